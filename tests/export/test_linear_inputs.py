"""A linear layer's input vector, weights and bias give its output, however an exporter writes the head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fovea.service.explain.introspection import IntrospectedModel
from fovea.service.explain.layer_view import LayerView
from fovea.service.explain.layers import LINEAR_KINDS
from tests.export.classifiers import Array, build_classifier, export_network, export_torchscript
from tests.export.imports import PLAN, ImportedModel, import_graph

pytestmark = pytest.mark.long

SIDE = 16
CHANNELS, LABELS = 6, 5


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class SqueezeExcitation(nn.Module):
    """Linear layers of the means, which turn each map up or down."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(CHANNELS, 3), nn.Linear(3, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        means = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        gates = torch.sigmoid(self.excite(torch.relu(self.squeeze(means))))
        return x * gates[:, :, None, None]


class ClassToken(nn.Module):
    """A transformer's layer, of which only the class token goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, CHANNELS))
        self.norm, self.query = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        shares = (self.query(tokens) @ tokens.transpose(1, 2)).softmax(-1)
        result: Tensor = self.norm(tokens + shares @ tokens)[:, 0]
        return result


def linear(inputs: int = CHANNELS) -> nn.Linear:
    return nn.Linear(inputs, LABELS)


HEADS: dict[str, Callable[[], list[nn.Module]]] = {
    "pool": lambda: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), linear()],
    "pool and view": lambda: [nn.AdaptiveAvgPool2d(1), Lambda(lambda x: x.view(x.shape[0], -1)), linear()],
    "pool as wide as the maps": lambda: [nn.AvgPool2d(8), nn.Flatten(), linear()],
    "mean": lambda: [Lambda(lambda x: x.mean((2, 3))), linear()],
    "kept mean": lambda: [Lambda(lambda x: x.mean((2, 3), keepdim=True)), nn.Flatten(), linear()],
    "maximum": lambda: [nn.AdaptiveMaxPool2d(1), nn.Flatten(), linear()],
    "flatten": lambda: [nn.AdaptiveAvgPool2d(2), nn.Flatten(), linear(4 * CHANNELS)],
    "flatten of channels last": lambda: [
        nn.AdaptiveAvgPool2d(2),
        Lambda(lambda x: x.permute(0, 2, 3, 1)),
        nn.Flatten(),
        linear(4 * CHANNELS),
    ],
    "flatten of tokens": lambda: [
        Lambda(lambda x: x.flatten(2).transpose(1, 2)),
        nn.Flatten(),
        linear(64 * CHANNELS),
    ],
    "norm": lambda: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(CHANNELS), nn.ReLU(), linear()],
    "two linear layers": lambda: [
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS, 8),
        nn.Hardswish(),
        linear(8),
    ],
    "squeeze and excitation": lambda: [SqueezeExcitation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear()],
    "class token": lambda: [ClassToken(), linear()],
    "pooled tokens": lambda: [
        Lambda(lambda x: x.flatten(2)),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        linear(),
    ],
}
"""The steps from maps (n, channels, 8, 8) to scores (n, labels)."""

EXPORTERS = {
    "dynamo": lambda net: export_network(net, SIDE),
    "torchscript": lambda net: export_torchscript(net, SIDE),
}


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("head", HEADS)
def test_output_of_linear_layer_follows_from_its_input(tmp_path: Path, head: str, exporter: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.ReLU(), *HEADS[head]()).eval()
    count = sum(isinstance(module, nn.Linear) for module in net.modules()) - (head == "class token")
    assert_adds_up(import_graph(EXPORTERS[exporter](net), tmp_path), count)


@pytest.mark.parametrize("shape", [[0, -1], [-1, 8], [-1, 1, 1, 8], [-1, 1, 8]])
def test_output_of_keras_head_follows_from_its_input(tmp_path: Path, shape: list[int]) -> None:
    """Keras writes a product and a sum; a 1 x 1 map may stay one."""
    assert_adds_up(import_graph(build_classifier(layout="nhwc", shape=shape), tmp_path), 1)


def assert_adds_up(model: ImportedModel, count: int) -> None:
    """Assert that `count` linear layers have an input vector that gives their outputs, for two images."""
    introspected = IntrospectedModel(model.path.read_bytes(), model.contract, PLAN)
    layers = [layer for layer in introspected.layers if layer.kind in LINEAR_KINDS and layer.input_tensor]
    assert len(layers) == count
    for layer in layers:
        for pixels in np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8):
            inputs = introspected.compute_output(layer.input_tensor or "", pixels).ravel()
            computed = read_weights(introspected, layer, "weight") @ inputs
            if "bias" in layer.weights:
                computed += read_weights(introspected, layer, "bias")
            output = introspected.compute_output(layer.tensor, pixels)
            assert output.ravel() == pytest.approx(computed, abs=1e-4, rel=1e-4)


def read_weights(introspected: IntrospectedModel, layer: LayerView, part: str) -> Array:
    return introspected.read_weights(layer.tensor, part).astype(np.float64)

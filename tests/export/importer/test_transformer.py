"""Tokens of vision transformers as feature maps, compared with torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import Tensor, nn

from fovea.service.explain.introspection import IntrospectedModel
from fovea.service.explain.layer_view import LayerView
from fovea.service.explain.receptive_field import ReceptiveField, Span
from fovea.service.explain.tensor_layout import TensorLayout
from tests.export.classifiers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Block,
    Vit,
    export_network,
    export_torchscript,
)
from tests.export.imports import PLAN, import_graph
from tests.tokens import LABELS, build_token_network

SIDE = 64
GRID = SIDE // 16
PIXELS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


@dataclass(frozen=True)
class TransformerCase:
    """A transformer and its graph."""

    net: Vit
    introspected: IntrospectedModel

    @property
    def planes(self) -> Tensor:
        """Return the network's input for the image."""
        return torch.tensor(self.introspected.compute_output(self.introspected.layers[0].tensor, PIXELS))[
            None
        ]

    def find_layer(self, name: str, kind: str = "") -> LayerView:
        """Return the last layer of a module."""
        return [
            layer for layer in self.introspected.layers if layer.name == name and kind in ("", layer.kind)
        ][-1]


def make_transformer() -> Vit:
    """Return a network without equal weights: equal weights would be stored once, under one name."""
    torch.manual_seed(0)
    net = Vit(SIDE, len(LABELS), width=12, blocks=2).eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return net


def open_introspected(graph: onnx.ModelProto, folder: Path) -> IntrospectedModel:
    model = import_graph(graph, folder, LABELS)
    return IntrospectedModel(model.path.read_bytes(), model.contract, PLAN)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> TransformerCase:
    net = make_transformer()
    return TransformerCase(net, open_introspected(export_network(net, SIDE), tmp_path_factory.mktemp("vit")))


def tokens_to_maps(tokens: Tensor) -> npt.NDArray[np.float32]:
    """Return the tokens as (channels, rows, columns), without the class token."""
    return tokens.detach()[0, 1:].T.reshape(-1, GRID, GRID).numpy()


def record_outputs(net: nn.Module, planes: Tensor) -> list[tuple[str, nn.Module, Tensor]]:
    """Return the output of every module."""
    records: list[tuple[str, nn.Module, Tensor]] = []

    def make_hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, _, output: records.append((name, module, output))

    hooks = [module.register_forward_hook(make_hook(name)) for name, module in net.named_modules()]
    net(planes)
    for hook in hooks:
        hook.remove()
    return records


def test_token_layers_equal_torch_outputs(transformer: TransformerCase) -> None:
    compared = set()
    for name, module, output in record_outputs(transformer.net, transformer.planes):
        is_layer = isinstance(module, Block) or not list(module.children())
        if is_layer and output.dim() == 3:
            layer = transformer.find_layer(name)
            assert layer.shape == (output.shape[2], GRID, GRID)
            assert layer.layout
            assert layer.layout.leading_tokens == 1
            difference = np.abs(
                transformer.introspected.compute_output(layer.tensor, PIXELS) - tokens_to_maps(output)
            )
            assert difference.max() < 1e-4, name
            compared.add(type(module))
    assert compared == {Block, nn.LayerNorm, nn.Linear, nn.GELU}


def test_receptive_field_is_one_patch_until_the_attention(transformer: TransformerCase) -> None:
    """Gradients show the true receptive fields."""
    net = transformer.net.double()
    torch.manual_seed(0)
    planes = torch.rand(1, 3, SIDE, SIDE, dtype=torch.double, requires_grad=True)
    edges_by_layer: dict[str, tuple[int, ...]] = {}
    for name, _, output in record_outputs(net, planes):
        if output.dim() == 3 and name in ("blocks.0.norm1", "blocks.0.attn.qkv", "blocks.0.attn.proj"):
            (gradient,) = torch.autograd.grad(output[0, 1 + GRID + 2].sum(), planes, retain_graph=True)
            rows, columns = gradient[0].abs().sum(dim=0).nonzero().T
            edges_by_layer[name] = tuple(
                int(edge) for line in (rows, columns) for edge in (line.min(), line.max())
            )
    net.float()
    assert edges_by_layer.pop("blocks.0.attn.proj") == (0, SIDE - 1, 0, SIDE - 1)
    assert len(edges_by_layer) == 2
    for name, edges in edges_by_layer.items():
        field = transformer.find_layer(name).receptive_field
        assert field
        assert field.rows == field.columns == Span(16, 0, 15)
        assert edges == (16, 31, 32, 47)  # of row 1, column 2
    index = transformer.introspected.layers.index(transformer.find_layer("blocks.0.attn.qkv")) + 1
    assert all(layer.receptive_field is None for layer in transformer.introspected.layers[index:])


def test_linear_token_layers_follow_from_their_weights(transformer: TransformerCase) -> None:
    linear = [
        layer
        for layer in transformer.introspected.layers
        if layer.kind == "MatMul" and "weight" in layer.weights
    ]
    assert len(linear) == 2 * 4
    for layer in linear:
        weight, bias = (
            transformer.introspected.read_weights(layer.tensor, part) for part in ("weight", "bias")
        )
        value = transformer.introspected.compute_output(layer.tensor, PIXELS)
        # the projection reads the outputs of the heads
        assert layer.is_direct is (layer.name.split(".")[-1] != "proj")
        if layer.is_direct:
            inputs = transformer.introspected.compute_output(layer.sources[0], PIXELS)
            assert np.einsum("oi,ihw->ohw", weight, inputs) + bias[:, None, None] == pytest.approx(
                value, abs=1e-4
            )


def test_layer_norm_weights_are_reported(transformer: TransformerCase) -> None:
    layer = transformer.find_layer("blocks.1.norm2", "LayerNormalization")
    norm = transformer.net.get_submodule("blocks.1.norm2")
    assert isinstance(norm, nn.LayerNorm)
    assert transformer.introspected.read_weights(layer.tensor, "scale") == pytest.approx(
        norm.weight.detach().numpy()
    )
    assert transformer.introspected.read_weights(layer.tensor, "bias") == pytest.approx(
        norm.bias.detach().numpy()
    )


def test_all_parameters_but_the_class_token_are_counted(transformer: TransformerCase) -> None:
    expected = (
        sum(weight.numel() for weight in transformer.net.parameters()) - transformer.net.cls_token.numel()
    )
    assert sum(layer.parameters for layer in transformer.introspected.layers) == expected


def test_layers_that_do_not_read_the_maps_are_indirect(transformer: TransformerCase) -> None:
    """Layers behind the class token or behind the split into heads do not read the maps."""
    indirect = [layer for layer in transformer.introspected.layers if not layer.is_direct]
    assert [layer.kind for layer in indirect] == 2 * ["Mul", "MatMul", "MatMul", "MatMul"] + ["Gemm"]
    assert indirect[-1].sources == (transformer.find_layer("norm").tensor,)


def test_torchscript_norms_are_single_layers(transformer: TransformerCase, tmp_path: Path) -> None:
    """The older exporter writes each norm as nine operators."""
    older_model = open_introspected(export_torchscript(make_transformer(), SIDE, opset=16), tmp_path)
    kinds = [layer.kind for layer in older_model.layers]
    assert kinds == [layer.kind for layer in transformer.introspected.layers]
    for older_layer, layer in zip(older_model.layers, transformer.introspected.layers, strict=True):
        assert (older_layer.shape, older_layer.receptive_field, older_layer.parameters) == (
            layer.shape,
            layer.receptive_field,
            layer.parameters,
        ), older_layer
        difference = np.abs(
            older_model.compute_output(older_layer.tensor, PIXELS)
            - transformer.introspected.compute_output(layer.tensor, PIXELS)
        )
        assert difference.max() < 1e-4


def test_only_layers_before_token_mixing_see_one_patch(tmp_path: Path) -> None:
    introspected = open_introspected(build_token_network(), tmp_path)
    layers = {layer.tensor: layer for layer in introspected.layers}
    patch = ReceptiveField(Span(4, 0, 3), Span(4, 0, 3))
    assert {name for name, layer in layers.items() if layer.receptive_field == patch} == {"maps", "norm"}
    assert layers["mixed"].shape == layers["across"].shape == layers["sum"].shape == (8, 4, 4)
    assert all(layers[name].is_direct for name in ("mixed", "across", "scores of tokens", "attended"))


def test_average_that_includes_the_class_token_is_indirect(tmp_path: Path) -> None:
    introspected = open_introspected(build_token_network(), tmp_path)
    layers = {layer.tensor: layer for layer in introspected.layers}
    assert layers["all"].layout == TensorLayout("TC", 8, 4, 4, leading_tokens=1)
    assert not layers["average"].is_direct
    assert not introspected.has_cam
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    assert introspected.compute_output("all", pixels) == pytest.approx(
        introspected.compute_output("sum", pixels)
    )


class LinearPatchNet(nn.Module):
    """Patches without a convolution, as einops cuts them: rows and columns first, then the pixels inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16 * 16 * 3, 12)
        self.act = nn.GELU()
        self.head = nn.Linear(12, len(LABELS))

    def forward(self, planes: Tensor) -> Tensor:
        patches = planes.reshape(-1, 3, GRID, 16, GRID, 16).permute(0, 2, 4, 3, 5, 1)
        tokens = self.act(self.embed(patches.reshape(-1, GRID * GRID, 16 * 16 * 3)))
        logits: Tensor = self.head(tokens.mean(dim=1))
        return logits


def test_patches_without_a_convolution_are_recognised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = LinearPatchNet()
    introspected = open_introspected(export_torchscript(net, SIDE), tmp_path)
    planes = torch.tensor((PIXELS / 255 - IMAGENET_MEAN) / IMAGENET_STD, dtype=torch.float32)
    outputs = {name: output for name, _, output in record_outputs(net, planes.permute(2, 0, 1)[None])}
    layer = next(layer for layer in introspected.layers if layer.kind == "Gelu")
    expected = outputs["act"].detach()[0].T.reshape(-1, GRID, GRID).numpy()
    assert np.abs(introspected.compute_output(layer.tensor, PIXELS) - expected).max() < 1e-4
    assert layer.receptive_field == ReceptiveField(Span(16, 0, 15), Span(16, 0, 15))
    assert introspected.has_cam

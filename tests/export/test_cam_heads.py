"""Class activation maps of networks that end in an average and a linear layer, whatever their shapes.

The maps are exact: their average is the logit less the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from fovea.service.artifact.onnx_edit import add_outputs
from fovea.service.explain.cam import NoCam, find_head, verify_cam
from fovea.service.explain.explainer import Explainer
from fovea.service.inference.session import open_session
from tests.export.classifiers import export_network, export_torchscript
from tests.export.imports import PLAN, ImportedModel, import_graph

pytestmark = pytest.mark.long

CHANNELS, LABELS = 6, 5
Step = tuple[str, dict[str, Any], Sequence[Any]]


def step(kind: str, *constants: Any, **attributes: Any) -> Step:
    """Return an operator with attributes and with constants after its first input."""
    return kind, attributes, constants


PLANES = (step("Transpose", perm=[0, 2, 3, 1]),)
TOKENS = (
    step("Reshape", np.array([0, CHANNELS, -1])),
    step("Transpose", perm=[0, 2, 1]),
    step("LayerNormalization", np.linspace(0.5, 2, CHANNELS, dtype=np.float32)),
)
LAST = np.array([-1])
TAILS: dict[str, tuple[Step, ...]] = {
    "channels first": (step("ReduceMean", axes=[2, 3], keepdims=0),),
    "channels last": (*PLANES, step("ReduceMean", axes=[1, 2], keepdims=0)),
    "channels last, kept axes": (
        *PLANES,
        step("ReduceMean", axes=[1, 2], keepdims=1),
        step("Reshape", np.array([-1, CHANNELS])),
    ),
    "sum over the number of places": (
        *PLANES,
        step("ReduceSum", np.array([1, 2]), keepdims=0),
        step("Div", np.float32(64)),
    ),
    "sum by a share": (
        step("ReduceSum", np.array([2, 3]), keepdims=0),
        step("Mul", np.float32(1 / 64)),
    ),
    "rows of channels": (
        *PLANES,
        step("Reshape", np.array([0, -1, CHANNELS])),
        step("ReduceMean", axes=[1], keepdims=0),
    ),
    "tokens": (*TOKENS, step("ReduceMean", axes=[1], keepdims=0)),
    "pooled tokens": (
        *TOKENS,
        step("Transpose", perm=[0, 2, 1]),
        step("GlobalAveragePool"),
        step("Flatten"),
    ),
    "tokens as one row": (
        *TOKENS,
        step("Transpose", perm=[0, 2, 1]),
        step("Unsqueeze", np.array([2])),
        step("ReduceMean", axes=[-2, -1], keepdims=1),
        step("Squeeze", np.array([2, 3])),
    ),
    "tokens in a pool as wide as they are": (
        *TOKENS,
        step("Transpose", perm=[0, 2, 1]),
        step("Unsqueeze", np.array([2])),
        step("AveragePool", kernel_shape=[1, 64]),
        step("Flatten"),
    ),
}
"""The steps from maps (n, channels, 8, 8) to averages (n, channels)."""


def build_network(*tail: Step, has_bias: bool = True, end: str = "logits") -> onnx.ModelProto:
    """Build a graph of a convolution, these steps, and a linear layer as Keras writes it."""
    random = np.random.default_rng(0)
    steps = [
        step(
            "Conv",
            random.normal(0, 0.5, (CHANNELS, 3, 3, 3)).astype(np.float32),
            random.normal(0, 0.5, CHANNELS).astype(np.float32),
            strides=[2, 2],
            pads=[1, 1, 0, 0],
        ),
        step("Relu"),
        *tail,
        step("MatMul", random.normal(0, 2, (CHANNELS, LABELS)).astype(np.float32)),
        *([step("Add", random.normal(0, 2, LABELS).astype(np.float32))] if has_bias else []),
        *([step("Softmax", axis=1)] if end == "softmax" else []),
    ]
    nodes, constants, last = [], [], "image"
    for number, (kind, attributes, values) in enumerate(steps):
        names = [f"constant {number} {position}" for position in range(len(values))]
        constants += [
            numpy_helper.from_array(np.asarray(value), name)
            for value, name in zip(values, names, strict=True)
        ]
        output = "scores" if number == len(steps) - 1 else f"step {number}"
        nodes.append(helper.make_node(kind, [last, *names], [output], **attributes))
        last = output
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", LABELS])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def assert_exact(model: ImportedModel, size: tuple[int, int], bias: np.ndarray[Any, Any]) -> None:
    """Assert that the average of each label's map is its logit less its bias, for several images."""
    contract = model.contract
    head = find_head(contract)
    names = [head.maps, *([head.weight] if head.weight else ())]
    session = open_session(add_outputs(model.path.read_bytes(), names), "cpu", 1)

    def run_graph(tensors: list[str], pixels: Any) -> Any:
        return session.run(tensors, {contract.input_name: pixels})

    cam = verify_cam(head, contract, run_graph)
    assert Explainer(model.path.read_bytes(), contract, PLAN).has_cam
    side = contract.input.height
    images = np.random.default_rng(1).integers(0, 256, (4, side, side, 3), dtype=np.uint8)
    for image in images:
        values, logits = run_graph([head.maps, contract.logits_name], image[None])
        for label in range(LABELS):
            heat = cam.compute_map(values, label)
            assert heat.shape == size
            assert heat.mean() == pytest.approx(logits[0, label] - bias[label], abs=1e-4)


@pytest.mark.parametrize("end", ["logits", "softmax"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("tail", TAILS)
def test_maps_of_each_tail_add_up_to_the_logits(tmp_path: Path, tail: str, has_bias: bool, end: str) -> None:
    graph = build_network(*TAILS[tail], has_bias=has_bias, end=end)
    bias = np.random.default_rng(0)
    bias.normal(size=CHANNELS * 27 + CHANNELS + CHANNELS * LABELS)
    expected = bias.normal(0, 2, LABELS).astype(np.float32) if has_bias else np.zeros(LABELS)
    assert_exact(import_graph(graph, tmp_path), (8, 8), expected)


@pytest.mark.parametrize(
    "tail",
    [
        (*PLANES, step("ReduceSum", np.array([1, 2]), keepdims=0), step("Div", np.float32(50))),
        (step("ReduceMean", axes=[2, 3], keepdims=0), step("Relu"), step("Mul", np.float32(0.5))),
        (step("ReduceMax", axes=[2, 3], keepdims=0),),
        (step("GlobalAveragePool"), step("Flatten"), step("Sqrt")),
    ],
    ids=["another divisor", "halved", "maximum", "a layer between"],
)
def test_other_tails_have_no_exact_maps(tmp_path: Path, tail: tuple[Step, ...]) -> None:
    model = import_graph(build_network(*tail), tmp_path)
    with pytest.raises(NoCam):
        assert_exact(model, (8, 8), np.zeros(LABELS))


# --- windows of tokens ---------------------------------------------------------------------------


class ShiftedBlock(nn.Module):
    """Attention inside windows that are shifted, as in Swin."""

    def __init__(self, width: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, side: int) -> Tensor:
        batch, tokens, width = x.shape
        windows, window = side // self.window, self.window
        y = self.norm(x).view(batch, side, side, width)
        y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = y.view(batch, windows, window, windows, window, width).permute(0, 1, 3, 2, 4, 5)
        query, key, value = self.qkv(y.reshape(-1, window * window, width)).chunk(3, dim=-1)
        y = (query @ key.transpose(-2, -1) * width**-0.5).softmax(dim=-1) @ value
        y = y.view(batch, windows, windows, window, window, width).permute(0, 1, 3, 2, 4, 5)
        y = torch.roll(y.reshape(batch, side, side, width), (self.shift, self.shift), (1, 2))
        return x + y.reshape(batch, tokens, width)


class SmallSwin(nn.Module):
    """Two stages of shifted windows, patch merging between them, and an average over the tokens."""

    def __init__(self, side: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.side, self.pool = side // 4, pool
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.first = nn.ModuleList([ShiftedBlock(8, 4, shift) for shift in (0, 2)])
        self.merge_norm, self.merge = nn.LayerNorm(32), nn.Linear(32, 16, bias=False)
        self.second = nn.ModuleList([ShiftedBlock(16, 4, shift) for shift in (0, 2)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, LABELS)

    def forward(self, planes: Tensor) -> Tensor:
        x = self.patches(planes).flatten(2).transpose(1, 2)  # (B, tokens, width)
        for block in self.first:
            x = block(x, self.side)
        y = x.view(x.shape[0], self.side, self.side, -1)
        parts = [y[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x = self.merge(self.merge_norm(torch.cat(parts, dim=-1).view(x.shape[0], -1, 32)))
        for block in self.second:
            x = block(x, self.side // 2)
        result: Tensor = self.head(self.pool(self.norm(x)))
        return result


def pool_as_transformers(tokens: Tensor) -> Tensor:
    return nn.functional.adaptive_avg_pool1d(tokens.transpose(1, 2), 1).flatten(1)


def pool_as_torchvision(tokens: Tensor) -> Tensor:
    side = int(tokens.shape[1] ** 0.5)
    planes = tokens.view(tokens.shape[0], side, side, -1).permute(0, 3, 1, 2)
    return nn.functional.adaptive_avg_pool2d(planes, 1).flatten(1)


@pytest.mark.parametrize("batch", [None, 1])
@pytest.mark.parametrize("pool", [pool_as_transformers, pool_as_torchvision, lambda x: x.mean(dim=1)])
def test_maps_of_swin_add_up_to_the_logits(
    tmp_path: Path, pool: Callable[[Tensor], Tensor], batch: int | None
) -> None:
    torch.manual_seed(0)
    net = SmallSwin(32, pool).eval()
    with torch.no_grad():
        net.head.weight.mul_(10)
    graph = export_torchscript(net, 32) if batch == 1 else export_network(net, 32)
    model = import_graph(graph, tmp_path)
    assert_exact(model, (4, 4), net.head.bias.detach().numpy())

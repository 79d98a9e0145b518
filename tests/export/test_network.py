"""The layers of foreign networks, as the service reports them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from fovea.service.errors import BadRequest
from fovea.service.explain.introspection import IntrospectedModel, slice_rows
from fovea.service.explain.layer_view import LayerView
from fovea.service.explain.receptive_field import Span
from tests.export.classifiers import build_classifier, export_foreign, export_network
from tests.export.imports import PLAN, ImportedModel, import_graph
from tests.vgg import LABELS, build_vgg

pytestmark = pytest.mark.long


def import_layers(model: onnx.ModelProto, folder: Path, labels: int | tuple[str, ...] = 5) -> list[LayerView]:
    return open_introspected(import_graph(model, folder, labels)).layers


def open_introspected(model: ImportedModel) -> IntrospectedModel:
    return IntrospectedModel(model.path.read_bytes(), model.contract, PLAN)


def test_auto_padding_is_reported_like_explicit_padding(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    auto_layers = import_layers(build_vgg(auto_pad=True), tmp_path / "a", LABELS)
    explicit_layers = import_layers(build_vgg(), tmp_path / "b", LABELS)
    assert [layer.window for layer in auto_layers] == [layer.window for layer in explicit_layers]
    assert [layer.receptive_field for layer in auto_layers] == [
        layer.receptive_field for layer in explicit_layers
    ]


def test_product_and_bias_are_one_layer(tmp_path: Path) -> None:
    model = import_graph(build_classifier(), tmp_path)
    introspected = open_introspected(model)
    linear = next(layer for layer in introspected.layers if layer.kind == "MatMul")
    assert list(linear.weights) == ["weight", "bias"]
    assert "Add" not in [layer.kind for layer in introspected.layers]
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    inputs = introspected.compute_output(linear.sources[0], pixels).reshape(-1)
    computed = introspected.read_weights(linear.tensor, "weight") @ inputs + introspected.read_weights(
        linear.tensor, "bias"
    )
    assert computed == pytest.approx(introspected.compute_output(linear.tensor, pixels), abs=1e-4)


def test_input_preparation_is_not_shown(tmp_path: Path) -> None:
    for number, model in enumerate((build_classifier(layout="nhwc"), build_classifier(dtype="uint8"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        kinds = [layer.kind for layer in import_layers(model, folder)]
        assert kinds[:3] == ["Input", "Conv", "Relu"]
        assert kinds[-1] == "Softmax"


class BranchingNet(nn.Module):
    """Two branches that are concatenated, activations of several operators, and a dilated convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(3, 4, 3, padding=1)
        self.far = nn.Conv2d(3, 4, 3, padding=4, dilation=4)
        self.act = nn.SiLU()
        self.deep = nn.Conv2d(8, 8, 3, stride=2, groups=4)
        self.last = nn.Hardswish()
        self.head = nn.Linear(8, 5)

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        joined_maps = torch.cat([self.act(self.near(planes)), self.act(self.far(planes))], dim=1)
        result: torch.Tensor = self.head(self.last(self.deep(joined_maps)).mean(dim=(2, 3)))
        return result


def test_joined_branches_have_the_union_of_receptive_fields(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = import_layers(export_network(BranchingNet(), 32), tmp_path)
    layers_by_name = {(layer.name, layer.kind): layer for layer in layers}
    concat = next(layer for layer in layers if layer.kind == "Concat")
    assert concat.receptive_field
    assert concat.receptive_field.rows == Span(1, -4, 4)
    assert len(concat.sources) == 2
    assert layers_by_name["act", "Silu"].shape == (4, 32, 32)
    deep = layers_by_name["deep", "Conv"]
    assert deep.groups == 4
    assert deep.receptive_field
    assert deep.receptive_field.columns == Span(2, -4, 6)
    assert layers_by_name["last", "HardSwish"].sources == (deep.tensor,)


def test_residual_blocks_are_grouped_by_stage(tmp_path: Path) -> None:
    layers = import_layers(export_foreign("resnet18"), tmp_path, 7)
    blocks = list(dict.fromkeys(layer.block for layer in layers if layer.block))
    assert blocks == [f"features.layer{stage}" for stage in (1, 2, 3, 4)]
    assert all(sum(layer.block == block for layer in layers) <= 16 for block in blocks)
    indices = [number for number, layer in enumerate(layers) if layer.block == blocks[1]]
    assert indices == list(range(indices[0], indices[-1] + 1))


def test_layers_without_names_fold_by_structure(tmp_path: Path) -> None:
    """The blocks of a ResNet-18 are those of its modules."""
    model = onnx.ModelProto()
    model.CopyFrom(export_foreign("resnet18"))
    for node in model.graph.node:
        node.name = ""
        del node.metadata_props[:]
    (tmp_path / "named").mkdir()
    named_layers = import_layers(export_foreign("resnet18"), tmp_path / "named", 7)
    layers = import_layers(model, tmp_path, 7)
    modules: dict[str | None, set[str]] = {}
    for layer, named_layer in zip(layers, named_layers, strict=True):
        modules.setdefault(layer.block, set()).add(".".join(named_layer.name.split(".")[:3]))
    assert [len(modules[f"block {number}"]) for number in range(1, 9)] == [1] * 8
    assert modules["block 3"] == {"features.layer2.0"}


def test_reshape_with_a_computed_target_is_supported(tmp_path: Path) -> None:
    """The target of the reshape is computed from a shape."""
    nodes: list[NodeProto] = [
        helper.make_node("Conv", ["image", "kernel"], ["maps"], "conv", kernel_shape=[3, 3]),
        helper.make_node("Shape", ["maps"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["count"]),
        helper.make_node("Unsqueeze", ["count", "axis"], ["row"]),
        helper.make_node("Concat", ["row", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["maps", "target"], ["flat"]),
        helper.make_node("Gemm", ["flat", "matrix"], ["scores"]),
    ]
    random = np.random.default_rng(0)
    weights: dict[str, npt.NDArray[Any]] = {
        "kernel": random.normal(0, 0.4, (4, 3, 3, 3)).astype(np.float32),
        "matrix": random.normal(0, 0.3, (4 * 14 * 14, 5)).astype(np.float32),
        "first": np.array(0, np.int64),
        "axis": np.array([0], np.int64),
        "rest": np.array([-1], np.int64),
    }
    graph = helper.make_graph(
        nodes,
        "shapes",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    introspected = open_introspected(import_graph(model, tmp_path))
    kinds = [layer.kind for layer in introspected.layers]
    assert [kind for kind in kinds if kind != "Flatten"] == ["Input", "Conv", "Gemm", "Softmax"]
    pixels = np.zeros((16, 16, 3), np.uint8)
    for layer in introspected.layers:
        assert np.isfinite(introspected.compute_output(layer.tensor, pixels)).all()


def test_slice_of_rows_is_limited_in_size() -> None:
    values = np.zeros((5, 1 << 20), np.float32)
    assert len(slice_rows(values, 1, 4)) == 4
    with pytest.raises(BadRequest, match="ask for fewer of the 5 with first and count"):
        slice_rows(values, 0, 0)

"""The layer table."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from fovea.export.layer_table import build_layer_table, find_feature_maps
from fovea.model.networks.cnn import Square
from fovea.service.artifact.contract import Layer
from tests.export.conftest import ExportedModel
from tests.graphs import build_model

# --- exported network ----------------------------------------------------------------------------


@pytest.fixture
def layers(exported_model: ExportedModel) -> tuple[Layer, ...]:
    return exported_model.contract.layers


def test_table_has_every_node_in_order(exported_model: ExportedModel, layers: tuple[Layer, ...]) -> None:
    nodes = exported_model.model.graph.node
    assert [layer.kind for layer in layers] == [node.op_type for node in nodes]
    assert [layer.inputs for layer in layers] == [tuple(node.input) for node in nodes]
    assert [layer.outputs for layer in layers] == [tuple(node.output) for node in nodes]


def test_layers_have_the_names_of_torch_modules(
    exported_model: ExportedModel, layers: tuple[Layer, ...]
) -> None:
    modules = dict(exported_model.net.named_modules())
    kinds = {"Conv": nn.Conv2d, "Gelu": nn.GELU, "MaxPool": nn.MaxPool2d, "Pow": Square, "Gemm": nn.Linear}
    for kind, module in kinds.items():
        layer_names = [layer.name for layer in layers if layer.kind == kind]
        assert layer_names == [name for name, value in modules.items() if isinstance(value, module)]
    other_names = [layer.name for layer in layers if layer.name not in modules]
    assert other_names == ["mean", "div", "softmax"]  # operations outside modules


def test_attributes_equal_those_of_the_network(
    exported_model: ExportedModel, layers: tuple[Layer, ...]
) -> None:
    modules = dict(exported_model.net.named_modules())
    for layer in layers:
        if layer.kind == "Conv":
            convolution = modules[layer.name]
            assert isinstance(convolution, nn.Conv2d)
            side = 2 if layer.name == "features.0" else 3
            assert layer.attributes["kernel_shape"] == convolution.kernel_size == (side, side)
            assert layer.attributes["strides"] == convolution.stride
            assert layer.attributes["pads"] == convolution.padding * 2
            assert layer.shape[0] == convolution.out_channels
        if layer.kind == "MaxPool":
            assert layer.attributes["kernel_shape"] == layer.attributes["strides"] == (2, 2)
    assert next(layer for layer in layers if layer.kind == "Softmax").attributes == {"axis": 1}


def test_every_parameter_is_counted_once(exported_model: ExportedModel, layers: tuple[Layer, ...]) -> None:
    parameter_counts = {
        tensor.name: math.prod(tensor.dims) for tensor in exported_model.model.graph.initializer
    }
    for layer in layers:
        assert layer.parameters == sum(parameter_counts.get(name, 0) for name in layer.inputs)
    assert sum(layer.parameters for layer in layers) == sum(parameter_counts.values())
    head = next(layer for layer in layers if layer.name == "head")
    assert head.parameters == sum(weight.numel() for weight in exported_model.net.head.parameters())


def test_shapes_equal_those_of_a_run(exported_model: ExportedModel, layers: tuple[Layer, ...]) -> None:
    """Every feature map can be read after an output has been appended to the file."""
    names = [layer.outputs[0] for layer in layers if layer.outputs[0] not in ("logits", "probabilities")]
    extra_outputs = onnx.ModelProto()
    extra_outputs.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(exported_model.content + extra_outputs.SerializeToString())
    values = session.run(names, {"pixels": exported_model.data.test.pixels[:2].numpy()})
    shapes = {layer.outputs[0]: layer.shape for layer in layers}
    assert [value.shape for value in values] == [(2, *shapes[name]) for name in names]


def test_feature_maps_span_first_convolution_to_last_stage(
    exported_model: ExportedModel, layers: tuple[Layer, ...]
) -> None:
    layers_by_output = {layer.outputs[0]: layer for layer in layers}
    maps = [layers_by_output[name] for name in exported_model.contract.feature_maps]
    assert [maps[0].name, maps[1].name] == ["features.0", "features.1"]
    assert (maps[0].shape, maps[-1].shape) == ((8, 15, 15), (96, 3, 3))
    assert maps[-1].name == "features.6"  # the squares, which the head averages
    kinds = ("Conv", "Gelu", "MaxPool", "BatchNormalization", "Pow")
    assert len(maps) == sum(layer.kind in kinds and layer.name != "normalize" for layer in layers)


# --- handwritten graphs --------------------------------------------------------------------------


def test_small_graph_has_the_expected_table() -> None:
    table = {layer.kind: layer for layer in build_layer_table(build_model())}
    assert list(table) == ["Transpose", "Cast", "Mul", "Conv", "Relu", "ReduceMean", "Gemm", "Softmax"]
    assert [layer.parameters for layer in table.values()] == [0, 0, 1, 8 * 3 * 3 * 3, 0, 2, 8 * 4 + 4, 0]
    assert [layer.shape for layer in table.values()] == [(3, 16, 16)] * 3 + [(8, 16, 16)] * 2 + [
        (8,),
        (4,),
        (4,),
    ]
    assert table["Conv"].attributes == {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1)}
    assert (table["Conv"].inputs, table["Conv"].outputs) == (("scaled", "kernel"), ("conv",))
    assert find_feature_maps(build_layer_table(build_model())) == ("conv", "relu")


def build_graph(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """Build a graph from `x`, float32 (batch, 3, height, 8), to `y`; `kernel` is 4 x 3 x 1 x 1."""
    return helper.make_model(
        helper.make_graph(
            list(nodes),
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "height", 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.zeros((4, 3, 1, 1), np.float32), "kernel")],
        )
    )


def test_unknown_size_is_none() -> None:
    (layer,) = build_layer_table(build_graph(helper.make_node("Conv", ["x", "kernel"], ["y"])))
    assert layer.shape == (4, None, 8)
    assert layer.parameters == 12


def test_attributes_are_numbers_and_strings() -> None:
    constant = numpy_helper.from_array(np.zeros(2, np.float32))
    conv, leaky_relu, constant_layer = build_layer_table(
        build_graph(
            helper.make_node("Conv", ["x", "kernel"], ["a"], auto_pad="SAME_UPPER", group=1, name="first"),
            helper.make_node("LeakyRelu", ["a"], ["y"], alpha=0.25),
            helper.make_node("Constant", [], ["c"], value=constant),
        )
    )
    assert (conv.name, conv.attributes) == ("first", {"auto_pad": "SAME_UPPER", "group": 1})
    assert leaky_relu.attributes == {"alpha": 0.25}
    assert constant_layer.attributes == {}  # a tensor does not fit a table


def test_graph_without_convolutions_has_no_feature_maps() -> None:
    assert find_feature_maps(build_layer_table(build_graph(helper.make_node("Relu", ["x"], ["y"])))) == ()


def test_channels_last_tensors_are_not_feature_maps() -> None:
    """Between two transposes, as ConvNeXt has them, height would be read as channels."""
    graph = build_graph(
        helper.make_node("Conv", ["x", "kernel"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 3, 1]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Transpose", ["c"], ["d"], perm=[0, 3, 1, 2]),
        helper.make_node("Add", ["a", "d"], ["y"]),
    )
    assert find_feature_maps(build_layer_table(graph)) == ("a", "y")


def test_infinite_attribute_is_left_out() -> None:
    node = helper.make_node("Clip", ["x"], ["y"], min=float("-inf"), max=6.0)
    assert build_layer_table(build_graph(node))[0].attributes == {"max": 6.0}


def test_malformed_name_scopes_are_ignored() -> None:
    node = helper.make_node("Relu", ["x"], ["y"], name="mine")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="not a list (")
    assert build_layer_table(build_graph(node))[0].name == "mine"

"""The steps before a graph equal its users' preprocessing, in a form that ONNX Runtime computes fast."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from fovea.bench.wrapping import quantize_graph, to_channels_last
from fovea.export.importer.foreign_model import Arithmetic
from fovea.export.importer.graph_input import read_graph_input
from fovea.export.importer.inspect import TOLERANCE
from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
from fovea.export.node_builder import NodeBuilder
from fovea.export.pixel_steps import (
    PixelSteps,
    arrange_pixel_steps,
    find_rounding,
    prefers_planes,
    round_to_half,
)
from fovea.service.explain.layers import find_receptive_field
from fovea.service.explain.receptive_field import ReceptiveField, Span
from tests.export.classifiers import build_classifier, run_onnx, softmax
from tests.export.imports import import_graph
from tests.graphs import build_model

SIDE = 16

TINTS = np.array([[255, 60, 20], [20, 255, 120], [90, 10, 255]])
PIXELS = np.random.default_rng(1).integers(0, TINTS[:, None, None], (3, SIDE, SIDE, 3), np.uint8)
"""Noise in three colours, (n, H, W, 3)."""

ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "PRelu"})


@cache
def build_graph(kind: str, layout: str) -> ModelProto:
    """Return a graph of this input type, or a QDQ graph of int8; callers must not change it."""
    if kind != "int8":
        # pixels up to 255 give large logits, whose softmax is the same for all images
        return build_classifier(layout=layout, dtype=kind, spread=0.1 if kind == "uint8" else 3.0)
    graph = quantize_graph(build_classifier(), SIDE)
    return to_channels_last(graph) if layout == "nhwc" else graph


def list_narrow_steps(model: bytes, folder: Path) -> list[str]:
    """Return the operators of the optimised graph that take the channels one by one, on the last axis.

    These are arithmetic with a constant of three values on that axis, and a choice of channels on that axis.
    """
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4  # a warning says that the file is for this processor alone
    onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    graph = onnx.load(folder / "optimised.onnx").graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return [
        node.op_type
        for node in graph.node
        if (node.op_type in ARITHMETIC and any(shapes.get(name, ())[-1:] == (3,) for name in node.input))
        or (node.op_type == "Gather" and helper.get_node_attr_value(node, "axis") in (-1, 3))
    ]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("kind", "bgr"),
    [
        *((kind, bgr) for kind in ("float32", "float16", "int8") for bgr in (False, True)),
        ("uint8", None),  # the graph normalises its pixels itself
    ],
)
def test_steps_equal_preprocessing_in_numpy(tmp_path: Path, kind: str, layout: str, bgr: bool | None) -> None:
    """No step takes the channels one by one."""
    graph = build_graph(kind, layout)
    preprocessing = PreprocessingOptions(preset=IMAGENET, bgr=bgr)
    model = import_graph(graph, tmp_path, preprocessing=preprocessing)
    values = PIXELS if bgr is None else replace(IMAGENET.normalization, bgr=bgr)(PIXELS)
    images = read_graph_input(graph, None, None).from_pixel_values(values)
    expected = np.concatenate([softmax(run_onnx(graph, image[None])) for image in images])
    tolerance = TOLERANCE[Arithmetic(kind)] if kind in ("float16", "int8") else 1e-6
    assert np.ptp(expected, axis=0).max() > 0.05  # the images get different answers
    assert np.abs(model.engine.run(PIXELS) - expected).max() <= tolerance
    assert not list_narrow_steps(model.path.read_bytes(), tmp_path)
    maps = next(layer for layer in model.contract.layers if layer.kind == "Conv").outputs[0]
    field = ReceptiveField(Span(1, -1, 1), Span(1, -1, 1))
    assert find_receptive_field(model.contract, maps) == field  # the places are known behind the steps


def make_steps(*, has_planes: bool = True, is_merged: bool = True) -> PixelSteps:
    return PixelSteps(SIDE, SIDE, IMAGENET.normalization.operations, False, has_planes, is_merged)


@pytest.mark.parametrize("is_merged", [False, True])
def test_first_convolution_decides_the_form(is_merged: bool) -> None:
    """Arithmetic that is not merged would be moved behind the Transpose of a graph with channels last."""
    for kind, is_float in (("float32", True), ("float16", True), ("int8", False)):
        for layout, has_planes in (("nchw", True), ("nhwc", False)):
            graph = build_graph(kind, layout).graph
            steps = make_steps(has_planes=has_planes, is_merged=is_merged)
            expected = is_float and (has_planes or is_merged)
            assert prefers_planes(graph, graph.input[0].name, steps) is expected


def test_layout_decides_the_form_without_a_convolution() -> None:
    for permutation in ([0, 2, 3, 1], [0, 2, 1, 3]):
        node = helper.make_node("Transpose", ["image"], ["turned"], perm=permutation)
        graph = GraphProto(node=[node])
        assert not prefers_planes(graph, "image", make_steps())
        assert not prefers_planes(graph, "image", make_steps(has_planes=False))
        graph.node.append(helper.make_node("Shape", ["image"], ["shape"]))
        assert prefers_planes(graph, "image", make_steps())  # two nodes read the image as it is
        assert not prefers_planes(graph, "image", make_steps(has_planes=False))


@pytest.mark.parametrize(("levels", "is_merged"), [(256, True), (1 << 26, False)])
def test_arithmetic_is_merged_only_if_no_level_changes(levels: int, is_merged: bool) -> None:
    """Of 256 levels none changes; so many levels that each float32 has its own show the last bits."""
    steps = make_steps(is_merged=False)
    assert steps.merge(None).is_merged
    assert steps.merge(lambda values: np.rint(values * np.float32(levels / 6))).is_merged is is_merged
    assert not replace(steps, arithmetic=steps.arithmetic[:1]).merge(None).is_merged  # already one step


def test_rounding_behind_the_steps_is_found() -> None:
    values = np.array([-9, -2.6, 0.013, 0.031, 1.7, 9], np.float32)
    model = build_classifier()
    quantize_input_of_convolution(model)
    rounding = find_rounding(model.graph, "image")
    assert rounding
    levels = run_onnx_levels(model.graph, values)
    assert np.array_equal(rounding(values), levels)
    half = GraphProto(node=[helper.make_node("Cast", ["image"], ["half"], to=TensorProto.FLOAT16)])
    assert find_rounding(half, "image") is round_to_half
    assert find_rounding(build_classifier().graph, "image") is None


def run_onnx_levels(graph: GraphProto, values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return the levels that the QuantizeLinear of a graph gives in ONNX Runtime."""
    (node,) = [one for one in graph.node if one.op_type == "QuantizeLinear"]
    model = helper.make_model(
        helper.make_graph(
            [node],
            "levels",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [None])],
            [helper.make_tensor_value_info("levels", TensorProto.UINT8, [None])],
            [tensor for tensor in graph.initializer if tensor.name in node.input],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    levels: npt.NDArray[np.uint8] = onnxruntime.InferenceSession(model.SerializeToString()).run(
        None, {"image": values}
    )[0]
    return levels


def test_arithmetic_stays_if_its_last_bits_show(tmp_path: Path) -> None:
    """The sine of large numbers differs in its first digit if they differ in their last bit."""
    graph = build_graph("float32", "nchw")
    model = ModelProto()
    model.CopyFrom(graph)
    (conv,) = [node for node in model.graph.node if node.op_type == "Conv"]
    conv.input[0] = "sine"
    model.graph.node.insert(0, helper.make_node("Mul", ["image", "gain"], ["large"]))
    model.graph.node.insert(1, helper.make_node("Sin", ["large"], ["sine"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(1e7, np.float32), "gain"))
    kinds = [
        [
            layer.kind
            for layer in import_graph(one, tmp_path).contract.layers
            if layer.name.startswith("fovea/")
        ]
        for one in (graph, model)
    ]
    assert kinds[0][:3] == ["Transpose", "Cast", "BatchNormalization"]
    assert kinds[1][:5] == ["Transpose", "Cast", "Div", "Sub", "Div"]


def quantize_input_of_convolution(model: ModelProto) -> None:
    """Round the tensor that the first convolution reads to 256 levels."""
    nodes = list(model.graph.node)
    index = next(index for index, node in enumerate(nodes) if node.op_type == "Conv")
    rounded = [
        helper.make_node("QuantizeLinear", [nodes[index].input[0], "step", "zero"], ["levels"]),
        helper.make_node("DequantizeLinear", ["levels", "step", "zero"], ["rounded"]),
    ]
    nodes[index].input[0] = "rounded"
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:index], *rounded, *nodes[index:]])
    for name, value in (("step", np.array(1 / 32, np.float32)), ("zero", np.array(128, np.uint8))):
        model.graph.initializer.append(numpy_helper.from_array(value, name))


def build_own_graph() -> ModelProto:
    """Return a graph as `fovea export` writes it: a product and a sum for each channel."""
    model = build_model()
    (scale,) = [tensor for tensor in model.graph.initializer if tensor.name == "scale"]
    values = np.array([1 / 64, 1 / 65, 1 / 70], np.float32).reshape(1, 3, 1, 1)
    scale.CopyFrom(numpy_helper.from_array(values, "scale"))
    model.graph.initializer.append(numpy_helper.from_array(-64 * values, "offset"))
    index, product = next((index, one) for index, one in enumerate(model.graph.node) if one.op_type == "Mul")
    model.graph.node.insert(index + 1, helper.make_node("Add", ["product", "offset"], [product.output[0]]))
    product.output[0] = "product"
    return model


def build_old_import(bgr: bool) -> ModelProto:
    """Return a graph with the steps that Fovea 0.1 wrote for channels last."""
    graph = build_graph("float32", "nhwc").graph
    builder, tensor = NodeBuilder(), "pixels"
    if bgr:
        tensor = builder.add("Gather", tensor, np.array([2, 1, 0], np.int64), axis=3)
    tensor = builder.add("Cast", tensor, to=TensorProto.FLOAT)
    for op_type, values in IMAGENET.normalization.operations:
        tensor = builder.add(op_type, tensor, values.reshape(1, 1, 1, 3) if values.ndim else values)
    builder.add("Identity", tensor, output_name="image")
    shape: list[int | str] = ["batch", SIDE, SIDE, 3]
    return helper.make_model(
        helper.make_graph(
            [*builder.pop_nodes(), *graph.node],
            "old",
            [helper.make_tensor_value_info("pixels", TensorProto.UINT8, shape)],
            graph.output,
            [*graph.initializer, *builder.constants],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


def build_planes(name: str, folder: Path) -> ModelProto:
    """Return a model whose steps are planes."""
    if name == "own":
        return build_own_graph()
    preprocessing = PreprocessingOptions(preset=IMAGENET, bgr=name == "bgr")
    return onnx.load(import_graph(build_graph("float32", "nchw"), folder, preprocessing=preprocessing).path)


def check_arranged(before: bytes, model: ModelProto) -> list[tuple[int, ...]]:
    """Check that the results are those of `before`, and that another call changes nothing.

    Return the shapes of the constants of the arithmetic.
    """
    onnx.checker.check_model(model, full_check=True)
    after = model.SerializeToString()
    arrange_pixel_steps(model)
    assert model.SerializeToString() == after
    results = [
        onnxruntime.InferenceSession(content).run(None, {"pixels": PIXELS})[0] for content in (before, after)
    ]
    assert np.abs(results[0] - results[1]).max() <= 1e-5 * np.abs(results[0]).max()
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    arithmetic = {"BatchNormalization", *ARITHMETIC}
    steps = [node for node in model.graph.node if node.name.startswith("fovea/arranged/")]
    used_names = {name for node in model.graph.node for name in node.input}
    assert shapes.keys() <= used_names
    return [
        shapes[name] for step in steps if step.op_type in arithmetic for name in step.input if name in shapes
    ]


@pytest.mark.parametrize("name", ["own", "rgb", "bgr"])
def test_steps_of_a_quantised_network_become_rows(tmp_path: Path, name: str) -> None:
    model = build_planes(name, tmp_path)
    quantize_input_of_convolution(model)
    before = model.SerializeToString()
    arrange_pixel_steps(model)
    assert check_arranged(before, model) == [(SIDE * 3,)] * 4


def test_product_and_sum_of_a_network_become_one_step() -> None:
    model = build_own_graph()
    before = model.SerializeToString()
    arrange_pixel_steps(model)
    assert check_arranged(before, model) == [(3,)] * 4


@pytest.mark.parametrize("bgr", [False, True], ids=["rgb", "bgr"])
def test_steps_of_an_old_import_become_rows(bgr: bool) -> None:
    model = build_old_import(bgr)
    before = model.SerializeToString()
    arrange_pixel_steps(model)
    assert check_arranged(before, model) == [(), (1, SIDE * 3), (1, SIDE * 3)]


@pytest.mark.parametrize("change", ["order", "arithmetic", "reader"])
def test_other_first_steps_stay_as_they_are(change: str) -> None:
    model = build_old_import(bgr=True)
    first = model.graph.node[0]
    if change == "order":
        (order,) = [tensor for tensor in model.graph.initializer if tensor.name == first.input[1]]
        order.CopyFrom(numpy_helper.from_array(np.array([1, 0, 2], np.int64), order.name))
    elif change == "arithmetic":
        model.graph.node[2].op_type = "Pow"
    else:
        model.graph.node.append(helper.make_node("Shape", ["pixels"], ["size"]))
    unchanged = model.SerializeToString()
    arrange_pixel_steps(model)
    assert model.SerializeToString() == unchanged

"""Inputs in unusual forms: grey, without a batch axis, float64, bfloat16, and further inputs."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fovea.export.importer.foreign_model import ImportRefused, MissingInformation
from fovea.export.importer.graph_input import Layout
from fovea.export.importer.grey import add_grey_steps, to_grey
from fovea.export.importer.option_values import parse_settings
from fovea.export.importer.preprocessing import IMAGENET, ZERO_ONE, PreprocessingOptions
from fovea.export.node_builder import NodeBuilder
from fovea.service.artifact.contract import Interpolation
from tests.export.classifiers import build_classifier, prepare_imagenet, run_onnx, softmax
from tests.export.importer.test_graph_output import append_steps, make_step
from tests.export.importer.test_pipeline import IMAGES, find_largest_difference
from tests.export.importer.test_refused import assert_refused
from tests.export.imports import ImportedModel, import_graph

FLOAT = TensorProto.FLOAT
HALVES = PreprocessingOptions(
    mean=(0.5,) * 3, std=(0.25,) * 3, resize=18, interpolation=Interpolation.BILINEAR
)


def expected_rows(**options: Any) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """Return the probabilities of `IMAGES`, each (1, 5), with torchvision's preset."""
    graph = build_classifier(**options)
    return [softmax(run_onnx(graph, prepare_imagenet(image, 18, 16))) for image in IMAGES]


# --- grey ----------------------------------------------------------------------------------------


def prepare_grey(image: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Prepare an image by hand with Pillow: float32 (1, 1, 16, 16), 0 … 255."""
    picture = Image.open(BytesIO(image)).convert("RGB")
    shorter = min(picture.size)
    picture = picture.resize(
        (18 * picture.width // shorter, 18 * picture.height // shorter), Image.Resampling.BILINEAR
    )
    left, top = round((picture.width - 16) / 2), round((picture.height - 16) / 2)
    return np.asarray(picture.crop((left, top, left + 16, top + 16)).convert("L"), np.float32)[None, None]


def assert_grey_agrees(model: ImportedModel, graph: onnx.ModelProto, layout: str) -> None:
    expected = []
    for image in IMAGES:
        values = (prepare_grey(image) / np.float32(255) - np.float32(0.5)) / np.float32(0.25)
        values = values if layout == "nchw" else values.transpose(0, 2, 3, 1)
        expected.append(softmax(run_onnx(graph, values)))
    assert np.ptp(np.concatenate(expected), axis=0).max() > 0.05
    assert find_largest_difference(model, expected) <= 1e-5


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_grey_graphs_get_the_levels_of_pillow(tmp_path: Path, layout: str) -> None:
    graph = build_classifier(channels=1, layout=layout)
    model = import_graph(graph, tmp_path, preprocessing=HALVES)
    assert_grey_agrees(model, graph, layout)
    assert model.facts["normalise"].startswith("grey (ITU-R 601), (pixels / 255 - (0.5)) / (0.25) (--mean")
    assert "(one channel on axis" in model.facts["layout"]
    assert model.engine.batch_limit is None


def test_grey_steps_give_every_level_as_pillow_does() -> None:
    """All levels of one channel beside many of the others, which covers every rounding."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    pixels[0] = np.arange(256, dtype=np.uint8)[:, None, None]
    builder = NodeBuilder()
    name = add_grey_steps(builder, "pixels")
    graph = helper.make_graph(
        builder.pop_nodes(),
        "grey",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, [None, None, None, 3])],
        [helper.make_tensor_value_info(name, TensorProto.INT32, [None] * 4)],
        builder.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (levels,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"pixels": pixels})
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in pixels])
    assert np.array_equal(levels[:, 0], expected)
    assert np.array_equal(to_grey(pixels)[..., 0], expected)
    assert np.array_equal(levels[0, 0], pixels[0, ..., 0])


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_grey_graphs_of_other_types_are_supported(tmp_path: Path, dtype: str) -> None:
    graph = build_classifier(channels=1, dtype=dtype)
    options = PreprocessingOptions(preset=ZERO_ONE)
    model = import_graph(graph, tmp_path, preprocessing=options)
    assert dtype in model.facts["input"]
    assert "grey (ITU-R 601)" in model.facts["normalise"]


@pytest.mark.parametrize(
    "options",
    [
        PreprocessingOptions(preset=IMAGENET),
        PreprocessingOptions(preset=ZERO_ONE, bgr=True),
        PreprocessingOptions(preset=ZERO_ONE, mean=(0.1, 0.2, 0.3)),
    ],
)
def test_grey_graphs_refuse_a_normalisation_by_colour(tmp_path: Path, options: PreprocessingOptions) -> None:
    message = "has one channel, grey, but the normalisation differs .*--mean 0.5 --std 0.5"
    assert_refused(tmp_path, message, build_classifier(channels=1), preprocessing=options)


# --- axes ----------------------------------------------------------------------------------------


def remove_batch_axis(graph: onnx.ModelProto, *, has_output_axis: bool, axis: int = 0) -> onnx.ModelProto:
    """Return the graph for one image without a batch axis, as `model(x[None])[0]` is exported."""
    axes = numpy_helper.from_array(np.array([axis], np.int64), "first")
    graph.graph.initializer.append(axes)
    name = graph.graph.input[0].name
    for node in graph.graph.node:
        for index, one in enumerate(node.input):
            if one == name:
                node.input[index] = "batched"
    graph.graph.node.insert(0, helper.make_node("Unsqueeze", [name, "first"], ["batched"]))
    del graph.graph.input[0].type.tensor_type.shape.dim[axis]
    if not has_output_axis:
        append_steps(graph, make_step("Squeeze", np.array([0])))
    return graph


@pytest.mark.parametrize("has_output_axis", [True, False])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_graph_without_a_batch_axis_takes_any_batch(
    tmp_path: Path, layout: str, has_output_axis: bool
) -> None:
    graph = remove_batch_axis(build_classifier(layout=layout, batch=1), has_output_axis=has_output_axis)
    model = import_graph(graph, tmp_path)
    shape = "3 x 16 x 16" if layout == "nchw" else "16 x 16 x 3"
    assert model.facts["input"].endswith(f"; {shape} in the file, without a batch axis")
    assert find_largest_difference(model, expected_rows()) <= 1e-5
    assert model.engine.batch_limit is None


@pytest.mark.parametrize("opset", [11, 17])
def test_graph_with_another_first_step_gets_a_batch_axis(tmp_path: Path, opset: int) -> None:
    graph = build_classifier(batch=1, opset=opset)
    graph.graph.node[0].input[0] = "batched"
    graph.graph.node.insert(0, helper.make_node("Reshape", ["image", "sides"], ["batched"]))
    graph.graph.initializer.append(numpy_helper.from_array(np.array([1, 3, 16, 16]), "sides"))
    del graph.graph.input[0].type.tensor_type.shape.dim[0]
    model = import_graph(graph, tmp_path)
    assert find_largest_difference(model, expected_rows()) <= 1e-5


def test_grey_images_without_an_axis_of_channels_are_supported(tmp_path: Path) -> None:
    graph = remove_batch_axis(build_classifier(channels=1), has_output_axis=True, axis=1)
    model = import_graph(graph, tmp_path, preprocessing=HALVES)
    assert model.facts["input"].endswith("any x 16 x 16 in the file, without an axis of channels")
    assert_grey_agrees(model, build_classifier(channels=1), "nchw")


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ((3, 16, 3), "does not tell where the channels are: give --layout nchw or --layout nhwc"),
        ((8, 16, 16), "has 3 axes, 8 x 16 x 16; images have three channels, or one"),
    ],
)
def test_three_axes_without_channels_are_refused(
    tmp_path: Path, sides: tuple[int, ...], message: str
) -> None:
    graph = build_classifier()
    graph.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", FLOAT, sides))
    assert_refused(tmp_path, message, graph)


def test_layout_resolves_three_ambiguous_axes(tmp_path: Path) -> None:
    graph = remove_batch_axis(build_classifier(batch=1, size=3), has_output_axis=True)
    with pytest.raises(MissingInformation, match="give --layout"):
        import_graph(graph, tmp_path)
    assert "nchw" in import_graph(graph, tmp_path, layout=Layout.NCHW).facts["layout"]


# --- types ---------------------------------------------------------------------------------------


def convert_type(graph: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """Return the graph with all float32 tensors in another type, and a constant of that type inside."""
    for tensor in graph.graph.initializer:
        if tensor.data_type == FLOAT:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, kind, tensor.dims, values.ravel().tolist()))
    for value in (*graph.graph.input, *graph.graph.output):
        value.type.tensor_type.elem_type = kind
    zero = helper.make_tensor("zero", kind, [], [0.0])
    relu = next(node for node in graph.graph.node if node.op_type == "Relu")
    relu.op_type = "Max"
    relu.input.append("floor")
    graph.graph.node.insert(0, helper.make_node("Constant", [], ["floor"], value=zero))
    return graph


@pytest.mark.parametrize(
    ("kind", "name"), [(TensorProto.DOUBLE, "float64"), (TensorProto.BFLOAT16, "bfloat16")]
)
def test_other_float_types_are_computed_in_float32(tmp_path: Path, kind: int, name: str) -> None:
    model = import_graph(convert_type(build_classifier(), kind), tmp_path)
    assert model.facts["input"].endswith(f"; {name} in the file, computed in float32")
    rounding = 1e-5 if kind == TensorProto.DOUBLE else 0.2  # the weights of bfloat16 have 8 bits
    assert find_largest_difference(model, expected_rows()) <= rounding
    assert model.contract.golden.logit_tolerance["cpu/float32"] <= 1e-2


def test_bfloat16_weights_are_kept_exactly(tmp_path: Path) -> None:
    graph = convert_type(build_classifier(), TensorProto.BFLOAT16)
    (kernel,) = [tensor for tensor in graph.graph.initializer if tensor.name == "kernel"]
    expected = numpy_helper.to_array(kernel).astype(np.float32)
    model = import_graph(graph, tmp_path)
    (kernel,) = [tensor for tensor in onnx.load(model.path).graph.initializer if tensor.name == "kernel"]
    assert np.array_equal(numpy_helper.to_array(kernel), expected)


def test_cast_to_bfloat16_inside_a_float32_graph_is_replaced(tmp_path: Path) -> None:
    graph = convert_type(build_classifier(), TensorProto.BFLOAT16)
    conv = next(node for node in graph.graph.node if node.op_type == "Conv")
    cast = helper.make_node("Cast", ["image"], ["narrow"], to=TensorProto.BFLOAT16)
    conv.input[0] = "narrow"
    graph.graph.node.insert(0, cast)
    graph.graph.input[0].type.tensor_type.elem_type = FLOAT
    model = import_graph(graph, tmp_path)
    assert find_largest_difference(model, expected_rows()) <= 0.2


# --- further inputs ------------------------------------------------------------------------------


def build_with_switch(kind: int = TensorProto.BOOL, shape: tuple[int | str, ...] = ()) -> onnx.ModelProto:
    """Build a graph with a second input, which negates the logits where it is not 0."""
    graph = build_classifier(names=("image", "row"))
    value = helper.make_tensor_value_info("training", kind, shape)
    graph.graph.input.append(value)
    graph.graph.initializer.append(numpy_helper.from_array(np.array(-2, np.float32), "factor"))
    graph.graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), "one"))
    graph.graph.node.extend(
        [
            helper.make_node("Cast", ["training"], ["switch"], to=FLOAT),
            helper.make_node("Mul", ["switch", "factor"], ["twice"]),
            helper.make_node("Add", ["twice", "one"], ["sign"]),
            helper.make_node("Mul", ["row", "sign"], ["scores"]),
        ]
    )
    graph.graph.output[0].name = "scores"
    return graph


@pytest.mark.parametrize(
    ("kind", "shape", "texts"),
    [
        (TensorProto.BOOL, (), ("false", "true")),
        (TensorProto.BOOL, (1,), ("0", "1")),
        (TensorProto.INT64, (), ("0", "1")),
        (TensorProto.FLOAT, (), ("0.0", "1e0")),
        (TensorProto.FLOAT, ("N", 1), ("False", "True")),
    ],
)
def test_further_input_gets_its_value_from_the_option(
    tmp_path: Path, kind: int, shape: tuple[int | str, ...], texts: tuple[str, str]
) -> None:
    graph = build_with_switch(kind, shape)
    logits = [run_onnx(build_classifier(), prepare_imagenet(image, 18, 16)) for image in IMAGES]
    for text, sign in zip(texts, (1, -1), strict=True):
        folder = tmp_path / text
        folder.mkdir()
        model = import_graph(graph, folder, settings=(("training", text),))
        assert model.facts["input"].endswith(f"; training={text} (from --set)")
        assert find_largest_difference(model, [softmax(sign * one) for one in logits]) <= 1e-5
        assert len(onnx.load(model.path).graph.input) == 1


def test_further_inputs_are_listed_with_an_example(tmp_path: Path) -> None:
    graph = build_with_switch()
    graph.graph.input.append(helper.make_tensor_value_info("steps", TensorProto.INT64, [2]))
    message = (
        r"the graph takes 'training' \(bool\), 'steps' \(int64, 2\) besides the image 'image': give each a "
        "value with --set, such as --set training=false --set steps=0"
    )
    assert_refused(tmp_path, message, graph)
    message = r"takes 'steps' \(int64, 2\) besides the image"
    assert_refused(tmp_path, message, graph, settings=(("training", "true"),))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (TensorProto.BOOL, (("trainig", "0"),), "no input 'trainig'; it has 'image', 'training'"),
        (TensorProto.BOOL, (("training", "maybe"),), "takes bool, which 'maybe' is not"),
        (TensorProto.INT64, (("training", "0.5"),), "takes int64, which '0.5' is not"),
        (TensorProto.INT8, (("training", "1000"),), "takes int8, which '1000' is not"),
        (TensorProto.STRING, (("training", "0"),), "only numbers and true or false can be set"),
    ],
)
def test_wrong_values_of_further_inputs_are_refused(
    tmp_path: Path, kind: int, settings: tuple[tuple[str, str], ...], message: str
) -> None:
    assert_refused(tmp_path, message, build_with_switch(kind), settings=settings)


@pytest.mark.parametrize("texts", [["training"], ["=1"], ["training="], ["a=1", "a=2"]])
def test_malformed_settings_are_refused(texts: list[str]) -> None:
    with pytest.raises(ImportRefused, match="--set"):
        parse_settings(texts)
    assert parse_settings(["a=b=c", "d=1"]) == (("a", "b=c"), ("d", "1"))


# --- files that ONNX Runtime has optimised -------------------------------------------------------


def test_file_optimised_by_onnx_runtime_names_its_original(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(build_classifier(size=32).SerializeToString(), options)
    graph = onnx.load(tmp_path / "optimised.onnx")
    if not any("nchwc" in node.domain for node in graph.graph.node):
        graph.graph.node[0].domain = "com.microsoft.nchwc"  # on processors without these operators
    message = r"was optimised by ONNX Runtime .*com\.microsoft\.nchwc.*: import the file it was made from"
    assert_refused(tmp_path, message, graph)


def test_compiled_graph_names_its_original(tmp_path: Path) -> None:
    graph = build_classifier()
    graph.graph.node[0].op_type, graph.graph.node[0].domain = "EPContext", "com.microsoft"
    assert_refused(tmp_path, r"com\.microsoft\.EPContext: import the file it was made from", graph)

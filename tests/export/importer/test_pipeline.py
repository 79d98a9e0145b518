"""Imported classifiers give the same probabilities as the pipelines of their users."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from PIL import Image

from fovea.export.golden import LOGIT_TOLERANCE
from fovea.export.importer.foreign_model import Arithmetic
from fovea.export.importer.graph_input import MAX_SIDE, GraphInput, Layout
from fovea.export.importer.inspect import TOLERANCE
from fovea.export.importer.preprocessing import (
    CLIP,
    INCEPTION,
    KERAS_MOBILENET,
    PRESETS,
    ZERO_ONE,
    Normalization,
    PreprocessingOptions,
    Preset,
)
from fovea.export.importer.wrap import _add_preprocessing, _NodeBuilder
from fovea.service.artifact.contract import (
    MAX_GOLDEN_PIXELS,
    Geometry,
    Interpolation,
    PixelPath,
    Resize,
    Task,
    Training,
)
from fovea.service.inference.preprocess import decode_image
from tests.documents import read_page
from tests.export.classifiers import (
    Array,
    GraphEnd,
    build_classifier,
    export_foreign,
    export_torchscript,
    make_network,
    prepare_imagenet,
    resize_and_crop,
    run_onnx,
    sigmoid,
    softmax,
)
from tests.export.imports import ImportedModel, import_graph, make_labels
from tests.pictures import draw_picture, encode_image, make_jpeg

IMAGES = [
    make_jpeg(90, 70, 1, quality=90),
    make_jpeg(400, 300, 2, subsampling=2),
    encode_image(draw_picture(61, 130, 3), "PNG"),
    encode_image(draw_picture(20, 20, 4), "PNG"),
]
"""Images larger and smaller than the inputs, in portrait and landscape format."""


def largest_difference(model: ImportedModel, expected: list[Array], images: list[bytes] = IMAGES) -> float:
    """Return the largest difference of a probability, also with all images in one batch."""
    single_difference = max(
        float(np.abs(model(image) - one).max()) for image, one in zip(images, expected, strict=True)
    )
    batch_output = model.engine.run(np.stack([model.pixels(image) for image in images]))
    return max(single_difference, float(np.abs(batch_output - np.concatenate(expected)).max()))


# --- networks as torch exports them --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param("resnet18", 96, marks=pytest.mark.slow),
        pytest.param("resnet50", 96, marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", 96, marks=pytest.mark.slow),
        pytest.param("vit", 64, marks=pytest.mark.slow),
    ],
)
def test_a_network_answers_as_the_pipeline_written_by_hand(tmp_path: Path, name: str, size: int) -> None:
    graph = export_foreign(name, size)
    resize = round(size * 256 / 224)
    model = import_graph(graph, tmp_path, 7)
    assert model.contract.input == Geometry(
        size, size, Resize.SHORTER, resize, Interpolation.BILINEAR, PixelPath.EXACT
    )
    wanted = [softmax(run_onnx(graph, prepare_imagenet(image, resize, size))) for image in IMAGES]
    assert np.ptp(np.concatenate(wanted), axis=0).max() > 0.1  # they are told apart
    assert largest_difference(model, wanted) <= 1e-5
    assert model.engine.check_golden_set().images == 8


@pytest.mark.slow
def test_what_fast_changes_is_stated(tmp_path: Path) -> None:
    """Tolerance for photographs that are decoded at a smaller scale."""
    size = 64
    model = import_graph(export_foreign("resnet18", size), tmp_path, 7)
    fast = replace(model.contract.input, pixel_path=PixelPath.FAST)
    images = [make_jpeg(1600, 1200, seed, quality=90) for seed in range(3)]
    pixels = [decode_image(image, fast, max_pixels=10_000_000).pixels for image in images]
    difference = max(
        float(np.abs(model.engine.run(one[None]) - model(image)).max())
        for one, image in zip(pixels, images, strict=True)
    )
    print(f"fast changes a probability by {difference:.2g} at most")
    assert 0 < difference < 0.05


def test_a_transformer_s_maps_are_those_of_its_patches(tmp_path: Path) -> None:
    """Tokens and attention have three axes too, but are not feature maps."""
    model = import_graph(export_foreign("vit"), tmp_path, 7)
    layers = {layer.outputs[0]: layer for layer in model.contract.layers}
    assert [layers[name].kind for name in model.contract.feature_maps] == ["Conv"]
    assert layers[model.contract.feature_maps[0]].shape == (48, 4, 4)
    assert any(layer.kind == "Softmax" and len(layer.shape) == 3 for layer in model.contract.layers)


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        pytest.param("resnet18", 1, marks=pytest.mark.slow),
        ("vit", 1),
        pytest.param("vit", 2, marks=pytest.mark.slow),
        pytest.param("vit_of_torch", 1, marks=pytest.mark.slow),
    ],
)
def test_a_network_exported_for_some_images_takes_any_number(tmp_path: Path, name: str, batch: int) -> None:
    graph = export_foreign(name, batch=batch)
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value == batch
    model = import_graph(graph, tmp_path, 7)
    assert (
        model.facts["batch"] == f"any size (the file says {batch}; made dynamic and verified at 1, 2 and 3)"
    )
    assert model.engine.batch_limit is None
    assert (
        largest_difference(
            model,
            [softmax(run_onnx(export_foreign(name), prepare_imagenet(image, 73, 64))) for image in IMAGES],
        )
        <= 1e-5
    )


@pytest.mark.parametrize("name", ["vit", "vit_of_torch"])
def test_so_does_one_from_torch_s_older_exporter(tmp_path: Path, name: str) -> None:
    """The graph computes the shape of the class token from constants."""
    graph = export_torchscript(make_network(name, 64, 7), 64)
    model = import_graph(graph, tmp_path, 7)
    assert model.engine.batch_limit is None
    assert (
        largest_difference(
            model, [softmax(run_onnx(graph, prepare_imagenet(image, 73, 64))) for image in IMAGES]
        )
        <= 1e-5
    )


# --- presets and what is said instead ------------------------------------------------------------


def apply_preset(preset: Preset, image: bytes) -> Array:
    """float32 (1, 16, 16, 3), written out anew."""
    filters = {
        Interpolation.BILINEAR: Image.Resampling.BILINEAR,
        Interpolation.BICUBIC: Image.Resampling.BICUBIC,
    }
    if preset is KERAS_MOBILENET:
        return resize_and_crop(image, 18, 16, Image.Resampling.BILINEAR) / np.float32(127.5) - 1
    resize = {"imagenet": 18, "inception": 18, "clip": 16, "zero-one": 16}[preset.name]
    values = resize_and_crop(image, resize, 16, filters[preset.interpolation]) / 255
    means: dict[str, Any] = {"imagenet": (0.485, 0.456, 0.406), "inception": 0.5, "zero-one": 0.0}
    stds: dict[str, Any] = {"imagenet": (0.229, 0.224, 0.225), "inception": 0.5, "zero-one": 1.0}
    mean = means.get(preset.name, (0.48145466, 0.4578275, 0.40821073))
    std = stds.get(preset.name, (0.26862954, 0.26130258, 0.27577711))
    return np.asarray((values - np.array(mean, np.float32)) / np.array(std, np.float32))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_each_preset_is_what_its_source_says(tmp_path: Path, preset: Preset, layout: str) -> None:
    graph = build_classifier(layout=layout)
    model = import_graph(graph, tmp_path, preprocessing=PreprocessingOptions(preset=preset))
    turned = (0, 3, 1, 2) if layout == "nchw" else (0, 1, 2, 3)
    wanted = [softmax(run_onnx(graph, apply_preset(preset, image).transpose(turned))) for image in IMAGES]
    assert largest_difference(model, wanted) <= 1e-5
    assert layout in model.facts["layout"]
    assert preset.source in model.facts["normalise"]


def test_the_documentation_has_every_preset() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|.*x / (?:255|127\.5)", read_page("importing"), re.MULTILINE)
    assert rows == list(PRESETS)


@pytest.mark.parametrize(
    ("preset", "side", "resize"),
    [
        ("imagenet", 224, 256),
        ("imagenet", 299, 342),
        ("keras-mobilenet", 224, 256),
        ("keras-mobilenet", 160, 183),
        ("inception", 299, 341),
        ("inception", 224, 256),
        ("clip", 336, 336),
        ("zero-one", 224, 224),
    ],
)
def test_presets_keep_their_proportion_at_other_sizes(preset: str, side: int, resize: int) -> None:
    assert PreprocessingOptions(preset=PRESETS[preset]).build_geometry(side, side).resize_to == resize


CAFFE = PreprocessingOptions(
    mean=(103.939, 116.779, 123.68),
    std=(1.0, 1.0, 1.0),
    bgr=True,
    resize=20,
    interpolation=Interpolation.HAMMING,
)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_blue_may_come_first_and_values_go_to_255(tmp_path: Path, layout: str) -> None:
    graph = build_classifier(layout=layout, spread=0.02)
    model = import_graph(graph, tmp_path, preprocessing=CAFFE)
    turned = (0, 3, 1, 2) if layout == "nchw" else (0, 1, 2, 3)
    wanted = []
    for image in IMAGES:
        values = resize_and_crop(image, 20, 16, Image.Resampling.HAMMING)[..., ::-1] - np.array(
            [103.939, 116.779, 123.68], np.float32
        )
        wanted.append(softmax(run_onnx(graph, values.transpose(turned))))
    assert largest_difference(model, wanted) <= 1e-5
    assert "BGR" in model.facts["normalise"]
    assert "scale derived from mean and std" in model.facts["normalise"]


def test_options_take_the_place_of_the_preset_s(tmp_path: Path) -> None:
    wishes = PreprocessingOptions(
        preset=PRESETS["imagenet"], mean=(0.1, 0.2, 0.3), interpolation=Interpolation.LANCZOS, resize=17
    )
    assert wishes.normalization == Normalization(1 / 255, (0.1, 0.2, 0.3), (0.229, 0.224, 0.225))
    geometry = wishes.build_geometry(16, 16)
    assert (geometry.resize_to, geometry.interpolation) == (17, Interpolation.LANCZOS)
    assert (
        PreprocessingOptions(preset=KERAS_MOBILENET, resize=20).build_geometry(16, 16).resize
        is Resize.SHORTER
    )
    assert PreprocessingOptions(preset=CLIP, stretch=True).build_geometry(16, 16).resize is Resize.STRETCH


numbers = st.floats(-200, 200, width=32)
positive = st.floats(0.015625, 128, width=32)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(numbers, numbers, numbers),
    st.tuples(positive, positive, positive),
    st.sampled_from([1.0, 1 / 255, 1 / 127.5, 0.1234, 3.0]),
    st.booleans(),
)
def test_normalisation_is_the_arithmetic_that_is_written_by_hand(
    mean: tuple[float, float, float], std: tuple[float, float, float], scale: float, bgr: bool
) -> None:
    """The arithmetic is equal to the last bit in numpy and in the graph, for both channel orders."""
    normalization = Normalization(scale, mean, std, bgr)
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(1, 16, 16, 3)
    values = (pixels[..., ::-1] if bgr else pixels).astype(np.float32)
    values = values / np.float32(round(1 / scale, 1)) if scale < 0.1 else values * np.float32(scale)
    wanted = (values - np.array(mean, np.float32)) / np.array(std, np.float32)
    assert np.array_equal(normalization(pixels), wanted)
    for layout, turned in ((Layout.NHWC, wanted), (Layout.NCHW, wanted.transpose(0, 3, 1, 2))):
        steps = _NodeBuilder()
        taken = GraphInput("image", np.dtype(np.float32), layout, 16, 16, None, ())
        _add_preprocessing(steps, "pixels", taken, normalization)
        graph = helper.make_graph(
            steps.pop_nodes(),
            "first steps",
            [helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, pixels.shape)],
            [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, turned.shape)],
            steps.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        (said,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"pixels": pixels})
        assert np.array_equal(said, turned)
    assert normalization.with_reversed_channels.with_reversed_channels == normalization
    assert np.array_equal(normalization.with_reversed_channels(pixels)[..., ::-1], normalization(pixels))


# --- what graphs take ----------------------------------------------------------------------------


def test_uint8_graphs_keep_their_own_arithmetic(tmp_path: Path) -> None:
    for layout in ("nchw", "nhwc"):
        graph = build_classifier(layout=layout, dtype="uint8")
        model = import_graph(graph, tmp_path, preprocessing=PreprocessingOptions(preset=ZERO_ONE))
        turned = (0, 3, 1, 2) if layout == "nchw" else (0, 1, 2, 3)
        wanted = [
            softmax(
                run_onnx(
                    graph,
                    resize_and_crop(image, 16, 16, Image.Resampling.BILINEAR)
                    .astype(np.uint8)
                    .transpose(turned),
                )
            )
            for image in IMAGES
        ]
        assert largest_difference(model, wanted) <= 1e-6
        assert "the graph normalises them itself" in model.facts["normalise"]


@pytest.mark.parametrize("end", ["logits", "softmax", "hidden_softmax"])
def test_float16_graphs_are_as_close_as_their_arithmetic(tmp_path: Path, end: GraphEnd) -> None:
    graph = build_classifier(dtype="float16", end=end)
    model = import_graph(graph, tmp_path)
    wanted = []
    for image in IMAGES:
        said = run_onnx(graph, prepare_imagenet(image, 18, 16).astype(np.float16))
        wanted.append(softmax(said) if end == "logits" else said)
    assert largest_difference(model, wanted) <= TOLERANCE[Arithmetic.FLOAT16]
    assert model.contract.golden.logit_tolerance["cpu/float32"] >= 5e-2
    assert "float16" in model.facts["input"]


def build_rounded_inside(kind: str) -> onnx.ModelProto:
    """float32 in and out; a rounding to float16, or to one of 256 levels, in between."""
    graph = build_classifier()
    pool = next(node for node in graph.graph.node if node.op_type == "GlobalAveragePool")
    last, nodes = pool.output[0], []
    if kind == "float16":
        constant = onnx.numpy_helper.from_array(np.array(1, np.float16), "half")
        graph.graph.initializer.append(constant)
        nodes = [
            helper.make_node("Cast", ["exact"], ["rounded"], to=onnx.TensorProto.FLOAT16),
            helper.make_node("Mul", ["rounded", "half"], ["times"]),
            helper.make_node("Cast", ["times"], [last], to=onnx.TensorProto.FLOAT),
        ]
    else:
        for name, value in (("level", np.array(1 / 64, np.float32)), ("zero", np.array(0, np.uint8))):
            graph.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        nodes = [
            helper.make_node("QuantizeLinear", ["exact", "level", "zero"], ["levels"]),
            helper.make_node("DequantizeLinear", ["levels", "level", "zero"], [last]),
        ]
    pool.output[0] = "exact"
    place = list(graph.graph.node).index(pool) + 1
    for node in reversed(nodes):
        graph.graph.node.insert(place, node)
    return graph


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_coarse_arithmetic_is_seen_inside_too(tmp_path: Path, kind: str) -> None:
    graph = build_rounded_inside(kind)
    model = import_graph(graph, tmp_path)
    assert model.facts["arithmetic"] == kind
    assert model.contract.golden.logit_tolerance["cpu/float32"] >= 5e-2
    wanted = [softmax(run_onnx(graph, prepare_imagenet(image, 18, 16))) for image in IMAGES]
    assert largest_difference(model, wanted) <= TOLERANCE[Arithmetic(kind)]


def test_the_golden_tolerance_grows_with_the_logits(tmp_path: Path) -> None:
    small = import_graph(build_classifier(spread=0.1), tmp_path).contract.golden
    assert small.logit_tolerance == LOGIT_TOLERANCE
    large = import_graph(build_classifier(spread=300), tmp_path).contract.golden
    highest = max(abs(logit) for image in large.images for logit in image.logits)
    assert highest > 20
    assert large.logit_tolerance["cpu/float32"] == pytest.approx(1e-4 * highest)


def test_a_graph_that_takes_any_size_is_served_at_the_one_that_is_told(tmp_path: Path) -> None:
    graph = build_classifier(size=None)
    model = import_graph(graph, tmp_path, size=(24, 32))
    assert (model.contract.input.height, model.contract.input.width) == (24, 32)
    conv = next(layer for layer in model.contract.layers if layer.kind == "Conv")
    assert conv.shape == (8, 24, 32)
    assert model.engine.run(np.zeros((2, 24, 32, 3), np.uint8)).shape == (2, 5)


@pytest.mark.parametrize(("opset", "ir_version"), [(7, 3), (8, 3), (11, 6), (12, 7), (20, 9)])
def test_old_and_new_versions_of_the_format(tmp_path: Path, opset: int, ir_version: int) -> None:
    """The oldest graphs list all weights as inputs too."""
    graph = build_classifier(opset=opset, ir_version=ir_version, end="softmax")
    assert (len(graph.graph.input) == 1) == (ir_version > 3)
    model = import_graph(graph, tmp_path)
    assert (
        largest_difference(model, [run_onnx(graph, prepare_imagenet(image, 18, 16)) for image in IMAGES])
        <= 1e-5
    )
    assert len(onnx.load(model.path).graph.input) == 1


def test_names_that_the_graph_has_itself_are_not_taken(tmp_path: Path) -> None:
    graph = build_classifier(names=("pixels", "logits"))
    model = import_graph(graph, tmp_path)
    assert model.contract.input_name == "fovea/pixels"
    assert model.contract.logits_name == "fovea/logits"
    assert model.contract.probabilities_name == "probabilities"
    assert (
        largest_difference(
            model, [softmax(run_onnx(graph, prepare_imagenet(image, 18, 16))) for image in IMAGES]
        )
        <= 1e-5
    )
    added = [
        layer for layer in model.contract.layers if layer.name not in {node.name for node in graph.graph.node}
    ]
    assert all(layer.name.startswith("fovea/") for layer in added)


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("shape", [(None, 8), (None, -1)])
def test_a_number_of_images_in_a_reshape_is_made_free(
    tmp_path: Path, batch: int, shape: tuple[int | None, int]
) -> None:
    graph = build_classifier(batch=batch, shape=[batch if side is None else side for side in shape])
    model = import_graph(graph, tmp_path)
    assert f"the file says {batch}; made dynamic" in model.facts["batch"]
    assert model.engine.batch_limit is None
    wanted = [
        softmax(run_onnx(graph, np.repeat(prepare_imagenet(image, 18, 16), batch, axis=0))[:1])
        for image in IMAGES
    ]
    assert largest_difference(model, wanted) <= 1e-5


def test_a_number_of_images_that_the_file_does_not_admit_is_found(tmp_path: Path) -> None:
    """The input has any batch size, but the constants are for one image."""
    graph = build_classifier(batch="N", shape=[1, 8])
    model = import_graph(graph, tmp_path)
    assert model.engine.batch_limit is None
    assert (
        largest_difference(
            model, [softmax(run_onnx(graph, prepare_imagenet(image, 18, 16))) for image in IMAGES]
        )
        <= 1e-5
    )


def build_batch_mean(batch: int | str) -> onnx.ModelProto:
    """The mean includes the batch axis, which no constant shows."""
    graph = build_classifier(batch=batch)
    (pool,) = [node for node in graph.graph.node if node.op_type == "GlobalAveragePool"]
    pool.CopyFrom(helper.make_node("ReduceMean", pool.input, pool.output, axes=[0, 2, 3], keepdims=1))
    return graph


@pytest.mark.parametrize("batch", [1, "N"])
def test_a_graph_for_one_image_alone_stays_so_and_takes_batches_one_by_one(
    tmp_path: Path, batch: int | str
) -> None:
    graph = build_batch_mean(batch)
    model = import_graph(graph, tmp_path)
    assert model.facts["batch"].startswith("1 (")
    assert "images run one after the other" in model.facts["batch"]
    assert model.engine.batch_limit == 1
    assert (
        largest_difference(
            model, [softmax(run_onnx(graph, prepare_imagenet(image, 18, 16))) for image in IMAGES]
        )
        <= 1e-5
    )


# --- what graphs give ----------------------------------------------------------------------------

KINDS: dict[GraphEnd, str] = {
    "logits": "5 logits",
    "softmax": "5 probabilities that sum to 1",
    "hidden_softmax": "5 probabilities that sum to 1",
    "log_softmax": "5 logarithms of probabilities that sum to 1",
}


@pytest.mark.parametrize("end", KINDS)
def test_logits_and_probabilities_are_told_apart_whatever_they_are_called(
    tmp_path: Path, end: GraphEnd
) -> None:
    graph = build_classifier(end=end, names=("x", "logits" if end == "softmax" else "probabilities"))
    model = import_graph(graph, tmp_path)
    assert model.facts["values"] == f"{KINDS[end]} (measured by running the graph)"
    assert model.contract.task is Task.MULTICLASS
    logits = run_onnx(
        build_classifier(end="logits"), np.concatenate([prepare_imagenet(image, 18, 16) for image in IMAGES])
    )
    assert largest_difference(model, list(softmax(logits)[:, None])) <= 1e-5
    pixels = np.stack([model.pixels(image) for image in IMAGES])
    own = model.engine.compute_logits(pixels)
    if end in ("logits", "softmax"):
        assert np.abs(own - logits).max() < 1e-4
    assert np.abs(softmax(own) - softmax(logits)).max() <= 1e-5
    assert ("assumed" in model.facts["task"]) == (end == "logits")


@pytest.mark.parametrize("end", ["logits", "sigmoid", "hidden_sigmoid"])
@pytest.mark.parametrize("count", [1, 4])
def test_sigmoids_are_found_and_those_that_are_missing_added(
    tmp_path: Path, end: GraphEnd, count: int
) -> None:
    graph = build_classifier(end=end, count=count, spread=1)
    task = Task.BINARY if count == 1 else Task.MULTILABEL
    model = import_graph(graph, tmp_path, max(2, count), task=None if count == 1 else task)
    assert (model.contract.task, model.contract.thresholds) == (task, (0.5,) * count)
    positive = sigmoid(
        run_onnx(
            build_classifier(count=count, spread=1),
            np.concatenate([prepare_imagenet(i, 18, 16) for i in IMAGES]),
        )
    )
    wanted = np.hstack([1 - positive, positive]) if count == 1 else positive
    assert largest_difference(model, list(wanted[:, None])) <= 1e-5
    pixels = np.stack([model.pixels(image) for image in IMAGES])
    assert np.abs(sigmoid(model.engine.compute_logits(pixels)) - positive).max() <= 1e-4


def test_logits_that_happen_to_lie_between_0_and_1_are_still_logits(tmp_path: Path) -> None:
    """The values leave that range for images a thousand times as bright."""
    graph = build_classifier(count=1, spread=0.01)
    bias = next(tensor for tensor in graph.graph.initializer if tensor.name == "bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([0.5], np.float32), "bias"))
    model = import_graph(graph, tmp_path, 2)
    said = run_onnx(graph, np.concatenate([prepare_imagenet(image, 18, 16) for image in IMAGES]))
    assert said.min() >= 0
    assert said.max() <= 1
    assert model.facts["values"].startswith("1 logits")
    assert largest_difference(model, list(np.hstack([1 - sigmoid(said), sigmoid(said)])[:, None])) <= 1e-5


@pytest.mark.parametrize("task", [None, Task.BINARY, Task.MULTICLASS])
@pytest.mark.parametrize("end", ["logits", "softmax", "hidden_softmax", "log_softmax"])
def test_two_outputs_are_binary_or_two_classes(tmp_path: Path, end: GraphEnd, task: Task | None) -> None:
    graph = build_classifier(end=end, count=2)
    model = import_graph(graph, tmp_path, 2, task=task)
    assert model.contract.task is (task or Task.BINARY)
    wanted = softmax(
        run_onnx(
            build_classifier(count=2), np.concatenate([prepare_imagenet(image, 18, 16) for image in IMAGES])
        )
    )
    assert largest_difference(model, list(wanted[:, None])) <= 1e-5
    assert model.contract.logit_count == (2 if task is Task.MULTICLASS else 1)


def test_a_value_for_each_image_without_an_axis_of_its_own(tmp_path: Path) -> None:
    graph = build_classifier(count=1)
    last = graph.graph.node[-1]
    axis = onnx.numpy_helper.from_array(np.array([1], np.int64), "axis")
    graph.graph.initializer.append(axis)
    last.CopyFrom(helper.make_node("Squeeze", [last.input[0], "axis"], last.output))
    del graph.graph.output[0].type.tensor_type.shape.dim[1]
    model = import_graph(graph, tmp_path, 2)
    positive = sigmoid(
        run_onnx(graph, np.concatenate([prepare_imagenet(image, 18, 16) for image in IMAGES]))
    )[:, None]
    assert largest_difference(model, list(np.hstack([1 - positive, positive])[:, None])) <= 1e-5


def test_the_output_that_has_the_labels_is_found_and_the_rest_left_out(tmp_path: Path) -> None:
    graph = build_classifier()
    pooled = next(node.output[0] for node in graph.graph.node if node.op_type == "Flatten")
    graph.graph.output.insert(0, helper.make_tensor_value_info(pooled, onnx.TensorProto.FLOAT, ["N", 8]))
    graph.graph.node.append(helper.make_node("Neg", [pooled], ["unused"]))
    model = import_graph(graph, tmp_path)
    assert model.facts["output"] == "scores (the only one of 2 that fits the labels)"
    assert [value.name for value in onnx.load(model.path).graph.output] == ["logits", "probabilities"]
    assert "Neg" not in {layer.kind for layer in model.contract.layers}


def test_of_several_that_fit_one_is_named(tmp_path: Path) -> None:
    graph = build_classifier(end="softmax")
    before = next(node.input[0] for node in graph.graph.node if node.op_type == "Softmax")
    graph.graph.output.append(helper.make_tensor_value_info(before, onnx.TensorProto.FLOAT, ["N", 5]))
    model = import_graph(graph, tmp_path, output=before)
    assert model.facts["output"] == f"{before} (from --output)"
    assert model.facts["values"].startswith("5 logits")


# --- the file ------------------------------------------------------------------------------------


def test_the_contract_says_what_was_imported(tmp_path: Path) -> None:
    model = import_graph(build_classifier(), tmp_path, command="fovea import foreign.onnx --preset imagenet")
    contract, report = model.contract, model.report
    assert (contract.name, contract.version, contract.labels) == ("thing", "1", tuple(make_labels(5)))
    assert (contract.temperature, contract.coverage, contract.thresholds) == (1.0, (), ())
    assert (contract.accuracy, contract.reference) == (None, None)
    assert contract.training == Training(
        "imported: foreign.onnx", 0, f"sha256:{report.sha256}", "fovea import foreign.onnx --preset imagenet"
    )
    assert [layer.kind for layer in contract.layers][:4] == ["Transpose", "Cast", "Div", "Sub"]
    assert contract.layers[-1].kind == "Softmax"
    assert len(contract.feature_maps) == 3  # convolution, its ReLU, and their mean
    onnx.checker.check_model(onnx.load(model.path))


def test_the_report_is_written_beside_it(tmp_path: Path) -> None:
    model = import_graph(build_classifier(), tmp_path)
    written = json.loads((model.path.parent / "report.json").read_text())
    assert written == json.loads(json.dumps(asdict(model.report)))
    assert [agreed["batch"] for agreed in written["agreement"]] == [1, 2, 3]
    assert all(agreed["probabilities"] <= 1e-5 for agreed in written["agreement"])
    assert written["parameters"] >= 8 * 3 * 9 + 8 * 5 + 5
    assert sorted(path.name for path in model.path.parent.iterdir()) == ["model.onnx", "report.json"]


def test_the_next_version_is_taken(tmp_path: Path) -> None:
    assert import_graph(build_classifier(), tmp_path).report.version == "1"
    (tmp_path / "zoo" / "thing" / "9").mkdir()
    (tmp_path / "zoo" / "thing" / "notes").mkdir()
    assert import_graph(build_classifier(), tmp_path).report.version == "10"


@pytest.mark.slow
def test_the_golden_set_of_a_large_input_stays_within_its_limit(tmp_path: Path) -> None:
    """512 pixels a side, of a resize to 585: larger than any of our own networks."""
    model = import_graph(build_classifier(size=512), tmp_path)
    assert model.contract.input.resize_to == 585
    assert model.engine.check_golden_set().images == 8
    assert 2 * MAX_SIDE**2 <= MAX_GOLDEN_PIXELS  # the largest is twice as wide as high


def test_nothing_of_the_preset_is_lost_on_the_way_to_the_service(tmp_path: Path) -> None:
    """The file in plain ONNX Runtime is the whole pipeline except for the resize."""
    graph = build_classifier(layout="nhwc")
    model = import_graph(graph, tmp_path, preprocessing=PreprocessingOptions(preset=INCEPTION))
    session = onnxruntime.InferenceSession(model.path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    (said,) = session.run(["probabilities"], {"pixels": pixels})
    wanted = softmax(run_onnx(graph, (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)))
    assert np.abs(said - wanted).max() <= 1e-6

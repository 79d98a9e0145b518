"""Presets, and options that override their values."""

from __future__ import annotations

import re
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

from fovea.export.importer.graph_input import GraphInput, Layout
from fovea.export.importer.preprocessing import (
    CLIP,
    KERAS_MOBILENET,
    PRESETS,
    Normalization,
    PreprocessingOptions,
    Preset,
)
from fovea.export.importer.wrap import _add_preprocessing, _NodeBuilder
from fovea.service.artifact.contract import (
    Interpolation,
    Resize,
)
from tests.documents import read_page
from tests.export.classifiers import (
    Array,
    build_classifier,
    resize_and_crop,
    run_onnx,
    softmax,
)
from tests.export.importer.test_pipeline import IMAGES, find_largest_difference
from tests.export.imports import import_graph


def apply_preset(preset: Preset, image: bytes) -> Array:
    """Apply a preset, written out independently: float32 (1, 16, 16, 3)."""
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
def test_preset_matches_its_source(tmp_path: Path, preset: Preset, layout: str) -> None:
    graph = build_classifier(layout=layout)
    model = import_graph(graph, tmp_path, preprocessing=PreprocessingOptions(preset=preset))
    axes = (0, 3, 1, 2) if layout == "nchw" else (0, 1, 2, 3)
    expected = [softmax(run_onnx(graph, apply_preset(preset, image).transpose(axes))) for image in IMAGES]
    assert find_largest_difference(model, expected) <= 1e-5
    assert layout in model.facts["layout"]
    assert preset.source in model.facts["normalise"]


def test_documentation_lists_every_preset() -> None:
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
def test_presets_scale_the_resize_with_the_input(preset: str, side: int, resize: int) -> None:
    assert PreprocessingOptions(preset=PRESETS[preset]).build_geometry(side, side).resize_to == resize


CAFFE = PreprocessingOptions(
    mean=(103.939, 116.779, 123.68),
    std=(1.0, 1.0, 1.0),
    bgr=True,
    resize=20,
    interpolation=Interpolation.HAMMING,
)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_bgr_channels_and_values_up_to_255_are_supported(tmp_path: Path, layout: str) -> None:
    graph = build_classifier(layout=layout, spread=0.02)
    model = import_graph(graph, tmp_path, preprocessing=CAFFE)
    axes = (0, 3, 1, 2) if layout == "nchw" else (0, 1, 2, 3)
    expected = []
    for image in IMAGES:
        values = resize_and_crop(image, 20, 16, Image.Resampling.HAMMING)[..., ::-1] - np.array(
            [103.939, 116.779, 123.68], np.float32
        )
        expected.append(softmax(run_onnx(graph, values.transpose(axes))))
    assert find_largest_difference(model, expected) <= 1e-5
    assert "BGR" in model.facts["normalise"]
    assert "scale derived from mean and std" in model.facts["normalise"]


def test_options_override_the_preset(tmp_path: Path) -> None:
    options = PreprocessingOptions(
        preset=PRESETS["imagenet"], mean=(0.1, 0.2, 0.3), interpolation=Interpolation.LANCZOS, resize=17
    )
    assert options.normalization == Normalization(1 / 255, (0.1, 0.2, 0.3), (0.229, 0.224, 0.225))
    geometry = options.build_geometry(16, 16)
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
def test_normalisation_equals_handwritten_arithmetic(
    mean: tuple[float, float, float], std: tuple[float, float, float], scale: float, bgr: bool
) -> None:
    """The arithmetic is equal to the last bit in numpy and in the graph, for both channel orders."""
    normalization = Normalization(scale, mean, std, bgr)
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(1, 16, 16, 3)
    values = (pixels[..., ::-1] if bgr else pixels).astype(np.float32)
    values = values / np.float32(round(1 / scale, 1)) if scale < 0.1 else values * np.float32(scale)
    expected = (values - np.array(mean, np.float32)) / np.array(std, np.float32)
    assert np.array_equal(normalization(pixels), expected)
    for layout, expected_input in ((Layout.NHWC, expected), (Layout.NCHW, expected.transpose(0, 3, 1, 2))):
        steps = _NodeBuilder()
        graph_input = GraphInput("image", np.dtype(np.float32), layout, 16, 16, None, ())
        _add_preprocessing(steps, "pixels", graph_input, normalization)
        graph = helper.make_graph(
            steps.pop_nodes(),
            "first steps",
            [helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, pixels.shape)],
            [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, expected_input.shape)],
            steps.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        (output,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"pixels": pixels})
        assert np.array_equal(output, expected_input)
    assert normalization.with_reversed_channels.with_reversed_channels == normalization
    assert np.array_equal(normalization.with_reversed_channels(pixels)[..., ::-1], normalization(pixels))

"""Presets, and options that override their values."""

from __future__ import annotations

import re
from itertools import product
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

from fovea.export.importer.preprocessing import (
    CAFFE,
    CLIP,
    KERAS_MOBILENET,
    PRESETS,
    RAW,
    Normalization,
    PreprocessingOptions,
    Preset,
)
from fovea.export.node_builder import NodeBuilder
from fovea.export.pixel_steps import PixelSteps
from fovea.service.artifact.contract import (
    Interpolation,
)
from fovea.service.artifact.geometry import CropStep, Fit, ResizeStep
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
    if preset is RAW:
        return resize_and_crop(image, 18, 16, Image.Resampling.BICUBIC)
    if preset is CAFFE:
        blue_green_red = np.array([103.939, 116.779, 123.68], np.float32)
        return resize_and_crop(image, 18, 16, Image.Resampling.BILINEAR)[..., ::-1] - blue_green_red
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
    graph = build_classifier(layout=layout, spread=0.02 if preset in (RAW, CAFFE) else 3.0)
    model = import_graph(graph, tmp_path, preprocessing=PreprocessingOptions(preset=preset))
    axes = (0, 3, 1, 2) if layout == "nchw" else (0, 1, 2, 3)
    expected = [softmax(run_onnx(graph, apply_preset(preset, image).transpose(axes))) for image in IMAGES]
    assert find_largest_difference(model, expected) <= 1e-5
    assert layout in model.facts["layout"]
    assert preset.source in model.facts["normalise"]


def test_documentation_lists_every_preset() -> None:
    table = read_page("importing").partition("## Presets")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE)
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
        ("raw", 224, 256),
        ("caffe", 224, 256),
    ],
)
def test_presets_scale_the_resize_with_the_input(preset: str, side: int, resize: int) -> None:
    assert (
        PreprocessingOptions(preset=PRESETS[preset]).build_geometry(side, side).longest_resize_side == resize
    )


CAFFE_OPTIONS = PreprocessingOptions(
    mean=(103.939, 116.779, 123.68),
    std=(1.0, 1.0, 1.0),
    bgr=True,
    resize=20,
    interpolation=Interpolation.HAMMING,
)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_bgr_channels_and_values_up_to_255_are_supported(tmp_path: Path, layout: str) -> None:
    graph = build_classifier(layout=layout, spread=0.02)
    model = import_graph(graph, tmp_path, preprocessing=CAFFE_OPTIONS)
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
    assert geometry.steps[0] == ResizeStep(Fit.COVER, 17, 17, Interpolation.LANCZOS)
    geometry = PreprocessingOptions(preset=KERAS_MOBILENET, resize=20).build_geometry(16, 16)
    assert geometry.steps == (ResizeStep(Fit.COVER, 20, 20, Interpolation.BILINEAR), CropStep(16, 16))
    geometry = PreprocessingOptions(preset=CLIP, stretch=True).build_geometry(16, 16)
    assert geometry.steps == (ResizeStep(Fit.STRETCH, 16, 16, Interpolation.BICUBIC),)


def run_steps(normalization: Normalization, pixels: Array) -> dict[tuple[bool, bool], list[Array]]:
    """Return the results of the steps in both forms, by (`has_planes`, `is_merged`)."""
    height, width = pixels.shape[1:3]
    builder = NodeBuilder()
    cases = list(product((False, True), repeat=3))
    outputs = [
        PixelSteps(height, width, normalization.operations, normalization.bgr, has_planes, is_merged).add_to(
            builder, "pixels", as_planes=as_planes
        )
        for has_planes, is_merged, as_planes in cases
    ]
    shape: list[int | str] = ["batch", height, width, 3]
    graph = helper.make_graph(
        builder.pop_nodes(),
        "first steps",
        [helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * 4) for name in outputs],
        builder.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    results = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"pixels": pixels})
    by_kind: dict[tuple[bool, bool], list[Array]] = {}
    for (has_planes, is_merged, _), result in zip(cases, results, strict=True):
        by_kind.setdefault((has_planes, is_merged), []).append(result)
    return by_kind


numbers = st.floats(-200, 200, width=32)
positive = st.floats(0.015625, 128, width=32)


@settings(max_examples=60)
@given(
    st.tuples(numbers, numbers, numbers),
    st.tuples(positive, positive, positive),
    st.sampled_from([1.0, 1 / 255, 1 / 127.5, 0.1234, 3.0]),
    st.booleans(),
)
def test_normalisation_equals_handwritten_arithmetic(
    mean: tuple[float, float, float], std: tuple[float, float, float], scale: float, bgr: bool
) -> None:
    """The arithmetic is equal to the last bit in numpy and in the graph, or nearly equal if it is merged."""
    normalization = Normalization(scale, mean, std, bgr)
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(2, 8, 16, 3)
    values = (pixels[..., ::-1] if bgr else pixels).astype(np.float32)
    values = values / np.float32(round(1 / scale, 1)) if scale < 0.1 else values * np.float32(scale)
    expected = (values - np.array(mean, np.float32)) / np.array(std, np.float32)
    assert np.array_equal(normalization(pixels), expected)
    limit = 4e-7 * (np.abs(values) + np.abs(np.array(mean))).max() / min(std)
    for (has_planes, is_merged), results in run_steps(normalization, pixels).items():
        for result in results:
            difference = result - (expected.transpose(0, 3, 1, 2) if has_planes else expected)
            assert np.abs(difference).max() <= (limit if is_merged else 0)
    assert normalization.with_reversed_channels.with_reversed_channels == normalization
    assert np.array_equal(normalization.with_reversed_channels(pixels)[..., ::-1], normalization(pixels))

"""Each preset on a model of its kind is as good as the publisher's own pipeline.

The models know the pictures of this test, prepared by Pillow and numpy as the publisher does it, on the axes
and with the last steps that this publisher's files have. A picture that is prepared in another way is unknown
to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.preprocessing import PRESETS, PreprocessingOptions
from fovea.service.artifact.geometry import CropStep, Fit, Interpolation, ResizeStep
from tests.export.classifiers import Array, run_onnx, stretch_image
from tests.export.imports import import_graph
from tests.pictures import encode_image

SIDE = 32
LABELS = [f"picture {number}" for number in range(12)]
UNKNOWN = "none of them"
NEAR = 0.01
"""Mean squared difference, as a share of the pictures' variance, above which a picture is unknown."""
SURE = 8.0
"""Logit of a known picture, relative to that of an unknown picture."""


def draw_photo(seed: int) -> Image.Image:
    """Draw coarse and fine noise, 152 x 104, that any other crop, stretch or filter changes."""
    random = np.random.default_rng(seed // 2)
    coarse = Image.fromarray(random.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize(
        (152, 104), Image.Resampling.BICUBIC
    )
    fine = np.random.default_rng(100 + seed).normal(0, 1, (52, 76, 3)).repeat(2, axis=0).repeat(2, axis=1)
    return Image.fromarray((0.6 * np.asarray(coarse) + 50 + 30 * fine).clip(0, 255).astype(np.uint8))


def resize_and_crop_middle(image: bytes, resize: int, resample: Image.Resampling) -> Array:
    """Resize the shorter side to `resize` and crop the middle: float64 (SIDE, SIDE, 3), 0 … 255."""
    picture = Image.open(BytesIO(image)).convert("RGB")
    width, height = picture.size
    picture = picture.resize((int(resize * width / height), resize), resample)
    left, top = round((picture.width - SIDE) / 2), round((picture.height - SIDE) / 2)
    return np.asarray(picture.crop((left, top, left + SIDE, top + SIDE)), np.float64)


@dataclass(frozen=True)
class Publisher:
    """A publisher's preprocessing, and the form of its ONNX files."""

    prepare: Callable[[bytes], Array]
    """Function from an image to pixels, float64 (SIDE, SIDE, 3)."""
    layout: str
    softmax: bool


BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC

PUBLISHERS = {
    "imagenet": Publisher(
        lambda image: (
            (resize_and_crop_middle(image, 37, BILINEAR) / 255 - [0.485, 0.456, 0.406])
            / [0.229, 0.224, 0.225]
        ),
        "nchw",
        softmax=False,
    ),
    "keras-mobilenet": Publisher(
        lambda image: resize_and_crop_middle(image, 37, BILINEAR) / 127.5 - 1, "nhwc", softmax=True
    ),
    "inception": Publisher(
        lambda image: (resize_and_crop_middle(image, 36, BICUBIC) / 255 - 0.5) / 0.5, "nhwc", softmax=True
    ),
    "clip": Publisher(
        lambda image: (
            (resize_and_crop_middle(image, 32, BICUBIC) / 255 - [0.48145466, 0.4578275, 0.40821073])
            / [0.26862954, 0.26130258, 0.27577711]
        ),
        "nchw",
        softmax=False,
    ),
    "zero-one": Publisher(
        lambda image: resize_and_crop_middle(image, 32, BILINEAR) / 255, "nchw", softmax=True
    ),
    "raw": Publisher(lambda image: resize_and_crop_middle(image, 37, BICUBIC), "nhwc", softmax=True),
    "caffe": Publisher(
        lambda image: resize_and_crop_middle(image, 37, BILINEAR)[..., ::-1] - [103.939, 116.779, 123.68],
        "nhwc",
        softmax=True,
    ),
}


def build_lookup_model(images: Array, publisher: Publisher) -> onnx.ModelProto:
    """Build a model that knows only these pictures (labels, SIDE, SIDE, 3)."""
    scale = SURE / (NEAR * images.var())
    planes = images.transpose(0, 3, 1, 2) if publisher.layout == "nchw" else images
    rows = planes.reshape(len(images), -1)
    weights = {
        "matrix": (2 * scale / rows.shape[1] * rows.T).astype(np.float32),
        "bias": (-scale * (rows**2).mean(axis=1)).astype(np.float32),
        "scale": np.array(scale, np.float32),
        "near": np.array(-SURE, np.float32),
    }
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "matrix", "bias"], ["known"]),
        helper.make_node("Mul", ["flat", "flat"], ["squares"]),
        helper.make_node("ReduceMean", ["squares"], ["square"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["square", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "near"], ["strange"]),
        helper.make_node("Concat", ["known", "strange"], ["logits"], axis=1),
        helper.make_node("Softmax" if publisher.softmax else "Identity", ["logits"], ["scores"]),
    ]
    sides: list[int | str | None] = (
        ["N", 3, SIDE, SIDE] if publisher.layout == "nchw" else ["N", SIDE, SIDE, 3]
    )
    graph = helper.make_graph(
        nodes,
        "knowing",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, sides)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", len(images) + 1])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Write a picture for each label; return the pictures by path."""
    folder = tmp_path_factory.mktemp("photos")
    images: dict[str, bytes] = {}
    for seed, label in enumerate(LABELS):
        path = folder / label / "photo.png"
        path.parent.mkdir()
        path.write_bytes(images.setdefault(str(path), encode_image(draw_photo(seed), "PNG")))
    return images


def build_model_for(name: str, photos: dict[str, bytes]) -> onnx.ModelProto:
    return build_lookup_model(
        np.stack([PUBLISHERS[name].prepare(image) for image in photos.values()]), PUBLISHERS[name]
    )


def test_every_preset_has_a_publisher() -> None:
    assert set(PUBLISHERS) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_agrees_with_the_publisher_pipeline(
    tmp_path: Path, photos: dict[str, bytes], name: str
) -> None:
    graph = build_model_for(name, photos)
    folder = next(iter(map(Path, photos))).parents[1]
    model = import_graph(
        graph, tmp_path, [*LABELS, UNKNOWN], PreprocessingOptions(preset=PRESETS[name]), check=folder
    )
    assert model.report.check is not None
    assert model.report.check.top1 == 1
    own_score = model.report.check.others.pop("own")
    assert own_score[1] > 0.9
    others = {other: true_probability for other, (_, true_probability) in model.report.check.others.items()}
    assert len(others) == len(PRESETS)  # the other presets, and the other order of colours
    assert max(others.values()) < 0.5, others
    values = np.stack([PUBLISHERS[name].prepare(image) for image in photos.values()]).astype(np.float32)
    expected = run_onnx(graph, values.transpose(0, 3, 1, 2) if PUBLISHERS[name].layout == "nchw" else values)
    assert np.array_equal(expected.argmax(axis=1), np.arange(len(LABELS)))
    output = np.concatenate([model(image) for image in photos.values()])
    assert np.array_equal(output.argmax(axis=1), np.arange(len(LABELS)))
    if PUBLISHERS[name].softmax:
        assert np.abs(output - expected).max() <= 1e-5


def test_keras_mobilenet_with_nearest_stretch_is_refused(tmp_path: Path, photos: dict[str, bytes]) -> None:
    """The preset was once `load_img(path, target_size=…)`; labelled images show that it is worse."""
    graph = build_model_for("keras-mobilenet", photos)
    folder = next(iter(map(Path, photos))).parents[1]
    old_options = PreprocessingOptions(
        preset=PRESETS["keras-mobilenet"], stretch=True, interpolation=Interpolation.NEAREST
    )
    with pytest.raises(ImportRefused, match="import it with --preset keras-mobilenet"):
        import_graph(graph, tmp_path, [*LABELS, UNKNOWN], old_options, check=folder)
    values = [stretch_image(image, SIDE, Image.Resampling.NEAREST) / 127.5 - 1 for image in photos.values()]
    output = run_onnx(graph, np.concatenate(values).astype(np.float32))
    assert (output.argmax(axis=1) == np.arange(len(LABELS))).mean() < 0.9


def test_zero_one_preset_stretches_to_oblong_inputs(tmp_path: Path) -> None:
    stretched = PreprocessingOptions(preset=PRESETS["zero-one"]).build_geometry(16, 24)
    assert stretched.steps == (ResizeStep(Fit.STRETCH, 16, 24, Interpolation.BILINEAR),)
    cropped = PreprocessingOptions(preset=PRESETS["zero-one"], resize=30).build_geometry(16, 24)
    assert cropped.steps == (ResizeStep(Fit.COVER, 30, 30, Interpolation.BILINEAR), CropStep(16, 24))
    cropped = PreprocessingOptions(preset=PRESETS["clip"]).build_geometry(16, 24)
    assert cropped.steps == (ResizeStep(Fit.COVER, 24, 24, Interpolation.BICUBIC), CropStep(16, 24))

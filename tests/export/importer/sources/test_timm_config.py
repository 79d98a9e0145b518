"""Preprocessing in timm's configuration."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fovea.export.importer.preprocessing import Normalization
from fovea.export.importer.sources.timm_config import read_timm_config
from fovea.service.artifact.geometry import CropStep, Fit, Interpolation, PadStep, ResizeStep, Rounding, Step

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PRETRAINED = {
    "tag": "a1_in1k",
    "custom_load": False,
    "input_size": [3, 224, 224],
    "test_input_size": [3, 288, 288],
    "fixed_input_size": False,
    "interpolation": "bicubic",
    "crop_pct": 0.95,
    "test_crop_pct": 1.0,
    "crop_mode": "center",
    "mean": list(MEAN),
    "std": list(STD),
    "num_classes": 1000,
    "pool_size": [7, 7],
    "first_conv": "conv1",
    "classifier": "fc",
    "license": "apache-2.0",
}
BICUBIC = Interpolation.BICUBIC


def read_steps(**changes: Any) -> tuple[Step, ...]:
    facts = read_timm_config({"architecture": "resnet18", "pretrained_cfg": {**PRETRAINED, **changes}})
    assert facts.geometry is not None
    return facts.geometry.steps


def test_crop_of_the_centre_follows_a_resize_of_the_shorter_side() -> None:
    assert read_steps() == (ResizeStep(Fit.COVER, 235, 235, BICUBIC), CropStep(224, 224))
    assert read_steps(crop_pct=1.0)[0] == ResizeStep(Fit.COVER, 224, 224, BICUBIC)


def test_resize_rounds_down_as_timm_does() -> None:
    steps = read_steps(crop_pct=0.875, input_size=[3, 299, 299])
    assert steps == (ResizeStep(Fit.COVER, 341, 341, BICUBIC), CropStep(299, 299))


def test_squash_stretches_images() -> None:
    assert read_steps(crop_mode="squash", crop_pct=1) == (ResizeStep(Fit.STRETCH, 224, 224, BICUBIC),)
    assert read_steps(crop_mode="squash", crop_pct=0.875) == (
        ResizeStep(Fit.STRETCH, 256, 256, BICUBIC),
        CropStep(224, 224),
    )


def test_border_has_the_colour_of_the_mean() -> None:
    assert read_steps(crop_mode="border", crop_pct=1) == (
        ResizeStep(Fit.CONTAIN, 224, 224, BICUBIC, Rounding.ROUND),
        PadStep(224, 224, (124, 116, 104)),
    )


def test_oblong_input_is_resized_bilinearly_as_timm_does() -> None:
    assert read_steps(input_size=[3, 128, 256], crop_pct=1.0) == (
        ResizeStep(Fit.COVER, 128, 256, Interpolation.BILINEAR, Rounding.ROUND),
        CropStep(128, 256),
    )


def test_old_files_have_the_values_at_the_top() -> None:
    facts = read_timm_config({"architecture": "resnet18", **PRETRAINED})
    assert facts.problems == ()
    assert facts.normalization == Normalization(1 / 255, MEAN, STD)


@pytest.mark.parametrize("key", ["mean", "std", "input_size", "interpolation", "crop_pct"])
def test_missing_values_are_not_taken_from_imagenet(key: str) -> None:
    values = {name: value for name, value in PRETRAINED.items() if name != key}
    facts = read_timm_config({"architecture": "resnet18", "pretrained_cfg": values})
    assert facts.problems == (f"it does not state {key}",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": [1, 28, 28]}, "an image in colour has three channels"),
        ({"input_size": 224}, "input_size is 224; it takes"),
        ({"crop_pct": 0}, "crop_pct is 0; it must be"),
        ({"crop_pct": 1.2}, "crop_pct is 1.2; it must be"),
        ({"interpolation": "random"}, "interpolation is 'random', which is not a filter"),
        ({"crop_mode": "border"}, "crop_mode is border with crop_pct 0.95; Fovea reproduces 1"),
        ({"crop_mode": "tile"}, "crop_mode is 'tile'; Fovea reproduces"),
        ({"std": [0, 1, 1]}, "it must be greater than 0"),
        ({"mean": "black"}, "mean is 'black', which is not a number"),
    ],
)
def test_unusable_values_are_problems(changes: dict[str, Any], message: str) -> None:
    facts = read_timm_config({"pretrained_cfg": {**PRETRAINED, **changes}})
    assert len(facts.problems) == 1
    assert re.search(message, facts.problems[0])

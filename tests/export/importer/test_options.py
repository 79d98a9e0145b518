"""Options of an import: missing, contradictory and malformed ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.inspect import ImportRequest
from fovea.export.importer.option_values import find_preset, parse_channel_values, parse_number, parse_size
from fovea.export.importer.pipeline import import_model
from fovea.export.importer.preprocessing import IMAGENET, KERAS_MOBILENET, PreprocessingOptions
from fovea.service.artifact.contract import Interpolation
from tests.export.classifiers import build_classifier
from tests.export.importer.test_refused import assert_refused

GEOMETRY: dict[str, Any] = {"resize": 18, "interpolation": Interpolation.BILINEAR}
ONES = (1.0, 1.0, 1.0)
ZEROS = (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [
        (
            PreprocessingOptions(**GEOMETRY),
            r"does not say how to normalise pixels: give --preset \(imagenet, keras-mobilenet, .*--mean",
        ),
        (PreprocessingOptions(mean=ZEROS, **GEOMETRY), "or --mean and --std"),
        (PreprocessingOptions(mean=ZEROS, std=ONES, **GEOMETRY), "give --scale 1 or --scale 1/255"),
        (
            PreprocessingOptions(mean=ZEROS, std=ZEROS, **GEOMETRY),
            "must be finite, --std greater than 0 and --scale not 0",
        ),
        (
            PreprocessingOptions(mean=ZEROS, std=ONES, scale=0, **GEOMETRY),
            "must be finite, --std greater than 0 and --scale not 0",
        ),
        (PreprocessingOptions(mean=(np.nan,) * 3, std=ONES, scale=1, **GEOMETRY), "must be finite"),
        (
            PreprocessingOptions(mean=ZEROS, std=ONES, scale=1),
            "the file does not say how to resize images: give --preset, or",
        ),
        (
            PreprocessingOptions(mean=ZEROS, std=ONES, scale=1, resize=18),
            "--interpolation .*nearest, box, bilinear",
        ),
        (
            PreprocessingOptions(mean=ZEROS, std=ONES, scale=1, interpolation=Interpolation.BOX),
            "one of --resize and --stretch",
        ),
        (
            PreprocessingOptions(preset=IMAGENET, resize=2801),
            "--resize is 2801 pixels; the maximum is 2800",
        ),
        (PreprocessingOptions(preset=IMAGENET, resize=15), "--resize 15 is less than the input of 16 x 16"),
        (PreprocessingOptions(preset=IMAGENET, resize=18, stretch=True), "leave out --resize"),
    ],
)
def test_missing_or_invalid_options_are_refused(
    tmp_path: Path, preprocessing: PreprocessingOptions, message: str
) -> None:
    assert_refused(tmp_path, message, build_classifier(), preprocessing=preprocessing)


@pytest.mark.parametrize("options", [{"mean": ZEROS}, {"std": ONES}, {"scale": 1.0}, {"bgr": True}])
def test_uint8_graphs_refuse_normalisation_options(tmp_path: Path, options: dict[str, Any]) -> None:
    preprocessing = replace(PreprocessingOptions(preset=KERAS_MOBILENET), **options)
    (option,) = options
    assert_refused(
        tmp_path,
        f"normalises them itself; leave out --{option}",
        build_classifier(dtype="uint8"),
        preprocessing=preprocessing,
    )


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "ä"])
def test_invalid_model_names_are_refused(tmp_path: Path, name: str) -> None:
    request = ImportRequest(tmp_path / "x", tmp_path / "y", name, tmp_path / "zoo", PreprocessingOptions())
    with pytest.raises(ImportRefused, match=r"--name is .*; use letters, digits and"):
        import_model(request)


@pytest.mark.parametrize(
    ("parse_value", "message"),
    [
        (
            lambda: find_preset("imagnet"),
            "there is no preset 'imagnet'; there are imagenet, keras-mobilenet",
        ),
        (
            lambda: parse_channel_values("--mean", "1,2"),
            "--mean is '1,2'; it takes one number or three, such as",
        ),
        (lambda: parse_channel_values("--std", "1,two,3"), "--std is 'two', which is not a number"),
        (lambda: parse_number("--scale", "1/0"), "--scale is '1/0', which is not a number"),
        (lambda: parse_size("--size", "0"), "--size is '0'; it takes pixels such as 224"),
        (lambda: parse_size("--size", "1x2x3"), "--size is '1x2x3'"),
    ],
)
def test_malformed_option_values_are_refused(parse_value: Callable[[], object], message: str) -> None:
    with pytest.raises(ImportRefused, match=message):
        parse_value()


def test_option_values_are_parsed() -> None:
    assert parse_channel_values("--mean", "0.5") == (0.5, 0.5, 0.5)
    assert parse_channel_values("--mean", "1, -2,3e0") == (1, -2, 3)
    assert parse_number("--scale", "1/255") == 1 / 255
    assert parse_size("--size", "224") == (224, 224)
    assert parse_size("--size", "224x320") == (224, 320)

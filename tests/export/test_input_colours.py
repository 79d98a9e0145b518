"""The description of the input says which colour each of its maps shows, and the range of the values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
from fovea.service.explain.introspection import IntrospectedModel
from tests.export.classifiers import build_classifier
from tests.export.imports import PLAN, import_graph

pytestmark = pytest.mark.long

NO_NORMALISATION = PreprocessingOptions(preset=IMAGENET, mean=(0, 0, 0), std=(1, 1, 1), scale=1 / 255)
RGB = ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("graph_options", "preprocessing", "channels", "lowest", "highest"),
    [
        ({}, PreprocessingOptions(preset=IMAGENET), RGB, -2.1179, 2.64),
        ({}, NO_NORMALISATION, RGB, 0, 1),
        ({"layout": "nhwc"}, NO_NORMALISATION, RGB, 0, 1),
        (
            {},
            PreprocessingOptions(preset=IMAGENET, mean=(127.5,) * 3, std=(127.5,) * 3, bgr=True),
            ["blue", "green", "red"],
            -1,
            1,
        ),
        ({"channels": 1}, NO_NORMALISATION, ["grey"], 0, 1),
    ],
    ids=["ImageNet", "0 to 1", "channels last", "BGR", "one channel"],
)
def test_colours_and_range_are_those_of_the_graph(
    tmp_path: Path,
    graph_options: dict[str, Any],
    preprocessing: PreprocessingOptions,
    channels: list[str],
    lowest: float,
    highest: float,
) -> None:
    model = import_graph(build_classifier(**graph_options), tmp_path, preprocessing=preprocessing)
    first = IntrospectedModel(model.path.read_bytes(), model.contract, PLAN).layers[0]
    assert first.kind == "Input"
    assert first.attributes["channels"] == channels
    assert first.attributes["lowest"] == pytest.approx(lowest, abs=1e-3)
    assert first.attributes["highest"] == pytest.approx(highest, abs=1e-3)

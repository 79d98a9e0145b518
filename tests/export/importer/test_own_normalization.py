"""Graphs that begin with a normalisation of their own, and options that normalise before it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fovea.export.importer.preprocessing import (
    CAFFE,
    IMAGENET,
    KERAS_MOBILENET,
    RAW,
    PreprocessingOptions,
    Preset,
)
from tests.export.classifiers import build_classifier
from tests.export.importer.test_labelled_images import COLOURS, build_colour_model, draw_labelled_images
from tests.export.imports import import_graph

F32 = np.float32
Step = tuple[str, Any]


def prepend_steps(graph: onnx.ModelProto, *steps: Step, is_computed: bool = False) -> onnx.ModelProto:
    """Put arithmetic with constants, or other operators with attributes, before everything else.

    Constants that are computed have a node of their own.
    """
    name = graph.graph.input[0].name
    for node in graph.graph.node:
        for index, one in enumerate(node.input):
            if one == name:
                node.input[index] = "start"
    nodes, last = [], name
    for number, (operator, value) in enumerate(steps):
        inputs = [last]
        if not isinstance(value, dict):
            constant = numpy_helper.from_array(np.asarray(value, F32), f"step {number} constant")
            inputs.append(constant.name)
            graph.graph.initializer.append(constant)
            if is_computed:
                inputs[1] = f"step {number} computed"
                nodes.append(helper.make_node("Neg", [constant.name], [f"step {number} negative"]))
                nodes.append(helper.make_node("Neg", [f"step {number} negative"], [inputs[1]]))
        last = "start" if number == len(steps) - 1 else f"step {number}"
        attributes = value if isinstance(value, dict) else {}
        nodes.append(helper.make_node(operator, inputs, [last], **attributes))
    rest = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend([*nodes, *rest])
    return graph


PLANES = np.array([0.485, 0.456, 0.406])[:, None, None]
BEGINNINGS: dict[str, tuple[str, Sequence[Step], str]] = {
    "Rescaling of Keras": ("nhwc", [("Mul", 1 / 127.5), ("Sub", 1)], r"\* 0\.007843, - 1"),
    "EfficientNet": (
        "nhwc",
        [("Mul", 1 / 255), ("Sub", [0.485, 0.456, 0.406]), ("Div", [0.229, 0.224, 0.225])],
        r"\* 0\.003922, - \(0\.485, 0\.456, 0\.406\), / \(0\.229, 0\.224, 0\.225\)",
    ),
    "channels first": ("nchw", [("Div", 255), ("Sub", PLANES)], r"/ 255, - \(0\.485, 0\.456, 0\.406\)"),
    "after a Transpose": (
        "nhwc",
        [("Transpose", {"perm": [0, 3, 1, 2]}), ("Div", 255), ("Transpose", {"perm": [0, 2, 3, 1]})],
        "/ 255",
    ),
    "after a Cast": ("nchw", [("Cast", {"to": TensorProto.FLOAT}), ("Add", -128)], r"\+ -128"),
}


@pytest.mark.parametrize("is_computed", [False, True])
@pytest.mark.parametrize("preset", [IMAGENET, KERAS_MOBILENET, CAFFE], ids=lambda preset: preset.name)
@pytest.mark.parametrize("case", BEGINNINGS)
def test_second_normalisation_is_a_warning(
    tmp_path: Path, case: str, preset: Preset, is_computed: bool
) -> None:
    layout, steps, description = BEGINNINGS[case]
    graph = prepend_steps(build_classifier(layout=layout), *steps, is_computed=is_computed)
    warning = import_graph(graph, tmp_path, preprocessing=PreprocessingOptions(preset=preset)).facts[
        "warning"
    ]
    assert warning.startswith("pixels are normalised twice: the graph begins with a normalisation of its own")
    assert re.search(rf"\({description}\), and gets -?\S+ … \S+ from preset {preset.name}", warning)
    assert warning.endswith("if it takes 0 … 255, import it with --preset raw")


@pytest.mark.parametrize("case", BEGINNINGS)
def test_raw_pixels_need_no_warning(tmp_path: Path, case: str) -> None:
    layout, steps, _ = BEGINNINGS[case]
    graph = prepend_steps(build_classifier(layout=layout), *steps)
    model = import_graph(graph, tmp_path, preprocessing=PreprocessingOptions(preset=RAW))
    assert "warning" not in model.facts
    assert model.facts["normalise"].startswith("RGB, 0 … 255 as they are (preset raw: ")


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [("Mul", 1), ("Add", 0)],
        [("Relu", {}), ("Div", 255)],
        [("Mul", np.ones((1, 3, 16, 16)) / 255)],
    ],
    ids=["none", "no effect", "behind a layer", "for each place"],
)
def test_other_beginnings_are_no_normalisation(tmp_path: Path, steps: list[Step]) -> None:
    graph = prepend_steps(build_classifier(), *steps) if steps else build_classifier()
    assert "warning" not in import_graph(graph, tmp_path).facts


def test_report_says_that_nothing_was_checked_on_images(tmp_path: Path) -> None:
    labels = list(COLOURS)
    (tmp_path / "plain").mkdir()
    unchecked = import_graph(build_colour_model(), tmp_path / "plain", labels)
    assert unchecked.facts["check"].startswith("not checked on images; --check FOLDER")
    photos = draw_labelled_images(tmp_path / "photos", COLOURS, 3)
    (tmp_path / "checked").mkdir()
    assert "check" not in import_graph(build_colour_model(), tmp_path / "checked", labels, check=photos).facts

"""Graphs that take images of any size and resize them themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from fovea.export.importer.graph_input import read_graph_input
from fovea.export.importer.graph_resize import describe_own_resize
from fovea.export.importer.inspect import ImportRequest
from fovea.export.importer.option_values import parse_geometry
from fovea.export.importer.pipeline import import_model
from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
from tests.export.classifiers import build_classifier
from tests.export.importer.test_refused import assert_refused
from tests.export.imports import make_labels


def build_resizing_classifier(
    layout: str = "nchw", *, size: int | None = None, mode: str = "linear"
) -> onnx.ModelProto:
    """Build a graph that halves its pixels and resizes them to 16 x 24, as PyTorch exports `interpolate`.

    The sizes of the resize are those of the image but for the sides, which are constants.
    """
    model = build_classifier(layout=layout, size=size)
    graph = model.graph
    nodes = list(graph.node)
    nodes[0].input[0] = "resized"
    is_last = layout == "nhwc"
    constants = {"target": [16, 24], "0": [0], "end": [1 if is_last else 2], "3": [3], "4": [4]}
    graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "half"))
    graph.initializer.extend(
        numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items()
    )
    del graph.node[:]
    graph.node.extend(
        [
            helper.make_node("Mul", ["image", "half"], ["halved"]),
            helper.make_node("Shape", ["halved"], ["shape"]),
            helper.make_node("Slice", ["shape", "0", "end"], ["first"]),
            helper.make_node("Slice", ["shape", "3", "4"], ["last"]),
            helper.make_node("Concat", ["first", "target", *(["last"] * is_last)], ["sizes"], axis=0),
            helper.make_node("Resize", ["halved", "", "", "sizes"], ["resized"], mode=mode),
            *nodes,
        ]
    )
    return model


def describe(model: onnx.ModelProto, size: tuple[int, int]) -> list[str]:
    return [text for _, text in describe_own_resize(model, read_graph_input(model, None, size))]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_own_resize_is_reported_with_the_geometry_that_replaces_it(layout: str) -> None:
    (text,) = describe(build_resizing_classifier(layout), (32, 32))
    assert text == (
        "the graph resizes its input itself, to 16 x 24 (linear): images are resized twice, "
        "first to 32 x 32; --geometry 'resize stretch 16 x 24 bilinear no-antialias' resizes them once"
    )


def test_own_resize_to_the_same_size_is_reported_without_advice() -> None:
    (text,) = describe(build_resizing_classifier(mode="cubic"), (16, 24))
    assert text == "the graph resizes its input itself, to 16 x 24 (cubic)"


def test_other_graphs_have_no_own_resize() -> None:
    assert describe(build_classifier(size=None), (16, 16)) == []
    assert describe(build_resizing_classifier(size=32), (32, 32)) == []  # the graph takes one size only


def test_own_resize_is_a_fact_of_the_import_and_the_advice_works(tmp_path: Path) -> None:
    file, labels = tmp_path / "model.onnx", tmp_path / "labels.txt"
    onnx.save(build_resizing_classifier(), file)
    labels.write_text("\n".join(make_labels(5)))
    geometry = parse_geometry("--geometry", "resize stretch 16 x 24 bilinear no-antialias")
    request = ImportRequest(
        file, labels, "thing", tmp_path / "zoo", PreprocessingOptions(preset=IMAGENET), size=(32, 32)
    )
    facts = dict(import_model(request).facts)
    assert "resizes them once" in facts["own resize"]
    assert facts["geometry"].startswith("resize cover 37 x 37 bilinear, crop 32 x 32 (preset imagenet")
    preprocessing = PreprocessingOptions(preset=IMAGENET, geometry=geometry)
    facts = dict(import_model(replace(request, preprocessing=preprocessing, size=None)).facts)
    assert facts["own resize"] == "the graph resizes its input itself, to 16 x 24 (linear)"
    assert facts["size"] == "16 x 24 (the last step of --geometry; the graph takes any)"
    assert facts["geometry"] == "resize stretch 16 x 24 bilinear no-antialias (--geometry)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 18}, "--geometry names every step; leave out --resize"),
        ({"stretch": True}, "--geometry names every step; leave out --stretch"),
        ({}, "--geometry ends with 24 x 24 pixels; the graph takes 16 x 16"),
    ],
)
def test_geometry_that_contradicts_the_graph_or_options_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    geometry = parse_geometry("--geometry", "resize cover 32 bicubic, crop 24")
    preprocessing = PreprocessingOptions(preset=IMAGENET, geometry=geometry, **options)
    assert_refused(tmp_path, message, build_classifier(), preprocessing=preprocessing)

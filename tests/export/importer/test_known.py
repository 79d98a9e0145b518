"""The score of known images of an import: for graphs with logits, from the images of `--check`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from fovea.service.artifact.contract import Task
from tests.export.importer.test_labelled_images import COLOURS, build_colour_model, draw_labelled_images
from tests.export.imports import import_graph

LABELS = ["red", "green", "blue"]


def round_probabilities(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let the graph yield its probabilities in steps of 1/32, as networks of integers do."""
    graph = model.graph
    logits = graph.output[0].name
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == logits:
                node.output[index] = "logits"
    graph.node.extend(
        [
            helper.make_node("Mul", ["logits", "softness"], ["soft"]),
            helper.make_node("Softmax", ["soft"], ["exact"], axis=-1),
            helper.make_node("Mul", ["exact", "steps"], ["scaled"]),
            helper.make_node("Round", ["scaled"], ["rounded"]),
            helper.make_node("Div", ["rounded", "steps"], [logits]),
        ]
    )
    for name, value in (("softness", 0.2), ("steps", 32)):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    return model


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_labelled_images(tmp_path_factory.mktemp("photos") / "photos", COLOURS, 40)


def test_threshold_comes_from_the_images_of_the_check(tmp_path: Path, photos: Path) -> None:
    known = import_graph(build_colour_model(), tmp_path, LABELS, check=photos).contract.known
    assert known is not None
    assert known.images == 120
    assert 0.95 <= known.accepted < 0.97


def test_import_without_images_or_logits_has_no_score(tmp_path: Path, photos: Path) -> None:
    assert import_graph(build_colour_model(), tmp_path, LABELS).contract.known is None
    rounded = round_probabilities(build_colour_model())
    assert (
        import_graph(
            rounded, tmp_path, LABELS, check=photos, task=Task.MULTICLASS, tolerance=0.05
        ).contract.known
        is None
    )


def test_multilabel_import_has_a_score(tmp_path: Path, photos: Path) -> None:
    model = import_graph(build_colour_model(), tmp_path, LABELS, check=photos, task=Task.MULTILABEL)
    assert model.contract.known is not None

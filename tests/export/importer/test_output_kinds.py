"""Logits and probabilities of imported graphs, and the choice of the output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from fovea.service.artifact.contract import (
    Task,
)
from tests.export.classifiers import (
    GraphEnd,
    build_classifier,
    prepare_imagenet,
    run_onnx,
    sigmoid,
    softmax,
)
from tests.export.importer.test_pipeline import IMAGES, find_largest_difference
from tests.export.imports import import_graph

KINDS: dict[GraphEnd, str] = {
    "logits": "5 logits",
    "softmax": "5 probabilities that sum to 1",
    "hidden_softmax": "5 probabilities that sum to 1",
    "log_softmax": "5 logarithms of probabilities that sum to 1",
}


@pytest.mark.parametrize("end", KINDS)
def test_kind_of_output_does_not_depend_on_its_name(tmp_path: Path, end: GraphEnd) -> None:
    graph = build_classifier(end=end, names=("x", "logits" if end == "softmax" else "probabilities"))
    model = import_graph(graph, tmp_path)
    assert model.facts["values"] == f"{KINDS[end]} (measured by running the graph)"
    assert model.contract.task is Task.MULTICLASS
    logits = run_onnx(
        build_classifier(end="logits"), np.concatenate([prepare_imagenet(image, 18, 16) for image in IMAGES])
    )
    assert find_largest_difference(model, list(softmax(logits)[:, None])) <= 1e-5
    pixels = np.stack([model.pixels(image) for image in IMAGES])
    model_logits = model.engine.compute_logits(pixels)
    if end in ("logits", "softmax"):
        assert np.abs(model_logits - logits).max() < 1e-4
    assert np.abs(softmax(model_logits) - softmax(logits)).max() <= 1e-5
    assert ("assumed" in model.facts["task"]) == (end == "logits")


@pytest.mark.parametrize("end", ["logits", "sigmoid", "hidden_sigmoid"])
@pytest.mark.parametrize("count", [1, 4])
def test_sigmoids_are_detected_or_added(tmp_path: Path, end: GraphEnd, count: int) -> None:
    graph = build_classifier(end=end, count=count, spread=1)
    task = Task.BINARY if count == 1 else Task.MULTILABEL
    model = import_graph(graph, tmp_path, max(2, count), task=None if count == 1 else task)
    assert (model.contract.task, model.contract.thresholds) == (task, (0.5,) * count)
    positive = sigmoid(
        run_onnx(
            build_classifier(count=count, spread=1),
            np.concatenate([prepare_imagenet(image, 18, 16) for image in IMAGES]),
        )
    )
    expected = np.hstack([1 - positive, positive]) if count == 1 else positive
    assert find_largest_difference(model, list(expected[:, None])) <= 1e-5
    pixels = np.stack([model.pixels(image) for image in IMAGES])
    assert np.abs(sigmoid(model.engine.compute_logits(pixels)) - positive).max() <= 1e-4


def test_logits_between_0_and_1_are_still_logits(tmp_path: Path) -> None:
    """The values leave that range for images a thousand times as bright."""
    graph = build_classifier(count=1, spread=0.01)
    bias = next(tensor for tensor in graph.graph.initializer if tensor.name == "bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([0.5], np.float32), "bias"))
    model = import_graph(graph, tmp_path, 2)
    logits = run_onnx(graph, np.concatenate([prepare_imagenet(image, 18, 16) for image in IMAGES]))
    assert logits.min() >= 0
    assert logits.max() <= 1
    assert model.facts["values"].startswith("1 logits")
    assert (
        find_largest_difference(model, list(np.hstack([1 - sigmoid(logits), sigmoid(logits)])[:, None]))
        <= 1e-5
    )


@pytest.mark.parametrize("task", [None, Task.BINARY, Task.MULTICLASS])
@pytest.mark.parametrize("end", ["logits", "softmax", "hidden_softmax", "log_softmax"])
def test_two_values_are_binary_or_multiclass(tmp_path: Path, end: GraphEnd, task: Task | None) -> None:
    graph = build_classifier(end=end, count=2)
    model = import_graph(graph, tmp_path, 2, task=task)
    assert model.contract.task is (task or Task.BINARY)
    expected = softmax(
        run_onnx(
            build_classifier(count=2), np.concatenate([prepare_imagenet(image, 18, 16) for image in IMAGES])
        )
    )
    assert find_largest_difference(model, list(expected[:, None])) <= 1e-5
    assert model.contract.logit_count == (2 if task is Task.MULTICLASS else 1)


def test_single_value_without_a_label_axis_is_read(tmp_path: Path) -> None:
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
    assert find_largest_difference(model, list(np.hstack([1 - positive, positive])[:, None])) <= 1e-5


def test_output_that_fits_the_labels_is_selected(tmp_path: Path) -> None:
    graph = build_classifier()
    pooled = next(node.output[0] for node in graph.graph.node if node.op_type == "Flatten")
    graph.graph.output.insert(0, helper.make_tensor_value_info(pooled, onnx.TensorProto.FLOAT, ["N", 8]))
    graph.graph.node.append(helper.make_node("Neg", [pooled], ["unused"]))
    model = import_graph(graph, tmp_path)
    assert model.facts["output"] == "scores (the only one of 2 that fits the labels)"
    assert [value.name for value in onnx.load(model.path).graph.output] == ["logits", "probabilities"]
    assert "Neg" not in {layer.kind for layer in model.contract.layers}


def test_output_option_selects_among_fitting_outputs(tmp_path: Path) -> None:
    graph = build_classifier(end="softmax")
    logits_name = next(node.input[0] for node in graph.graph.node if node.op_type == "Softmax")
    graph.graph.output.append(helper.make_tensor_value_info(logits_name, onnx.TensorProto.FLOAT, ["N", 5]))
    model = import_graph(graph, tmp_path, output=logits_name)
    assert model.facts["output"] == f"{logits_name} (from --output)"
    assert model.facts["values"].startswith("5 logits")

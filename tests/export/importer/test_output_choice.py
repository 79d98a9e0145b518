"""Graphs with several outputs, maps, decisions, sigmoids of one label, and answers that cannot be served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fovea.export.importer.foreign_model import MissingInformation
from fovea.service.artifact.contract import Task
from fovea.service.artifact.inputs import find_original_output
from tests.export.classifiers import GraphEnd, build_classifier, prepare_imagenet, run_onnx, sigmoid, softmax
from tests.export.importer.test_pipeline import IMAGES, find_largest_difference
from tests.export.importer.test_refused import assert_refused
from tests.export.imports import import_graph, make_labels

ML = "ai.onnx.ml"
FLOAT = TensorProto.FLOAT


def expected_logits(count: int = 5, seed: int = 0, **options: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the logits of `IMAGES` (n, count), computed without the importer."""
    planes = np.concatenate([prepare_imagenet(image, 18, 16) for image in IMAGES])
    return run_onnx(build_classifier(count=count, seed=seed, **options), planes)


def add_nodes(graph: onnx.ModelProto, *nodes: onnx.NodeProto, **constants: Any) -> onnx.ModelProto:
    """Append nodes, and constants by name."""
    graph.graph.node.extend(nodes)
    graph.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
    )
    return graph


def set_outputs(graph: onnx.ModelProto, **types: int) -> onnx.ModelProto:
    """Replace the outputs by tensors of these names and types, without shapes."""
    del graph.graph.output[:]
    graph.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in types.items())
    return graph


# --- lists of maps -------------------------------------------------------------------------------

NAMES = ["tabby", "beagle", "carp", "wren", "toad"]


def build_zip_map(
    labels: list[str] | list[int], *, end: GraphEnd = "softmax", has_label_output: bool = True
) -> onnx.ModelProto:
    """Build a graph that ends as those of skl2onnx and Azure Custom Vision do."""
    graph = build_classifier(end=end, count=len(labels), names=("data", "row"))
    is_text = isinstance(labels[0], str)
    key = "classlabels_strings" if is_text else "classlabels_int64s"
    attributes: dict[str, Any] = {key: labels}
    nodes = [helper.make_node("ZipMap", ["row"], ["loss"], domain=ML, **attributes)]
    if has_label_output:
        nodes += [
            helper.make_node("ArgMax", ["row"], ["best"], axis=1, keepdims=0),
            helper.make_node("ArrayFeatureExtractor", ["names", "best"], ["classLabel"], domain=ML),
        ]
    values = np.array([label.encode() if isinstance(label, str) else label for label in labels])
    add_nodes(graph, *nodes, names=values.astype(object) if is_text else values.astype(np.int64))
    graph.opset_import.append(helper.make_opsetid(ML, 1))
    set_outputs(graph)
    if has_label_output:
        kind = TensorProto.STRING if is_text else TensorProto.INT64
        graph.graph.output.append(helper.make_tensor_value_info("classLabel", kind, None))
    key_type = TensorProto.STRING if is_text else TensorProto.INT64
    value_type = helper.make_tensor_type_proto(FLOAT, [])
    map_type = helper.make_map_type_proto(key_type, value_type)
    graph.graph.output.append(helper.make_value_info("loss", helper.make_sequence_type_proto(map_type)))
    return graph


@pytest.mark.parametrize("end", ["softmax", "logits"])
@pytest.mark.parametrize("has_label_output", [True, False])
@pytest.mark.parametrize("labels", [NAMES, [10, 20, 30, 40, 50]], ids=["text", "numbers"])
def test_list_of_maps_is_read_as_the_tensor_before_it(
    tmp_path: Path, labels: Any, has_label_output: bool, end: GraphEnd
) -> None:
    graph = build_zip_map(labels, end=end, has_label_output=has_label_output)
    model = import_graph(graph, tmp_path, labels=None)
    assert model.contract.labels == tuple(map(str, labels))
    assert model.facts["labels"].endswith("; the graph's own")
    assert model.facts["output"].startswith("row (the only one")
    assert find_largest_difference(model, list(softmax(expected_logits())[:, None])) <= 1e-5
    assert {node.domain for node in onnx.load(model.path).graph.node} == {""}


def test_labels_may_be_given_for_a_graph_with_numbers(tmp_path: Path) -> None:
    model = import_graph(build_zip_map([0, 1, 2, 3, 4]), tmp_path, NAMES)
    assert model.contract.labels == tuple(NAMES)


def test_given_labels_in_another_order_than_the_graph_s_are_refused(tmp_path: Path) -> None:
    message = "label 0 is 'toad' there and 'tabby' in the graph .*leave out --labels"
    assert_refused(tmp_path, message, build_zip_map(NAMES), NAMES[::-1])


def test_labels_choose_between_several_lists_of_the_graph(tmp_path: Path) -> None:
    graph = build_zip_map(NAMES)
    other = helper.make_node("ZipMap", ["row"], ["other"], domain=ML, classlabels_strings=NAMES[::-1])
    add_nodes(graph, other)
    graph.graph.output.append(graph.graph.output[-1])
    graph.graph.output[-1].name = "other"
    assert_refused(tmp_path, "give them with --labels", graph, None)
    model = import_graph(graph, tmp_path, NAMES, output="row")
    assert model.contract.labels == tuple(NAMES)


def test_graph_without_labels_asks_for_them(tmp_path: Path) -> None:
    assert_refused(tmp_path, "has no labels: give them with --labels", build_classifier(), None)


def test_wrong_number_of_labels_names_the_graph_s_own_list(tmp_path: Path) -> None:
    graph = build_zip_map(NAMES)
    next(node for node in graph.graph.node if node.op_type == "ZipMap").attribute[0].strings.pop()
    message = "the graph's own list of labels has 4 labels, the graph gives 5 values"
    assert_refused(tmp_path, message, graph, None)


# --- several outputs -----------------------------------------------------------------------------


def build_pair(operator: str, *, is_logits_first: bool = True, **attributes: Any) -> onnx.ModelProto:
    """Build a graph with logits and the result of another operator as its outputs."""
    graph = build_classifier(names=("image", "logits"), spread=1)
    add_nodes(graph, helper.make_node(operator, ["logits"], ["other"], **attributes))
    names = ("logits", "other") if is_logits_first else ("other", "logits")
    return set_outputs(graph, **dict.fromkeys(names, FLOAT))


@pytest.mark.parametrize("is_logits_first", [True, False])
@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax", "Identity"])
def test_logits_are_chosen_beside_what_follows_from_them(
    tmp_path: Path, operator: str, is_logits_first: bool
) -> None:
    attributes = {} if operator == "Identity" else {"axis": 1}
    graph = build_pair(operator, is_logits_first=is_logits_first, **attributes)
    model = import_graph(graph, tmp_path)
    if operator == "Identity":
        assert "copy" in model.facts["output"]
    else:
        assert model.facts["output"].startswith("logits (by measurement: 'other' is the ")
        assert model.facts["task"] == "multiclass (the graph has their softmax as another output)"
    assert find_largest_difference(model, list(softmax(expected_logits(spread=1))[:, None])) <= 1e-5


def test_sigmoids_are_chosen_beside_their_logits(tmp_path: Path) -> None:
    """The sigmoids say that the labels are independent; the logits alone would become a softmax."""
    graph = build_pair("Sigmoid")
    with pytest.raises(MissingInformation, match="'other' has independent probabilities"):
        import_graph(graph, tmp_path)
    model = import_graph(graph, tmp_path, task=Task.MULTILABEL)
    assert model.facts["output"].startswith("other (by measurement: the sigmoid of 'logits')")
    assert find_largest_difference(model, list(sigmoid(expected_logits(spread=1))[:, None])) <= 1e-5


def build_heads(*, has_average: bool, has_softmax: bool = False) -> onnx.ModelProto:
    """Build a graph with the two heads of a distilled network, as transformers exports DeiT and LeViT."""
    graph = build_classifier(names=("image", "cls_logits"))
    pooled = next(node.output[0] for node in graph.graph.node if node.op_type == "Flatten")
    random = np.random.default_rng(5)
    add_nodes(
        graph,
        helper.make_node("MatMul", [pooled, "matrix 2"], ["distillation_logits"]),
        helper.make_node("Add", ["cls_logits", "distillation_logits"], ["sum"]),
        helper.make_node("Div", ["sum", "two"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        **{"matrix 2": random.normal(0, 3, (8, 5)).astype(np.float32), "two": np.float32(2)},
    )
    names = ["logits"] * has_average + ["cls_logits", "distillation_logits"] + ["probabilities"] * has_softmax
    return set_outputs(graph, **dict.fromkeys(names, FLOAT))


@pytest.mark.parametrize("has_softmax", [True, False])
def test_average_of_two_heads_is_chosen(tmp_path: Path, has_softmax: bool) -> None:
    graph = build_heads(has_average=True, has_softmax=has_softmax)
    model = import_graph(graph, tmp_path)
    reason = "the average of 'cls_logits' and 'distillation_logits'"
    assert model.facts["output"] == f"logits ({reason})"
    planes = np.concatenate([prepare_imagenet(image, 18, 16) for image in IMAGES])
    expected = softmax(run_onnx(set_outputs(graph, logits=FLOAT), planes))
    assert find_largest_difference(model, list(expected[:, None])) <= 1e-5


def test_two_heads_without_average_ask_for_the_output(tmp_path: Path) -> None:
    graph = build_heads(has_average=False)
    assert_refused(tmp_path, r"cls_logits \(5 values\), distillation_logits .*--output", graph)
    model = import_graph(graph, tmp_path, output="logits")  # a tensor inside the graph
    assert model.facts["output"] == "logits (from --output)"


# --- decisions -----------------------------------------------------------------------------------


def build_decision(kind: str) -> onnx.ModelProto:
    graph = build_classifier(names=("image", "scores"))
    if kind == "ArgMax":
        add_nodes(graph, helper.make_node("ArgMax", ["scores"], ["label"], axis=1))
        return set_outputs(graph, label=TensorProto.INT64)
    if kind == "name":
        add_nodes(
            graph,
            helper.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
            helper.make_node("Gather", ["names", "best"], ["label"]),
            names=np.array([name.encode() for name in NAMES], object),
        )
        return set_outputs(graph, label=TensorProto.STRING)
    if kind == "max":
        add_nodes(
            graph,
            helper.make_node("ReduceMax", ["scores"], ["value"], axes=[-1], keepdims=0),
            helper.make_node("ArgMax", ["scores"], ["label"], axis=1),
        )
        return set_outputs(graph, value=FLOAT, label=TensorProto.INT64)
    add_nodes(graph, helper.make_node("TopK", ["scores", "k"], ["values", "labels"], axis=1), k=np.array([3]))
    if kind == "TopK, softmax":
        add_nodes(graph, helper.make_node("Softmax", ["values"], ["shares"], axis=1))
        return set_outputs(graph, shares=FLOAT, labels=TensorProto.INT64)
    return set_outputs(graph, values=FLOAT, labels=TensorProto.INT64)


@pytest.mark.parametrize("labels", [5, 3, 2])
@pytest.mark.parametrize("kind", ["ArgMax", "name", "max", "TopK", "TopK, softmax"])
def test_decisions_say_what_to_import_instead(tmp_path: Path, kind: str, labels: int) -> None:
    graph = build_decision(kind)
    message = (
        r"gives decisions \(its (ArgMax|TopK)\).*give --output scores .*or export the model with 'scores'"
    )
    assert_refused(tmp_path, message, graph, labels)
    if labels == 5:
        model = import_graph(graph, tmp_path, output="scores")
        assert find_largest_difference(model, list(softmax(expected_logits())[:, None])) <= 1e-5


def test_probabilities_beside_a_decision_need_no_question(tmp_path: Path) -> None:
    graph = build_decision("ArgMax")
    graph.graph.output.append(helper.make_tensor_value_info("scores", FLOAT, None))
    model = import_graph(graph, tmp_path)
    assert model.facts["output"] == "scores (the only one of 2 with values for each label)"


# --- sigmoids of one label -----------------------------------------------------------------------


@pytest.mark.parametrize("end", ["sigmoid", "hidden_sigmoid"])
@pytest.mark.parametrize(("count", "task"), [(4, Task.MULTICLASS), (2, Task.MULTICLASS), (2, Task.BINARY)])
def test_sigmoids_of_one_label_are_divided_by_their_sum(
    tmp_path: Path, end: GraphEnd, count: int, task: Task
) -> None:
    graph = build_classifier(end=end, count=count, spread=1)
    model = import_graph(graph, tmp_path, count, task=task)
    assert model.facts["task"] == f"{task} (from --task; each probability is divided by their sum)"
    assert find_original_output(model.contract) is None  # no output of ours has the sigmoids themselves
    shares = sigmoid(expected_logits(count, spread=1))
    expected = shares / shares.sum(axis=1, keepdims=True)
    assert find_largest_difference(model, list(expected[:, None])) <= 1e-5
    pixels = np.stack([model.pixels(image) for image in IMAGES])
    if task is Task.MULTICLASS:
        assert np.abs(softmax(model.engine.compute_logits(pixels)) - expected).max() <= 1e-5


def test_sigmoids_name_both_choices(tmp_path: Path) -> None:
    message = (
        r"independent probabilities from 0 to 1, which sum to \S+ … \S+: give --task multilabel if any "
        "number of labels may be true of an image, or --task multiclass if exactly one is true"
    )
    assert_refused(tmp_path, message, build_classifier(end="sigmoid", count=4), 4)


# --- answers that cannot be served ---------------------------------------------------------------


def build_noisy(kind: str) -> onnx.ModelProto:
    """Build a graph with random numbers, as exported in training mode."""
    graph = build_classifier(names=("image", "row"))
    noise: dict[str, Callable[[], list[onnx.NodeProto]]] = {
        "RandomNormalLike": lambda: [
            helper.make_node("RandomNormalLike", ["row"], ["noise"], "jitter", scale=0.1),
            helper.make_node("Add", ["row", "noise"], ["scores"]),
        ],
        "Dropout": lambda: [helper.make_node("Dropout", ["row", "half", "yes"], ["scores"], "drop_out_1")],
        "Bernoulli": lambda: [
            helper.make_node("Softmax", ["row"], ["shares"], axis=1),
            helper.make_node("Bernoulli", ["shares"], ["chosen"], "coin"),
            helper.make_node("Add", ["row", "chosen"], ["scores"]),
        ],
    }
    add_nodes(graph, *noise[kind](), half=np.float32(0.5), yes=np.array(True))
    return set_outputs(graph, scores=FLOAT)


@pytest.mark.parametrize(
    ("kind", "name"), [("RandomNormalLike", "jitter"), ("Dropout", "drop_out_1"), ("Bernoulli", "coin")]
)
def test_graph_that_answers_differently_twice_is_refused(tmp_path: Path, kind: str, name: str) -> None:
    message = (
        rf"'scores' answers the same image differently twice, by up to .*random numbers \({kind} {name}\)"
    )
    assert_refused(tmp_path, message, build_noisy(kind))


def test_random_numbers_beside_the_answer_are_accepted(tmp_path: Path) -> None:
    graph = build_noisy("RandomNormalLike")
    graph = set_outputs(graph, row=FLOAT, noise=FLOAT)
    model = import_graph(graph, tmp_path, output="row")
    assert model.contract.labels == tuple(make_labels(5))


def test_graph_with_the_same_answer_for_every_image_is_refused(tmp_path: Path) -> None:
    message = "'scores' says the same for every image, from black to white: the graph ignores its input"
    assert_refused(tmp_path, message, build_classifier(spread=0.0))
    assert_refused(tmp_path, message, build_classifier(spread=0.0, end="softmax"))


def test_saturated_softmax_is_no_constant_answer(tmp_path: Path) -> None:
    """A network with a label for everything unknown is certain of it for every image that is tried."""
    graph = build_classifier(spread=0.1, end="softmax")
    (bias,) = [tensor for tensor in graph.graph.initializer if tensor.name == "bias"]
    values = np.array([0, 0, 0, 0, 500], np.float32)
    bias.CopyFrom(numpy_helper.from_array(values, "bias"))
    assert import_graph(graph, tmp_path).facts["values"].startswith("5 probabilities")

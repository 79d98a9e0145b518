"""What foreign graphs give, in every shape and unit: read as it is meant, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fovea.export.importer.foreign_model import ImportRefused, ReferenceModel
from fovea.export.importer.graph_output import ValueKind, detect_kind
from fovea.export.importer.preprocessing import ZERO_ONE, PreprocessingOptions
from fovea.export.verify import VerificationError
from fovea.service.artifact.contract import Task
from fovea.service.artifact.inputs import find_original_output
from tests.export.classifiers import Array, classifier, imagenet, run, sigmoid, softmax
from tests.export.imports import Imported, bring, nothing_written
from tests.pictures import encode, jpeg, picture

pytestmark = pytest.mark.long

IMAGES = [jpeg(90, 70, 1), jpeg(60, 80, 2), encode(picture(40, 60, 3), "PNG")]

Step = tuple[str, tuple[Any, ...], dict[str, Any]]


def step(kind: str, *constants: Any, **attributes: Any) -> Step:
    """One more operator behind the graph, with constants behind its first input."""
    return kind, constants, attributes


def then(graph: onnx.ModelProto, *steps: Step, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """The graph with steps behind it, and of its output no shape said."""
    output = graph.graph.output[0].name
    graph.graph.node[-1].output[0] = last = "end_0"
    for number, (operator, constants, attributes) in enumerate(steps):
        inputs = [last]
        for place, constant in enumerate(constants):
            inputs.append(f"end_{number}_constant_{place}")
            graph.graph.initializer.append(numpy_helper.from_array(np.array(constant), inputs[-1]))
        last = output if number == len(steps) - 1 else f"end_{number + 1}"
        graph.graph.node.append(helper.make_node(operator, inputs, [last], **attributes))
    graph.graph.output[0].CopyFrom(helper.make_tensor_value_info(output, kind, None))
    return graph


def values(count: int = 5, seed: int = 0) -> Array:
    """The logits of `IMAGES` (n, count), by hand."""
    planes = np.concatenate([imagenet(image, 18, 16) for image in IMAGES])
    return run(classifier(count=count, seed=seed), planes)


def agrees(model: Imported, wanted: Array, tolerance: float = 1e-5) -> None:
    """Each image alone, all together, and each in another place of the batch."""
    pixels = np.stack([model.pixels(image) for image in IMAGES])
    alone = np.concatenate([model(image) for image in IMAGES])
    assert np.abs(alone - wanted).max() <= tolerance
    assert np.abs(model.engine.run(pixels) - wanted).max() <= tolerance
    assert np.abs(model.engine.run(pixels[::-1]) - wanted[::-1]).max() <= tolerance


def refused(tmp_path: Path, message: str, model: onnx.ModelProto, *arguments: Any, **options: Any) -> None:
    with pytest.raises(ImportRefused, match=message):
        bring(model, tmp_path, *arguments, **options)
    assert nothing_written(tmp_path)


# --- shapes --------------------------------------------------------------------------------------

F32 = np.float32
SHAPES: dict[str, tuple[Step, ...]] = {
    "no batch axis": (step("Squeeze", np.array([0])),),
    "classes, 1": (step("Transpose", perm=[1, 0]),),
    "classes, 1, 1": (step("Transpose", perm=[1, 0]), step("Unsqueeze", np.array([2]))),
    "1, 1, classes": (step("Unsqueeze", np.array([1])),),
    "1, classes, 1": (step("Unsqueeze", np.array([2])),),
    "folded": (step("Reshape", np.array([-1])),),
    "the images last": (step("Transpose", perm=[1, 0]), step("Unsqueeze", np.array([0]))),
}
FREE = {"1, 1, classes", "1, classes, 1", "folded"}


@pytest.mark.parametrize("batch", [1, "N"])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_read_wherever_its_images_are(
    tmp_path: Path, shape: str, count: int, batch: int | str
) -> None:
    """Where the axis of the images is not the first, they run one after the other."""
    graph = then(classifier(count=count, batch=batch, end="softmax"), *SHAPES[shape])
    model = bring(graph, tmp_path, count)
    assert model.facts["values"].startswith(f"{count} probabilities that sum to 1")
    assert (model.engine.batch_limit is None) == (shape in FREE)
    agrees(model, softmax(values(count)))


def test_two_labels_without_a_batch_axis_are_not_swapped(tmp_path: Path) -> None:
    """As two values they are both of one image, and not the only value of two."""
    graph = then(classifier(count=2, batch=1, end="softmax"), step("Squeeze", np.array([0])))
    model = bring(graph, tmp_path, ["dark", "bright"], task=Task.BINARY)
    agrees(model, softmax(values(2)))
    assert model.contract.labels == ("dark", "bright")


def test_an_axis_too_many_is_no_row(tmp_path: Path) -> None:
    graph = then(classifier(count=6, batch=1), step("Reshape", np.array([1, 2, 3])))
    refused(
        tmp_path, r"no output is a row of values for each image \(scores: float32 images x 2 x 3\)", graph, 3
    )


def test_a_shape_that_changes_with_the_image_is_no_row(tmp_path: Path) -> None:
    graph = then(classifier(batch=1), step("Compress", np.array([True]), axis=1), step("NonZero"), kind=7)
    graph.graph.node[-2].op_type = "Relu"
    del graph.graph.node[-2].input[1:], graph.graph.node[-2].attribute[:]
    refused(tmp_path, "no output is a row of values for each image .*not an image classifier", graph)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("first image only", (step("Gather", np.array([0]), axis=0),)),
        (
            "first image, repeated",
            (step("Gather", np.array([0]), axis=0), step("Add", np.zeros((3, 5), F32))),
        ),
        (
            "turned round",
            (step("Slice", np.array([-1]), np.array([-(2**31)]), np.array([0]), np.array([-1])),),
        ),
        ("less the mean of the batch", (step("ReduceMean", axes=[0], keepdims=1),)),
        ("rounded to a scale of the batch", (step("DynamicQuantizeLinear"),)),
    ],
)
def test_answers_that_depend_on_the_batch_are_given_alone(
    tmp_path: Path, name: str, steps: tuple[Step, ...]
) -> None:
    graph = classifier()
    if name.startswith("rounded"):
        (pool,) = [node for node in graph.graph.node if node.op_type == "GlobalAveragePool"]
        source, pool.output[0] = pool.output[0], "exact"
        place = list(graph.graph.node).index(pool) + 1
        for node in (
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], [source]),
            helper.make_node("DynamicQuantizeLinear", ["exact"], ["q", "scale", "zero"]),
        ):
            graph.graph.node.insert(place, node)
    else:
        then(graph, *steps)
        if name.startswith("less"):
            mean = graph.graph.node[-1]
            mean.output[0] = "mean"
            half = numpy_helper.from_array(np.array(0.5, F32), "half")
            graph.graph.initializer.append(half)
            graph.graph.node.append(helper.make_node("Mul", ["mean", "half"], ["part"]))
            graph.graph.node.append(helper.make_node("Sub", ["end_0", "part"], ["scores"]))
    if name == "first image, repeated":
        refused(tmp_path, "no output is a row of values", graph)
        return
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    wanted = [softmax(session.run(None, {"image": imagenet(one, 18, 16)})[0]) for one in IMAGES]
    model = bring(graph, tmp_path)
    assert model.engine.batch_limit == 1
    assert "images run one after the other" in model.facts["batch"]
    agrees(model, np.concatenate(wanted), 5e-3 if name.startswith("rounded") else 1e-5)


def test_files_for_two_images_that_answer_one_are_refused(tmp_path: Path) -> None:
    graph = then(
        classifier(batch=2, count=2), step("Gather", np.array([0]), axis=0), step("Squeeze", np.array([0]))
    )
    refused(tmp_path, "the graph takes 2 images at a time", graph, 2)


def test_verification_counts_every_value_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads too few of them is found out by what compares."""

    def first(_: ReferenceModel, output: Array) -> Array:
        return output[0] if output.ndim > 1 else output[:1]

    monkeypatch.setattr(ReferenceModel, "_of_one", first)
    graph = then(classifier(count=2, batch=1, end="softmax"), step("Squeeze", np.array([0])))
    with pytest.raises(VerificationError, match="has 2 values for 1 images, and not 1 for each"):
        bring(graph, tmp_path, 2)
    assert nothing_written(tmp_path)


# --- units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [100.0, 255.0, 1000.0, 0.5])
@pytest.mark.parametrize("end", ["softmax", "hidden_softmax"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_probabilities_that_sum_to_something_else_are_divided_by_it(
    tmp_path: Path, end: Any, total: float, dtype: str
) -> None:
    graph = classifier(end=end, dtype=dtype)
    kind = TensorProto.FLOAT16 if dtype == "float16" else TensorProto.FLOAT
    model = bring(then(graph, step("Mul", np.array(total, dtype)), kind=kind), tmp_path)
    assert f"5 probabilities times {total:g} (each row sums to that), divided by it" in model.facts["values"]
    assert model.contract.task is Task.MULTICLASS
    agrees(model, softmax(values()), 1e-5 if dtype == "float32" else 5e-3)
    assert (
        find_original_output(model.contract) is None
    )  # none of ours has the values of the file's own output


def test_two_percentages_are_two_labels(tmp_path: Path) -> None:
    model = bring(then(classifier(count=2, end="softmax"), step("Mul", F32(100))), tmp_path, 2)
    assert model.contract.task is Task.BINARY
    agrees(model, softmax(values(2)))


def test_a_uint8_graph_s_percentages_are_known_too(tmp_path: Path) -> None:
    graph = then(classifier(dtype="uint8", end="softmax"), step("Mul", F32(100)))
    model = bring(graph, tmp_path, wishes=PreprocessingOptions(preset=ZERO_ONE))
    assert "times 100" in model.facts["values"]


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_logits_that_hardly_differ_are_no_shares(tmp_path: Path, dtype: str) -> None:
    """Their sum hardly differs either; of a graph of bytes no extreme images can show that."""
    graph = classifier(spread=1e-5, dtype=dtype)
    bias = next(tensor for tensor in graph.graph.initializer if tensor.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(np.array([3, 1, 2, 0.5, 0.7], F32), "bias"))
    wishes = PreprocessingOptions(preset=ZERO_ONE)
    assert bring(graph, tmp_path, wishes=wishes).facts["values"].startswith("5 logits")


@pytest.mark.parametrize("total", [1.0, 100.0])
def test_a_sum_that_extreme_images_change_is_chance(total: float) -> None:
    rows = total * softmax(np.random.default_rng(0).normal(0, 2, (14, 5)))
    beyond = np.random.default_rng(1).uniform(0, 1000, (14, 5))
    dtype = np.dtype(np.float32)
    assert detect_kind(rows, beyond, dtype) == (ValueKind.LOGITS, 1.0)
    assert detect_kind(rows, rows[::-1], dtype) == (ValueKind.PROBABILITIES, total)
    assert detect_kind(np.log(rows / total), -beyond, dtype) == (ValueKind.LOGITS, 1.0)


QUANTIZED = (
    step("QuantizeLinear", F32(1 / 256), np.uint8(0)),
    step("DequantizeLinear", F32(1 / 256), np.uint8(0)),
)


@pytest.mark.parametrize("count", [5, 300])
def test_a_softmax_that_is_rounded_to_bytes_is_taken_before_the_rounding(tmp_path: Path, count: int) -> None:
    """Of many labels most are rounded to 0, and the sum is far from 1."""
    graph = then(classifier(count=count, end="softmax", spread=1), *QUANTIZED)
    model = bring(graph, tmp_path, count)
    assert model.facts["values"].startswith(f"{count} probabilities that sum to 1")
    planes = np.concatenate([imagenet(image, 18, 16) for image in IMAGES])
    agrees(model, softmax(run(classifier(count=count, spread=1), planes)))


def test_sigmoids_that_are_rounded_to_bytes_too(tmp_path: Path) -> None:
    graph = then(classifier(end="sigmoid", spread=1), *QUANTIZED)
    model = bring(graph, tmp_path, task=Task.MULTILABEL)
    planes = np.concatenate([imagenet(image, 18, 16) for image in IMAGES])
    agrees(model, sigmoid(run(classifier(spread=1), planes)))


def test_a_softmax_with_a_temperature_of_its_own_stays_as_it_is(tmp_path: Path) -> None:
    graph = then(classifier(), step("Div", F32(4)), step("Softmax", axis=1))
    agrees(bring(graph, tmp_path), softmax(values() / 4))


NEITHER: dict[str, tuple[Callable[[], onnx.ModelProto], int, str]] = {
    "sigmoid x 100": (
        lambda: then(classifier(end="sigmoid"), step("Mul", F32(100))),
        5,
        "values of its Sigmoid, moved, stretched or rounded",
    ),
    "one sigmoid x 100": (
        lambda: then(classifier(end="sigmoid", count=1), step("Mul", F32(100))),
        2,
        "values of its Sigmoid, moved, stretched or rounded",
    ),
    "hidden sigmoid x 100": (
        lambda: then(classifier(end="hidden_sigmoid"), step("Mul", F32(100))),
        5,
        "values from 0 to 100, each by itself, as percentages are",
    ),
    "tanh": (lambda: then(classifier(), step("Tanh")), 5, "values of its Tanh"),
    "2 softmax - 1": (
        lambda: then(classifier(end="softmax"), step("Mul", F32(2)), step("Sub", F32(1))),
        5,
        "values of its Softmax, moved, stretched or rounded",
    ),
    "softmax in whole percents": (
        lambda: then(classifier(end="softmax"), step("Mul", F32(100)), step("Round")),
        5,
        "values of its Softmax, moved, stretched or rounded",
    ),
    "hidden softmax in bytes": (
        lambda: then(classifier(end="hidden_softmax"), step("Mul", F32(255)), step("Floor")),
        5,
        "whole numbers",
    ),
    "1 - softmax": (
        lambda: then(classifier(end="hidden_softmax"), step("Neg"), step("Add", F32(1))),
        5,
        "1 - p of 5 labels",
    ),
    "-log p": (lambda: then(classifier(end="log_softmax"), step("Neg")), 5, "gives -log p "),
    "log10 p": (
        lambda: then(classifier(end="log_softmax"), step("Mul", F32(1 / np.log(10)))),
        5,
        "log p to base 10",
    ),
    "log2 p": (lambda: then(classifier(end="log_softmax"), step("Mul", F32(1 / np.log(2)))), 5, "to base 2"),
    "number of the label": (
        lambda: then(classifier(), step("ArgMax", axis=1, keepdims=1), step("Cast", to=TensorProto.FLOAT)),
        2,
        r"decisions \(its ArgMax\)",
    ),
    "hardmax": (lambda: then(classifier(), step("Hardmax", axis=1)), 5, r"decisions \(its Hardmax\)"),
    "softmax over the images": (
        lambda: then(classifier(batch=1), step("Softmax", axis=0)),
        5,
        "is 1 for every label and image, .* its last step goes over the wrong axis",
    ),
    "bytes": (
        lambda: then(classifier(end="softmax"), QUANTIZED[0], kind=TensorProto.UINT8),
        5,
        "scores in 8 bits are read behind a DequantizeLinear",
    ),
}


@pytest.mark.parametrize("case", NEITHER)
def test_values_that_are_neither_logits_nor_probabilities_are_refused(tmp_path: Path, case: str) -> None:
    make, labels, message = NEITHER[case]
    refused(tmp_path, message, make(), labels)


def test_what_is_the_same_for_every_image_is_said(tmp_path: Path) -> None:
    graph = classifier(spread=0.0)
    model = bring(graph, tmp_path)
    assert model.facts["values"] == "5 logits (as seen when it is run; the same for every image)"
    assert model.engine.batch_limit == 1  # a row in the wrong place would not be seen

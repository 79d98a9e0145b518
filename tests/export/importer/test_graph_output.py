"""Outputs of foreign graphs in every shape and unit: read correctly, or refused with the reason."""

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
from tests.export.classifiers import Array, build_classifier, prepare_imagenet, run_onnx, sigmoid, softmax
from tests.export.imports import ImportedModel, has_no_output, import_graph
from tests.pictures import draw_picture, encode_image, make_jpeg

pytestmark = pytest.mark.long

IMAGES = [make_jpeg(90, 70, 1), make_jpeg(60, 80, 2), encode_image(draw_picture(40, 60, 3), "PNG")]

Step = tuple[str, tuple[Any, ...], dict[str, Any]]


def make_step(kind: str, *constants: Any, **attributes: Any) -> Step:
    """Return a step to append to a graph: an operator with constants after its first input."""
    return kind, constants, attributes


def append_steps(graph: onnx.ModelProto, *steps: Step, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """Return the graph with appended steps and without a stated output shape."""
    output = graph.graph.output[0].name
    graph.graph.node[-1].output[0] = last = "end_0"
    for number, (operator, constants, attributes) in enumerate(steps):
        inputs = [last]
        for position, constant in enumerate(constants):
            inputs.append(f"end_{number}_constant_{position}")
            graph.graph.initializer.append(numpy_helper.from_array(np.array(constant), inputs[-1]))
        last = output if number == len(steps) - 1 else f"end_{number + 1}"
        graph.graph.node.append(helper.make_node(operator, inputs, [last], **attributes))
    graph.graph.output[0].CopyFrom(helper.make_tensor_value_info(output, kind, None))
    return graph


def expected_logits(count: int = 5, seed: int = 0) -> Array:
    """Return the logits of `IMAGES` (n, count), computed without the importer."""
    planes = np.concatenate([prepare_imagenet(image, 18, 16) for image in IMAGES])
    return run_onnx(build_classifier(count=count, seed=seed), planes)


def assert_agrees(model: ImportedModel, expected: Array, tolerance: float = 1e-5) -> None:
    """Compare with images run one at a time, all in one batch, and at other positions of the batch."""
    pixels = np.stack([model.pixels(image) for image in IMAGES])
    single_outputs = np.concatenate([model(image) for image in IMAGES])
    assert np.abs(single_outputs - expected).max() <= tolerance
    assert np.abs(model.engine.run(pixels) - expected).max() <= tolerance
    assert np.abs(model.engine.run(pixels[::-1]) - expected[::-1]).max() <= tolerance


def assert_refused(
    tmp_path: Path, message: str, model: onnx.ModelProto, *arguments: Any, **options: Any
) -> None:
    with pytest.raises(ImportRefused, match=message):
        import_graph(model, tmp_path, *arguments, **options)
    assert has_no_output(tmp_path)


# --- shapes --------------------------------------------------------------------------------------

F32 = np.float32
SHAPES: dict[str, tuple[Step, ...]] = {
    "no batch axis": (make_step("Squeeze", np.array([0])),),
    "classes, 1": (make_step("Transpose", perm=[1, 0]),),
    "classes, 1, 1": (make_step("Transpose", perm=[1, 0]), make_step("Unsqueeze", np.array([2]))),
    "1, 1, classes": (make_step("Unsqueeze", np.array([1])),),
    "1, classes, 1": (make_step("Unsqueeze", np.array([2])),),
    "folded": (make_step("Reshape", np.array([-1])),),
    "the images last": (make_step("Transpose", perm=[1, 0]), make_step("Unsqueeze", np.array([0]))),
}
BATCHABLE_SHAPES = {"1, 1, classes", "1, classes, 1", "folded"}


@pytest.mark.parametrize("batch", [1, "N"])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_read_at_any_position_of_the_batch_axis(
    tmp_path: Path, shape: str, count: int, batch: int | str
) -> None:
    """Images run one after the other if the batch is not the first axis."""
    graph = append_steps(build_classifier(count=count, batch=batch, end="softmax"), *SHAPES[shape])
    model = import_graph(graph, tmp_path, count)
    assert model.facts["values"].startswith(f"{count} probabilities that sum to 1")
    assert (model.engine.batch_limit is None) == (shape in BATCHABLE_SHAPES)
    assert_agrees(model, softmax(expected_logits(count)))


def test_two_labels_without_a_batch_axis_are_not_swapped(tmp_path: Path) -> None:
    """Two values are the two labels of one image, not the single values of two images."""
    graph = append_steps(
        build_classifier(count=2, batch=1, end="softmax"), make_step("Squeeze", np.array([0]))
    )
    model = import_graph(graph, tmp_path, ["dark", "bright"], task=Task.BINARY)
    assert_agrees(model, softmax(expected_logits(2)))
    assert model.contract.labels == ("dark", "bright")


def test_output_with_an_extra_axis_is_refused(tmp_path: Path) -> None:
    graph = append_steps(build_classifier(count=6, batch=1), make_step("Reshape", np.array([1, 2, 3])))
    assert_refused(
        tmp_path, r"no output is a row of values for each image \(scores: float32 images x 2 x 3\)", graph, 3
    )


def test_output_with_a_varying_shape_is_refused(tmp_path: Path) -> None:
    graph = append_steps(
        build_classifier(batch=1),
        make_step("Compress", np.array([True]), axis=1),
        make_step("NonZero"),
        kind=7,
    )
    graph.graph.node[-2].op_type = "Relu"
    del graph.graph.node[-2].input[1:], graph.graph.node[-2].attribute[:]
    assert_refused(tmp_path, "no output is a row of values for each image .*not an image classifier", graph)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("first image only", (make_step("Gather", np.array([0]), axis=0),)),
        (
            "first image, repeated",
            (make_step("Gather", np.array([0]), axis=0), make_step("Add", np.zeros((3, 5), F32))),
        ),
        (
            "turned round",
            (make_step("Slice", np.array([-1]), np.array([-(2**31)]), np.array([0]), np.array([-1])),),
        ),
        ("less the mean of the batch", (make_step("ReduceMean", axes=[0], keepdims=1),)),
        ("rounded to a scale of the batch", (make_step("DynamicQuantizeLinear"),)),
    ],
)
def test_batch_dependent_graph_runs_one_image_at_a_time(
    tmp_path: Path, name: str, steps: tuple[Step, ...]
) -> None:
    graph = build_classifier()
    if name.startswith("rounded"):
        (pool,) = [node for node in graph.graph.node if node.op_type == "GlobalAveragePool"]
        source, pool.output[0] = pool.output[0], "exact"
        index = list(graph.graph.node).index(pool) + 1
        for node in (
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], [source]),
            helper.make_node("DynamicQuantizeLinear", ["exact"], ["q", "scale", "zero"]),
        ):
            graph.graph.node.insert(index, node)
    else:
        append_steps(graph, *steps)
        if name.startswith("less"):
            mean = graph.graph.node[-1]
            mean.output[0] = "mean"
            half = numpy_helper.from_array(np.array(0.5, F32), "half")
            graph.graph.initializer.append(half)
            graph.graph.node.append(helper.make_node("Mul", ["mean", "half"], ["part"]))
            graph.graph.node.append(helper.make_node("Sub", ["end_0", "part"], ["scores"]))
    if name == "first image, repeated":
        assert_refused(tmp_path, "no output is a row of values", graph)
        return
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    expected = [softmax(session.run(None, {"image": prepare_imagenet(image, 18, 16)})[0]) for image in IMAGES]
    model = import_graph(graph, tmp_path)
    assert model.engine.batch_limit == 1
    assert "images run one after the other" in model.facts["batch"]
    assert_agrees(model, np.concatenate(expected), 5e-3 if name.startswith("rounded") else 1e-5)


def test_two_image_graph_with_one_answer_is_refused(tmp_path: Path) -> None:
    graph = append_steps(
        build_classifier(batch=2, count=2),
        make_step("Gather", np.array([0]), axis=0),
        make_step("Squeeze", np.array([0])),
    )
    assert_refused(tmp_path, "the graph takes exactly 2 images at a time", graph, 2)


def test_verification_refuses_outputs_with_too_few_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison finds an output with too few values."""

    def select_first(_: ReferenceModel, output: Array) -> Array:
        return output[0] if output.ndim > 1 else output[:1]

    monkeypatch.setattr(ReferenceModel, "_select_image", select_first)
    graph = append_steps(
        build_classifier(count=2, batch=1, end="softmax"), make_step("Squeeze", np.array([0]))
    )
    with pytest.raises(VerificationError, match="has 2 values for 1 images; expected 1 for each"):
        import_graph(graph, tmp_path, 2)
    assert has_no_output(tmp_path)


# --- units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [100.0, 255.0, 1000.0, 0.5])
@pytest.mark.parametrize("end", ["softmax", "hidden_softmax"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_probabilities_are_divided_by_their_constant_sum(
    tmp_path: Path, end: Any, total: float, dtype: str
) -> None:
    graph = build_classifier(end=end, dtype=dtype)
    kind = TensorProto.FLOAT16 if dtype == "float16" else TensorProto.FLOAT
    model = import_graph(append_steps(graph, make_step("Mul", np.array(total, dtype)), kind=kind), tmp_path)
    assert f"5 probabilities times {total:g} (each row sums to that), divided by it" in model.facts["values"]
    assert model.contract.task is Task.MULTICLASS
    assert_agrees(model, softmax(expected_logits()), 1e-5 if dtype == "float32" else 5e-3)
    # no output of the imported model has the values of the original output
    assert find_original_output(model.contract) is None


def test_two_percentages_are_read_as_two_labels(tmp_path: Path) -> None:
    model = import_graph(
        append_steps(build_classifier(count=2, end="softmax"), make_step("Mul", F32(100))), tmp_path, 2
    )
    assert model.contract.task is Task.BINARY
    assert_agrees(model, softmax(expected_logits(2)))


def test_uint8_graph_percentages_are_recognised(tmp_path: Path) -> None:
    graph = append_steps(build_classifier(dtype="uint8", end="softmax"), make_step("Mul", F32(100)))
    model = import_graph(graph, tmp_path, preprocessing=PreprocessingOptions(preset=ZERO_ONE))
    assert "times 100" in model.facts["values"]


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_nearly_constant_logits_are_not_probabilities(tmp_path: Path, dtype: str) -> None:
    """Logits of similar sum are no probabilities; graphs of uint8 have no extreme images to show it."""
    graph = build_classifier(spread=1e-5, dtype=dtype)
    bias = next(tensor for tensor in graph.graph.initializer if tensor.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(np.array([3, 1, 2, 0.5, 0.7], F32), "bias"))
    options = PreprocessingOptions(preset=ZERO_ONE)
    assert import_graph(graph, tmp_path, preprocessing=options).facts["values"].startswith("5 logits")


@pytest.mark.parametrize("total", [1.0, 100.0])
def test_sum_that_changes_for_extreme_images_means_logits(total: float) -> None:
    rows = total * softmax(np.random.default_rng(0).normal(0, 2, (14, 5)))
    extreme_rows = np.random.default_rng(1).uniform(0, 1000, (14, 5))
    dtype = np.dtype(np.float32)
    assert detect_kind(rows, extreme_rows, dtype) == (ValueKind.LOGITS, 1.0)
    assert detect_kind(rows, rows[::-1], dtype) == (ValueKind.PROBABILITIES, total)
    assert detect_kind(np.log(rows / total), -extreme_rows, dtype) == (ValueKind.LOGITS, 1.0)


QUANTIZED = (
    make_step("QuantizeLinear", F32(1 / 256), np.uint8(0)),
    make_step("DequantizeLinear", F32(1 / 256), np.uint8(0)),
)


@pytest.mark.parametrize("count", [5, 300])
def test_quantized_softmax_is_taken_before_rounding(tmp_path: Path, count: int) -> None:
    """With many labels, most probabilities are rounded to 0 and the sum is far from 1."""
    graph = append_steps(build_classifier(count=count, end="softmax", spread=1), *QUANTIZED)
    model = import_graph(graph, tmp_path, count)
    assert model.facts["values"].startswith(f"{count} probabilities that sum to 1")
    planes = np.concatenate([prepare_imagenet(image, 18, 16) for image in IMAGES])
    assert_agrees(model, softmax(run_onnx(build_classifier(count=count, spread=1), planes)))


def test_quantized_sigmoids_are_taken_before_rounding(tmp_path: Path) -> None:
    graph = append_steps(build_classifier(end="sigmoid", spread=1), *QUANTIZED)
    model = import_graph(graph, tmp_path, task=Task.MULTILABEL)
    planes = np.concatenate([prepare_imagenet(image, 18, 16) for image in IMAGES])
    assert_agrees(model, sigmoid(run_onnx(build_classifier(spread=1), planes)))


def test_softmax_with_a_temperature_is_kept(tmp_path: Path) -> None:
    graph = append_steps(build_classifier(), make_step("Div", F32(4)), make_step("Softmax", axis=1))
    assert_agrees(import_graph(graph, tmp_path), softmax(expected_logits() / 4))


REFUSED_OUTPUTS: dict[str, tuple[Callable[[], onnx.ModelProto], int, str]] = {
    "sigmoid x 100": (
        lambda: append_steps(build_classifier(end="sigmoid"), make_step("Mul", F32(100))),
        5,
        "values of its Sigmoid, shifted, scaled or rounded",
    ),
    "one sigmoid x 100": (
        lambda: append_steps(build_classifier(end="sigmoid", count=1), make_step("Mul", F32(100))),
        2,
        "values of its Sigmoid, shifted, scaled or rounded",
    ),
    "hidden sigmoid x 100": (
        lambda: append_steps(build_classifier(end="hidden_sigmoid"), make_step("Mul", F32(100))),
        5,
        "independent values from 0 to 100, like percentages",
    ),
    "tanh": (lambda: append_steps(build_classifier(), make_step("Tanh")), 5, "values of its Tanh"),
    "2 softmax - 1": (
        lambda: append_steps(
            build_classifier(end="softmax"), make_step("Mul", F32(2)), make_step("Sub", F32(1))
        ),
        5,
        "values of its Softmax, shifted, scaled or rounded",
    ),
    "softmax in whole percents": (
        lambda: append_steps(build_classifier(end="softmax"), make_step("Mul", F32(100)), make_step("Round")),
        5,
        "values of its Softmax, shifted, scaled or rounded",
    ),
    "hidden softmax in bytes": (
        lambda: append_steps(
            build_classifier(end="hidden_softmax"), make_step("Mul", F32(255)), make_step("Floor")
        ),
        5,
        "whole numbers",
    ),
    "1 - softmax": (
        lambda: append_steps(
            build_classifier(end="hidden_softmax"), make_step("Neg"), make_step("Add", F32(1))
        ),
        5,
        "1 - p of 5 labels",
    ),
    "-log p": (
        lambda: append_steps(build_classifier(end="log_softmax"), make_step("Neg")),
        5,
        "gives -log p ",
    ),
    "log10 p": (
        lambda: append_steps(build_classifier(end="log_softmax"), make_step("Mul", F32(1 / np.log(10)))),
        5,
        "log p to base 10",
    ),
    "log2 p": (
        lambda: append_steps(build_classifier(end="log_softmax"), make_step("Mul", F32(1 / np.log(2)))),
        5,
        "to base 2",
    ),
    "number of the label": (
        lambda: append_steps(
            build_classifier(),
            make_step("ArgMax", axis=1, keepdims=1),
            make_step("Cast", to=TensorProto.FLOAT),
        ),
        2,
        r"decisions \(its ArgMax\), .*export",
    ),
    "hardmax": (
        lambda: append_steps(build_classifier(), make_step("Hardmax", axis=1)),
        5,
        r"decisions \(its Hardmax\)",
    ),
    "softmax over the images": (
        lambda: append_steps(build_classifier(batch=1), make_step("Softmax", axis=0)),
        5,
        "is 1 for every label and image, .* its last step uses the wrong axis",
    ),
    "bytes": (
        lambda: append_steps(build_classifier(end="softmax"), QUANTIZED[0], kind=TensorProto.UINT8),
        5,
        "8-bit scores need a DequantizeLinear",
    ),
}


@pytest.mark.parametrize("case", REFUSED_OUTPUTS)
def test_other_kinds_of_values_are_refused(tmp_path: Path, case: str) -> None:
    build, labels, message = REFUSED_OUTPUTS[case]
    assert_refused(tmp_path, message, build(), labels)

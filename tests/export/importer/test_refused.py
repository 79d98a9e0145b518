"""Files and options that the import refuses with one sentence, leaving no file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fovea.export.importer import foreign_model
from fovea.export.importer.foreign_model import ImportRefused, read_model
from fovea.export.importer.inspect import ForeignModel
from fovea.export.importer.wrap import WrappedModel
from fovea.export.verify import VerificationError
from fovea.service.artifact.contract import Task
from tests.export.classifiers import build_classifier
from tests.export.importer.test_pipeline import build_batch_mean
from tests.export.imports import has_no_output, import_graph


def assert_refused(
    tmp_path: Path, message: str, model: onnx.ModelProto | bytes, *arguments: Any, **options: Any
) -> None:
    """Assert that the import fails with one line that matches `message`, and leaves no file."""
    with pytest.raises(ImportRefused, match=message) as error_info:
        import_graph(model, tmp_path, *arguments, **options)
    assert "\n" not in str(error_info.value)
    assert has_no_output(tmp_path)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 20, 200, -1])
def test_truncated_files_are_refused(tmp_path: Path, length: int) -> None:
    assert_refused(
        tmp_path, "is not an ONNX file, or it is cut short", build_classifier().SerializeToString()[:length]
    )


def test_file_above_two_gigabytes_is_refused(tmp_path: Path) -> None:
    """A sparse file takes no space on the disk and is not read."""
    file = tmp_path / "zeros.onnx"
    with file.open("wb") as stream:
        stream.truncate(3 << 30)
    with pytest.raises(ImportRefused, match=r"has 3\.2 GB; at most 2 GB .* convert it to float16"):
        read_model(file)


def test_missing_model_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportRefused, match=r"cannot read .*gone\.onnx: No such file"):
        read_model(tmp_path / "gone.onnx")
    with pytest.raises(ImportRefused, match=r"cannot read .*: Is a directory"):
        read_model(tmp_path)


def test_custom_operators_are_refused(tmp_path: Path) -> None:
    graph = build_classifier()
    graph.graph.node[1].domain = "com.example"
    graph.opset_import.append(helper.make_opsetid("com.example", 1))
    assert_refused(tmp_path, r"operators that ONNX Runtime does not include: com\.example\.Relu;", graph)


def test_custom_operators_inside_a_branch_are_refused(tmp_path: Path) -> None:
    graph = build_classifier()
    value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    branch = helper.make_graph(
        [helper.make_node("Odd", ["image"], ["inner"], domain="mine")], "branch", [], [value]
    )
    node = helper.make_node("If", ["yes"], ["odd"], then_branch=branch, else_branch=branch)
    graph.graph.node.append(node)
    assert_refused(tmp_path, r"does not include: mine\.Odd;", graph)


def test_graph_that_onnx_runtime_cannot_load_is_refused(tmp_path: Path) -> None:
    graph = build_classifier()
    graph.graph.node[0].input[1] = "nowhere"
    assert_refused(tmp_path, "ONNX Runtime cannot load the model: ", graph)


def test_operators_too_old_to_convert_are_refused(tmp_path: Path) -> None:
    assert_refused(
        tmp_path,
        "operators of version 2, which cannot be converted to 13: ",
        build_classifier(opset=2, ir_version=3),
    )


# --- weights outside the file --------------------------------------------------------------------


def move_matrix_outside(graph: onnx.ModelProto, location: str, **entries: int) -> onnx.ModelProto:
    """Return the graph with its matrix in another file."""
    (matrix,) = [tensor for tensor in graph.graph.initializer if tensor.name == "matrix"]
    matrix.ClearField("raw_data")
    matrix.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        matrix.external_data.add(key=key, value=str(value))
    return graph


def read_matrix(graph: onnx.ModelProto) -> bytes:
    (matrix,) = [tensor for tensor in graph.graph.initializer if tensor.name == "matrix"]
    return numpy_helper.to_array(matrix).tobytes()


@pytest.mark.parametrize("entries", [{}, {"offset": 0, "length": 160}, {"offset": 64, "length": 160}])
def test_external_weights_are_put_into_the_model_file(tmp_path: Path, entries: dict[str, int]) -> None:
    graph = build_classifier()
    (tmp_path / "data").mkdir()
    padding = bytes(entries.get("offset", 0))
    (tmp_path / "data" / "weights.bin").write_bytes(
        padding + read_matrix(graph) + (b"more" if entries else b"")
    )
    model = import_graph(move_matrix_outside(build_classifier(), "data/weights.bin", **entries), tmp_path)
    (tmp_path / "plain").mkdir()
    plain_model = import_graph(graph, tmp_path / "plain")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    assert np.array_equal(model.engine.run(pixels), plain_model.engine.run(pixels))
    assert not any(tensor.external_data for tensor in onnx.load(model.path).graph.initializer)


@pytest.mark.parametrize(
    "location",
    ["/etc/hostname", "../outside.bin", "data/../../outside.bin", "in/../side.bin", "link.bin", "a\0b"],
)
def test_external_weights_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(read_matrix(build_classifier()))
    (folder / "link.bin").symlink_to("../outside.bin")
    (folder / "side.bin").write_bytes(read_matrix(build_classifier()))
    (folder / "in").mkdir()
    assert_refused(
        folder,
        "outside its own folder; only files inside it are read",
        move_matrix_outside(build_classifier(), location),
    )


@pytest.mark.parametrize(
    ("location", "entries", "message"),
    [
        ("gone.bin", {}, "which is not there; copy it beside the model"),
        (".", {}, "which is not there; copy it beside the model"),
        (
            "short.bin",
            {"length": 160},
            "needs bytes 0 to 160 of short.bin, which has .*; the file is incomplete: copy it again",
        ),
        ("short.bin", {"offset": -1}, "needs bytes -1 to .* of short.bin"),
        ("short.bin", {"offset": 10**30}, "of short.bin, which has .*the file is incomplete"),
        ("short.bin", {"length": 10**12}, "more than 2 GB of weights"),
    ],
)
def test_missing_or_incomplete_weights_are_refused(
    tmp_path: Path, location: str, entries: dict[str, int], message: str
) -> None:
    (tmp_path / "short.bin").write_bytes(bytes(100))
    assert_refused(tmp_path, message, move_matrix_outside(build_classifier(), location, **entries))


def test_weights_above_two_gigabytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of all weights counts, not each tensor; the test lowers the limit."""
    graph = build_classifier()
    (tmp_path / "weights.bin").write_bytes(read_matrix(graph))
    monkeypatch.setattr(foreign_model, "MAX_BYTES", graph.ByteSize() - 20)
    assert_refused(
        tmp_path,
        "more than 2 GB of weights.*convert it to float16",
        move_matrix_outside(graph, "weights.bin"),
    )


# --- graph inputs --------------------------------------------------------------------------------


def build_two_inputs() -> onnx.ModelProto:
    graph = build_classifier()
    graph.graph.input.append(helper.make_tensor_value_info("phase", TensorProto.BOOL, []))
    return graph


def build_two_images() -> onnx.ModelProto:
    graph = build_classifier()
    graph.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1, 3, 16, 16]))
    return graph


def build_with_shape(*sides: int | str | None) -> onnx.ModelProto:
    graph = build_classifier()
    graph.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, sides))
    return graph


def build_with_type(kind: int) -> onnx.ModelProto:
    graph = build_classifier()
    graph.graph.input[0].type.tensor_type.elem_type = kind
    return graph


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (build_two_inputs, r"takes 'phase' \(bool\) besides the image 'image': give each a value with --set"),
        (build_two_images, r"takes 2 inputs \('image', 'other'\); an image classifier takes one"),
        (
            lambda: build_with_shape("N", 48),
            r"the input 'image' has 2 axes, any x 48; images in a batch have four",
        ),
        (lambda: build_with_shape("N", 3, 8, 8, 8), "has 5 axes"),
        (
            lambda: build_with_shape("N", "C", "H", "W"),
            "any x any x any x any, does not tell where the channels are: give",
        ),
        (lambda: build_with_shape("N", 3, 16, 3), "give --layout nchw or --layout nhwc"),
        (
            lambda: build_classifier(channels=4),
            r"has 4 channels in layout nchw; 3 channels \(RGB\) or 1 \(grey\) are needed",
        ),
        (lambda: build_classifier(channels=2, layout="nhwc"), "has 2 channels in layout nhwc"),
        (lambda: build_classifier(size=100_000), "is 100000 x 100000 pixels; the maximum side is 2800"),
        (
            lambda: build_with_type(TensorProto.INT64),
            "has type int64; supported types are float32, float16 and uint8",
        ),
        (
            lambda: build_classifier(size=None),
            "takes images of any size: set the size .* with --crop, such as --crop 224",
        ),
        (
            lambda: build_batch_mean(4),
            "the graph takes exactly 4 images at a time and cannot be converted",
        ),
    ],
)
def test_inputs_that_are_not_images_are_refused(
    tmp_path: Path, build: Callable[[], onnx.ModelProto], message: str
) -> None:
    assert_refused(tmp_path, message, build())


def test_size_that_contradicts_the_graph_is_refused(tmp_path: Path) -> None:
    assert_refused(
        tmp_path, "--crop is 20, but the graph takes only any x 3", build_classifier(), size=(20, 20)
    )


def test_layout_that_contradicts_the_shape_is_refused(tmp_path: Path) -> None:
    from fovea.export.importer.graph_input import Layout

    assert_refused(tmp_path, "has 16 channels in layout nhwc", build_classifier(), layout=Layout.NHWC)


# --- graph outputs -------------------------------------------------------------------------------


def build_map_output() -> onnx.ModelProto:
    """Build a graph with the output of a segmentation model."""
    graph = build_classifier()
    map_nodes = [node for node in graph.graph.node if node.op_type in ("Conv", "Relu")]
    map_nodes[-1].output[0] = "scores"
    del graph.graph.node[:]
    graph.graph.node.extend(map_nodes)
    del graph.graph.output[0].type.tensor_type.shape.dim[:]
    graph.graph.output[0].type.tensor_type.ClearField("shape")
    return graph


def build_argmax_output() -> onnx.ModelProto:
    graph = build_classifier()
    graph.graph.node[-1].CopyFrom(
        helper.make_node("ArgMax", [graph.graph.node[-1].input[0]], ["scores"], axis=1)
    )
    graph.graph.output[0].CopyFrom(helper.make_tensor_value_info("scores", TensorProto.INT64, None))
    return graph


def build_two_heads() -> onnx.ModelProto:
    graph = build_classifier()
    graph.graph.node.append(helper.make_node("Neg", ["scores"], ["others"]))
    graph.graph.output.append(helper.make_tensor_value_info("others", TensorProto.FLOAT, ["N", 5]))
    return graph


def build_nan_bias() -> onnx.ModelProto:
    graph = build_classifier()
    (bias,) = [tensor for tensor in graph.graph.initializer if tensor.name == "bias"]
    bias.CopyFrom(numpy_helper.from_array(np.full(5, np.nan, np.float32), "bias"))
    return graph


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            build_map_output,
            {},
            r"no output is a row of values .*scores: float32 images x 8 x 16 x 16\): not an image classifier",
        ),
        (build_argmax_output, {}, r"the output 'scores' gives decisions \(its ArgMax\)"),
        (
            build_map_output,
            {"output": "scores"},
            "the output 'scores' is float32 images x 8 x 16 x 16: not a row of values",
        ),
        (
            build_two_heads,
            {},
            r"several outputs, scores \(5 values\), others \(5 values\): select .* with --output",
        ),
        (build_two_heads, {"output": "other"}, "there is no output 'other'; there are scores, others"),
        (build_nan_bias, {}, "the output 'scores' is not finite for every image"),
    ],
)
def test_unusable_outputs_are_refused(
    tmp_path: Path, build: Callable[[], onnx.ModelProto], options: dict[str, Any], message: str
) -> None:
    assert_refused(tmp_path, message, build(), **options)


@pytest.mark.parametrize(
    ("count", "labels", "message"),
    [
        (5, 4, "labels.txt has 4 labels, the graph gives 5 values for an image$"),
        (5, 2, "has 2 labels, the graph gives 5 values"),
        (1, 3, "one value needs two labels, and is the probability of the second"),
        (
            1001,
            1000,
            "models have a background class first; add a line such as `background` before the others",
        ),
    ],
)
def test_wrong_number_of_labels_is_refused(tmp_path: Path, count: int, labels: int, message: str) -> None:
    assert_refused(tmp_path, message, build_classifier(count=count), labels)


@pytest.mark.parametrize(
    ("model", "labels", "task", "message"),
    [
        (
            build_classifier(end="sigmoid"),
            5,
            None,
            "independent probabilities from 0 to 1, which sum to .*: give --task multilabel",
        ),
        (build_classifier(end="sigmoid"), 5, Task.BINARY, "--task binary takes one value or two"),
        (
            build_classifier(end="softmax"),
            5,
            Task.MULTILABEL,
            "probabilities that sum to 1: that is not multilabel",
        ),
        (build_classifier(end="log_softmax"), 5, Task.MULTILABEL, "that is not multilabel"),
        (
            build_classifier(),
            5,
            Task.BINARY,
            "--task binary takes one value or two for an image; the graph gives 5",
        ),
        (
            build_classifier(count=1),
            2,
            Task.MULTICLASS,
            "--task multiclass does not fit one value for an image",
        ),
    ],
)
def test_task_that_contradicts_the_values_is_refused(
    tmp_path: Path, model: onnx.ModelProto, labels: int, task: Task | None, message: str
) -> None:
    assert_refused(tmp_path, message, model, labels, task=task)


# --- verification --------------------------------------------------------------------------------


def wrap_with_change(
    change: Callable[[onnx.GraphProto], None],
) -> Callable[..., WrappedModel]:
    """Return a replacement for `ForeignModel.wrap` that applies `change` to the wrapped graph."""
    original = ForeignModel.wrap

    def wrap_and_change(self: ForeignModel, normalization: Any, **options: bool) -> WrappedModel:
        result = original(self, normalization, **options)
        change(result.model.graph)
        return result

    return wrap_and_change


def shift_mean(graph: onnx.GraphProto) -> None:
    """Shift the mean by half a level of 255, in the merged or in the usual arithmetic."""
    position, step = next(
        (position, node)
        for node in graph.node
        for op_type, position in (("BatchNormalization", 2), ("Sub", 1))
        if node.op_type == op_type and node.name.startswith("fovea/")
    )
    (mean,) = [tensor for tensor in graph.initializer if tensor.name == step.input[position]]
    mean.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(mean) + np.float32(2e-3), mean.name))


def swap_axes(graph: onnx.GraphProto) -> None:
    (transpose,) = [node for node in graph.node if node.op_type == "Transpose"]
    transpose.attribute[0].ints[:] = [0, 3, 2, 1]


def replace_softmax(graph: onnx.GraphProto) -> None:
    (softmax,) = [node for node in graph.node if node.op_type == "Softmax"]
    softmax.op_type = "LogSoftmax"


@pytest.mark.parametrize("change", [shift_mean, swap_axes, replace_softmax])
def test_graph_with_wrong_results_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[onnx.GraphProto], None]
) -> None:
    monkeypatch.setattr(ForeignModel, "wrap", wrap_with_change(change))
    with pytest.raises(
        VerificationError, match=r"at batch 1 a probability of the imported graph is off by .*at most 1e-05"
    ):
        import_graph(build_classifier(spread=30), tmp_path)
    assert has_no_output(tmp_path)

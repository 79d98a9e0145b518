"""Models take tensors in place of encoded images, and the answers are the same."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fovea.export.importer.preprocessing import IMAGENET, PreprocessingOptions
from fovea.service.artifact.contract import Task
from fovea.service.artifact.inputs import find_original_output, input_tensors_of
from fovea.service.artifact.onnx_edit import extract_preprocessing, replace_input
from fovea.service.errors import BadRequest, GoldenError, Internal, ModelError
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.engine import Engine
from fovea.service.runners.batch_messages import Answer, BatchReport, ImageRequest, Item
from fovea.service.runners.frames import FrameDecoder
from fovea.service.runners.load_messages import ProcessPlan
from fovea.service.runners.predictor import Predictor
from fovea.service.runners.shared_memory import SharedRef
from tests.export.classifiers import Array, build_classifier, run_onnx
from tests.export.imports import ImportedModel, import_graph
from tests.graphs import build_model, read_contract, with_contract
from tests.pictures import make_jpeg

PLAN = ProcessPlan("cpu", 8, 1, 2, 1, 1_000_000, 1 << 28, 1)


SMALL_FILE = build_model().SerializeToString()
(PIXELS,) = input_tensors_of(read_contract(build_model()))


@dataclass(frozen=True)
class GraphKind:
    """A foreign graph and how it is imported."""

    options: dict[str, Any]
    bgr: bool = False

    def import_model(self, folder: Path) -> ImportedModel:
        return import_graph(
            build_classifier(**self.options),
            folder,
            preprocessing=PreprocessingOptions(preset=IMAGENET, bgr=self.bgr),
        )

    def compute_by_hand(self, pixels: Array) -> Array:
        """Return the tensor that the graph takes, computed from pixels as its users do."""
        dtype, layout = self.options.get("dtype", "float32"), self.options.get("layout", "nchw")
        values = pixels
        if dtype != "uint8":
            values = replace(IMAGENET.normalization, bgr=self.bgr)(pixels)
        tensor = values.transpose(0, 3, 1, 2) if layout == "nchw" else values
        return np.ascontiguousarray(tensor, dtype)


KINDS = {
    "float32 nchw": GraphKind({}),
    "float32 nhwc": GraphKind({"layout": "nhwc"}),
    "float16": GraphKind({"dtype": "float16"}),
    "uint8 nchw": GraphKind({"dtype": "uint8"}),
    "uint8 nhwc": GraphKind({"dtype": "uint8", "layout": "nhwc"}),
    "bgr": GraphKind({}, bgr=True),
    "called pixels": GraphKind({"names": ("pixels", "logits")}),
    "one at a time": GraphKind({"batch": 1, "shape": [1, 8]}),
}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> GraphKind:
    return KINDS[request.param]


def load_predictor(path: Path, bodies: int = -1) -> Predictor:
    return Predictor(path, PLAN, DecodeMemory(1 << 28), bodies_descriptor=bodies)


def make_noise(model: Predictor | ImportedModel, count: int) -> Array:
    geometry = model.contract.input
    shape = (count, geometry.height, geometry.width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def answer_items(model: Predictor, items: list[Item]) -> list[Answer]:
    """Return the answers that reach the service, after encoding and decoding."""
    (frame,) = FrameDecoder().feed(model.predict_batch(items).to_bytes())
    report = BatchReport.from_frame(frame)
    assert isinstance(report, BatchReport)
    assert report.batch_size == len(items)
    answers = [answer for answer in report.answers if isinstance(answer, Answer)]
    assert len(answers) == len(items)
    return answers


def test_tensor_whose_session_cannot_be_opened_fails_no_image(tmp_path: Path) -> None:
    """The session is opened from the file again, when the first row of this tensor comes."""
    kind = KINDS["float32 nchw"]
    imported = kind.import_model(tmp_path)
    model = load_predictor(imported.path)
    row = kind.compute_by_hand(make_noise(imported, 1))[0]
    imported.path.unlink()
    for _ in range(2):
        plain, failed, with_logits = model.predict_batch(
            [
                make_jpeg(),
                ImageRequest(row.tobytes(), imported.engine.tensors[1].name),
                ImageRequest(make_jpeg(), include_logits=True),
            ]
        ).answers
        assert isinstance(failed, Internal)
        assert str(failed).startswith("the input 'image' cannot be used: cannot read the model once more")
        assert isinstance(plain, Answer) and isinstance(with_logits, Answer)


def test_original_tensor_and_pixels_get_equal_answers(tmp_path: Path, kind: GraphKind) -> None:
    imported = kind.import_model(tmp_path)
    model = load_predictor(imported.path)
    pixels = make_noise(imported, 5)
    values = kind.compute_by_hand(pixels)
    pixels_input, original_input = imported.engine.tensors
    assert (original_input.dtype, original_input.shape) == (values.dtype.name, values.shape[1:])
    assert original_input.name == kind.options.get("names", ("image",))[0]
    with os.fdopen(os.memfd_create("bodies"), "wb") as bodies:
        bodies.write(b"head" + values.tobytes())
        bodies.flush()
        shared_memory_model = load_predictor(imported.path, bodies.fileno())
        rows = [
            ImageRequest(SharedRef(4 + index * original_input.size, original_input.size), original_input.name)
            for index in range(5)
        ]
        shared_memory_answers = answer_items(shared_memory_model, list(rows))
    tensor_answers = answer_items(
        model, [ImageRequest(row.tobytes(), original_input.name, include_logits=True) for row in values]
    )
    pixel_answers = answer_items(
        model, [ImageRequest(row.tobytes(), pixels_input.name, include_logits=True) for row in pixels]
    )
    expected = imported.engine.run(pixels)
    # float16: other rounding where casts are left out; float32: the normalisation may differ in its last bits
    tolerance = {"float16": 1e-3, "float32": 1e-5, "uint8": 1e-6}[values.dtype.name]
    for *answers, reference in zip(
        shared_memory_answers, tensor_answers, pixel_answers, expected, strict=True
    ):
        for answer in answers:
            assert np.asarray(answer.probabilities) == pytest.approx(reference, abs=tolerance)
            assert list(answer.ranking) == np.argsort(-reference, kind="stable").tolist()
            assert answer.format == ""
    logits = imported.engine.compute_logits(pixels)
    for tensor_answer, pixel_answer, expected_logits in zip(
        tensor_answers, pixel_answers, logits, strict=True
    ):
        assert tensor_answer.logits is not None
        assert np.asarray(tensor_answer.logits) == pytest.approx(expected_logits, abs=10 * tolerance)
        assert np.asarray(pixel_answer.logits) == pytest.approx(expected_logits, abs=10 * tolerance)
    assert {answer.logits for answer in shared_memory_answers} == {None}
    assert {answer.brightness for answer in tensor_answers} == {None}
    assert pixel_answers[0].brightness == pytest.approx(pixels[0].mean() / 255, abs=1e-6)


@pytest.mark.parametrize("task", list(Task))
def test_encoded_images_and_rows_share_a_batch(tmp_path: Path, task: Task) -> None:
    labels = ["no", "yes"] if task is Task.BINARY else ["ant", "bee", "cow"]
    (tmp_path / "model.onnx").write_bytes(build_model(task, labels).SerializeToString())
    model = load_predictor(tmp_path / "model.onnx")
    image, row = make_jpeg(), make_noise(model, 1)[0].tobytes()
    single_answers = [
        answer_items(model, [item])[0] for item in (image, ImageRequest(image), ImageRequest(row, "pixels"))
    ]
    assert single_answers[0] == single_answers[1]._replace(timing=single_answers[0].timing)
    batch_answers = answer_items(
        model, [image, ImageRequest(row, "pixels", include_logits=True), ImageRequest(image)]
    )
    for answer, single_answer in zip(
        batch_answers, (single_answers[0], single_answers[2], single_answers[0]), strict=True
    ):
        assert list(answer.probabilities) == pytest.approx(list(single_answer.probabilities), abs=1e-6)
        assert answer.format == single_answer.format
        assert answer.logits is not None and len(answer.logits) == model.contract.logit_count


def test_bad_image_among_rows_fails_only_itself(tmp_path: Path) -> None:
    imported = KINDS["float32 nchw"].import_model(tmp_path)
    model = load_predictor(imported.path)
    row = KINDS["float32 nchw"].compute_by_hand(make_noise(model, 1))[0].tobytes()
    (frame,) = FrameDecoder().feed(
        model.predict_batch(
            [ImageRequest(row, "image"), b"nonsense", ImageRequest(make_jpeg(), include_logits=True)]
        ).to_bytes()
    )
    report = BatchReport.from_frame(frame)
    assert isinstance(report, BatchReport)
    assert [type(answer) for answer in report.answers] == [Answer, type(report.answers[1]), Answer]
    assert not isinstance(report.answers[1], Answer)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_row_with_non_finite_result_fails_only_itself(tmp_path: Path, value: float) -> None:
    imported = KINDS["float32 nchw"].import_model(tmp_path)
    model = load_predictor(imported.path)
    values = KINDS["float32 nchw"].compute_by_hand(make_noise(model, 3))
    values[1, 0, :4] = value
    values[1, 1, :4] = -value
    first, second, third = model.predict_batch(
        [ImageRequest(row.tobytes(), "image") for row in values]
    ).answers
    assert isinstance(first, Answer) and isinstance(third, Answer)
    assert isinstance(second, BadRequest) and "'image'" in str(second)


def test_trained_model_takes_only_pixels() -> None:
    assert (PIXELS.name, PIXELS.dtype, PIXELS.shape) == ("pixels", "uint8", (16, 16, 3))


@pytest.mark.parametrize(
    ("options", "task", "output"),
    [
        ({}, None, "logits"),
        ({"dtype": "float16"}, None, "logits"),
        ({"end": "hidden_softmax"}, None, "probabilities"),
        ({"end": "hidden_sigmoid"}, Task.MULTILABEL, "probabilities"),
        ({"count": 2}, Task.BINARY, None),
        ({"count": 1, "end": "hidden_sigmoid"}, Task.BINARY, None),
        ({"count": 1}, Task.BINARY, "logits"),
    ],
)
def test_original_output_of_imported_file_is_found(
    tmp_path: Path, options: dict[str, Any], task: Task | None, output: str | None
) -> None:
    """The output is found by its name in the file; it equals one of Fovea's outputs, or none."""
    graph = build_classifier(**options)
    labels = 2 if task is Task.BINARY else 5
    imported = import_graph(graph, tmp_path, labels, task=task)
    assert find_original_output(imported.contract) == (None if output is None else ("scores", output))
    if output:
        pixels = make_noise(imported, 2)
        values = KINDS["float32 nchw"].compute_by_hand(pixels)
        file_output = run_onnx(graph, values.astype(np.float16) if "dtype" in options else values)
        engine = imported.engine
        engine_output = engine.compute_logits(pixels) if output == "logits" else engine.run(pixels)
        assert engine_output == pytest.approx(
            file_output.reshape(engine_output.shape), abs=0.05 if "dtype" in options else 1e-4
        )


def test_trained_model_has_no_original_output() -> None:
    assert find_original_output(read_contract(build_model())) is None


def test_wrong_preprocessing_or_layer_table_is_detected(tmp_path: Path) -> None:
    """The skipped part must be everything between the pixels and the tensor."""
    imported = KINDS["float32 nchw"].import_model(tmp_path)
    graph = onnx.load(imported.path)
    (step,) = [node for node in graph.graph.node if node.op_type == "BatchNormalization"]
    scale = next(tensor for tensor in graph.graph.initializer if tensor.name == step.input[1])
    scale.CopyFrom(onnx.numpy_helper.from_array(np.ones(3, np.float32), scale.name))
    content = imported.path.read_bytes()
    engine = Engine(content, provider="cpu", threads=1, read_bytes=graph.SerializeToString)
    with pytest.raises(GoldenError):
        engine.run_tensor(engine.tensors[1], np.zeros((1, 3, 16, 16), np.float32))
    wrong_contract = replace(
        imported.contract,
        layers=tuple(
            replace(layer, shape=(3, 8, 32)) if layer.outputs[0] == "image" else layer
            for layer in imported.contract.layers
        ),
    )
    engine = Engine(
        with_contract(onnx.load(imported.path), wrong_contract).SerializeToString(), provider="cpu", threads=1
    )
    with pytest.raises(ModelError):
        engine.run_tensor(engine.tensors[1], np.zeros((1, 3, 8, 32), np.float32))


def test_tensor_sessions_read_the_model_once(tmp_path: Path) -> None:
    """The sessions for a tensor are created on its first use, and kept."""
    imported = KINDS["float32 nchw"].import_model(tmp_path)
    content, reads = imported.path.read_bytes(), []

    def read_content() -> bytes:
        reads.append(1)
        return content

    engine = Engine(content, provider="cpu", threads=1, wide_threads=2, read_bytes=read_content)
    assert not reads
    values = KINDS["float32 nchw"].compute_by_hand(make_noise(imported, 2))
    single_output = engine.run_tensor(engine.tensors[1], values[:1], exclusive=True)[0]
    batch_output = engine.run_tensor(engine.tensors[1], values)[0]
    assert single_output[0] == pytest.approx(batch_output[0], abs=1e-6)
    assert len(reads) == 1


@given(st.data())
def test_truncated_model_is_refused_unless_valid(data: st.DataObject) -> None:
    end = data.draw(st.integers(0, len(SMALL_FILE) - 1))
    for edit_model in (replace_input, extract_preprocessing):
        try:
            edit_model(SMALL_FILE[:end], PIXELS)
        except ModelError:
            pass
        else:  # the file ends between two fields
            assert end == 0 or onnx.load_from_string(SMALL_FILE[:end])


@given(st.binary(max_size=200))
def test_any_bytes_are_edited_or_refused(content: bytes) -> None:
    try:
        assert replace_input(content, PIXELS)
    except ModelError as error:
        assert "ONNX model" in str(error)

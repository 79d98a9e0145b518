"""Batch sizes of a predictor, and the brightness, entropy and errors in its answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fovea.service.artifact.contract import Task
from fovea.service.errors import BadBox, DeadlineExceeded, Internal, NoEmbedding, UnsupportedFormat
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.pixels import brightness_of
from fovea.service.resources.cgroup import Cgroup
from fovea.service.runners import predictor as predictor_module
from fovea.service.runners import process
from fovea.service.runners.batch_messages import Answer, Batch, BatchReport, BoxAnswers, ImageRequest
from fovea.service.runners.frames import FrameDecoder
from fovea.service.runners.load_messages import ProcessPlan
from fovea.service.runners.predictor import Predictor, entropy_of
from tests.graphs import (
    build_float16_head,
    build_model,
    build_nan_for_black,
    build_unopenable,
    build_without_embedding_tensor,
)
from tests.pictures import encode_image, make_jpeg

PLAN = ProcessPlan("cpu", 3, 1, 0, 1, 1_000_000, 1 << 28, 1)


@pytest.mark.parametrize(("batch_dimension", "expected_batch_max"), [("batch", 3), (1, 1)])
def test_batch_max_respects_the_limit_of_the_graph(
    tmp_path: Path, batch_dimension: str | int, expected_batch_max: int
) -> None:
    model = build_model()
    batch_axis = model.graph.input[0].type.tensor_type.shape.dim[0]
    if isinstance(batch_dimension, int):
        batch_axis.dim_value = batch_dimension
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    predictor = Predictor(tmp_path / "model.onnx", PLAN, DecodeMemory(1 << 28))
    assert predictor.loaded_model.batch_max == expected_batch_max
    images = [make_jpeg(seed=seed) for seed in range(3)]
    assert all(isinstance(answer, Answer) for answer in predictor.predict_batch(images).answers)


@pytest.mark.parametrize(
    ("task", "row", "entropy"),
    [
        (Task.MULTICLASS, [1, 0, 0, 0], 0),
        (Task.MULTICLASS, [0.25, 0.25, 0.25, 0.25], 1),
        (Task.MULTICLASS, [0.5, 0.5, 0, 0], 0.5),
        (Task.BINARY, [0.5, 0.5], 1),
        (Task.BINARY, [0.11002786, 0.88997214], 0.5),  # where the binary entropy function is a half
        (Task.MULTILABEL, [0.5, 0.5, 0.5], 1),
        (Task.MULTILABEL, [1, 0.5, 0, 0], 0.25),
        (Task.MULTICLASS, [1], 0),
    ],
)
def test_entropy_is_0_if_certain_and_1_if_uniform(task: Task, row: list[float], entropy: float) -> None:
    assert entropy_of(np.array([row, row], np.float32), task) == pytest.approx([entropy] * 2, abs=1e-6)


@pytest.mark.parametrize("row", [[1 / 3] * 3, [0.1] * 10, [1.0000001, 0]])
def test_entropy_is_between_zero_and_one(row: list[float]) -> None:
    (entropy,) = entropy_of(np.array([row], np.float32), Task.MULTICLASS)
    assert 0 <= entropy <= 1


def test_brightness_is_the_mean_of_all_values() -> None:
    batch = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    batch[0], batch[1] = 0, 255
    assert brightness_of(batch) == pytest.approx([0, 1, batch[2].mean() / 255], abs=1e-6)


def test_non_finite_answer_fails_only_its_own_image(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(build_nan_for_black().SerializeToString())
    predictor = Predictor(tmp_path / "model.onnx", PLAN, DecodeMemory(1 << 28))
    black = encode_image(Image.new("RGB", (32, 32)), "PNG")
    (frame,) = FrameDecoder().feed(
        predictor.predict_batch(
            [make_jpeg(), black, ImageRequest(make_jpeg(), include_logits=True)]
        ).to_bytes()
    )
    report = BatchReport.from_frame(frame)
    assert isinstance(report, BatchReport)
    first, second, third = report.answers
    assert isinstance(second, Internal)
    assert "not finite" in str(second)
    for answer in (first, third):
        assert isinstance(answer, Answer)
        assert np.isfinite(np.asarray(answer.probabilities)).all()


def test_only_the_images_that_ask_get_an_embedding(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(build_model().SerializeToString())
    predictor = Predictor(tmp_path / "model.onnx", PLAN, DecodeMemory(1 << 28))
    image = make_jpeg()
    report = predictor.predict_batch([image, b"nonsense", ImageRequest(image, include_embedding=True)])
    plain, failed, embedded = report.answers
    assert isinstance(plain, Answer) and isinstance(embedded, Answer)
    assert not isinstance(failed, Answer)
    assert plain.embedding is None
    assert embedded.embedding is not None
    assert len(embedded.embedding) == 8
    assert list(plain.probabilities) == pytest.approx(list(embedded.probabilities), abs=1e-6)


def test_boxes_are_answered_beside_other_images(tmp_path: Path) -> None:
    """Batches of the model have three images at most."""
    (tmp_path / "model.onnx").write_bytes(build_model().SerializeToString())
    predictor = Predictor(tmp_path / "model.onnx", PLAN, DecodeMemory(1 << 28))
    image = make_jpeg()
    box = (0, 0, 64, 48)
    report = predictor.predict_batch(
        [
            ImageRequest(image, boxes=(box,) * 7, include_logits=True),
            image,
            ImageRequest(b"nonsense", boxes=(box,)),
            ImageRequest(image, boxes=((0, 0, 64, 49),)),
            ImageRequest(image, include_embedding=True),
            ImageRequest(image, boxes=()),
        ],
        exclusive=True,
    )
    boxed, plain, failed, outside, embedded, empty = report.answers
    assert isinstance(plain, Answer) and isinstance(embedded, Answer)
    assert isinstance(boxed, BoxAnswers) and isinstance(empty, BoxAnswers)
    assert isinstance(failed, UnsupportedFormat)
    assert isinstance(outside, BadBox)
    assert len(report.decode_seconds) == 6
    assert report.batch_size == 3
    assert empty.answers == []
    assert (boxed.format, boxed.width, boxed.height) == ("JPEG", 64, 48)
    assert [one.timing.batch_size for one in boxed.answers] == [3, 3, 3, 3, 3, 3, 1]
    for answer in boxed.answers:
        assert list(answer.probabilities) == pytest.approx(list(plain.probabilities), abs=1e-6)
        assert (answer.format, answer.width, answer.height) == ("", 64, 48)
        assert answer.logits is not None
    starts = [one.timing.decode_started_at for one in boxed.answers]
    assert starts == sorted(starts)


def test_boxes_end_with_the_batch_in_which_their_deadline_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.onnx").write_bytes(build_model().SerializeToString())
    predictor = Predictor(tmp_path / "model.onnx", PLAN, DecodeMemory(1 << 28))
    now = 0.0
    monkeypatch.setattr(predictor_module, "time", SimpleNamespace(monotonic=lambda: now))
    run_tensor = predictor._run_tensor

    def run_slowly(*arguments: Any, **options: Any) -> Any:
        nonlocal now
        now += 10
        return run_tensor(*arguments, **options)

    monkeypatch.setattr(predictor, "_run_tensor", run_slowly)
    box = (0, 0, 64, 48)
    request = ImageRequest(make_jpeg(), boxes=(box,) * 7)
    report = predictor.predict_batch([request, request.content, request], deadlines=[15.0, None, None])
    late, plain, boxed = report.answers
    assert isinstance(late, DeadlineExceeded)
    assert str(late) == "6 of 7 boxes were classified in time"
    assert isinstance(plain, Answer) and isinstance(boxed, BoxAnswers)
    assert now == 10 * (2 + 3 + 1)


def test_runner_ends_boxes_at_the_deadline_of_their_own_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that was dropped before must not shift the deadlines of the others."""
    (tmp_path / "model.onnx").write_bytes(build_model().SerializeToString())
    predictor = Predictor(tmp_path / "model.onnx", PLAN, DecodeMemory(1 << 28))
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(predictor_module, "time", clock)
    monkeypatch.setattr(process, "time", clock)
    run_tensor = predictor._run_tensor

    def run_slowly(*arguments: Any, **options: Any) -> Any:
        nonlocal now
        now += 10
        return run_tensor(*arguments, **options)

    monkeypatch.setattr(predictor, "_run_tensor", run_slowly)
    request = ImageRequest(make_jpeg(), boxes=((0, 0, 64, 48),) * 7)
    deadlines = [None, 1000.0, 35.0]
    batch = Batch(1, 0, [request] * 3, deadlines, exclusive=False, separate=False)
    (content,) = process._run_group(predictor, [batch], {(1, 0)})
    (frame,) = FrameDecoder().feed(content)
    dropped, in_time, late = BatchReport.from_frame(frame).answers
    assert isinstance(dropped, DeadlineExceeded)
    assert isinstance(in_time, BoxAnswers)
    assert isinstance(late, DeadlineExceeded)
    assert str(late) == "3 of 7 boxes were classified in time"


def test_boxes_alone_use_the_session_of_exclusive_calls_one_by_one(tmp_path: Path) -> None:
    """This session keeps the memory of single images only."""
    (tmp_path / "model.onnx").write_bytes(build_model().SerializeToString())
    plan = ProcessPlan("cpu", 3, 1, 2, 1, 1_000_000, 1 << 28, 1)
    predictor = Predictor(tmp_path / "model.onnx", plan, DecodeMemory(1 << 28))
    request = ImageRequest(make_jpeg(), boxes=((0, 0, 64, 48),) * 4)
    for exclusive, sizes in ((True, [1, 1, 1, 1]), (False, [3, 3, 3, 1])):
        (answer,) = predictor.predict_batch([request], exclusive=exclusive).answers
        assert isinstance(answer, BoxAnswers)
        assert [one.timing.batch_size for one in answer.answers] == sizes


def test_embedding_of_boxes_needs_a_model_with_one(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(build_unopenable().SerializeToString())
    predictor = Predictor(tmp_path / "model.onnx", PLAN, DecodeMemory(1 << 28))
    request = ImageRequest(make_jpeg(), boxes=((0, 0, 64, 48),), include_embedding=True)
    (answer,) = predictor.predict_batch([request]).answers
    assert isinstance(answer, NoEmbedding)


def test_embedding_that_cannot_be_computed_fails_no_other_image(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(build_without_embedding_tensor().SerializeToString())
    predictor = Predictor(tmp_path / "model.onnx", PLAN, DecodeMemory(1 << 28))
    image = make_jpeg()
    wish = ImageRequest(image, include_embedding=True)
    for _ in range(2):  # the second time without another attempt
        plain, failed, with_logits = predictor.predict_batch(
            [image, wish, ImageRequest(image, include_logits=True)]
        ).answers
        assert isinstance(failed, Internal)
        assert "the model's embedding cannot be computed: ONNX Runtime cannot load the model" in str(failed)
        assert isinstance(plain, Answer) and isinstance(with_logits, Answer)
        assert with_logits.logits is not None
        assert list(plain.probabilities) == list(with_logits.probabilities)
    report = predictor.predict_batch(
        [wish, ImageRequest(image, include_embedding=True, boxes=((0, 0, 9, 9),))]
    )
    assert [type(answer) for answer in report.answers] == [Internal, Internal]
    assert report.batch_size == 0


def test_failed_embedding_is_not_tried_again_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt takes as long as loading the model: a caller could repeat it with every request."""
    file = tmp_path / "model.onnx"
    file.write_bytes(build_model().SerializeToString())
    predictor = Predictor(file, PLAN, DecodeMemory(1 << 28))
    content = file.read_bytes()
    file.unlink()
    wish = ImageRequest(make_jpeg(), include_embedding=True)
    (failed,) = predictor.predict_batch([wish]).answers
    assert "cannot read the model once more: No such file" in str(failed)
    file.write_bytes(content)
    (failed,) = predictor.predict_batch([wish]).answers
    assert isinstance(failed, Internal)
    monkeypatch.setattr("fovea.service.inference.engine._RETRY_SECONDS", 0)
    predictor._engine._failures.clear()
    (answer,) = predictor.predict_batch([wish]).answers
    assert isinstance(answer, Answer) and answer.embedding is not None


def test_embedding_of_float16_is_returned_as_float32(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(build_float16_head().SerializeToString())
    (tmp_path / "float.onnx").write_bytes(build_model().SerializeToString())
    image = ImageRequest(make_jpeg(), include_embedding=True)
    half, full = (
        Predictor(tmp_path / name, PLAN, DecodeMemory(1 << 28)).predict_batch([image]).answers[0]
        for name in ("model.onnx", "float.onnx")
    )
    assert isinstance(half, Answer) and isinstance(full, Answer)
    assert half.embedding is not None and full.embedding is not None
    assert half.embedding.format == "f"
    values = np.array(full.embedding, np.float32)
    assert np.array_equal(np.array(half.embedding), values.astype(np.float16).astype(np.float32))


def test_container_without_memory_refuses_the_second_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the kernel would kill the runner, with the images of all its callers."""
    file = tmp_path / "model.onnx"
    file.write_bytes(build_model().SerializeToString())
    predictor = Predictor(file, PLAN, DecodeMemory(1 << 28))
    values = {"max": f"{1 << 30}\n", "current": f"{(1 << 30) - 100}\n", "stat": "inactive_file 9\n"}
    for name, value in values.items():
        (tmp_path / f"memory.{name}").write_text(value)
    (tmp_path / "membership").write_text("0::/\n")
    group = Cgroup(tmp_path, tmp_path / "membership")
    monkeypatch.setattr("fovea.service.resources.model_memory.Cgroup", lambda: group)
    wish = ImageRequest(make_jpeg(), include_embedding=True)
    failed, plain = predictor.predict_batch([wish, make_jpeg()]).answers
    assert "of the container's 1024 MB only 0 MB are free" in str(failed)
    assert isinstance(plain, Answer)

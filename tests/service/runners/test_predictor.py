"""Batch sizes of a predictor, and the brightness, entropy and errors in its answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fovea.service.artifact.contract import Task
from fovea.service.errors import Internal
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.drift import brightness_of
from fovea.service.runners.batch_messages import Answer, BatchReport, ImageRequest
from fovea.service.runners.frames import FrameDecoder
from fovea.service.runners.load_messages import ProcessPlan
from fovea.service.runners.predictor import Predictor, entropy_of
from tests.graphs import build_model, build_nan_for_black
from tests.pictures import encode_image, make_jpeg

PLAN = ProcessPlan("cpu", 3, 1, 0, 1, 1_000_000, 1 << 28, 1)


@pytest.mark.parametrize(("first", "most"), [("batch", 3), (1, 1)])
def test_a_batch_has_no_more_images_than_the_graph_takes(tmp_path: Path, first: str | int, most: int) -> None:
    model = build_model()
    side = model.graph.input[0].type.tensor_type.shape.dim[0]
    if isinstance(first, int):
        side.dim_value = first
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    loaded = Predictor(tmp_path / "model.onnx", PLAN, DecodeMemory(1 << 28))
    assert loaded.loaded_model.batch_max == most
    images = [make_jpeg(seed=seed) for seed in range(3)]
    assert all(isinstance(answer, Answer) for answer in loaded.predict_batch(images).answers)


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
def test_entropy_is_0_where_sure_and_1_where_all_are_alike(
    task: Task, row: list[float], entropy: float
) -> None:
    assert entropy_of(np.array([row, row], np.float32), task) == pytest.approx([entropy] * 2, abs=1e-6)


@pytest.mark.parametrize("row", [[1 / 3] * 3, [0.1] * 10, [1.0000001, 0]])
def test_entropy_stays_within_0_and_1_where_rounding_leads_outside(row: list[float]) -> None:
    (entropy,) = entropy_of(np.array([row], np.float32), Task.MULTICLASS)
    assert 0 <= entropy <= 1


def test_brightness_is_the_mean_of_all_values() -> None:
    batch = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    batch[0], batch[1] = 0, 255
    assert brightness_of(batch) == pytest.approx([0, 1, batch[2].mean() / 255], abs=1e-6)


def test_an_answer_that_is_not_finite_is_an_error_and_harms_no_neighbour(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(build_nan_for_black().SerializeToString())
    model = Predictor(tmp_path / "model.onnx", PLAN, DecodeMemory(1 << 28))
    black = encode_image(Image.new("RGB", (32, 32)), "PNG")
    (frame,) = FrameDecoder().feed(
        model.predict_batch([make_jpeg(), black, ImageRequest(make_jpeg(), include_logits=True)]).to_bytes()
    )
    report = BatchReport.from_frame(frame)
    assert isinstance(report, BatchReport)
    first, second, third = report.answers
    assert isinstance(second, Internal)
    assert "not finite" in str(second)
    for good in (first, third):
        assert isinstance(good, Answer)
        assert np.isfinite(np.asarray(good.probabilities)).all()

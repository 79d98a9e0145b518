"""Answered images are counted at the next fold, each of them once."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from fovea.service.observability.metrics import Metrics
from fovea.service.runners.batch_messages import Answer, ImageTiming
from fovea.service.runners.lane import Job, Lane
from fovea.service.serving import prediction_tally
from fovea.service.serving.prediction_tally import PredictionTally
from tests.service.api.infer_bodies import make_model


def add_image(tally: PredictionTally) -> None:
    lane: Lane[Any, Any] = Lane(model_id=0, batch_max=4)
    job = Job(b"", lane, lambda outcome, job: None, deadline=1.0, arrived_at=0.0, batch_share=1.0)
    probabilities: memoryview[float] = memoryview(array("f", [0.25, 0.75]))
    ranking: memoryview[int] = memoryview(array("i", [1, 0]))
    timing = ImageTiming(0.0, 0.0, 0.0, 0.0, 1)
    tally.add_image(Answer("JPEG", 8, 8, 0.5, 0.8, None, probabilities, ranking, timing), job)


def test_images_are_counted_at_the_next_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_tally, "_MAX_PENDING_IMAGES", 3)
    metrics, model = Metrics(CollectorRegistry(), is_shared=True), make_model()
    tally = PredictionTally(model, metrics, drift_images=100)
    series = {"model": model.name, "version": model.version}
    total = 0
    for count in (1, 0, 2, 3, 4, 1):
        for _ in range(count):
            add_image(tally)
        total += count
        metrics.fold()
        assert metrics.registry.get_sample_value("fovea_images_total", series) == total

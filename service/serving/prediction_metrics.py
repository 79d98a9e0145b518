"""Metrics of a model's predictions: labels, confidence, entropy and drift."""

from __future__ import annotations

from typing import Final

from fovea.service.inference.drift import DriftMonitor
from fovea.service.observability.metrics import Metrics
from fovea.service.runners.batch_messages import Answer
from fovea.service.serving.live_model import LiveModel

_MAX_LABELS: Final = 100
"""Maximum number of labels of a model with a series of their own."""

_OTHER_LABEL: Final = "other"

_DRIFT_INTERVAL: Final = 20
"""Number of images between two drift computations. A computation takes as long as counting ten images."""


class PredictionMetrics:
    """Prediction metrics of one model."""

    def __init__(self, model: LiveModel, metrics: Metrics, *, drift_images: int) -> None:
        """Look up the model's series. Drift is computed over the last `drift_images` images."""
        labels, identity = model.contract.labels, (model.name, model.version)
        self._image_counter = metrics.images.labels(*identity)
        label_names = [name if number < _MAX_LABELS else _OTHER_LABEL for number, name in enumerate(labels)]
        series = {name: metrics.predictions.labels(*identity, name) for name in label_names}
        self._label_counters = [series[name] for name in label_names]
        self._confidence = metrics.prediction_confidence.labels(*identity)
        self._entropy = metrics.prediction_entropy.labels(*identity)
        self._brightness = metrics.image_brightness.labels(*identity)
        self._width, self._height = (metrics.image_pixels.labels(side) for side in ("width", "height"))
        reference = model.contract.reference
        self._drift = DriftMonitor(reference, labels, drift_images) if reference else None
        self._metrics, self._identity = metrics, identity

    def count_image(self, answer: Answer) -> None:
        """Count an answered image."""
        label = answer.ranking[0]
        confidence = answer.probabilities[label]
        self._image_counter.inc()
        self._label_counters[label].inc()
        self._confidence.observe(confidence)
        self._entropy.observe(answer.entropy)
        for warning in answer.warnings:
            self._metrics.image_warnings.labels(warning.code).inc()
        if answer.format:
            self._width.observe(answer.width)
            self._height.observe(answer.height)
        if answer.brightness is None:
            return
        self._brightness.observe(answer.brightness)
        if self._drift:
            self._drift.add(label, confidence, answer.brightness)
            if self._drift.is_full and not self._drift.images % _DRIFT_INTERVAL:
                self._set_drift_metrics(self._drift)

    def _set_drift_metrics(self, drift: DriftMonitor) -> None:
        """Set the drift metrics."""
        for signal, index in drift.compute_indices().items():
            self._metrics.drift_psi.labels(*self._identity, signal).set(index.psi)
            self._metrics.drift_chance_psi.labels(*self._identity, signal).set(index.chance)

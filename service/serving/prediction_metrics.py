"""Metrics of a model's predictions: labels, confidence, entropy and drift."""

from __future__ import annotations

from typing import Final

from fovea.service.inference.drift import DriftMonitor
from fovea.service.observability.metrics import Metrics
from fovea.service.runners.messages import Answer
from fovea.service.serving.registry import LiveModel

_LABELS: Final = 100
"""Maximum number of labels of a model with a series of their own."""

_OTHER: Final = "other"

_EVERY: Final = 20
"""Number of images between two drift computations. A computation takes as long as counting ten images."""


class Predictions:
    """Prediction metrics of one model."""

    def __init__(self, model: LiveModel, metrics: Metrics, *, drift_images: int) -> None:
        """Look up the model's series. Drift covers the last `drift_images` images, once there are as many."""
        names, own = model.contract.labels, (model.name, model.version)
        self._images = metrics.images.labels(*own)
        shown = [name if number < _LABELS else _OTHER for number, name in enumerate(names)]
        series = {name: metrics.predictions.labels(*own, name) for name in shown}
        self._labels = [series[name] for name in shown]
        self._confidence = metrics.prediction_confidence.labels(*own)
        self._entropy = metrics.prediction_entropy.labels(*own)
        self._brightness = metrics.image_brightness.labels(*own)
        self._width, self._height = (metrics.image_pixels.labels(side) for side in ("width", "height"))
        reference = model.contract.reference
        self._drift = DriftMonitor(reference, names, drift_images) if reference else None
        self._metrics, self._own = metrics, own

    def count(self, answer: Answer) -> None:
        """Count an answered image."""
        label = answer.ranking[0]
        confidence = answer.probabilities[label]
        self._images.inc()
        self._labels[label].inc()
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
            if self._drift.is_full and not self._drift.images % _EVERY:
                self._tell(self._drift)

    def _tell(self, drift: DriftMonitor) -> None:
        """Set the drift metrics."""
        for signal, index in drift.compute_indices().items():
            self._metrics.drift_psi.labels(*self._own, signal).set(index.psi)
            self._metrics.drift_chance_psi.labels(*self._own, signal).set(index.chance)

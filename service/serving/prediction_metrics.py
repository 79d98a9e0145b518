"""What a model says, as metrics: labels, how sure it is, and how far that is from held-out images."""

from __future__ import annotations

from typing import Final

from fovea.service.inference.drift import Drift
from fovea.service.observability.metrics import Metrics
from fovea.service.runners.messages import Answer
from fovea.service.serving.registry import LiveModel

_LABELS: Final = 100
"""Labels of a model that have a series of their own."""

_OTHER: Final = "other"

_EVERY: Final = 20
"""Images from one comparison with the reference to the next: one takes as long as counting ten images."""


class Predictions:
    """One model's."""

    def __init__(self, model: LiveModel, metrics: Metrics, *, drift_images: int) -> None:
        """`drift_images`: the last ones, of which drift is told once there are as many."""
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
        self._drift = Drift(reference, names, drift_images) if reference else None
        self._metrics, self._own = metrics, own

    def count(self, answer: Answer) -> None:
        """An image was answered."""
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

    def _tell(self, drift: Drift) -> None:
        for signal, index in drift.indices().items():
            self._metrics.drift_psi.labels(*self._own, signal).set(index.psi)
            self._metrics.drift_chance_psi.labels(*self._own, signal).set(index.chance)

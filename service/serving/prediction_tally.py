"""Metrics of a model's predictions: labels, confidence, entropy and drift."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

from fovea.service.image_warnings import ImageWarning
from fovea.service.inference.drift import DriftMonitor
from fovea.service.observability.metrics import Metrics
from fovea.service.observability.tallies import observe_all
from fovea.service.runners.batch_messages import Answer, BoxAnswers, ImageTiming
from fovea.service.runners.lane import Job
from fovea.service.serving.live_model import LiveModel

_MAX_LABELS: Final = 100
"""Maximum number of labels of a model with a series of their own."""

_OTHER_LABEL: Final = "other"

_MAX_PENDING_IMAGES: Final = 256
"""Number of images after which they are counted, which takes a millisecond."""

_DRIFT_INTERVAL: Final = 20
"""Number of images between two drift computations. A computation takes as long as counting ten images."""


class _CountedImage(NamedTuple):
    """Counted properties of an answered image. Times are in seconds, `answered_at` on the monotonic clock."""

    label: int
    """Index of the most probable label."""
    confidence: float
    entropy: float
    brightness: float | None
    is_unknown: bool
    """True if the image is unlike the training images."""
    format: str
    width: int
    height: int
    warnings: Sequence[ImageWarning]
    queue_seconds: float
    timing: ImageTiming
    answered_at: float


class PredictionTally:
    """The answered images of one model that wait to be counted (`service.observability.tallies`)."""

    def __init__(self, model: LiveModel, metrics: Metrics, *, drift_images: int) -> None:
        """Look up the model's series. Drift is computed over the last `drift_images` images."""
        labels, identity = model.contract.labels, (model.name, model.version)
        self._images: list[_CountedImage] = []
        self._statistics = model.statistics
        self._image_counter = metrics.images.labels(*identity)
        label_names = [name if number < _MAX_LABELS else _OTHER_LABEL for number, name in enumerate(labels)]
        series = {name: metrics.predictions.labels(*identity, name) for name in label_names}
        self._label_counters = [series[name] for name in label_names]
        self._confidence = metrics.prediction_confidence.labels(*identity)
        self._entropy = metrics.prediction_entropy.labels(*identity)
        self._brightness = metrics.image_brightness.labels(*identity)
        self._known = model.contract.known
        self._unknown_counter = metrics.unknown_images.labels(*identity) if self._known else None
        self._width, self._height = (metrics.image_pixels.labels(side) for side in ("width", "height"))
        reference = model.contract.reference
        self._drift = DriftMonitor(reference, labels, drift_images) if reference else None
        self._metrics, self._identity = metrics, identity

    def add_image(self, answer: Answer, job: Job) -> None:
        """Count an answered image at the next fold. The arrays of `answer` are not kept."""
        label = answer.ranking[0]
        if not self._images:
            self._metrics.fold_later(self)
        self._images.append(
            _CountedImage(
                label,
                answer.probabilities[label],
                answer.entropy,
                answer.brightness,
                self._is_unknown(answer),
                answer.format,
                answer.width,
                answer.height,
                answer.warnings,
                job.started_at - job.arrived_at,
                answer.timing,
                time.monotonic(),
            )
        )
        # A request may have many images: counting thousands at once would block the event loop.
        if len(self._images) >= _MAX_PENDING_IMAGES:
            self.fold()

    def add_boxes(self, outcome: BoxAnswers, job: Job) -> None:
        """Count each box of an image as an image, and the warnings about the image once."""
        for answer in outcome.answers:
            self.add_image(answer, job)
        for warning in outcome.warnings:
            self._metrics.image_warnings.labels(warning.code).inc()

    def _is_unknown(self, answer: Answer) -> bool:
        score = answer.known_score
        return self._known is not None and score is not None and not self._known.accepts(score)

    def fold(self) -> None:
        """Count the images in the metrics, the statistics and the drift monitor."""
        if not self._images:
            return
        images, self._images = self._images, []
        self._image_counter.inc(len(images))
        for label, count in Counter(image.label for image in images).items():
            self._label_counters[label].inc(count)
        observe_all(self._confidence, [image.confidence for image in images])
        observe_all(self._entropy, [image.entropy for image in images])
        encoded_images = [image for image in images if image.format]
        observe_all(self._width, [image.width for image in encoded_images])
        observe_all(self._height, [image.height for image in encoded_images])
        brightnesses = [image.brightness for image in images if image.brightness is not None]
        observe_all(self._brightness, brightnesses)
        if self._unknown_counter:
            self._unknown_counter.inc(sum(image.is_unknown for image in images))
        is_drift_due = False
        for image in images:
            self._statistics.count_image(image.queue_seconds, image.timing, image.answered_at)
            for warning in image.warnings:
                self._metrics.image_warnings.labels(warning.code).inc()
            if self._drift and image.brightness is not None:
                self._drift.add(image.label, image.confidence, image.brightness)
                is_drift_due |= self._drift.is_full and not self._drift.images % _DRIFT_INTERVAL
        if self._drift and is_drift_due:
            self._set_drift_metrics(self._drift)

    def _set_drift_metrics(self, drift: DriftMonitor) -> None:
        """Set the drift metrics."""
        for signal, index in drift.compute_indices().items():
            self._metrics.drift_psi.labels(*self._identity, signal).set(index.psi)
            self._metrics.drift_chance_psi.labels(*self._identity, signal).set(index.chance)

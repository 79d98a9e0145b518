"""Definition of every metric: name, unit, labels and buckets.

Metrics are an interface: renaming a metric breaks the alerts that use the metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from fovea.service.errors import list_error_codes
from fovea.service.image_warnings import WarningCode

_SECONDS_BUCKETS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""Bucket edges of durations in seconds, from 0.1 ms to 10 s.

A thumbnail decodes in 0.1 ms. A saturated queue holds a request for seconds.
"""

CLIENT_LEFT: Final = "client_left"
"""Value of the label `reason` for a client that left early; it is counted beside the error codes."""

DEATH_REASONS: Final = ("signal", "exit", "hung")
"""Reasons for the death of a worker."""

STAGES: Final = ("read", "queue", "decode", "inference", "encode")
"""Stages of a request, in this order."""

_BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128)

_RATIO_BUCKETS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

_CONFIDENCE_BUCKETS: Final = (*_RATIO_BUCKETS[:-1], 0.95, 0.98, 0.99, 1.0)
"""Bucket edges of the confidence: most answers of a calibrated model are above 0.9."""

_SIDE_BUCKETS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Bucket edges of image sides in pixels: from thumbnails to phones (4,000) and scanners (8,000)."""


class ProcessMetrics:
    """Metrics of the service's own processes.

    The supervisor counts the workers. Each process counts the connections that lacked a file descriptor.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.workers = Gauge(
            "fovea_workers",
            "Worker processes that take connections; 1 where the service is one process.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.workers_expected = Gauge(
            "fovea_workers_expected",
            "Worker processes that there should be (FOVEA_WORKERS).",
            multiprocess_mode="livesum",
            registry=registry,
        )
        deaths = Counter(
            "fovea_worker_deaths",
            "Worker processes that died and were replaced: ended by a `signal`, by themselves (`exit`), or "
            "killed because they were not heard of any more (`hung`).",
            ("reason",),
            registry=registry,
        )
        self.worker_deaths: Mapping[str, Counter] = {
            reason: deaths.labels(reason) for reason in DEATH_REASONS
        }
        self.connections_starved = Counter(
            "fovea_connections_starved",
            "Times that a connection had to wait because a process had no file descriptor left for it.",
            registry=registry,
        )


class Metrics:
    """All metrics of one process, in the given registry.

    `multiprocess_mode` of a gauge says how the values of several workers are combined.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.process_metrics = ProcessMetrics(registry)
        self.requests = Counter(
            "fovea_requests",
            "Requests answered. `route` is the route's template, `model` empty where none took part.",
            ("protocol", "route", "model", "status"),
            registry=registry,
        )
        self.request_seconds = Histogram(
            "fovea_request_seconds",
            "Time from the request's headers to the last byte of its answer.",
            ("protocol", "route", "model"),
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self.requests_in_flight = Gauge(
            "fovea_requests_in_flight",
            "Requests being answered now.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.connections = Gauge(
            "fovea_connections", "Open connections.", multiprocess_mode="livesum", registry=registry
        )
        self.errors = Counter(
            "fovea_errors",
            "Requests, or images of one with many, that got an error, by its code.",
            ("reason",),
            registry=registry,
        )
        self.image_warnings = Counter(
            "fovea_image_warnings",
            "Images answered with a warning, by its code.",
            ("reason",),
            registry=registry,
        )
        stages = Histogram(
            "fovea_stage_seconds",
            "Time in one stage: read and encode per request, decode and queue per image, "
            "inference per batch.",
            ("stage",),
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self.stage_seconds: Mapping[str, Histogram] = {stage: stages.labels(stage) for stage in STAGES}
        self.images = Counter("fovea_images", "Images classified.", ("model", "version"), registry=registry)
        self.explanations = Counter(
            "fovea_explanations", "Heat maps made.", ("model", "version", "method"), registry=registry
        )
        self.images_in_flight = Gauge(
            "fovea_images_in_flight",
            "Images accepted and not yet answered.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.images_limit = Gauge(
            "fovea_images_limit",
            "Most images that may be accepted and not yet answered (FOVEA_QUEUE_IMAGES).",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.queue_images = Gauge(
            "fovea_queue_images",
            "Images waiting for a runner.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.decode_reserved_bytes = Gauge(
            "fovea_decode_reserved_bytes",
            "Memory reserved for the large images that runners decode (of FOVEA_DECODE_BYTES).",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.queue_costly_images = Gauge(
            "fovea_queue_costly_images",
            "Images waiting for a runner that take long to decode, by their headers.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.batch_images = Histogram(
            "fovea_batch_images", "Images in one model call.", buckets=_BATCH_BUCKETS, registry=registry
        )
        self.runners = Gauge(
            "fovea_runners",
            "Runner processes that are ready for work.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.runners_expected = Gauge(
            "fovea_runners_expected",
            "Runner processes that there should be, of all workers together.",
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.runner_deaths = Counter(
            "fovea_runner_deaths", "Runner processes that died and were replaced.", registry=registry
        )
        self.runner_busy_seconds = Counter(
            "fovea_runner_busy_seconds",
            "Time that runners had a batch, all of them together.",
            registry=registry,
        )
        self.runner_start_failures = Counter(
            "fovea_runner_start_failures",
            "Runners that could not take a dead one's place: the host fails the `golden` set, or `other`.",
            ("reason",),
            registry=registry,
        )
        self.model_info = Gauge(
            "fovea_model_info",
            "1: a model that is loaded, and where it really runs; 0: one that was.",
            ("model", "version", "task", "provider"),
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.provider_fallback = Gauge(
            "fovea_provider_fallback",
            "1 if the model runs on a CPU although ONNX Runtime has CUDA and the CPU was not asked for.",
            ("model", "version"),
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.golden_logit_difference = Gauge(
            "fovea_golden_logit_difference",
            "Largest difference of a logit from the golden set when the model was loaded.",
            ("model", "version"),
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.model_load_seconds = Gauge(
            "fovea_model_load_seconds",
            "Time to load, warm up and prove a model.",
            ("model", "version"),
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.model_changes = Counter(
            "fovea_model_changes",
            "Models and versions that came after the start, by `result`: `loaded` or `refused`.",
            ("model", "result"),
            registry=registry,
        )
        self.versions_refused = Gauge(
            "fovea_versions_refused",
            "Versions in the repository that did not pass their checks, newer than what is served.",
            ("model",),
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.swap_flip_ratio = Gauge(
            "fovea_swap_flip_ratio",
            "Share of the last images that a new version gave another label when it was last tried.",
            ("model",),
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.swap_slowdown_ratio = Gauge(
            "fovea_swap_slowdown_ratio",
            "How many times as long as the old version a new one took for an image when it was last tried.",
            ("model",),
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.predictions = Counter(
            "fovea_predictions",
            "Images by their most probable label; labels beyond the model's first hundred are `other`.",
            ("model", "version", "label"),
            registry=registry,
        )
        self.prediction_confidence = Histogram(
            "fovea_prediction_confidence",
            "Probability of the most probable label.",
            ("model", "version"),
            buckets=_CONFIDENCE_BUCKETS,
            registry=registry,
        )
        self.prediction_entropy = Histogram(
            "fovea_prediction_entropy",
            "Entropy of the probabilities: 0 sure of one label, 1 all labels alike.",
            ("model", "version"),
            buckets=_RATIO_BUCKETS,
            registry=registry,
        )
        self.image_pixels = Histogram(
            "fovea_image_pixels",
            "Width and height of the images, by `side`.",
            ("side",),
            buckets=_SIDE_BUCKETS,
            registry=registry,
        )
        self.image_brightness = Histogram(
            "fovea_image_brightness",
            "Mean of the model's input: 0 black, 1 white.",
            ("model", "version"),
            buckets=_RATIO_BUCKETS,
            registry=registry,
        )
        self.drift_psi = Gauge(
            "fovea_drift_psi",
            "Population stability index of the last images against the held-out ones, by `signal`; "
            "of the worker that is farthest from them.",
            ("model", "version", "signal"),
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.drift_chance_psi = Gauge(
            "fovea_drift_chance_psi",
            "How large that index is on average by chance alone.",
            ("model", "version", "signal"),
            multiprocess_mode="livemax",
            registry=registry,
        )
        # Create every series at the start: an alert on an increase would miss a series that begins at 1.
        self._error_counters = {code: self.errors.labels(code) for code in (*list_error_codes(), CLIENT_LEFT)}
        for code in WarningCode:
            self.image_warnings.labels(code)
        for reason in ("golden", "other"):
            self.runner_start_failures.labels(reason)
        self._request_series: dict[tuple[str, str, str, int], tuple[Counter, Histogram]] = {}

    def count_error(self, reason: str) -> None:
        """Count one error by its code, or `CLIENT_LEFT`.

        Every series exists from the start, because a series that begins at 1 shows no increase.

        Raises `KeyError` for an unknown code.
        """
        self._error_counters[reason].inc()

    def count_request(self, protocol: str, route: str, model: str, status: int, seconds: float) -> None:
        """Count one request that took `seconds`, and record its duration.

        The series are cached: finding a series by its labels takes longer than counting.
        """
        key = (protocol, route, model, status)
        series = self._request_series.get(key)
        if series is None:
            counter = self.requests.labels(protocol, route, model, str(status))
            series = self._request_series[key] = counter, self.request_seconds.labels(protocol, route, model)
        series[0].inc()
        series[1].observe(seconds)

    def remove_version(self, model: str, version: str) -> None:
        """Remove all series of a model version.

        This works in a single process only: values of several processes cannot be removed.
        """
        for metric in vars(self).values():
            if isinstance(metric, MetricWrapperBase) and {"model", "version"} <= set(metric._labelnames):
                metric.remove_by_labels({"model": model, "version": version})

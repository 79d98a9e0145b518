"""All metrics: two tables of name, meaning, labels and buckets.

The name of a metric is `fovea_` and the name of its attribute. Metrics are an interface: renaming a metric
breaks the alerts that use it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Generic, TypeAlias, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from fovea.service.errors import list_error_codes
from fovea.service.image_warnings import WarningCode
from fovea.service.observability.tallies import HistogramTally, SumTally, Tally, observe_all

log = logging.getLogger(__name__)

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

HANDSHAKE_FAILURES: Final = ("plain_http", "protocol", "certificate", "timeout", "client_left", "stopped")
"""Reasons for which a connection has no encryption. Without TLS they stay 0."""

URL_RESULTS: Final = ("ok", "refused", "failed", "timeout", "too_large", "overloaded", "client_left")
"""Results of fetching an image by URL."""

STAGES: Final = ("read", "queue", "decode", "inference", "encode")
"""Stages of a request, in this order."""

_BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128)

_RATIO_BUCKETS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

_CONFIDENCE_BUCKETS: Final = (*_RATIO_BUCKETS[:-1], 0.95, 0.98, 0.99, 1.0)
"""Bucket edges of the confidence: most answers of a calibrated model are above 0.9."""

_SIDE_BUCKETS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Bucket edges of image sides in pixels: from thumbnails to phones (4,000) and scanners (8,000)."""


MAX_PENDING_REQUESTS: Final = 256
"""Number of requests after which the tallies are folded, so that they do not grow without a scrape."""

MAX_CALLERS: Final = 100
"""Number of names of API keys that are labels of metrics. Further names count as `OTHER_CALLERS`."""

OTHER_CALLERS: Final = "other"
ANONYMOUS: Final = "anonymous"
"""Label of requests without an API key. No key has this name."""

_RequestKey: TypeAlias = tuple[str, str, str, int]
"""Protocol, route, model and status of a request."""

MetricT = TypeVar("MetricT", bound=MetricWrapperBase)


class _Row(Generic[MetricT]):
    """One row of a table. Reading the attribute of an instance returns its metric."""

    def __init__(self, kind: type[MetricT], meaning: str, labels: tuple[str, ...], **options: Any) -> None:
        self._kind, self._meaning, self._labels, self._options = kind, meaning, labels, options

    def __set_name__(self, owner: type, attribute: str) -> None:
        self._attribute = attribute

    def __get__(self, instance: object, owner: type) -> MetricT:
        """Never runs for an instance, whose own attribute comes first; it gives the attribute its type."""
        raise AttributeError(f"{owner.__name__}.{self._attribute} belongs to an instance")

    def register(self, owner: object, registry: CollectorRegistry) -> None:
        """Create the metric in `registry`, as an attribute of `owner`."""
        metric = self._kind(
            f"fovea_{self._attribute}", self._meaning, self._labels, registry=registry, **self._options
        )
        vars(owner)[self._attribute] = metric


def _counter(meaning: str, *labels: str) -> _Row[Counter]:
    return _Row(Counter, meaning, labels)


def _gauge(meaning: str, *labels: str, workers: str = "livesum") -> _Row[Gauge]:
    """`workers` says how the values of several workers are combined: `livesum` or `livemax`."""
    return _Row(Gauge, meaning, labels, multiprocess_mode=workers)


def _histogram(meaning: str, *labels: str, buckets: Sequence[float]) -> _Row[Histogram]:
    return _Row(Histogram, meaning, labels, buckets=buckets)


def _register_all(owner: object, registry: CollectorRegistry) -> None:
    """Create the metrics of the table that is the class of `owner`."""
    for row in vars(type(owner)).values():
        if isinstance(row, _Row):
            row.register(owner, registry)


class ProcessMetrics:
    """Metrics of the service's own processes.

    The supervisor counts the workers and the updates of the model store. Each process counts the connections
    that lacked a file descriptor.
    """

    workers = _gauge("Worker processes that accept connections; 1 if the service is one process.")
    workers_expected = _gauge("Worker processes that should run (FOVEA_WORKERS).")
    worker_deaths = _counter(
        "Worker processes that died and were replaced: ended by a `signal`, ended by themselves (`exit`), or "
        "killed because they did not respond any more (`hung`).",
        "reason",
    )
    connections_starved = _counter(
        "Connections that had to wait because a process had no free file descriptor."
    )
    store_updates = _counter("Updates of the local copy of the model store, `ok` or `failed`.", "result")
    store_updated_timestamp_seconds = _gauge(
        "Time of the last successful update of that copy, in seconds since 1970; 0 without a store."
    )

    def __init__(self, registry: CollectorRegistry) -> None:
        _register_all(self, registry)
        for reason in DEATH_REASONS:
            self.worker_deaths.labels(reason)  # every series exists from the start
        for result in ("ok", "failed"):
            self.store_updates.labels(result)


class Metrics:
    """All metrics of one process, in the given registry."""

    requests = _counter(
        "Requests answered. `route` is the route's template; `model` is empty if no model took part.",
        "protocol", "route", "model", "status",
    )  # fmt: skip
    request_seconds = _histogram(
        "Time from the request's headers to the last byte of its answer.",
        "protocol", "route", "model", buckets=_SECONDS_BUCKETS,
    )  # fmt: skip
    requests_in_flight = _gauge("Requests that are being answered.")
    connections = _gauge("Open connections.")
    tls_handshake_failures = _counter(
        "Connections that ended before or in the handshake of TLS, by reason: `plain_http`, `protocol`, "
        "`certificate`, `timeout`, `client_left` or `stopped`.",
        "reason",
    )
    keys_reloads = _counter(
        "New states of the keys file: `ok`, or `failed` if the keys from before stay.", "result"
    )
    tls_certificate_reloads = _counter("Attempts to load a changed certificate, `ok` or `failed`.", "result")
    tls_certificate_expiry_timestamp_seconds = _gauge(
        "End of the certificate's validity, in seconds since 1970; 0 without TLS.",
        workers="livemax",
    )
    url_fetches = _counter(
        "Images fetched by URL, by result: `ok`, `refused`, `failed`, `timeout`, `too_large`, `overloaded`, "
        "`client_left`.",
        "result",
    )
    errors = _counter(
        "Requests that got an error, and failed images of requests with many images, by error code.",
        "reason",
    )
    caller_requests = _counter(
        "Requests by the name of their API key, if keys are needed; `anonymous` without a valid key, and "
        "`other` after the first hundred names.",
        "caller", "status",
    )  # fmt: skip
    image_warnings = _counter("Images answered with a warning, by warning code.", "reason")
    stage_seconds = _histogram(
        "Time in one stage: read and encode per request, decode and queue per image, inference per batch.",
        "stage",
        buckets=_SECONDS_BUCKETS,
    )
    images = _counter("Images classified.", "model", "version")
    unknown_images = _counter(
        "Images classified that are unlike the training images, for models that tell.", "model", "version"
    )
    explanations = _counter("Heatmaps computed.", "model", "version", "method")
    images_in_flight = _gauge("Images accepted and not yet answered.")
    images_limit = _gauge(
        "Maximum number of images that may be accepted and not yet answered (FOVEA_QUEUE_IMAGES)."
    )
    queue_images = _gauge("Images that wait for a runner.")
    decode_reserved_bytes = _gauge(
        "Memory reserved for large images that runners decode (part of FOVEA_DECODE_BYTES)."
    )
    queue_costly_images = _gauge(
        "Images that wait for a runner and will take long, estimated from their headers and their boxes."
    )
    batch_images = _histogram("Images in one model call.", buckets=_BATCH_BUCKETS)
    runners = _gauge("Runner processes that are ready for work.")
    runners_expected = _gauge("Runner processes that should run, in all workers together.", workers="livemax")
    runner_deaths = _counter("Runner processes that died and were replaced.")
    runner_busy_seconds = _counter("Time for which runners had a batch, summed over all runners.")
    runner_start_failures = _counter(
        "Runners that could not replace a dead runner: this host fails the `golden` set, or `other`.",
        "reason",
    )
    model_info = _gauge(
        "1 for a loaded model with the provider that runs it; 0 for a model that was unloaded.",
        "model", "version", "task", "provider", workers="livemax",
    )  # fmt: skip
    provider_fallback = _gauge(
        "1 if the model runs on a CPU although ONNX Runtime has CUDA and nobody asked for the CPU.",
        "model", "version", workers="livemax",
    )  # fmt: skip
    golden_logit_difference = _gauge(
        "Largest difference of a logit from the golden set when the model was loaded.",
        "model", "version", workers="livemax",
    )  # fmt: skip
    model_load_seconds = _gauge(
        "Time to load, warm up and check a model.", "model", "version", workers="livemax"
    )
    model_versions = _gauge(
        "Versions of a model in each state: found, loading, ready, draining or refused.",
        "model", "state", workers="livemax",
    )  # fmt: skip
    model_changes = _counter(
        "Models and versions that appeared after the start, by `result`: `loaded` or `refused`.",
        "model", "result",
    )  # fmt: skip
    versions_refused = _gauge(
        "Versions in the repository that failed their checks and are newer than the served version.",
        "model",
        workers="livemax",
    )
    swap_flip_ratio = _gauge(
        "Share of the recent images to which a new version gave another label in its last shadow test.",
        "model",
        workers="livemax",
    )
    swap_slowdown_ratio = _gauge(
        "Time of a new version for an image, divided by the old version's time, in the last shadow test.",
        "model",
        workers="livemax",
    )
    predictions = _counter(
        "Images by their most probable label; labels after the model's first hundred count as `other`.",
        "model", "version", "label",
    )  # fmt: skip
    prediction_confidence = _histogram(
        "Probability of the most probable label.", "model", "version", buckets=_CONFIDENCE_BUCKETS
    )
    prediction_entropy = _histogram(
        "Entropy of the probabilities: 0 if one label is certain, 1 if all labels are equally probable.",
        "model", "version", buckets=_RATIO_BUCKETS,
    )  # fmt: skip
    image_pixels = _histogram("Width and height of the images, by `side`.", "side", buckets=_SIDE_BUCKETS)
    image_brightness = _histogram(
        "Mean of the model's input: 0 is black, 1 is white.", "model", "version", buckets=_RATIO_BUCKETS
    )
    drift_psi = _gauge(
        "Population stability index between recent images and held-out images, by `signal`; the largest of "
        "all workers.",
        "model", "version", "signal", workers="livemax",
    )  # fmt: skip
    drift_chance_psi = _gauge(
        "Average of the population stability index that chance alone would give.",
        "model", "version", "signal", workers="livemax",
    )  # fmt: skip

    def __init__(self, registry: CollectorRegistry, *, is_shared: bool = False) -> None:
        """Create all metrics in `registry`.

        Frequent events wait in tallies until `fold`. The event loop calls it after `MAX_PENDING_REQUESTS`
        requests, and before each scrape. If other processes read the metrics too, as `is_shared` says, it is
        called after every change.
        """
        self.registry = registry
        self.is_shared = is_shared
        """True if other processes read the metrics: whoever changes a gauge calls `fold`."""
        self.process_metrics = ProcessMetrics(registry)
        _register_all(self, registry)
        # Create every series at the start: an alert on an increase would miss a series that begins at 1.
        self.seconds_by_stage: Mapping[str, HistogramTally] = {
            stage: HistogramTally(self.stage_seconds.labels(stage)) for stage in STAGES
        }
        self.batch_sizes = HistogramTally(self.batch_images)
        self.busy_seconds = SumTally(self.runner_busy_seconds)
        self._tallies: Sequence[Tally] = (
            *self.seconds_by_stage.values(),
            self.batch_sizes,
            self.busy_seconds,
        )
        self._pending_tallies: set[Tally] = set()
        self._error_counters = {code: self.errors.labels(code) for code in (*list_error_codes(), CLIENT_LEFT)}
        for code in WarningCode:
            self.image_warnings.labels(code)
        self.caller_requests.labels(ANONYMOUS, "401")
        for reason in ("golden", "other"):
            self.runner_start_failures.labels(reason)
        for reason in HANDSHAKE_FAILURES:
            self.tls_handshake_failures.labels(reason)
        for result in URL_RESULTS:
            self.url_fetches.labels(result)
        for result in ("ok", "failed"):
            self.tls_certificate_reloads.labels(result)
            self.keys_reloads.labels(result)
        self.active_requests = 0
        """Number of requests that are being answered."""
        self._finished_requests: list[tuple[_RequestKey, float]] = []
        self._request_series: dict[_RequestKey, tuple[Counter, Histogram]] = {}
        self._gauge_setters: list[Callable[[], None]] = [
            lambda: self.requests_in_flight.set(self.active_requests)
        ]
        self._finished_callers: list[tuple[str, int]] = []
        self._caller_counters: dict[tuple[str, int], Counter] = {}
        self._callers = {ANONYMOUS}
        self._fold_interval = 1 if is_shared else MAX_PENDING_REQUESTS
        self._pending_requests = 0

    # --- tallies; on the event loop ---

    def fold_later(self, tally: Tally) -> None:
        """Fold `tally` too at the next fold, and then no more.

        Each loaded model has a tally, and a fold after every change must not take time for all of them.
        """
        self._pending_tallies.add(tally)

    def add_gauge_setter(self, set_gauges: Callable[[], None]) -> None:
        """Call `set_gauges` at every fold, to set gauges to what they describe."""
        self._gauge_setters.append(set_gauges)

    def count_keys_reload(self, is_valid: bool) -> None:
        """Count a new state of the keys file."""
        self.keys_reloads.labels("ok" if is_valid else "failed").inc()
        self.fold()

    def count_certificate_reload(self, is_loaded: bool) -> None:
        """Count an attempt to load a changed certificate."""
        self.tls_certificate_reloads.labels("ok" if is_loaded else "failed").inc()
        self.fold()

    def fold(self) -> None:
        """Add everything that is pending to the metrics.

        Never raises: an error is logged, because a metric is no reason to lose an answer.
        """
        self._pending_requests = 0
        tallies = (*self._tallies, *self._pending_tallies)
        self._pending_tallies.clear()
        folds = (*(tally.fold for tally in tallies), self._fold_requests, self._fold_callers)
        for update in (*folds, *self._gauge_setters):
            self._update(update)

    def _update(self, update: Callable[[], None]) -> None:
        try:
            update()
        except Exception:
            log.exception("a metric could not be updated")

    def _fold_requests(self) -> None:
        """Count the finished requests.

        The series are cached: finding a series by its labels takes longer than counting.
        """
        seconds_by_key: defaultdict[_RequestKey, list[float]] = defaultdict(list)
        for key, seconds in self._finished_requests:
            seconds_by_key[key].append(seconds)
        self._finished_requests.clear()
        for key, values in seconds_by_key.items():
            series = self._request_series.get(key)
            if series is None:
                protocol, route, model, status = key
                counter = self.requests.labels(protocol, route, model, str(status))
                series = self._request_series[key] = (
                    counter,
                    self.request_seconds.labels(protocol, route, model),
                )
            series[0].inc(len(values))
            observe_all(series[1], values)

    def _fold_callers(self) -> None:
        """Count the requests of each caller.

        Those of callers beyond the first `MAX_CALLERS` have one name.
        """
        counts: defaultdict[tuple[str, int], int] = defaultdict(int)
        for key in self._finished_callers:
            counts[key] += 1
        self._finished_callers.clear()
        for (caller, status), count in counts.items():
            name = caller
            if name not in self._callers:
                if len(self._callers) > MAX_CALLERS:
                    name = OTHER_CALLERS
                else:
                    self._callers.add(name)
            counter = self._caller_counters.get((name, status))
            if counter is None:
                counter = self._caller_counters[name, status] = self.caller_requests.labels(name, str(status))
            counter.inc(count)

    def count_request(self, protocol: str, route: str, model: str, status: int, seconds: float) -> None:
        """Count one request that took `seconds`, and fold if enough are pending."""
        self._finished_requests.append(((protocol, route, model, status), seconds))
        self._pending_requests += 1
        if self._pending_requests >= self._fold_interval:
            self.fold()

    def count_caller(self, name: str, status: int) -> None:
        """Count a request under the name of its API key; an empty name is that of no key.

        Call it before `count_request`, which folds.
        """
        self._finished_callers.append((name or ANONYMOUS, status))

    def count_error(self, reason: str) -> None:
        """Count one error by its code, or `CLIENT_LEFT`.

        Every series exists from the start, because a series that begins at 1 shows no increase.

        Raises `KeyError` for an unknown code.
        """
        self._error_counters[reason].inc()

    def remove_version(self, model: str, version: str) -> None:
        """Remove all series of a model version.

        This works in a single process only: values of several processes cannot be removed.
        """
        self.fold()  # a tally that is folded later may create a series again
        for metric in vars(self).values():
            if isinstance(metric, MetricWrapperBase) and {"model", "version"} <= set(metric._labelnames):
                metric.remove_by_labels({"model": model, "version": version})

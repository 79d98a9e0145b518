"""Every metric: its name, unit, labels and buckets. They are an interface: renaming one breaks alerts."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""0.1 ms … 10 s: a thumbnail decodes in 0.1 ms, a saturated queue holds a request for seconds."""

_BATCH: Final = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """All metrics of one process, in the registry that is given."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "fovea_requests",
            "Requests answered. `route` is the route's template, `model` empty where none took part.",
            ("route", "model", "status"),
            registry=registry,
        )
        self.request_seconds = Histogram(
            "fovea_request_seconds",
            "Time from the request's headers to the last byte of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.requests_in_flight = Gauge(
            "fovea_requests_in_flight", "Requests being answered now.", registry=registry
        )
        self.errors = Counter(
            "fovea_errors",
            "Requests, or images of one with many, that got an error, by its code.",
            ("reason",),
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "fovea_stage_seconds",
            "Time in one stage: read and encode per request, decode and queue per image, "
            "inference per batch.",
            ("stage",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.images = Counter("fovea_images", "Images classified.", ("model", "version"), registry=registry)
        self.images_in_flight = Gauge(
            "fovea_images_in_flight", "Images accepted and not yet answered.", registry=registry
        )
        self.queue_images = Gauge(
            "fovea_queue_images", "Decoded images waiting for a runner.", registry=registry
        )
        self.batch_images = Histogram(
            "fovea_batch_images", "Images in one model call.", buckets=_BATCH, registry=registry
        )
        self.model_info = Gauge(
            "fovea_model_info",
            "Always 1: a model that is served, and where it really runs.",
            ("model", "version", "task", "provider"),
            registry=registry,
        )
        self.model_load_seconds = Gauge(
            "fovea_model_load_seconds",
            "Time to load, warm up and prove a model.",
            ("model", "version"),
            registry=registry,
        )

"""What is known of one request when it is over: for the metrics, the log and the traces."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping
from typing import Final, NamedTuple

from fovea.service.http.api_protocol import NATIVE, Dialect
from fovea.service.runners.batcher import Job
from fovea.service.runners.messages import Answer

REQUEST_ID: Final = b"x-request-id"

_ACCEPTABLE_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")


class Stage(NamedTuple):
    """A stretch of a request's time."""

    name: str
    """One of `metrics.STAGES`."""
    began: float
    """On the monotonic clock, in seconds."""
    seconds: float
    batch: int = 0
    """Of `inference`: images in the model call."""


class Record:
    """One request, from its headers to its end. Whoever answers it fills in what is not known before."""

    __slots__ = (
        "client", "dialect", "image_errors", "images", "method", "model", "peer", "reason", "request_id",
        "route", "stages", "started", "status", "traceparent", "tracestate", "version", "warnings",
    )  # fmt: skip

    def __init__(self, method: str, headers: Mapping[bytes, bytes], client: str = "", peer: str = "") -> None:
        """`headers` have their names in lower case; the rest is as in `proxies.Origin`."""
        self.started = time.monotonic()
        self.client = client
        self.peer = peer
        self.request_id = _own_id(headers.get(REQUEST_ID, b""))
        self.traceparent = headers.get(b"traceparent", b"")
        self.tracestate = headers.get(b"tracestate", b"")
        """Both as the caller sent them, unchecked."""
        self.method = method
        self.route = "unmatched"
        """The route's template."""
        self.dialect: Dialect = NATIVE
        self.model = self.version = ""
        """What is asked for an answer; empty where no model is."""
        self.images = 0
        self.image_errors: dict[str, int] = {}
        """Of a request with many images, by code: it may still be answered with 200."""
        self.warnings: dict[str, int] = {}
        """Of its images that were answered, by code (`service.image_warnings`)."""
        self.status = 0
        """0 until an answer has begun, and when the caller has left before."""
        self.reason = ""
        """The code of the error that was the answer; or `metrics.CLIENT_LEFT`."""
        self.stages: list[Stage] = []

    def stage(self, name: str, began: float) -> float:
        """A stage ends now; returns how many seconds it took."""
        seconds = time.monotonic() - began
        self.stages.append(Stage(name, began, seconds))
        return seconds

    def given_up(self, job: Job) -> None:
        """An image of it is not waited for any more."""
        self.stages.append(Stage("queue", job.since, (job.begun or time.monotonic()) - job.since))

    def longest(self) -> dict[str, Stage]:
        """Of each stage, by name, the one that took the longest: of several images, or calls."""
        longest: dict[str, Stage] = {}
        for stage in self.stages:
            other = longest.get(stage.name)
            if other is None or stage.seconds > other.seconds:
                longest[stage.name] = stage
        return longest

    def image(self, outcome: Answer | BaseException, job: Job) -> None:
        """An image of it has its answer, or an error."""
        self.images += 1
        if job.begun:
            self.stages.append(Stage("queue", job.since, job.begun - job.since))
        if isinstance(outcome, Answer):
            for warning in outcome.warnings:
                self.warnings[warning.code] = self.warnings.get(warning.code, 0) + 1
            work = outcome.work
            self.stages.append(Stage("decode", work.decode_began, work.decode))
            self.stages.append(Stage("inference", work.inference_began, work.inference, work.batch))


def _own_id(given: bytes) -> str:
    """The caller's own, where it is printable; or a new one."""
    if given and _ACCEPTABLE_ID.fullmatch(given):
        return given.decode()
    return f"{random.getrandbits(128):032x}"

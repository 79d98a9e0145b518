"""The record of one request, for the metrics, the log and the traces."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping
from typing import Final, NamedTuple

from fovea.service.access.access_control import NO_CREDENTIAL, Credential
from fovea.service.access.caller import Caller
from fovea.service.http.api_protocol import NATIVE, ApiProtocol
from fovea.service.runners.batch_messages import Answer, BoxAnswers
from fovea.service.runners.lane import Job

REQUEST_ID_HEADER: Final = b"x-request-id"

_VALID_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")


class TimeSpan(NamedTuple):
    """A stage of a request, with its start and duration."""

    name: str
    """Name of the stage, one of `metrics.STAGES`."""
    started_at: float
    """Start on the monotonic clock in seconds."""
    seconds: float
    """Duration in seconds."""
    batch_size: int = 0
    """Number of images in the model call, for the stage `inference`."""


class RequestRecord:
    """Data of one request, from its headers to its end.

    The code that answers the request fills in the rest.
    """

    __slots__ = (
        "_stages",
        "client",
        "cors_lines",
        "credential",
        "image_errors",
        "images",
        "method",
        "model",
        "peer",
        "protocol",
        "reason",
        "request_id",
        "route",
        "started_at",
        "status",
        "traceparent",
        "tracestate",
        "version",
        "warnings",
    )  # fmt: skip

    def __init__(self, method: str, headers: Mapping[bytes, bytes], client: str = "", peer: str = "") -> None:
        """Start a record.

        Names in `headers` are in lower case. `client` and `peer` are as in `proxies.Origin`.
        """
        self.started_at = time.monotonic()
        """Start on the monotonic clock in seconds."""
        self.client = client
        self.peer = peer
        self.credential: Credential = NO_CREDENTIAL
        """API key of the request. `Observer.create_record` sets it if the service has keys."""
        self.cors_lines = b""
        """Encoded headers of the answer for pages of other sites (`service.http.cors`)."""
        self.request_id = _choose_request_id(headers.get(REQUEST_ID_HEADER, b""))
        self.traceparent = headers.get(b"traceparent", b"")
        self.tracestate = headers.get(b"tracestate", b"")
        """Trace headers as the caller sent them. They are not checked."""
        self.method = method
        self.route = "unmatched"
        """Template of the route."""
        self.protocol: ApiProtocol = NATIVE
        self.model = self.version = ""
        """Name and version of the requested model; empty if no model is requested."""
        self.images = 0
        self.image_errors: dict[str, int] = {}
        """Number of failed images by error code. A request with many images may still be answered with
        200."""
        self.warnings: dict[str, int] = {}
        """Number of warnings by code about the answered images (`service.image_warnings`)."""
        self.status = 0
        """Status of the answer. 0 until an answer has begun, and if the client left before."""
        self.reason = ""
        """Code of the error that was the answer, or `metrics.CLIENT_LEFT`."""
        self._stages: list[tuple[str, float, float, int]] = []
        """Fields of `TimeSpan`; few requests need the objects."""

    @property
    def caller(self) -> Caller:
        """Sender of the request."""
        return Caller(self.credential.name, self.client)

    def add_stage(self, name: str, started_at: float) -> float:
        """Add a stage that ends now and return its duration in seconds."""
        seconds = time.monotonic() - started_at
        self._stages.append((name, started_at, seconds, 0))
        return seconds

    @property
    def stages(self) -> list[TimeSpan]:
        """All stages, in the order in which they ended."""
        return [TimeSpan(*stage) for stage in self._stages]

    def add_queue_time(self, job: Job) -> None:
        """Add the queue time of an image that is no longer waited for."""
        seconds = (job.started_at or time.monotonic()) - job.arrived_at
        self._stages.append(("queue", job.arrived_at, seconds, 0))

    def longest_stages(self) -> dict[str, TimeSpan]:
        """Return the longest stage of each name.

        A request with several images or calls repeats its stages.
        """
        longest: dict[str, TimeSpan] = {}
        for stage in self.stages:
            other = longest.get(stage.name)
            if other is None or stage.seconds > other.seconds:
                longest[stage.name] = stage
        return longest

    def add_image(self, outcome: Answer | BoxAnswers | BaseException, job: Job) -> None:
        """Add the stages and warnings of an image that was answered or failed. A box counts as an image."""
        if job.started_at:
            self._stages.append(("queue", job.arrived_at, job.started_at - job.arrived_at, 0))
        if isinstance(outcome, BoxAnswers):
            for warning in outcome.warnings:
                self.warnings[warning.code] = self.warnings.get(warning.code, 0) + 1
            for answer in outcome.answers:
                self._add_answer(answer)
        elif isinstance(outcome, Answer):
            self._add_answer(outcome)
        else:
            self.images += 1

    def _add_answer(self, answer: Answer) -> None:
        self.images += 1
        for warning in answer.warnings:
            self.warnings[warning.code] = self.warnings.get(warning.code, 0) + 1
        work = answer.timing
        self._stages.append(("decode", work.decode_started_at, work.decode_seconds, 0))
        self._stages.append(("inference", work.inference_started_at, work.inference_seconds, work.batch_size))


def _choose_request_id(request_id: bytes) -> str:
    """Return the caller's request id if it is printable, or a new id."""
    if request_id and _VALID_REQUEST_ID.fullmatch(request_id):
        return request_id.decode()
    return f"{random.getrandbits(128):032x}"

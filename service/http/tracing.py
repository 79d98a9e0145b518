"""OpenTelemetry traces: a span for each request, each of its stages, and each model call.

Spans are created when a request is over, from the times in its record, so tracing costs nothing before. The
standard `OTEL_*` variables set the exporter's address, the sampling and the service name.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from typing import Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from fovea.service import __version__
from fovea.service.http.request_record import Record, Stage

_LINGER: Final = 10.0
"""Time in seconds that the span of a model call waits for its requests. Requests with many images end
later."""

_MANY: Final = 8
"""Maximum number of images of a request for which every stage gets a span. Larger requests get spans only for
their longest stages, because a span takes 30 us."""

_FAREWELL: Final = 1.0
"""Time limit in seconds for sending the last spans when the process ends."""


@dataclass(eq=False)
class _Call:
    """Span of a model call that waits for its requests to end."""

    span: Span
    end: int
    timer: asyncio.TimerHandle
    images: int = 0
    requests: set[int] = field(default_factory=set)


class Tracing:
    """Exporter of request spans. Every method must be called on the event loop."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        """Set up the tracers. The default exporter is OTLP over HTTP."""
        resource = Resource.create({"service.name": "fovea", "service.version": __version__})
        resource = resource.merge(OTELResourceDetector().detect())
        self._processor = BatchSpanProcessor(exporter or OTLPSpanExporter())
        self._requests = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._calls = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False)  # sampled with its requests
        for provider in (self._requests, self._calls):
            # Both providers share one processor, and so one queue and one export thread.
            provider.add_span_processor(self._processor)
        self._tracer = self._requests.get_tracer("fovea", __version__)
        self._call_tracer = self._calls.get_tracer("fovea", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._under_way: dict[tuple[str, str, float], _Call] = {}

    def end(self, record: Record, seconds: float) -> str:
        """Create the spans of a finished request and return its trace id.

        The id has 32 hexadecimal digits, or is empty if there is no valid trace.
        """
        offset = time.time() - time.monotonic()
        carrier = {"traceparent": record.traceparent.decode("latin-1")}
        if record.tracestate:
            carrier["tracestate"] = record.tracestate.decode("latin-1")
        span = self._tracer.start_span(
            f"{record.method} {record.route}".strip(),
            self._propagator.extract(carrier, Context()),
            SpanKind.SERVER,
            start_time=_nanoseconds(record.started + offset),
        )
        if span.is_recording():
            span.set_attributes(_attributes(record))
            if record.status >= 500:
                span.set_status(Status(StatusCode.ERROR, record.reason))
            inside = set_span_in_context(span, Context())
            calls: set[int] = set()
            stages = record.stages if record.images <= _MANY else record.longest().values()
            for stage in stages:
                call = self._call(stage, record, span.get_span_context(), offset) if stage.batch else None
                if call is None or call.span_id not in calls:  # one call may hold several images
                    self._stage(stage, record, call, inside, offset)
                if call:
                    calls.add(call.span_id)
        span.end(_nanoseconds(record.started + seconds + offset))
        context = span.get_span_context()
        return format(context.trace_id, "032x") if context.is_valid else ""

    def _stage(
        self, stage: Stage, record: Record, call: SpanContext | None, inside: Context, offset: float
    ) -> None:
        """Create the span of a stage as a child of the request's span.

        An `inference` span links to its model call.
        """
        links = [Link(call)] if call else None
        span = self._tracer.start_span(
            stage.name, inside, links=links, start_time=_nanoseconds(stage.began + offset)
        )
        if call:
            span.set_attributes(_model(record) | {"fovea.batch_images": stage.batch})
        span.end(_nanoseconds(stage.began + stage.seconds + offset))

    def _call(self, stage: Stage, record: Record, request: SpanContext, offset: float) -> SpanContext:
        """Return the span of a model call that the request took part in."""
        key = (record.model, record.version, stage.began)
        call = self._under_way.get(key)
        if call is None:
            span = self._call_tracer.start_span(
                "batch",
                Context(),
                attributes=_model(record) | {"fovea.batch_images": stage.batch},
                start_time=_nanoseconds(stage.began + offset),
            )
            timer = asyncio.get_running_loop().call_later(_LINGER, self._finish, key)
            end = _nanoseconds(stage.began + stage.seconds + offset)
            call = self._under_way[key] = _Call(span, end, timer)
        if request.span_id not in call.requests:
            call.requests.add(request.span_id)
            call.span.add_link(request)
        call.images += 1
        if call.images == stage.batch:
            self._finish(key)
        return call.span.get_span_context()

    def _finish(self, key: tuple[str, str, float]) -> None:
        """End the span of a model call."""
        call = self._under_way.pop(key)
        call.timer.cancel()
        call.span.end(call.end)

    def close(self) -> None:
        """Send the remaining spans, within a time limit because the collector may not answer."""
        for key in list(self._under_way):
            self._finish(key)
        sending = threading.Thread(target=self._processor.shutdown, daemon=True)
        sending.start()
        sending.join(_FAREWELL)


def _nanoseconds(seconds: float) -> int:
    """Convert seconds to nanoseconds."""
    return int(seconds * 1e9)


def _model(record: Record) -> dict[str, str | int]:
    """Return the attributes of the request's model."""
    return {"fovea.model": record.model, "fovea.version": record.version}


def _attributes(record: Record) -> dict[str, str | int]:
    """Return attributes by OpenTelemetry's conventions for HTTP servers, and Fovea's own."""
    attributes: dict[str, str | int] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "error.type": record.reason,
        "fovea.request_id": record.request_id,
        "fovea.images": record.images,
        **_model(record),
    }
    return {name: value for name, value in attributes.items() if value}

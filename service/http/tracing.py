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
from fovea.service.http.request_record import RequestRecord, TimeSpan

_BATCH_SPAN_TIMEOUT: Final = 10.0
"""Time in seconds that the span of a model call waits for its requests. Requests with many images end
later."""

_MAX_DETAILED_IMAGES: Final = 8
"""Maximum number of images of a request for which every stage gets a span. Larger requests get spans only for
their longest stages, because a span takes 30 us."""

_FLUSH_TIMEOUT: Final = 1.0
"""Time limit in seconds for sending the last spans when the process ends."""


@dataclass(eq=False)
class _BatchSpan:
    """Span of a model call that waits for its requests to end."""

    span: Span
    end_time: int
    timer: asyncio.TimerHandle
    images: int = 0
    request_span_ids: set[int] = field(default_factory=set)


class Tracing:
    """Exporter of request spans. Call every method on the event loop; another thread sends the spans."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        """Set up the tracers. The default exporter is OTLP over HTTP."""
        resource = Resource.create({"service.name": "fovea", "service.version": __version__})
        resource = resource.merge(OTELResourceDetector().detect())
        self._processor = BatchSpanProcessor(exporter or OTLPSpanExporter())
        self._request_provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        # The span of a model call is always recorded: its requests decide about sampling.
        self._batch_provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False)
        for provider in (self._request_provider, self._batch_provider):
            # Both providers share one processor, and so one queue and one export thread.
            provider.add_span_processor(self._processor)
        self._request_tracer = self._request_provider.get_tracer("fovea", __version__)
        self._batch_tracer = self._batch_provider.get_tracer("fovea", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._open_batches: dict[tuple[str, str, float], _BatchSpan] = {}

    def trace_request(self, record: RequestRecord, seconds: float) -> str:
        """Create the spans of a finished request and return its trace id.

        The id has 32 hexadecimal digits, or is empty if there is no valid trace.
        """
        offset = time.time() - time.monotonic()
        carrier = {"traceparent": record.traceparent.decode("latin-1")}
        if record.tracestate:
            carrier["tracestate"] = record.tracestate.decode("latin-1")
        span = self._request_tracer.start_span(
            f"{record.method} {record.route}".strip(),
            self._propagator.extract(carrier, Context()),
            SpanKind.SERVER,
            start_time=_to_nanoseconds(record.started_at + offset),
        )
        if span.is_recording():
            span.set_attributes(_request_attributes(record))
            if record.status >= 500:
                span.set_status(Status(StatusCode.ERROR, record.reason))
            parent_context = set_span_in_context(span, Context())
            linked_batch_ids: set[int] = set()
            stages = (
                record.stages if record.images <= _MAX_DETAILED_IMAGES else record.longest_stages().values()
            )
            for stage in stages:
                batch_context = (
                    self._link_batch_span(stage, record, span.get_span_context(), offset)
                    if stage.batch_size
                    else None
                )
                # One model call may have several images of the request, but gets one stage span.
                if batch_context is None or batch_context.span_id not in linked_batch_ids:
                    self._create_stage_span(stage, record, batch_context, parent_context, offset)
                if batch_context:
                    linked_batch_ids.add(batch_context.span_id)
        span.end(_to_nanoseconds(record.started_at + seconds + offset))
        context = span.get_span_context()
        return format(context.trace_id, "032x") if context.is_valid else ""

    def _create_stage_span(
        self,
        stage: TimeSpan,
        record: RequestRecord,
        batch_context: SpanContext | None,
        parent_context: Context,
        offset: float,
    ) -> None:
        """Create the span of a stage as a child of the request's span.

        An `inference` span links to its model call.
        """
        links = [Link(batch_context)] if batch_context else None
        span = self._request_tracer.start_span(
            stage.name, parent_context, links=links, start_time=_to_nanoseconds(stage.started_at + offset)
        )
        if batch_context:
            span.set_attributes(_model_attributes(record) | {"fovea.batch_images": stage.batch_size})
        span.end(_to_nanoseconds(stage.started_at + stage.seconds + offset))

    def _link_batch_span(
        self, stage: TimeSpan, record: RequestRecord, request: SpanContext, offset: float
    ) -> SpanContext:
        """Return the span of a model call that the request took part in."""
        key = (record.model, record.version, stage.started_at)
        batch = self._open_batches.get(key)
        if batch is None:
            span = self._batch_tracer.start_span(
                "batch",
                Context(),
                attributes=_model_attributes(record) | {"fovea.batch_images": stage.batch_size},
                start_time=_to_nanoseconds(stage.started_at + offset),
            )
            timer = asyncio.get_running_loop().call_later(_BATCH_SPAN_TIMEOUT, self._end_batch_span, key)
            end_time = _to_nanoseconds(stage.started_at + stage.seconds + offset)
            batch = self._open_batches[key] = _BatchSpan(span, end_time, timer)
        if request.span_id not in batch.request_span_ids:
            batch.request_span_ids.add(request.span_id)
            batch.span.add_link(request)
        batch.images += 1
        if batch.images == stage.batch_size:
            self._end_batch_span(key)
        return batch.span.get_span_context()

    def _end_batch_span(self, key: tuple[str, str, float]) -> None:
        """End the span of a model call."""
        batch = self._open_batches.pop(key)
        batch.timer.cancel()
        batch.span.end(batch.end_time)

    def close(self) -> None:
        """Send the remaining spans, for at most `_FLUSH_TIMEOUT` seconds.

        A thread sends them, because a collector that does not answer would block the event loop.
        """
        for key in list(self._open_batches):
            self._end_batch_span(key)
        flush_thread = threading.Thread(target=self._processor.shutdown, daemon=True)
        flush_thread.start()
        flush_thread.join(_FLUSH_TIMEOUT)


def _to_nanoseconds(seconds: float) -> int:
    """Convert seconds to nanoseconds."""
    return int(seconds * 1e9)


def _model_attributes(record: RequestRecord) -> dict[str, str | int]:
    """Return the attributes of the request's model."""
    return {"fovea.model": record.model, "fovea.version": record.version}


def _request_attributes(record: RequestRecord) -> dict[str, str | int]:
    """Return attributes by OpenTelemetry's conventions for HTTP servers, and Fovea's own."""
    attributes: dict[str, str | int] = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "error.type": record.reason,
        "fovea.request_id": record.request_id,
        "fovea.images": record.images,
        "fovea.caller": record.credential.name,
        **_model_attributes(record),
    }
    return {name: value for name, value in attributes.items() if value}

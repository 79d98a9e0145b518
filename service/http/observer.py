"""Observation of requests: every request gets an id, metrics, a log line and an end."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fovea.service.errors import Internal, RequestError, Unavailable
from fovea.service.http.access_log import AccessLog, trace_id_of
from fovea.service.http.api_protocol import Dialects
from fovea.service.http.paths import plain_path
from fovea.service.http.proxies import Header, Origin, Proxies
from fovea.service.http.request_record import REQUEST_ID, Record
from fovea.service.observability.metrics import CLIENT_LEFT, Metrics

if TYPE_CHECKING:  # its packages are an extra
    from fovea.service.http.tracing import Tracing

log = logging.getLogger(__name__)


class Observer:
    """Recorder of requests in the metrics, the log and the traces."""

    def __init__(
        self,
        metrics: Metrics,
        access: AccessLog,
        tracing: Tracing | None,
        dialects: Dialects,
        proxies: Proxies,
    ) -> None:
        self.metrics = metrics
        self._dialects = dialects
        self._proxies = proxies
        self._access = access
        self._tracing = tracing

    def close(self) -> None:
        """Send the traces that have not been sent yet."""
        if self._tracing:
            self._tracing.close()

    def record(
        self,
        method: str,
        headers: Mapping[bytes, bytes],
        pairs: Iterable[Header],
        client: tuple[str, int] | None,
    ) -> tuple[Record, Origin]:
        """Create the record of a request and return it with the request's origin.

        `headers` has the same headers as `pairs`, by name. `client` is the other end of the connection, None
        for a Unix socket.
        """
        origin = self._proxies.origin(client[0] if client else "", pairs)
        return Record(method, headers, origin.client, origin.peer), origin

    def settle(self, scope: Scope) -> None:
        """Give an ASGI request its normalised path, its record and its origin.

        May be called again: the first code that looks at a request calls it.
        """
        state = scope.setdefault("state", {})
        if "origin" not in state:
            scope["path"] = plain_path(scope["path"])
            headers = scope["headers"]
            record, origin = self.record(scope["method"], dict(headers), headers, scope.get("client"))
            state["origin"] = origin
            state.setdefault("record", record)

    def placed(self, scope: Scope) -> Record:
        """Return the record of an ASGI request, with its route and dialect as far as they are known."""
        self.settle(scope)
        record = record_of(scope)
        record.dialect = self._dialects.of(scope)
        route = getattr(scope.get("route"), "path", "") or scope.get("root_path")
        record.route = route or record.route
        return record

    def begin(self) -> None:
        """Count a request as in flight."""
        self._count(self.metrics.requests_in_flight.inc)

    def failed(self, record: Record, reason: str) -> None:
        """Record that the request failed: `reason` is the error's code, or `CLIENT_LEFT`."""
        record.reason = reason
        self._count(self.metrics.count_error, reason)

    def image_failed(self, record: Record, reason: str) -> None:
        """Record that one image of a request with many images failed."""
        record.image_errors[reason] = record.image_errors.get(reason, 0) + 1
        self._count(self.metrics.count_error, reason)

    def end(self, record: Record) -> None:
        """Count a finished request, then log and trace it."""
        self._count(self.metrics.requests_in_flight.dec)
        seconds = time.monotonic() - record.started
        about = (record.dialect.name, record.route, record.model, record.status, seconds)
        self._count(self.metrics.count_request, *about)
        self.tell(record)

    def _count(self, count: Callable[..., None], *values: object) -> None:
        """Call a metric and log any exception.

        Never raises, because the answer is written and the request's resources are released after the count.
        """
        try:
            count(*values)
        except Exception:
            log.exception("a request could not be counted")

    def tell(self, record: Record) -> None:
        """Log and trace a request after its answer has been written.

        Also used for input that is no request.
        """
        seconds = time.monotonic() - record.started
        # The answer is written in the current callback, so logging later does not delay the answer.
        asyncio.get_running_loop().call_soon(self._tell, record, seconds)

    def _tell(self, record: Record, seconds: float) -> None:
        """Trace and log a request."""
        trace_id = trace_id_of(record.traceparent)
        if self._tracing:
            try:
                trace_id = self._tracing.end(record, seconds) or trace_id
            except Exception:
                log.exception("request %s could not be traced", record.request_id)
        self._access.write(record, seconds, trace_id)


class Observe:
    """ASGI middleware around the whole application.

    `service.http.fast_path` reports requests that bypass ASGI.
    """

    def __init__(self, app: ASGIApp, *, observer: Observer) -> None:
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._observer.settle(scope)
        observed = _Observed(scope, send, self._observer)
        record = observed.record
        self._observer.begin()
        try:
            await self._app(scope, receive, observed.send)
        except ClientDisconnect:
            if "refused" not in scope["state"]:
                self._observer.failed(record, CLIENT_LEFT)
        except Exception:
            error = failure(record.request_id)
            if record.status:
                self._observer.failed(record, error.code)
                raise  # the answer has begun: only closing the connection can signal the error
            await render(scope, error, self._observer)(scope, receive, observed.send)
        finally:
            if refused := scope["state"].get("refused"):  # the connection has sent the answer instead
                record.status = refused.status
                self._observer.failed(record, refused.code)
            observed.end()


class _Observed:
    """State of one ASGI request that is being observed."""

    def __init__(self, scope: Scope, send: Send, observer: Observer) -> None:
        self.record = record_of(scope)
        self._scope = scope
        self._send = send
        self._observer = observer
        self._is_over = False

    async def send(self, message: Message) -> None:
        """Send a message, and end the request before its last one.

        The request is counted before the last byte leaves, so that a client that has its answer finds the
        request in the next scrape.
        """
        if message["type"] == "http.response.start":
            self.record.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (REQUEST_ID, self.record.request_id.encode())]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.end()
        await self._send(message)

    def end(self) -> None:
        """End the request once. Further calls do nothing."""
        if self._is_over:
            return
        self._is_over = True
        self._observer.end(self._observer.placed(self._scope))


def record_of(scope: Scope) -> Record:
    """Return the record of an ASGI request. The record is created on the first call and kept in the scope."""
    state = scope.setdefault("state", {})
    if "record" not in state:
        state["record"] = Record(scope["method"], dict(scope["headers"]))
    record: Record = state["record"]
    return record


def origin_of(scope: Scope) -> Origin:
    """Return the origin of an ASGI request. Call `Observer.settle` first."""
    origin: Origin = scope["state"]["origin"]
    return origin


def failure(request_id: str) -> Internal:
    """Return the error for an unexpected exception and log its traceback.

    Call this while handling the exception.
    """
    log.exception("request %s failed", request_id)
    return Internal("internal error; the log has it under this request id")


def describe(error: RequestError, record: Record) -> tuple[int, bytes, dict[str, str]]:
    """Return an error's status, its body as JSON, and its headers besides the content type.

    The error's traceback is dropped, because the traceback refers back to the error and to the whole request.
    """
    error.__traceback__ = None
    headers = {}
    if isinstance(error, Unavailable):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    body = record.dialect.write(error, record.request_id)
    return error.status, orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE), headers


def render(scope: Scope, error: RequestError, observer: Observer) -> Response:
    """Return the response for an error, and count the error by its code."""
    record = observer.placed(scope)
    observer.failed(record, error.code)
    status, content, headers = describe(error, record)
    return Response(content, status, headers, media_type="application/json")

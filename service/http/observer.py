"""What every request gets, whatever answers it: an id, a count, a time, a line in the log, and an end."""

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
    """Tells the metrics, the log and the traces of requests."""

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
        """Send what is not yet sent."""
        if self._tracing:
            self._tracing.close()

    def record(
        self,
        method: str,
        headers: Mapping[bytes, bytes],
        pairs: Iterable[Header],
        client: tuple[str, int] | None,
    ) -> tuple[Record, Origin]:
        """Begin the record of a request. `headers` are its `pairs` by name, and `client` is the other end of
        its connection, None of a Unix socket."""
        origin = self._proxies.origin(client[0] if client else "", pairs)
        return Record(method, headers, origin.client, origin.peer), origin

    def settle(self, scope: Scope) -> None:
        """Give a request that came by ASGI the path that routes know, its record and its origin. May be
        called again: whoever is first to look at a request does so."""
        state = scope.setdefault("state", {})
        if "origin" not in state:
            scope["path"] = plain_path(scope["path"])
            headers = scope["headers"]
            record, origin = self.record(scope["method"], dict(headers), headers, scope.get("client"))
            state["origin"] = origin
            state.setdefault("record", record)

    def placed(self, scope: Scope) -> Record:
        """The record of a request that came by ASGI, with its route and dialect as far as they are known."""
        self.settle(scope)
        record = record_of(scope)
        record.dialect = self._dialects.of(scope)
        route = getattr(scope.get("route"), "path", "") or scope.get("root_path")
        record.route = route or record.route
        return record

    def begin(self) -> None:
        """A request is being answered."""
        self._count(self.metrics.requests_in_flight.inc)

    def failed(self, record: Record, reason: str) -> None:
        """Its answer is an error, by its code; or there is none, as the client has left."""
        record.reason = reason
        self._count(self.metrics.error, reason)

    def image_failed(self, record: Record, reason: str) -> None:
        """One of its many images has an error for an answer."""
        record.image_errors[reason] = record.image_errors.get(reason, 0) + 1
        self._count(self.metrics.error, reason)

    def end(self, record: Record) -> None:
        """It is over."""
        self._count(self.metrics.requests_in_flight.dec)
        seconds = time.monotonic() - record.started
        about = (record.dialect.name, record.route, record.model, record.status, seconds)
        self._count(self.metrics.request, *about)
        self.tell(record)

    def _count(self, count: Callable[..., None], *values: object) -> None:
        """Never raises: the answer is written, and what the request took is given back, after this."""
        try:
            count(*values)
        except Exception:
            log.exception("a request could not be counted")

    def tell(self, record: Record) -> None:
        """The log and the traces of a request, or of what was none: when its answer has been written."""
        seconds = time.monotonic() - record.started
        asyncio.get_running_loop().call_soon(self._tell, record, seconds)

    def _tell(self, record: Record, seconds: float) -> None:
        trace_id = trace_id_of(record.traceparent)
        if self._tracing:
            try:
                trace_id = self._tracing.end(record, seconds) or trace_id
            except Exception:
                log.exception("request %s could not be traced", record.request_id)
        self._access.write(record, seconds, trace_id)


class Observe:
    """ASGI middleware around the whole application; `service.http.fast_path` reports what bypasses it."""

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
                raise  # the answer has begun: all that is left is to cut the connection
            await render(scope, error, self._observer)(scope, receive, observed.send)
        finally:
            if refused := scope["state"].get("refused"):  # the connection has answered in our place
                record.status = refused.status
                self._observer.failed(record, refused.code)
            observed.end()


class _Observed:
    """One request on its way."""

    def __init__(self, scope: Scope, send: Send, observer: Observer) -> None:
        self.record = record_of(scope)
        self._scope = scope
        self._send = send
        self._observer = observer
        self._is_over = False

    async def send(self, message: Message) -> None:
        """Count before the last byte leaves: who has an answer finds it in the next scrape."""
        if message["type"] == "http.response.start":
            self.record.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (REQUEST_ID, self.record.request_id.encode())]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.end()
        await self._send(message)

    def end(self) -> None:
        """It is over; may be called again."""
        if self._is_over:
            return
        self._is_over = True
        self._observer.end(self._observer.placed(self._scope))


def record_of(scope: Scope) -> Record:
    """The record of a request that came by ASGI: made once, and kept with it."""
    state = scope.setdefault("state", {})
    if "record" not in state:
        state["record"] = Record(scope["method"], dict(scope["headers"]))
    record: Record = state["record"]
    return record


def origin_of(scope: Scope) -> Origin:
    """Where a request that came by ASGI is from, once it is settled."""
    origin: Origin = scope["state"]["origin"]
    return origin


def failure(request_id: str) -> Internal:
    """The error for our own bug that is being handled; its trace goes to the log."""
    log.exception("request %s failed", request_id)
    return Internal("internal error; the log has it under this request id")


def describe(error: RequestError, record: Record) -> tuple[int, bytes, dict[str, str]]:
    """An error as the caller sees it: its status, its body as JSON, and the headers besides the type.

    It is done with then: what its traceback refers to refers back to it, and to the whole request.
    """
    error.__traceback__ = None
    headers = {}
    if isinstance(error, Unavailable):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    body = record.dialect.write(error, record.request_id)
    return error.status, orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE), headers


def render(scope: Scope, error: RequestError, observer: Observer) -> Response:
    """The answer that says so; counted by the error's code."""
    record = observer.placed(scope)
    observer.failed(record, error.code)
    status, content, headers = describe(error, record)
    return Response(content, status, headers, media_type="application/json")

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

from fovea.service.access.access_control import AccessControl
from fovea.service.errors import Internal, MissingScope, RequestError, Unauthorized, Unavailable
from fovea.service.http.access_log import AccessLog, parse_trace_id
from fovea.service.http.api_protocol import ApiProtocols
from fovea.service.http.cors import CorsPolicy
from fovea.service.http.paths import normalize_path
from fovea.service.http.proxies import Header, Origin, TrustedProxies
from fovea.service.http.request_context import get_context, get_record
from fovea.service.http.request_record import REQUEST_ID_HEADER, RequestRecord
from fovea.service.observability.metrics import CLIENT_LEFT, Metrics

if TYPE_CHECKING:  # the packages of tracing are an optional extra
    from fovea.service.http.tracing import Tracing

log = logging.getLogger(__name__)


class Observer:
    """Recorder of requests in the metrics, the log and the traces."""

    def __init__(
        self,
        metrics: Metrics,
        access_log: AccessLog,
        tracing: Tracing | None,
        protocols: ApiProtocols,
        proxies: TrustedProxies,
        access: AccessControl | None = None,
        cors: CorsPolicy | None = None,
    ) -> None:
        """Create the recorder.

        `access` has the API keys if the service needs keys, and `cors` the pages of other sites if any may
        call the service.
        """
        self.cors = cors
        self.metrics = metrics
        self._protocols = protocols
        self._proxies = proxies
        self._access = access
        self._access_log = access_log
        self._tracing = tracing

    def close(self) -> None:
        """Send the traces that have not been sent yet."""
        if self._tracing:
            self._tracing.close()

    def create_record(
        self,
        method: str,
        headers: Mapping[bytes, bytes],
        header_pairs: Iterable[Header],
        client: tuple[str, int] | None,
    ) -> tuple[RequestRecord, Origin]:
        """Create the record of a request and return it with the request's origin.

        `headers` has the same headers as `header_pairs`, by name. `client` is the other end of the
        connection, None for a Unix socket.
        """
        origin = self._proxies.resolve_origin(client[0] if client else "", header_pairs)
        record = RequestRecord(method, headers, origin.client, origin.peer)
        if self._access:
            record.credential = self._access.identify(header_pairs)
        if self.cors:
            record.cors_lines = self.cors.build_lines(headers.get(b"origin"))
        return record, origin

    def prepare_scope(self, scope: Scope) -> None:
        """Give an ASGI request its normalised path, its record and its origin.

        May be called again: the first code that looks at a request calls it.
        """
        context = get_context(scope)
        if context.origin is None:
            scope["path"] = normalize_path(scope["path"])
            headers = scope["headers"]
            client = scope.get("client")
            record, context.origin = self.create_record(scope["method"], dict(headers), headers, client)
            context.record = context.record or record

    def resolve_record(self, scope: Scope) -> RequestRecord:
        """Return the record of an ASGI request, with its route and protocol as far as they are known."""
        self.prepare_scope(scope)
        record = get_record(scope)
        record.protocol = self._protocols.find_protocol(scope)
        route = getattr(scope.get("route"), "path", "") or scope.get("root_path")
        record.route = route or record.route
        return record

    def start_request(self) -> None:
        """Count a request as in flight."""
        self.metrics.active_requests += 1
        if self.metrics.is_shared:
            self.metrics.fold()

    def record_failure(self, record: RequestRecord, reason: str) -> None:
        """Record that the request failed: `reason` is the error's code, or `CLIENT_LEFT`."""
        record.reason = reason
        self._update_metric(self.metrics.count_error, reason)

    def record_image_failure(self, record: RequestRecord, reason: str) -> None:
        """Record that one image of a request with many images failed."""
        record.image_errors[reason] = record.image_errors.get(reason, 0) + 1
        self._update_metric(self.metrics.count_error, reason)

    def end_request(self, record: RequestRecord) -> None:
        """Count a finished request, then log and trace it."""
        metrics, seconds = self.metrics, time.monotonic() - record.started_at
        metrics.active_requests -= 1
        if self._access:
            metrics.count_caller(record.credential.name, record.status)
        metrics.count_request(record.protocol.name, record.route, record.model, record.status, seconds)
        self.log_request(record)

    def _update_metric(self, update: Callable[..., None], *values: object) -> None:
        """Update a metric, and log any exception.

        Never raises, because the answer is written and the request's resources are released after the count.
        """
        try:
            update(*values)
        except Exception:
            log.exception("a request could not be counted")

    def log_request(self, record: RequestRecord) -> None:
        """Log and trace a request after its answer has been written.

        Also used for input that is no request.
        """
        has_line = self._access_log.take_line(record)
        if has_line or self._tracing:
            seconds = time.monotonic() - record.started_at
            # The caller writes the answer in the current callback of the event loop, after this call. Logging
            # in a later callback does not delay the answer.
            asyncio.get_running_loop().call_soon(self._log_and_trace, record, seconds, has_line)

    def _log_and_trace(self, record: RequestRecord, seconds: float, has_line: bool) -> None:
        """Trace a request, and log it if it has a line."""
        trace_id = parse_trace_id(record.traceparent)
        if self._tracing:
            try:
                trace_id = self._tracing.trace_request(record, seconds) or trace_id
            except Exception:
                log.exception("request %s could not be traced", record.request_id)
        if has_line:
            self._access_log.write(record, seconds, trace_id)


class ObserverMiddleware:
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
        self._observer.prepare_scope(scope)
        context = get_context(scope)
        observed_request = _ObservedRequest(scope, send, self._observer)
        record = observed_request.record
        self._observer.start_request()
        try:
            await self._app(scope, receive, observed_request.send)
        except ClientDisconnect:
            if not context.sent_error:
                self._observer.record_failure(record, CLIENT_LEFT)
        except Exception:
            error = log_internal_error(record.request_id)
            if record.status:
                self._observer.record_failure(record, error.code)
                raise  # the answer has begun: only closing the connection can signal the error
            await render_error(scope, error, self._observer)(scope, receive, observed_request.send)
        finally:
            if sent_error := context.sent_error:
                record.status = sent_error.status
                self._observer.record_failure(record, sent_error.code)
            observed_request.end()


class _ObservedRequest:
    """State of one ASGI request that is being observed."""

    def __init__(self, scope: Scope, send: Send, observer: Observer) -> None:
        self.record = get_record(scope)
        self._scope = scope
        self._send = send
        self._observer = observer
        self._is_over = False

    async def send(self, message: Message) -> None:
        """Send a message of the application, and end the request before its last message.

        The request is counted before the last byte leaves, so that a client that has its answer finds the
        request in the next scrape.
        """
        if message["type"] == "http.response.start":
            self.record.status = message["status"]
            message["headers"] = [
                *message.get("headers", ()),
                (REQUEST_ID_HEADER, self.record.request_id.encode()),
            ]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.end()
        await self._send(message)

    def end(self) -> None:
        """End the request once. Further calls do nothing."""
        if self._is_over:
            return
        self._is_over = True
        self._observer.end_request(self._observer.resolve_record(self._scope))


def log_internal_error(request_id: str) -> Internal:
    """Return the error for an unexpected exception and log its traceback.

    Call this while handling the exception.
    """
    log.exception("request %s failed", request_id)
    return Internal("internal error; the log of the service has the traceback under this request id")


def encode_error(error: RequestError, record: RequestRecord) -> tuple[int, bytes, dict[str, str]]:
    """Return an error's status, its body as JSON, and its headers besides the content type.

    The error's traceback is dropped, because the traceback refers back to the error and to the whole request.
    """
    error.__traceback__ = None
    headers = {}
    if isinstance(error, Unavailable):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    elif isinstance(error, Unauthorized | MissingScope):
        headers["www-authenticate"] = error.challenge
    body = record.protocol.render_error(error, record.request_id)
    return error.status, orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE), headers


def render_error(scope: Scope, error: RequestError, observer: Observer) -> Response:
    """Return the response for an error, and count the error by its code."""
    record = observer.resolve_record(scope)
    observer.record_failure(record, error.code)
    status, content, headers = encode_error(error, record)
    return Response(content, status, headers, media_type="application/json")

"""What every request gets, whatever answers it: an id, a count, a time, and an end."""

from __future__ import annotations

import logging
import math
import re
import time
import uuid
from typing import Final

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Internal, RequestError, Unavailable
from service.metrics import Metrics

log = logging.getLogger(__name__)

REQUEST_ID: Final = "X-Request-ID"
_ACCEPTABLE_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")


class Observe:
    """ASGI middleware around the whole application; the one place where requests are counted."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _ACCEPTABLE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        observed = _Observed(scope, send, self._metrics)
        with self._metrics.requests_in_flight.track_inprogress():
            try:
                await self._app(scope, receive, observed.send)
            except ClientDisconnect:
                self._metrics.errors.labels("client_left").inc()
            except Exception:
                log.exception("request %s failed", request_id)
                if observed.status:
                    raise  # the answer has begun: all that is left is to cut the connection
                error = Internal("internal error; the log has it under this request id")
                await render(Request(scope), error, self._metrics)(scope, receive, observed.send)
            finally:
                observed.count()


class _Observed:
    """One request on its way. `status` is 0 until an answer has begun."""

    def __init__(self, scope: Scope, send: Send, metrics: Metrics) -> None:
        self.status = 0
        self._scope = scope
        self._send = send
        self._metrics = metrics
        self._started = time.monotonic()
        self._counted = False

    async def send(self, message: Message) -> None:
        """Count before the last byte leaves: who has an answer finds it in the next scrape."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[REQUEST_ID] = self._scope["state"]["request_id"]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.count()
        await self._send(message)

    def count(self) -> None:
        """Count and time this request, once."""
        if self._counted:
            return
        self._counted = True
        route = getattr(self._scope.get("route"), "path", "") or self._scope.get("root_path") or "unmatched"
        model = self._scope["state"].get("model", "")
        self._metrics.requests.labels(route, model, str(self.status)).inc()
        self._metrics.request_seconds.labels(route).observe(time.monotonic() - self._started)


def render(request: Request, error: RequestError, metrics: Metrics) -> Response:
    """An error as the caller sees it; counted by its code."""
    metrics.errors.labels(error.code).inc()
    body = {**error.to_dict(), "request_id": request.state.request_id}
    headers = {}
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    content = orjson.dumps({"error": body}, option=orjson.OPT_APPEND_NEWLINE)
    return Response(content, error.status, headers, "application/json")

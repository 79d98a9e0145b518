"""What every request gets, whatever answers it: an id, a count, a time, and an end."""

from __future__ import annotations

import logging
import math
import random
import re
import time
from typing import Final

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Internal, RequestError, Unavailable
from service.metrics import CLIENT_LEFT, Metrics

log = logging.getLogger(__name__)

REQUEST_ID: Final = b"x-request-id"
_ACCEPTABLE_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")


class Observe:
    """ASGI middleware around the whole application; what goes past it is counted by `service.direct`."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        observed = _Observed(scope, send, self._metrics)
        self._metrics.requests_in_flight.inc()
        try:
            await self._app(scope, receive, observed.send)
        except ClientDisconnect:
            self._metrics.error(CLIENT_LEFT)
        except Exception:
            error = failure(observed.request_id)
            if observed.status:
                raise  # the answer has begun: all that is left is to cut the connection
            await render(scope, error, self._metrics)(scope, receive, observed.send)
        finally:
            self._metrics.requests_in_flight.dec()
            observed.count()


class _Observed:
    """One request on its way. `status` is 0 until an answer has begun."""

    def __init__(self, scope: Scope, send: Send, metrics: Metrics) -> None:
        self.status = 0
        self.request_id = own_id(dict(scope["headers"]).get(REQUEST_ID, b""))
        self._scope = scope
        self._send = send
        self._metrics = metrics
        self._started = time.monotonic()
        self._counted = False
        scope.setdefault("state", {})["request_id"] = self.request_id

    async def send(self, message: Message) -> None:
        """Count before the last byte leaves: who has an answer finds it in the next scrape."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (REQUEST_ID, self.request_id.encode())]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.count()
        await self._send(message)

    def count(self) -> None:
        """Count and time this request, once."""
        if self._counted:
            return
        self._counted = True
        scope, seconds = self._scope, time.monotonic() - self._started
        route = getattr(scope.get("route"), "path", "") or scope.get("root_path") or "unmatched"
        self._metrics.request(route, scope["state"].get("model", ""), self.status, seconds)


def own_id(given: bytes) -> str:
    """A request's id: the caller's own, where it is printable; or a new one."""
    if given and _ACCEPTABLE_ID.fullmatch(given):
        return given.decode()
    return f"{random.getrandbits(128):032x}"


def failure(request_id: str) -> Internal:
    """The error for our own bug that is being handled; its trace goes to the log."""
    log.exception("request %s failed", request_id)
    return Internal("internal error; the log has it under this request id")


def describe(error: RequestError, request_id: str) -> tuple[bytes, dict[str, str]]:
    """An error as the caller sees it, as JSON, and the headers that go with it besides the type.

    It is done with then: what its traceback refers to refers back to it, and to the whole request.
    """
    error.__traceback__ = None
    headers = {}
    if isinstance(error, Unavailable):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    body = {"error": {**error.to_dict(), "request_id": request_id}}
    return orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE), headers


def render(scope: Scope, error: RequestError, metrics: Metrics) -> Response:
    """The answer that says so; counted by the error's code."""
    metrics.error(error.code)
    content, headers = describe(error, scope["state"]["request_id"])
    return Response(content, error.status, headers, media_type="application/json")

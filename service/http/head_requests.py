"""Support for HEAD requests."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from fovea.service.http.observer import Observer


class HeadMiddleware:
    """ASGI middleware that answers HEAD requests as GET requests.

    The server omits the body. Load balancers send HEAD requests, which FastAPI would refuse.
    """

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # This must come before the method is replaced: the log record describes the request as it was
            # received.
            self._observer.prepare_scope(scope)
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)

"""ASGI middleware between the observer and FastAPI, for requests that need no FastAPI."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from fovea.service.api.cached_replies import CachedReplies
from fovea.service.api.endpoint import list_bypass_routes
from fovea.service.api.native.classify import ClassifyEndpoint
from fovea.service.http.observer import render_error
from fovea.service.http.request_context import get_context


class FastPathMiddleware:
    """ASGI middleware that passes inference requests to their handlers directly, bypassing FastAPI."""

    def __init__(self, app: FastAPI, classify: ClassifyEndpoint, cached_replies: CachedReplies) -> None:
        self._app = app
        self._cached_replies = cached_replies
        self._classify = classify
        self._bypass_routes = list_bypass_routes(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._find_app(scope)
        if app is self._app and scope["type"] == "http" and scope["method"] == "GET":
            await self._cached_replies.capture_reply(app, scope, receive, send)
        else:
            await app(scope, receive, send)

    def _find_app(self, scope: Scope) -> ASGIApp:
        if scope["type"] != "http":
            return self._app
        context = get_context(scope)
        if refusal := context.refusal:
            return render_error(scope, refusal, self._classify.services.observer)
        if scope["path"] == "*":  # an OPTIONS request about the server as a whole (RFC 9110, section 9.3.7)
            return Response(headers={"Allow": "GET, HEAD, OPTIONS, POST, PUT"})
        if scope["method"] not in ("POST", "PUT"):
            return self._app
        if target := self._classify.find_target(scope["method"], scope["path"]):
            context.target = target
            return self._classify
        for route in self._bypass_routes:
            match, child_scope = route.matches(scope)
            if match is Match.FULL:
                scope.update(child_scope)
                return route.app
        return self._app

"""The router in front of FastAPI: it finds the endpoint of a request, and answers from the cached replies.

FastAPI gets the requests that no endpoint answers.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import unquote

import httptools
from fastapi import FastAPI
from fastapi.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from fovea.service.api.asgi_endpoint import RouteMatch
from fovea.service.api.cached_replies import CachedReplies
from fovea.service.api.protocol_routes import EndpointRoute
from fovea.service.api.services import ModelAddress, Services
from fovea.service.errors import RequestError
from fovea.service.http.fast_path import Exchange, Headers, RequestHandler
from fovea.service.http.paths import normalize_path
from fovea.service.http.request_context import get_context

MAX_CACHED_URLS: Final = 1024
"""Maximum number of matches that are cached; finding a match takes longer than everything else."""

MAX_CACHED_URL_BYTES: Final = 256
"""Maximum length in bytes of a URL that is cached."""


class Router:
    """ASGI middleware around FastAPI, and the `FastApp` of requests that bypass ASGI.

    Both paths find the endpoint, the model and the options of a request by its method and URL, in one cache.
    """

    def __init__(self, app: FastAPI, services: Services, cached_replies: CachedReplies) -> None:
        """Create the router after all routes were added to `app`."""
        self.shared_bodies = services.classifier.shared_bodies
        self._app = app
        self._cached_replies = cached_replies
        self._access = services.access
        self._cors = services.observer.cors
        self._routes = [(route, route.answerer) for route in app.routes if isinstance(route, EndpointRoute)]
        self._matches: dict[tuple[bytes, bytes], RouteMatch] = {}

    def find_match(self, method: bytes, url: bytes) -> RouteMatch | None:
        """Return the match of a method and a URL, or None if no endpoint answers."""
        if route_match := self._matches.get((method, url)):
            return route_match
        try:
            url_parts = httptools.parse_url(url)
        except httptools.HttpParserInvalidURLError:
            return None
        path = normalize_path(unquote((url_parts.path or b"").decode("ascii", "replace")))
        scope = {"type": "http", "method": method.decode(), "path": path}
        for route, endpoint in self._routes:
            match, child_scope = route.matches(scope)
            if match is not Match.FULL:
                continue
            address = ModelAddress(**child_scope["path_params"])
            try:
                options = endpoint.parse_options(url_parts.query or b"")
            except RequestError as error:
                return RouteMatch(route, endpoint, address, None, error)
            route_match = RouteMatch(route, endpoint, address, options)
            if len(url) <= MAX_CACHED_URL_BYTES:
                if len(self._matches) >= MAX_CACHED_URLS:
                    self._matches.clear()
                self._matches[method, url] = route_match
            return route_match
        return None

    # --- without ASGI ---

    def open_request(
        self, exchange: Exchange, method: bytes, url: bytes, headers: Headers
    ) -> RequestHandler | None:
        """Accept a request, or return None if it must go through ASGI, like one with a compressed body.

        See `service.http.fast_path.FastApp`. Raises `RequestError`, also for a missing API key.
        """
        if b"content-encoding" in headers:
            return None
        if method == b"GET":
            return self._cached_replies.open_request(exchange, url, headers)
        route_match = self.find_match(method, url)
        if route_match is None:
            return None
        endpoint = route_match.endpoint
        if self._access:
            record = exchange.record
            record.route, record.protocol = route_match.route.path, endpoint.protocol
            self._access.authorize(endpoint.key_scope, record.credential, record.client)
        return endpoint.open_request(exchange, route_match, headers)

    def can_answer(self, url: bytes) -> bool:
        """Return True if there may be a cached reply; see `service.http.fast_path.FastApp`."""
        return self._cached_replies.has_reply(url)

    # --- ASGI ---

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._find_app(scope)
        if app is self._app and scope["type"] == "http" and scope["method"] == "GET":
            await self._cached_replies.capture_reply(app, scope, receive, send)
        else:
            await app(scope, receive, send)

    def _find_app(self, scope: Scope) -> ASGIApp:
        """Return the application that answers an ASGI request."""
        if scope["type"] != "http":
            return self._app
        context = get_context(scope)
        if scope["method"] == "OPTIONS" and (cors := self._cors):
            # Before the key is checked: a preflight carries no key.
            preflight_headers = cors.build_preflight_headers(dict(scope["headers"]))
            if preflight_headers is not None:
                return Response(status_code=204, headers=preflight_headers)
        if scope["path"] == "*":  # an OPTIONS request about the server as a whole (RFC 9110, section 9.3.7)
            return Response(headers={"Allow": "GET, HEAD, OPTIONS, POST, PUT"})
        if scope["method"] not in ("POST", "PUT"):
            return self._app
        query = scope["query_string"]
        url = scope["raw_path"] + b"?" + query if query else scope["raw_path"]
        route_match = self.find_match(scope["method"].encode(), url)
        if route_match is None:
            return self._app
        context.target, scope["route"] = route_match, route_match.route
        return route_match.endpoint

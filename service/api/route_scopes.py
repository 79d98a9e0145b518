"""The scope of every route: which API keys open it.

A new route needs a line here, or the service does not start: a route that is forgotten must not be open.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from fovea.service.access.access_control import AccessControl
from fovea.service.access.caller import Scope as KeyScope
from fovea.service.api.protocol_routes import EndpointRoute
from fovea.service.http.paths import HEALTH_PATHS
from fovea.service.http.request_context import get_context, get_record

PLATFORM_HEALTH: Final = "platform_health"
"""Name of the route whose path is the setting FOVEA_HEALTH_ROUTE."""

_OPEN: Final = None
"""Scope of open routes: probes, which send no key, and the files of the pages, which hold no data."""

_SCOPES: Final[Mapping[str, KeyScope | None]] = {
    **{f"GET {path}": _OPEN for path in HEALTH_PATHS},
    "GET /": _OPEN,
    "GET /docs": _OPEN,
    "GET /execution-parameters": _OPEN,
    "GET /metrics": KeyScope.METRICS,
    "GET /models": KeyScope.CLASSIFY,
    "GET /models/{name}": KeyScope.CLASSIFY,
    "GET /models/{name}/all": KeyScope.CLASSIFY,
    "GET /models/{name}/{version}": KeyScope.CLASSIFY,
    "GET /openapi.json": _OPEN,
    "GET /runtime": KeyScope.MANAGE,
    "GET /v1/models": KeyScope.CLASSIFY,
    "GET /v1/models/{name}": KeyScope.CLASSIFY,
    "GET /v1/models/{name}/contract": KeyScope.CLASSIFY,
    "GET /v1/models/{name}/layers": KeyScope.EXPLAIN,
    "GET /v1/models/{name}/metadata": KeyScope.CLASSIFY,
    "GET /v1/models/{name}/versions/{version}": KeyScope.CLASSIFY,
    "GET /v1/models/{name}/versions/{version}/contract": KeyScope.CLASSIFY,
    "GET /v1/models/{name}/versions/{version}/layers": KeyScope.EXPLAIN,
    "GET /v1/models/{name}/versions/{version}/metadata": KeyScope.CLASSIFY,
    "GET /v1/models/{name}/versions/{version}/weights": KeyScope.EXPLAIN,
    "GET /v1/models/{name}/weights": KeyScope.EXPLAIN,
    "GET /v2": _OPEN,
    "GET /v2/models/stats": KeyScope.CLASSIFY,
    "GET /v2/models/{name}": KeyScope.CLASSIFY,
    "GET /v2/models/{name}/config": KeyScope.CLASSIFY,
    "GET /v2/models/{name}/ready": KeyScope.CLASSIFY,
    "GET /v2/models/{name}/stats": KeyScope.CLASSIFY,
    "GET /v2/models/{name}/versions/{version}": KeyScope.CLASSIFY,
    "GET /v2/models/{name}/versions/{version}/config": KeyScope.CLASSIFY,
    "GET /v2/models/{name}/versions/{version}/ready": KeyScope.CLASSIFY,
    "GET /v2/models/{name}/versions/{version}/stats": KeyScope.CLASSIFY,
    "MOUNT /docs/swagger": _OPEN,
    "MOUNT /page": _OPEN,
    "OPTIONS /": _OPEN,
    "POST /models": KeyScope.MANAGE,
    "POST /v2/repository/index": KeyScope.CLASSIFY,
    "POST /v2/repository/models/{name}/load": KeyScope.MANAGE,
    "POST /v2/repository/models/{name}/unload": KeyScope.MANAGE,
}
"""Scopes by method and template of a route. Routes that take images have their scope in their endpoint."""


def find_scope(route: BaseRoute) -> KeyScope | None:
    """Return the scope of a route, or None for a route that is always open.

    Raises `LookupError` for a route without a scope.
    """
    if isinstance(route, EndpointRoute):
        return route.answerer.key_scope
    if getattr(route, "name", "") == PLATFORM_HEALTH:
        return _OPEN
    path = getattr(route, "path", "")
    scopes = {_SCOPES[f"{method} {path}"] for method in getattr(route, "methods", None) or ("MOUNT",)}
    if len(scopes) != 1:
        raise LookupError(f"the methods of {path} have different scopes")
    return scopes.pop()


def guard_routes(app: FastAPI, access: AccessControl) -> None:
    """Let every route check the API key of a request before it does anything else.

    Call this after all routes were added. Raises `LookupError` for a route without a scope.
    """
    for route in app.routes:
        scope = find_scope(route)
        # An endpoint checks the key itself, because the router calls it without FastAPI.
        if scope is not None and not isinstance(route, EndpointRoute):
            any_route: Any = route
            any_route.handle = _Guard(route.handle, access, scope)


class _Guard:
    """ASGI middleware around one route that checks API keys."""

    def __init__(self, app: ASGIApp, access: AccessControl, key_scope: KeyScope) -> None:
        self._app = app
        self._access = access
        self._key_scope = key_scope

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request with the right key. Raises `Unauthorized` or `MissingScope`."""
        if scope["type"] == "http":
            get_context(scope).key_scope = self._key_scope
            record = get_record(scope)
            self._access.authorize(self._key_scope, record.credential, record.client)
        await self._app(scope, receive, send)

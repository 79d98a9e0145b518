"""API protocols: the client protocols, and how each protocol renders an error.

`service/api` has the routes and the translation of each protocol. This module has the part that all other
code needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from fovea.service.errors import RequestError

ErrorRenderer: TypeAlias = Callable[[RequestError, str], dict[str, Any]]
"""Function that renders the body of an error, given the error and the request id."""


@dataclass(frozen=True, eq=False)
class ApiProtocol:
    """A client protocol: a name and an error renderer."""

    name: str
    render_error: ErrorRenderer
    path_prefix: str | None = None
    """Path prefix that belongs to this protocol, including paths without a route. None if there is no
    prefix."""


def _render_native_error(error: RequestError, request_id: str) -> dict[str, Any]:
    """Return the body of an error in the native format."""
    return {"error": {**error.to_dict(), "request_id": request_id}}


def render_flat_error(error: RequestError, request_id: str) -> dict[str, Any]:
    """Return the body of an error as KServe, TensorFlow Serving and Hugging Face render it.

    `error` is the message. `code` and `request_id` are Fovea's own additions.
    """
    return {"error": str(error), "code": error.code, "request_id": request_id}


NATIVE: Final = ApiProtocol("native", _render_native_error)
"""Fovea's own protocol. It also covers operations, pages and paths without a route."""


class ApiProtocols:
    """Registry that maps requests to protocols by route."""

    def __init__(self) -> None:
        self._routes: Sequence[BaseRoute] = ()
        self._protocols: dict[int, ApiProtocol] = {}
        """Protocols by `id` of the route, because routes are not hashable."""
        self._protocols_by_prefix: dict[str, ApiProtocol] = {}
        """Protocols by path prefix, with a slash at its end."""

    @contextmanager
    def register_routes(self, routes: Sequence[BaseRoute], protocol: ApiProtocol) -> Iterator[None]:
        """Register every route that is added to `routes` inside the `with` block for this protocol."""
        self._routes = routes
        route_count = len(routes)
        yield
        self._protocols.update((id(route), protocol) for route in routes[route_count:])
        if protocol.path_prefix:
            self._protocols_by_prefix[f"{protocol.path_prefix}/"] = protocol

    def find_protocol(self, scope: Scope) -> ApiProtocol:
        """Return the protocol of a request. If the request has no route yet, its route is looked up."""
        if route := scope.get("route") or self._find_route(scope):
            return self._protocols.get(id(route), NATIVE)
        protocols = (
            one for prefix, one in self._protocols_by_prefix.items() if scope["path"].startswith(prefix)
        )
        return next(protocols, NATIVE)

    def _find_route(self, scope: Scope) -> BaseRoute | None:
        """Return the route that matches a request, as Starlette's router would choose it."""
        partial = None
        for route in self._routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return route
            if match is Match.PARTIAL and partial is None:
                partial = route
        return partial

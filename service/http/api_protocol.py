"""API dialects: the client protocols, and how each protocol renders an error.

`service/api` has the routes and the translation of each dialect. This module has the part that all other code
needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from fovea.service.errors import RequestError

Written: TypeAlias = Callable[[RequestError, str], dict[str, Any]]
"""Function that renders the body of an error, given the error and the request id."""


@dataclass(frozen=True, eq=False)
class Dialect:
    """A client protocol: a name and an error renderer."""

    name: str
    write: Written
    root: str | None = None
    """Path prefix that belongs to this dialect, including paths without a route. None if there is no
    prefix."""


def _write(error: RequestError, request_id: str) -> dict[str, Any]:
    """Return the body of an error in the native format."""
    return {"error": {**error.to_dict(), "request_id": request_id}}


def write_flat(error: RequestError, request_id: str) -> dict[str, Any]:
    """Return the body of an error as KServe, TensorFlow Serving and Hugging Face render it.

    `error` is the message. `code` and `request_id` are Fovea's own additions.
    """
    return {"error": str(error), "code": error.code, "request_id": request_id}


NATIVE: Final = Dialect("native", _write)
"""Fovea's own dialect. It also covers operations, pages and paths without a route."""


class Dialects:
    """Registry that maps requests to dialects by route."""

    def __init__(self) -> None:
        self._routes: Sequence[BaseRoute] = ()
        self._dialects: dict[int, Dialect] = {}
        """Dialects by `id` of the route, because routes are not hashable."""
        self._roots: dict[str, Dialect] = {}
        """Dialects by path prefix, with a slash at its end."""

    @contextmanager
    def adding(self, routes: Sequence[BaseRoute], dialect: Dialect) -> Iterator[None]:
        """Register every route that is added to `routes` inside the `with` block for this dialect."""
        self._routes = routes
        before = len(routes)
        yield
        self._dialects.update((id(route), dialect) for route in routes[before:])
        if dialect.root:
            self._roots[f"{dialect.root}/"] = dialect

    def of(self, scope: Scope) -> Dialect:
        """Return the dialect of a request. If the request has no route yet, its route is looked up."""
        if route := scope.get("route") or self._find(scope):
            return self._dialects.get(id(route), NATIVE)
        roots = (one for root, one in self._roots.items() if scope["path"].startswith(root))
        return next(roots, NATIVE)

    def _find(self, scope: Scope) -> BaseRoute | None:
        """Return the route that matches a request, as Starlette's router would choose it."""
        partial = None
        for route in self._routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return route
            if match is Match.PARTIAL and partial is None:
                partial = route
        return partial

"""A dialect: one of the protocols that clients speak, and how it says what went wrong.

The routes of a dialect and what it translates are in `service/api`; this is what everybody else must know.
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
"""Makes the body of an error, of it and the request's id."""


@dataclass(frozen=True, eq=False)
class Dialect:
    """Its name, and how it writes an error."""

    name: str
    write: Written
    root: str | None = None
    """Below this path all is of it, also where there is nothing."""


def _write(error: RequestError, request_id: str) -> dict[str, Any]:
    return {"error": {**error.to_dict(), "request_id": request_id}}


def write_flat(error: RequestError, request_id: str) -> dict[str, Any]:
    """As KServe, TensorFlow Serving and Hugging Face have it: the message alone, and ours beside it."""
    return {"error": str(error), "code": error.code, "request_id": request_id}


NATIVE: Final = Dialect("native", _write)
"""Our own, and that of whatever belongs to no other: operations, pages, paths where there is nothing."""


class Dialects:
    """Which dialect a request speaks: that of its route."""

    def __init__(self) -> None:
        self._routes: Sequence[BaseRoute] = ()
        self._dialects: dict[int, Dialect] = {}
        """By the route's identity: routes have no hash."""
        self._roots: dict[str, Dialect] = {}

    @contextmanager
    def adding(self, routes: Sequence[BaseRoute], dialect: Dialect) -> Iterator[None]:
        """What is added inside to the application's `routes` is of this dialect."""
        self._routes = routes
        before = len(routes)
        yield
        self._dialects.update((id(route), dialect) for route in routes[before:])
        if dialect.root:
            self._roots[f"{dialect.root}/"] = dialect

    def of(self, scope: Scope) -> Dialect:
        """Of a request that may not have been routed yet: then as it would be."""
        if route := scope.get("route") or self._find(scope):
            return self._dialects.get(id(route), NATIVE)
        roots = (one for root, one in self._roots.items() if scope["path"].startswith(root))
        return next(roots, NATIVE)

    def _find(self, scope: Scope) -> BaseRoute | None:
        partial = None
        for route in self._routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return route
            if match is Match.PARTIAL and partial is None:
                partial = route
        return partial

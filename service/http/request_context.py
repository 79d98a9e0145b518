"""The context of one ASGI request: the state that the connection, the middleware and the endpoints share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from starlette.types import Scope

from fovea.service.access.caller import Scope as KeyScope
from fovea.service.errors import RequestError
from fovea.service.http.proxies import Origin
from fovea.service.http.request_record import RequestRecord

_KEY: Final = "fovea.request_context"
"""Key of the context in the ASGI scope."""


@dataclass(slots=True)
class RequestContext:
    """State of one ASGI request. Middleware that copies the scope keeps the same context."""

    record: RequestRecord | None = None
    """Record for log, metrics and traces. Read it with `get_record`, which creates it."""
    origin: Origin | None = None
    """Client and address of the request; None until `Observer.prepare_scope` has run."""
    target: Any = None
    """Match of the router (`service.api.asgi_endpoint.RouteMatch`), for the endpoint that answers."""
    key_scope: KeyScope | None = None
    """Scope that the route needs of an API key, once it is checked; None for a route that is open."""
    sent_error: RequestError | None = None
    """Error with which the connection has answered in place of the application."""
    has_disconnected: bool = False
    """True once nobody reads the answer: the client has left, or the connection has answered."""
    on_disconnect: Callable[[], None] | None = None
    """Callback that cancels the application's jobs. The connection calls it on the event loop when the client
    leaves."""


def get_context(scope: Scope) -> RequestContext:
    """Return the context of an ASGI request. The first call creates it."""
    context: RequestContext | None = scope.get(_KEY)
    if context is None:
        context = scope[_KEY] = RequestContext()
    return context


def get_record(scope: Scope) -> RequestRecord:
    """Return the record of an ASGI request. The first call creates it."""
    context = get_context(scope)
    if context.record is None:
        context.record = RequestRecord(scope["method"], dict(scope["headers"]))
    return context.record


def get_request_origin(scope: Scope) -> Origin:
    """Return the origin of an ASGI request. Call `Observer.prepare_scope` first."""
    origin = get_context(scope).origin
    if origin is None:
        raise RuntimeError("the request has no origin yet")
    return origin

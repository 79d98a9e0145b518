"""Objects that all connections of a server share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from starlette.types import ASGIApp

from fovea.service.http.fast_path import FastApp
from fovea.service.http.hangups import HangUpWatcher
from fovea.service.http.known_heads import KnownHeads, RequestHead
from fovea.service.http.lifecycle import Lifecycle
from fovea.service.http.observer import Observer
from fovea.service.http.paths import HEALTH_PATHS
from fovea.service.http.rate_limiter import RateLimiter
from fovea.service.resources.body_memory import BodyMemory
from fovea.service.settings import Settings

if TYPE_CHECKING:
    from fovea.service.http.connection import Connection


_HEALTH_URLS: Final = frozenset(path.encode() for path in HEALTH_PATHS)


@dataclass
class ServerContext:
    """Objects that all connections of a server share."""

    asgi: ASGIApp
    asgi_state: dict[str, Any]
    """State of the application's lifespan, for the ASGI scope."""
    fast_app: FastApp
    settings: Settings
    lifecycle: Lifecycle
    observer: Observer
    body_memory: BodyMemory
    hangups: HangUpWatcher
    refusal_limiter: RateLimiter
    buffer: bytearray
    """Buffer for one read. Allocating memory for each read would fragment the heap. Its content is valid only
    until the callback of the read returns."""
    scheme: str = "http"
    """Scheme of the service's own URL: "http" or "https"."""
    known_heads: KnownHeads = field(default_factory=KnownHeads)
    """Parsed heads of all connections."""
    date_line: bytes = b""
    """The Date header, which the server updates every second."""
    connections: set[Connection] = field(default_factory=set)
    """Open connections."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """Running tasks of the ASGI application."""

    def is_health_request(self, head: RequestHead) -> bool:
        """Return whether a request asks for nothing but health. Other spellings of a path do not count."""
        path = head.url.partition(b"?")[0]
        own_path = (self.settings.health_route or "").encode()
        return head.method in (b"GET", b"HEAD") and (path in _HEALTH_URLS or (path == own_path != b""))

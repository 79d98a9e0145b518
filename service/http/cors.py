"""Cross-origin requests: which pages of other sites may call the service from a browser (CORS).

A browser lets a page read an answer only if the answer names the page's origin. Before most requests it asks
by `OPTIONS` (a preflight). Fovea never allows credentials such as cookies, because it has none: an API key is
a header that the page itself sends. Management stays closed to other sites (`service.api.cross_site`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

ANY_ORIGIN: Final = "*"

_MAX_AGE: Final = 600
"""Time in seconds for which a browser may remember the answer to a preflight."""

_METHODS: Final = b"GET, HEAD, POST, PUT"

_VALID_HEADER_NAMES: Final = re.compile(rb"[A-Za-z0-9_-]+(?: ?, ?[A-Za-z0-9_-]+)*")
"""Valid value of `Access-Control-Request-Headers`: names with commas between."""

_MAX_NAMES_BYTES: Final = 1024
"""Maximum size in bytes of that value."""


class CorsPolicy:
    """The origins whose pages may call the service."""

    def __init__(self, origins: Sequence[str]) -> None:
        """Allow `origins`, such as `https://app.example.com`; `*` allows every origin."""
        self._allows_all = ANY_ORIGIN in origins
        self._origins = {origin.encode() for origin in origins}

    def build_lines(self, origin: bytes | None) -> bytes:
        """Return the encoded headers of an answer to a request with this `Origin`."""
        if self._allows_all:
            return _format_lines(b"*") if origin is not None else b""
        # Also without an origin: a cache must not give this answer to a page.
        vary = b"vary: Origin\r\n"
        return _format_lines(origin) + vary if origin in self._origins and origin is not None else vary

    def build_preflight_headers(self, headers: Mapping[bytes, bytes]) -> dict[str, str] | None:
        """Return the headers of the answer to an OPTIONS request, besides those of `build_lines`.

        None if the request is no preflight, or if its origin is not allowed. Names in `headers` are in lower
        case.
        """
        origin = headers.get(b"origin")
        if origin is None or b"access-control-request-method" not in headers:
            return None
        if not self._allows_all and origin not in self._origins:
            return None
        preflight = {
            "access-control-allow-methods": _METHODS.decode(),
            "access-control-max-age": str(_MAX_AGE),
        }
        names = headers.get(b"access-control-request-headers", b"")
        if len(names) <= _MAX_NAMES_BYTES and _VALID_HEADER_NAMES.fullmatch(names):
            preflight["access-control-allow-headers"] = names.decode()
        return preflight


def _format_lines(origin: bytes) -> bytes:
    return b"access-control-allow-origin: %b\r\naccess-control-expose-headers: *\r\n" % origin

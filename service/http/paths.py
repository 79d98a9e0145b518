"""Paths of requests, as routes are compared with them."""

from __future__ import annotations

import re
from typing import Final

_SLASHES: Final = re.compile("//+")


def plain_path(path: str) -> str:
    """Return a path without doubled slashes and without one at its end.

    Clients join addresses and paths carelessly. A redirect would lose the body in some clients, and behind a
    proxy the scheme and the prefix.
    """
    if "//" in path:
        path = _SLASHES.sub("/", path)
    return path.rstrip("/") or "/"


def root_of(raw_path: bytes) -> str:
    """Return the URL of our root, relative to a path of one segment: `.` for `/docs`, `..` for `/docs/`."""
    return ".." if raw_path.endswith(b"/") else "."

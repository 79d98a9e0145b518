"""Paths of requests: their normalisation for routing, and those of health checks."""

from __future__ import annotations

import re
from typing import Final

HEALTH_PATHS: Final = (
    "/health", "/health/live", "/health/ready", "/ping", "/v2/health/live", "/v2/health/ready",
)  # fmt: skip
"""Paths that probes ask for. Probes have neither an API key nor a client certificate. FOVEA_HEALTH_ROUTE is
another."""

_REPEATED_SLASHES: Final = re.compile("//+")


def normalize_path(path: str) -> str:
    """Return a path without doubled slashes and without a slash at its end.

    Clients often join base URLs and paths carelessly. A redirect would lose the body in some clients. Behind
    a proxy, a redirect would also lose the scheme and the path prefix.
    """
    if "//" in path:
        path = _REPEATED_SLASHES.sub("/", path)
    return path.rstrip("/") or "/"


def relative_root_url(raw_path: bytes) -> str:
    """Return the URL of the service's root relative to a path of one segment.

    The result is `.` for `/docs` and `..` for `/docs/`.
    """
    return ".." if raw_path.endswith(b"/") else "."

"""Callers and scopes: who sends a request, and which group of routes a key opens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Scope(StrEnum):
    """A group of routes that a key may open."""

    CLASSIFY = "classify"
    """Inference in every protocol, and the metadata and lists of models."""
    EXPLAIN = "explain"
    """Heat maps and the contents of layers."""
    MANAGE = "manage"
    """Loading and unloading models."""
    METRICS = "metrics"
    """`/metrics`. This route is open as long as no key has this scope."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request."""

    name: str
    """Name of the key in the keys file; empty for a request without a key."""
    address: str
    """Address of the client, as trusted proxies report it; empty on a Unix socket."""

"""Callers and scopes: who sends a request, and which group of routes a key opens."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

_IPV6_PREFIX: Final = 64
"""Length in bits of the part of an IPv6 address that counts: one customer has at least a /64 network, and any
address in the network."""

_IPV4_IN_IPV6: Final = ipaddress.IPv6Network("64:ff9b::/96")
"""Addresses of IPv4 clients behind a translator (RFC 6052)."""


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


def name_caller(caller: Caller) -> str:
    """Return the name under which a caller is counted: its key, or else its address.

    IPv6 addresses are counted by network. All callers without an address, as on a Unix socket, are one
    caller.
    """
    if caller.name:
        return f"key {caller.name}"
    try:
        address = ipaddress.ip_address(caller.address)
    except ValueError:
        return f"address {caller.address}"
    if isinstance(address, ipaddress.IPv4Address):
        return f"address {address}"
    if address in _IPV4_IN_IPV6:
        return f"address {ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)}"
    return f"network {ipaddress.IPv6Network((int(address), _IPV6_PREFIX), strict=False)}"


def exceeds_share(*, own: int, total: int, callers: int, limit: int) -> bool:
    """Return whether a caller has more than its share of something of which more than half is taken.

    The first half is for any caller. After that there is always room for one more caller. `own` is the part
    of the caller with the new ones, `total` that of all callers, `callers` is the number of callers with any
    part, and `limit` is all that there is.
    """
    return 2 * total > limit and own > max(1, limit // (callers + 1))

"""Forwarding headers of reverse proxies: the client's address and the service's public address."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

Header: TypeAlias = tuple[bytes, bytes]
"""Name of a header in lower case, and its value."""

_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAX_HOPS: Final = 100
"""Maximum number of addresses of `X-Forwarded-For` that are read."""

_MAX_CACHED_PEERS: Final = 4096
"""Maximum number of peers in the cache. Parsing an address takes longer than a cache lookup."""

_VALID_PREFIX: Final = re.compile(r"(?:/[A-Za-z0-9._~%-]+)+/?")
"""Valid path prefix. Prefixes are put into links: no allowed character can end an attribute or name another
host."""

_VALID_HOST: Final = re.compile(r"[A-Za-z0-9.-]+(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?")


class Origin(NamedTuple):
    """Origin of a request, and the service's address as the client sees it."""

    client: str = ""
    """Address of the client; empty if there is none, as on a Unix socket."""
    peer: str = ""
    """Address of the other end of the connection, which may be a proxy."""
    prefix: str = ""
    """Path prefix such as `/vision` that a proxy removes before it forwards a request."""
    scheme: str = ""
    """`http` or `https`, if a proxy reports it."""
    host: str = ""
    """Host that the client requested, with a port unless it is the scheme's default, if a proxy reports
    it."""

    @property
    def url(self) -> str:
        """Known part of the service's root URL, without a slash at its end."""
        return f"{self.scheme}://{self.host}{self.prefix}" if self.scheme and self.host else self.prefix


class TrustedProxies:
    """Trusted proxies. Forwarding headers from any other peer are ignored, because anybody can forge them."""

    def __init__(self, networks: Iterable[str]) -> None:
        """Parse `networks`, which are addresses or networks in CIDR notation. Raises `ValueError`."""
        self._networks = [ipaddress.ip_network(one) for one in networks]
        self._is_trusted = lru_cache(_MAX_CACHED_PEERS)(self._is_in_networks)
        self._direct_origin = lru_cache(_MAX_CACHED_PEERS)(_create_direct_origin)

    def resolve_origin(self, peer: str, headers: Iterable[Header]) -> Origin:
        """Return the origin of a request.

        The headers `X-Forwarded-For`, `-Prefix`, `-Proto` and `-Host` are read only if `peer` is trusted.
        """
        if not self._networks:
            return self._direct_origin(peer)
        peer = _normalize_address(peer)
        if not self._is_trusted(peer):
            return Origin(peer, peer)
        forwarded: dict[bytes, list[str]] = {}
        for name, value in headers:
            if name.startswith(b"x-forwarded-"):
                forwarded.setdefault(name, []).append(value.decode("latin-1"))
        prefix = _first_value(forwarded.get(b"x-forwarded-prefix"))
        scheme = _first_value(forwarded.get(b"x-forwarded-proto")).lower()
        host = _first_value(forwarded.get(b"x-forwarded-host"))
        return Origin(
            client=self._find_client(peer, ",".join(forwarded.get(b"x-forwarded-for", ()))),
            peer=peer,
            prefix=prefix.rstrip("/") if _VALID_PREFIX.fullmatch(prefix) else "",
            scheme=scheme if scheme in ("http", "https") else "",
            host=host if _VALID_HOST.fullmatch(host) else "",
        )

    def _find_client(self, peer: str, forwarded: str) -> str:
        """Return the address of the client from `X-Forwarded-For`.

        The addresses are read from the nearest proxy outwards, up to the first untrusted address. An
        untrusted sender wrote everything to the left of that address.
        """
        client = peer
        for hop in reversed(forwarded.split(",")[-_MAX_HOPS:]):
            address = _strip_port(hop.strip())
            if _parse_address(address) is None:  # such as `unknown`
                break
            client = _normalize_address(address)
            if not self._is_trusted(client):
                break
        return client

    def _is_in_networks(self, address: str) -> bool:
        """Return whether an address is in a trusted network."""
        parsed = _parse_address(address)
        return parsed is not None and any(parsed in network for network in self._networks)


def _create_direct_origin(peer: str) -> Origin:
    """Return the origin of a request that came from `peer` itself."""
    address = _normalize_address(peer)
    return Origin(address, address)


def _parse_address(address: str) -> _Address | None:
    """Return the parsed address, with an IPv4-mapped IPv6 address as IPv4; None if it is not an address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed


def _normalize_address(address: str) -> str:
    """Return an address in its shortest form. An IPv4 address that came over an IPv6 socket becomes IPv4."""
    if ":" not in address:
        return address
    return str(_parse_address(address) or address)


def _strip_port(hop: str) -> str:
    """Return the address without a port or brackets.

    `1.2.3.4:5`, `[::1]:5` and `[::1]` contain an address; `::1` is an address.
    """
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop


def _first_value(values: list[str] | None) -> str:
    """Return the first value of a list, which the proxy nearest to the client has written."""
    return values[0].partition(",")[0].strip() if values else ""

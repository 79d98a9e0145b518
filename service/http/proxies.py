"""Proxies in front of the service: what they say of the client and of the service's own address."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

Header: TypeAlias = tuple[bytes, bytes]
"""A header's name, in lower case, and its value."""

_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_HOPS: Final = 100
"""Most addresses of `X-Forwarded-For` that are looked at."""

_KNOWN: Final = 4096
"""Most peers that are remembered: to parse an address takes longer than to look it up."""

_PREFIX: Final = re.compile(r"(?:/[A-Za-z0-9._~%-]+)+/?")
"""A path that goes into links: nothing in it can end an attribute or name another host."""

_HOST: Final = re.compile(r"[A-Za-z0-9.-]+(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?")


class Origin(NamedTuple):
    """Where a request came from and where its client believes the service to be."""

    client: str = ""
    """The client's address; empty where there is none, as on a Unix socket."""
    peer: str = ""
    """The address at the other end of the connection: a proxy's, where there is one."""
    prefix: str = ""
    """Path in front of all of ours, such as `/vision`: a proxy takes it away."""
    scheme: str = ""
    """`http` or `https`, where a proxy says so."""
    host: str = ""
    """Host, and port if it is not the scheme's, that the client has asked, where a proxy says so."""

    @property
    def url(self) -> str:
        """The address of our `/`, without a slash at its end: as much of it as is known."""
        return f"{self.scheme}://{self.host}{self.prefix}" if self.scheme and self.host else self.prefix


class Proxies:
    """The proxies whose headers are trusted. Anybody else can write what they like into theirs."""

    def __init__(self, networks: Iterable[str]) -> None:
        """`networks` are addresses, or networks in CIDR notation. Raises `ValueError`."""
        self._networks = [ipaddress.ip_network(one) for one in networks]
        self._is_trusted = lru_cache(_KNOWN)(self._is_inside)

    def origin(self, peer: str, headers: Iterable[Header]) -> Origin:
        """Read the headers `X-Forwarded-For`, `-Prefix`, `-Proto` and `-Host` if `peer` is trusted."""
        peer = _plain(peer)
        if not self._networks or not self._is_trusted(peer):
            return Origin(peer, peer)
        told: dict[bytes, list[str]] = {}
        for name, value in headers:
            if name.startswith(b"x-forwarded-"):
                told.setdefault(name, []).append(value.decode("latin-1"))
        prefix = _first(told.get(b"x-forwarded-prefix"))
        scheme = _first(told.get(b"x-forwarded-proto")).lower()
        host = _first(told.get(b"x-forwarded-host"))
        return Origin(
            client=self._client(peer, ",".join(told.get(b"x-forwarded-for", ()))),
            peer=peer,
            prefix=prefix.rstrip("/") if _PREFIX.fullmatch(prefix) else "",
            scheme=scheme if scheme in ("http", "https") else "",
            host=host if _HOST.fullmatch(host) else "",
        )

    def _client(self, peer: str, forwarded: str) -> str:
        """Go from the nearest proxy outwards, and stop at the first address that is not trusted: what stands
        left of that was written by somebody who is not."""
        client = peer
        for hop in reversed(forwarded.split(",")[-_HOPS:]):
            address = _without_port(hop.strip())
            if _parse(address) is None:  # such as `unknown`
                break
            client = _plain(address)
            if not self._is_trusted(client):
                break
        return client

    def _is_inside(self, address: str) -> bool:
        parsed = _parse(address)
        return parsed is not None and any(parsed in network for network in self._networks)


def _parse(address: str) -> _Address | None:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed


def _plain(address: str) -> str:
    """As it is written shortest; an IPv4 address that came over an IPv6 socket as itself."""
    if ":" not in address:
        return address
    return str(_parse(address) or address)


def _without_port(hop: str) -> str:
    """`1.2.3.4:5`, `[::1]:5` and `[::1]` have an address inside; `::1` is one."""
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop


def _first(values: list[str] | None) -> str:
    """Of a list the first, which the proxy nearest to the client has written."""
    return values[0].partition(",")[0].strip() if values else ""

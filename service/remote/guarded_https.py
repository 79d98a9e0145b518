"""Downloads from https URLs that come from strangers, with a guard against private addresses.

The caller lists the hosts that may be asked. Each host is resolved once, every address must be public, and
the connection goes to the address that was checked, so a name that changes its address in between gains
nothing. Redirects pass the same checks. Proxies of the environment are not used, because a proxy would
resolve the name again. A fetch blocks, so an event loop calls it in another thread.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import closing, suppress
from typing import Any, Final, NamedTuple
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from fovea.service.errors import BodyTooLarge, FoveaError, to_one_line
from fovea.service.remote.time_limits import call_within

Resolver = Callable[[str, int], Sequence[str]]
"""Returns the addresses of a host, as text. Raises `OSError`."""

Connector = Callable[[tuple[str, int], float], socket.socket]
"""Connects to an address and a port within some seconds. Raises `OSError`."""

_HTTPS_PORT: Final = 443

_CHUNK_BYTES: Final = 64 << 10

_MAX_URL_LENGTH: Final = 4096

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})

_HOST: Final = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")

_PLATFORM_ADDRESSES: Final = frozenset(map(ipaddress.ip_address, ("168.63.129.16", "fd00:ec2::254")))
"""Addresses of clouds' own services for their machines: Azure's is in a public range."""

_EMBEDDING_NETWORKS: Final = tuple(
    map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96"))
)
"""Networks of IPv6 whose addresses stand for addresses of IPv4 (NAT64, compatible, translated)."""

_SPECIAL_NETWORKS: Final = (ipaddress.ip_network("192.88.99.0/24"), ipaddress.ip_network("3fff::/20"))
"""Networks that older versions of Python take for public: relays of 6to4 (RFC 7526), examples (RFC 9637)."""


class UrlError(FoveaError):
    """An image cannot be read from a URL."""


class UrlRefused(UrlError):
    """The guard does not allow a URL: its host, its address or its form."""


class UrlFailed(UrlError):
    """A host could not be reached, was too slow, or gave no image."""


class UrlTooSlow(UrlFailed):
    """A host took longer than the limit."""


class UrlLimits(NamedTuple):
    """Limits of one fetch, with all of its redirects."""

    max_bytes: int = 64 << 20
    """Largest body, in bytes."""
    seconds: float = 20.0
    """Longest time, from the first question to the resolver to the last byte."""
    redirects: int = 3
    bytes_setting: str = "FOVEA_BODY_BYTES"
    """Setting that `max_bytes` comes from, for messages."""


class FetchControl:
    """Stops a fetch from another thread, and counts what has arrived."""

    def __init__(self, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        """Call `on_bytes` with the size of each piece, in the thread that fetches. Its errors end it."""
        self.on_bytes: Final = on_bytes
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self.is_cancelled = False
        """True after `cancel`."""

    def cancel(self) -> None:
        """End the fetch: its connection is shut down. The look-up of a name goes on until its limit."""
        with self._lock:
            self.is_cancelled = True
            if self._connection:
                with suppress(OSError):  # closed already
                    # Not the method of `ssl`, which would take the encryption away from the other thread.
                    socket.socket.shutdown(self._connection, socket.SHUT_RDWR)

    def attach(self, connection: socket.socket | None) -> None:
        """Note the connection in use, or that there is none. Raises `UrlFailed` after `cancel`."""
        with self._lock:
            self._connection = connection
            if connection and self.is_cancelled:
                raise UrlFailed("the caller has left")


class GuardedHttps:
    """Fetches https URLs from listed hosts only, and never from a private address."""

    def __init__(
        self,
        allowed_hosts: Collection[str],
        limits: UrlLimits | None = None,
        *,
        resolve: Resolver | None = None,
        connect: Connector | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Allow `allowed_hosts`: `photos.example.com`, `*.example.com`, or with a port `example.com:8443`.

        `resolve`, `connect` and `tls` replace the system's resolver, its sockets and its certificates.
        """
        self._allowed: Final = tuple(_split_allowed(host) for host in allowed_hosts)
        self._limits: Final = limits or UrlLimits()
        self._resolve: Final = resolve or resolve_host
        self._connect: Final = connect or _connect
        self._tls: Final = tls or ssl.create_default_context()

    def fetch(self, url: str, control: FetchControl | None = None) -> bytes:
        """Return the content of a URL.

        Raises `UrlRefused`, `UrlFailed`, and `BodyTooLarge` above the limit of bytes.
        """
        deadline = time.monotonic() + self._limits.seconds
        for _ in range(self._limits.redirects + 1):
            result = self._fetch_once(url, deadline, control or FetchControl())
            if isinstance(result, bytes):
                return result
            try:
                url = urljoin(url, result.location)
            except ValueError as error:
                raise UrlRefused(f"{_shorten(url)}: redirected to what is no URL: {error}") from None
        raise UrlFailed(f"{_shorten(url)}: more than {self._limits.redirects} redirects")

    def check(self, url: str) -> None:
        """Raise `UrlRefused` if a URL is malformed or its host is not allowed. Asks nobody."""
        self._check_url(url)

    def _fetch_once(self, url: str, deadline: float, control: FetchControl) -> bytes | _Redirect:
        parts, host, port = self._check_url(url)
        name = _shorten(url)
        address = self._choose_address(host, port, deadline, name)
        try:
            with closing(self._connect((address, port), _left(deadline, name))) as plain:
                plain.settimeout(_left(deadline, name))
                with self._tls.wrap_socket(
                    plain, server_hostname=host, do_handshake_on_connect=False
                ) as encrypted:
                    control.attach(encrypted)
                    try:
                        encrypted.do_handshake()
                        return self._exchange(encrypted, parts, deadline, name, control.on_bytes)
                    finally:
                        control.attach(None)
        except ssl.SSLCertVerificationError as error:
            raise UrlFailed(f"{name}: the certificate is not valid: {error.verify_message}") from None
        except TimeoutError:
            raise _too_slow(name) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise UrlFailed(f"{name}: {to_one_line(error) or type(error).__name__}") from None

    def _check_url(self, url: str) -> tuple[SplitResult, str, int]:
        """Return a URL in parts, its host and its port, if its form and its host are allowed."""
        name = _shorten(url)
        if len(url) > _MAX_URL_LENGTH or any(ord(one) <= 32 or ord(one) == 127 for one in url) or "\\" in url:
            raise UrlRefused(f"{name}: not a URL: it is too long, or has a space or a control character")
        try:
            parts = urlsplit(url)
            port = _HTTPS_PORT if parts.port is None else parts.port
            host = _normalise_host(parts.hostname or "")
        except ValueError as error:
            raise UrlRefused(f"{name}: not a URL: {error}") from None
        if parts.scheme != "https":
            raise UrlRefused(f"{name}: only https:// is allowed")
        if "@" in parts.netloc:
            raise UrlRefused(f"{name}: a URL with a user name or a password is not allowed")
        if not any(_matches(host, port, *one) for one in self._allowed):
            raise UrlRefused(f"{name}: the host is not in the list of allowed hosts ({self._list_allowed()})")
        return parts, host, port

    def _list_allowed(self) -> str:
        hosts = (host if port == _HTTPS_PORT else f"{host}:{port}" for host, port in self._allowed)
        return ", ".join(hosts) or "it is empty"

    def _choose_address(self, host: str, port: int, deadline: float, name: str) -> str:
        """Resolve a host once and return its first address, if all addresses are public."""
        try:
            addresses = call_within(lambda: self._resolve(host, port), _left(deadline, name))
        except TimeoutError:
            raise _too_slow(name) from None
        except (OSError, UnicodeError) as error:
            raise UrlFailed(f"{name}: the host cannot be resolved: {to_one_line(error)}") from None
        if not addresses:
            raise UrlFailed(f"{name}: the host has no address")
        for address in addresses:
            if not is_public_address(address):
                raise UrlRefused(f"{name}: the host has a private or reserved address")
        return addresses[0]

    def _exchange(
        self,
        connection: ssl.SSLSocket,
        parts: SplitResult,
        deadline: float,
        name: str,
        on_bytes: Callable[[int], None],
    ) -> bytes | _Redirect:
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (
            f"?{quote(parts.query, safe='/%:@!$&()*+,;=~-._?')}" if parts.query else ""
        )
        host = parts.netloc.encode("idna").decode() if not parts.netloc.isascii() else parts.netloc
        connection.settimeout(_left(deadline, name))
        connection.sendall(
            f"GET {target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: fovea\r\nAccept: image/*, */*;q=0.1\r\n"
            "Accept-Encoding: identity\r\nConnection: close\r\n\r\n".encode("ascii")
        )
        response = http.client.HTTPResponse(_DeadlineSocket(connection, deadline))  # type: ignore[arg-type]
        response.begin()
        if response.status in _REDIRECTS and (location := response.getheader("Location")):
            return _Redirect(location)
        if response.status != http.HTTPStatus.OK:
            raise UrlFailed(f"{name}: the host answered {response.status}")
        if (encoding := response.getheader("Content-Encoding", "identity").lower()) != "identity":
            raise UrlFailed(f"{name}: the host answered with the encoding {encoding!r}")
        declared = response.length
        self._check_size(declared or 0, name)
        content = bytearray()
        while chunk := response.read1(_CHUNK_BYTES):
            self._check_size(len(content) + len(chunk), name)
            on_bytes(len(chunk))
            content += chunk
        if declared is not None and len(content) != declared:
            raise UrlFailed(f"{name}: the host sent {len(content)} of {declared} bytes")
        return bytes(content)

    def _check_size(self, size: int, name: str) -> None:
        if size > self._limits.max_bytes:
            limits = self._limits
            raise BodyTooLarge(f"{name} has more than {limits.max_bytes} bytes ({limits.bytes_setting})")


class _Redirect(NamedTuple):
    location: str


class _DeadlineSocket:
    """The part of a socket that `HTTPResponse` uses. Every read ends at the deadline, of headers too."""

    def __init__(self, connection: ssl.SSLSocket, deadline: float) -> None:
        self._reader = _DeadlineReader(connection, deadline)

    def makefile(self, _: str) -> io.BufferedReader:
        """Return a stream of the bytes that arrive."""
        return io.BufferedReader(self._reader, _CHUNK_BYTES)


class _DeadlineReader(io.RawIOBase):
    def __init__(self, connection: ssl.SSLSocket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self._connection.settimeout(seconds)
        return self._connection.recv_into(buffer)


def is_public_address(text: str) -> bool:
    """Return True if an address belongs to the public internet, and to no host, network or cloud of ours."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public_address(str(address.ipv4_mapped))
        # Tunnels lead to an address of IPv4 that the text does not show.
        if address.sixtofour is not None or address.teredo is not None:
            return False
        if any(address in network for network in _EMBEDDING_NETWORKS):
            return False
        if address.is_site_local:  # RFC 3879
            return False
    return (
        address.is_global
        and not any(address in one for one in _SPECIAL_NETWORKS if one.version == address.version)
        and not address.is_multicast
        and not address.is_reserved
        and address not in _PLATFORM_ADDRESSES
    )


def resolve_host(host: str, port: int) -> list[str]:
    """Return the addresses of a host from the system's resolver. Raises `OSError`."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(one[4][0]) for one in found))


def _connect(address: tuple[str, int], seconds: float) -> socket.socket:
    return socket.create_connection(address, timeout=seconds)


def check_allowed_host(text: str) -> None:
    """Raise `UrlRefused` if an entry cannot be in the list of allowed hosts."""
    _split_allowed(text)


def _split_allowed(text: str) -> tuple[str, int]:
    """Split an entry of the list of allowed hosts into host and port. Raises `UrlRefused`."""
    host, colon, port = text.strip().rpartition(":")
    if not colon or not port.isdecimal():
        host, port = text.strip(), str(_HTTPS_PORT)
    wildcard = "*." if host.startswith("*.") else ""
    try:
        return wildcard + _normalise_host(host.removeprefix("*.")), int(port)
    except ValueError as error:
        raise UrlRefused(f"{text!r} is not an allowed host: {error}; write photos.example.com") from None


def _normalise_host(host: str) -> str:
    """Return a host name in lower case, in ASCII and without a dot at its end. Raises `ValueError`."""
    if not host.isascii():
        host = host.encode("idna").decode()
    host = host.lower().removesuffix(".").removeprefix("[").removesuffix("]")
    if ":" in host:
        return str(ipaddress.IPv6Address(host))
    if not _HOST.fullmatch(host):
        raise ValueError(f"{host!r} is not a host name")
    return host


def _matches(host: str, port: int, allowed: str, allowed_port: int) -> bool:
    if port != allowed_port:
        return False
    return host.endswith(allowed[1:]) if allowed.startswith("*.") else host == allowed


def _left(deadline: float, name: str) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise _too_slow(name)
    return seconds


def _too_slow(name: str) -> UrlTooSlow:
    return UrlTooSlow(f"{name}: the host did not answer in time")


def _shorten(url: str) -> str:
    """Return a URL for messages: without query, which may hold a signature, and without credentials."""
    shown = re.sub(r"//[^/]*@", "//***@", url.partition("?")[0].partition("#")[0])
    return repr(shown if len(shown) <= 200 else f"{shown[:200]}…")[1:-1]

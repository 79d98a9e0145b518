"""Protection of requests that change something against cross-site requests.

A page of another site can make a browser send any request that an HTML form can send (a *simple* request).
With DNS rebinding it can also pass as a page of this service, under a host name of its own that suddenly
resolves to this service. Browsers mark such requests by `Origin` and `Sec-Fetch-Site` (W3C Fetch Metadata),
which no page can forge. Other clients send neither header.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from fastapi import Request

from fovea.service.api.bodies import parse_media_type
from fovea.service.errors import Forbidden
from fovea.service.http.request_context import get_request_origin

_SIMPLE_TYPES: Final = (b"text/plain", b"multipart/form-data")
"""Content types of simple requests that no legitimate client sends. The third such type,
`application/x-www-form-urlencoded`, is the default of `curl -d`."""

_FORM_TYPE: Final = b"application/x-www-form-urlencoded"

_OWN_SITES: Final = ("same-origin", "none")
"""Accepted values of `Sec-Fetch-Site`; `none` is a typed address or a bookmark."""

_PRIVATE_SUFFIXES: Final = (".localhost", ".local", ".internal", ".svc", ".home.arpa")
"""Suffixes that nobody can register in the public DNS: RFC 6761, 6762 and 8375, ICANN's `.internal`, and
Kubernetes' services."""

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}

_MAX_QUOTE_LENGTH: Final = 100
"""Maximum number of characters of a header that a message quotes."""


class _Host(NamedTuple):
    name: str
    """Lower-case name; empty if the header is malformed."""
    port: int | None


def require_same_site(request: Request, hosts: Sequence[str]) -> None:
    """Raise `Forbidden` unless a request comes from a page of this service or from no browser.

    `hosts` are the configured names of the service (`FOVEA_MANAGEMENT_HOSTS`).
    """
    headers = request.headers
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    is_browser = origin is not None or any(name.startswith("sec-fetch-") for name in headers)
    content_type = parse_media_type(headers.get("content-type", "").encode("latin-1"))
    if content_type in _SIMPLE_TYPES or (is_browser and content_type == _FORM_TYPE):
        raise Forbidden(
            f"the content type is {content_type.decode('latin-1')!r}, which a page of another site can send; "
            "use application/json"
        )
    if site is not None and site not in _OWN_SITES:
        raise Forbidden(
            f"the request comes from a page of another site (Sec-Fetch-Site: {site[:_MAX_QUOTE_LENGTH]})"
        )
    host_header = get_request_origin(request.scope).host or headers.get("host", "")
    host = _parse_host(host_header)
    quoted_host = repr(host_header[:_MAX_QUOTE_LENGTH])
    quoted_origin = repr((origin or "")[:_MAX_QUOTE_LENGTH])
    if origin is not None and not _is_same_site(origin, host, hosts):
        raise Forbidden(
            f"the request comes from the page {quoted_origin}, and the service is {quoted_host}; "
            "behind a proxy that changes the host, set FOVEA_TRUSTED_PROXIES or FOVEA_MANAGEMENT_HOSTS"
        )
    if (is_browser or hosts) and not (_is_private_host(host.name) or _is_configured_host(host.name, hosts)):
        raise Forbidden(
            f"the host {quoted_host} is not known to be this service; "
            "if it is, add it to FOVEA_MANAGEMENT_HOSTS"
        )


def _is_same_site(origin: str, host: _Host, hosts: Sequence[str]) -> bool:
    """Return True if an `Origin` belongs to this service: the requested address, or a configured name."""
    scheme, _, rest = origin.partition("://")
    other = _parse_host(rest)
    if scheme not in _DEFAULT_PORTS or not other.name:  # such as `null`, or the origin of an extension
        return False
    default = _DEFAULT_PORTS[scheme]
    is_same = other.name == host.name and (other.port or default) == (host.port or default)
    return is_same or _is_configured_host(other.name, hosts)


def _is_private_host(name: str) -> bool:
    """Return True if a stranger cannot have registered a host name.

    Then DNS rebinding cannot have led the browser here.
    """
    if not name:
        return False
    if "." not in name or name.endswith(_PRIVATE_SUFFIXES) or name == socket.gethostname().lower():
        return True
    return _is_ip_address(name)


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_configured_host(name: str, hosts: Sequence[str]) -> bool:
    """Return True if a name is listed; `*.example.com` matches every name below it."""
    return any(name == one or (one.startswith("*.") and name.endswith(one[1:])) for one in hosts)


def _parse_host(text: str) -> _Host:
    """Parse a `Host` header, or the part of an `Origin` after the scheme."""
    try:
        parts = urlsplit(f"//{text}")
        port = parts.port
    except ValueError:
        return _Host("", None)
    is_plain = text == parts.netloc and "@" not in text
    return _Host((parts.hostname or "").removesuffix(".") if is_plain else "", port)

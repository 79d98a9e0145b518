"""Values of headers and queries: forwarding headers, options, trace ids, content types."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from math import inf as INFINITY
from typing import Final

from starlette.datastructures import QueryParams

from fovea.service.api.bodies import parse_media_type
from fovea.service.api.options import parse_query, refuse_native_options
from fovea.service.api.request_schemas import ClassifyOptions
from fovea.service.api.services import parse_time_limit
from fovea.service.errors import RequestError
from fovea.service.http.access_log import parse_trace_id
from fovea.service.http.proxies import TrustedProxies
from fovea.service.settings import Settings
from tests.fuzz.target import Target, require

_SETTINGS: Final = Settings()

_PROXIES: Final = TrustedProxies(["10.0.0.0/8", "::1"])


def _check_forwarding(value: bytes) -> None:
    """Check the address and the links that a trusted proxy may set."""
    names = (b"x-forwarded-for", b"x-forwarded-prefix", b"x-forwarded-proto", b"x-forwarded-host")
    lines = value.split(b"\n", len(names) - 1)
    headers = list(zip(names, lines, strict=False))
    origin = _PROXIES.resolve_origin("10.1.2.3", headers)
    ipaddress.ip_address(origin.client)
    require(origin.scheme in ("", "http", "https"), f"the scheme is {origin.scheme!r}")
    require(not re.search(r"[\s<>\"'\\@?#]|^//", origin.prefix), f"the prefix is {origin.prefix!r}")
    require(not re.search(r"[\s<>\"'\\/@?#]", origin.host), f"the host is {origin.host!r}")
    stranger = _PROXIES.resolve_origin("192.0.2.1", headers)
    require(stranger == ("192.0.2.1", "192.0.2.1", "", "", ""), "a stranger's headers were read")


def _check_query(value: bytes) -> None:
    options = parse_query(ClassifyOptions, value)
    require(options.top_k is None or options.top_k >= 0, f"top_k is {options.top_k}")
    require(options.threshold is None or 0 <= options.threshold <= 1, f"threshold is {options.threshold}")


def _check_time_limit(value: bytes) -> None:
    seconds = parse_time_limit({b"x-deadline-ms": value}, _SETTINGS)
    require(seconds is not None and 0 < seconds < INFINITY, f"the time limit is {seconds}")


def _check_trace_id(value: bytes) -> None:
    trace_id = parse_trace_id(value)
    require(not trace_id or bool(re.fullmatch("[0-9a-f]{32}", trace_id)), f"the trace id is {trace_id!r}")


_CHECKS: Final[dict[bytes, Callable[[bytes], object]]] = {
    b"forwarding": _check_forwarding,
    b"media-type": parse_media_type,
    b"other-query": lambda value: refuse_native_options(QueryParams(value)),
    b"query": _check_query,
    b"time-limit": _check_time_limit,
    b"trace": _check_trace_id,
}
"""Checks by the word in the first line of an input."""


def check_value(data: bytes) -> bool:
    """Check a value; the first line of the input names the check."""
    name, _, value = data.partition(b"\n")
    if (check := _CHECKS.get(name)) is None:
        return False
    try:
        check(value)
    except RequestError as error:
        str(error).encode()
        return False
    return True


def _make_seeds() -> list[bytes]:
    return [
        b"forwarding\n203.0.113.7, 10.0.0.2\n/vision\nhttps\nexample.com:8443",
        b"forwarding\n[2001:db8::1]:99, ::ffff:10.0.0.9, 1.2.3.4:5\n/a/b/\nHTTP\n[::1]:80",
        b"media-type\nApplication/vnd.api+json; charset=utf-8",
        b"other-query\ntop=3&x=%C3%A9",
        b"query\ntop_k=3&threshold=0.5&coverage=0.9&embedding=true&boxes=%5B%5B0,0,1,1%5D%5D",
        b"time-limit\n1500.5",
        b"trace\n00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    ]


TARGET = Target(
    check_value,
    _make_seeds,
    words=(
        *(name + b"\n" for name in _CHECKS), b"top_k=", b"threshold=", b"boxes=", b"coverage=", b"&", b"%00",
        b"%FF", b"nan", b"inf", b"1e400", b"-0", b"unknown", b"::", b"fe80::1%eth0", b"//", b"/../", b"\xff",
        b"1_0", b"true",
    ),
    max_size=400,
)  # fmt: skip

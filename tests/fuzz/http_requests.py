"""HTTP/1.1: whatever arrives on a connection is a request or an error, wherever the stream is cut.

Two parsers that disagree about the end of a request let a caller hide a second one in it (request smuggling).
Here the same bytes are parsed whole, in pieces, byte by byte, and with heads that are known from before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from fovea.service.errors import RequestError
from fovea.service.http.known_heads import KnownHeads, RequestHead
from fovea.service.http.request_parser import RequestParser
from tests.fuzz.target import Target, require

_CUTS: Final = 4
"""Number of bytes before the stream that say where it is cut."""

_VALID_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
"""Name of a header (RFC 9110, section 5.6.2)."""

Parsed = tuple[list[tuple[RequestHead, bytes]], str]
"""The requests of a stream, and the type of the error at its end, if any."""


def parse_pieces(pieces: Sequence[bytes], known_heads: KnownHeads) -> Parsed:
    """Parse a stream as a connection does."""
    parser, body = RequestParser(known_heads), b""
    requests: list[tuple[RequestHead, bytes]] = []
    try:
        for piece in pieces:
            start = 0
            while start < len(piece):
                stop = parser.feed(piece, memoryview(piece), start, len(piece))
                require(stop > start, "the parser does not move on")
                start = stop
                body += parser.take_body()
                if parser.is_complete and parser.head:
                    requests.append((parser.head, body))
                    body = b""
                    parser.start_next()
    except RequestError as error:
        str(error).encode()
        return requests, type(error).__name__
    finally:
        parser.close()
    return requests, ""


def check_stream(data: bytes) -> bool:
    """Check that all ways to read a stream agree, and that no header can end a line."""
    cuts, stream = data[:_CUTS], data[_CUTS:]
    expected = parse_pieces([stream], KnownHeads())
    positions = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    pieces = [stream[start:end] for start, end in pairwise(positions)]
    require(parse_pieces(pieces, KnownHeads()) == expected, "other cuts give other requests")
    if len(stream) < 300:
        single_bytes = [stream[index : index + 1] for index in range(len(stream))]
        require(parse_pieces(single_bytes, KnownHeads()) == expected, "single bytes give other requests")
    known_heads = KnownHeads()
    for _ in range(2):
        require(parse_pieces([stream], known_heads) == expected, "known heads give other requests")
    for head, body in expected[0]:
        _check_head(head, body)
    return not expected[1] and bool(expected[0])


def _check_head(head: RequestHead, body: bytes) -> None:
    require(not (head.is_chunked and head.content_length), "a body has two lengths")
    require(head.is_chunked or len(body) == head.content_length, "a body has another length than its header")
    require(not re.search(rb"[\x00-\x20\x7f]", head.url), "the target has a blank or a control character")
    for name, value in head.headers:
        require(bool(_VALID_NAME.fullmatch(name)), f"the name of a header is {name!r}")
        require(not re.search(rb"[\r\n\x00]", value), f"the value of a header is {value!r}")
    names = [name for name, _ in head.headers]
    require(names.count(b"host") <= 1, "a request has two hosts")
    require(names.count(b"content-length") <= 1, "a request has two lengths")


def _make_seeds() -> list[bytes]:
    head = b"POST /v1/classify?top_k=3 HTTP/1.1\r\nHost: x\r\n"
    upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    chunks = b"Transfer-Encoding: chunked\r\n\r\n2;a=b\r\nab\r\n1\r\nc\r\n0\r\nA: b\r\n\r\n"
    streams = (
        b"GET /health/ready HTTP/1.1\r\nHost: [::1]:8000\r\nX-Request-Id: 1\r\n\r\n",
        b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /b HTTP/1.0\r\n\r\n",
        head + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\nabc" + head + b"Content-Length: 0\r\n\r\n",
        head + chunks + head + b"Connection: close\r\nContent-Length: 1\r\n\r\nx",
        head + upgrade + chunks,
        b"\r\n\r\n" + head + upgrade + b"Content-Length: 2\r\n\r\n\r\n",
    )
    return [bytes((9, 60, 70, 90)) + stream for stream in streams]


TARGET = Target(
    check_stream,
    _make_seeds,
    words=(
        b"\r\n", b"\r\n\r\n", b"\n", b"\r", b" ", b"\t", b":", b";", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0",
        b"GET ", b"POST ", b"HEAD ", b"OPTIONS ", b"CONNECT ", b"PRI ", b"Host: ", b"Content-Length: ",
        b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: identity\r\n", b"Connection: close\r\n", b"Connection: Upgrade\r\n",
        b"Upgrade: websocket\r\n", b"Expect: 100-continue\r\n", b"0\r\n\r\n", b"ffffffffffffffff\r\n",
        b"+5", b"0x5", b"5, 5", b"\x00", b"\x0b", b"\xff",
    ),
    max_size=1200,
)  # fmt: skip

"""The parser stops at the end of every request, however its bytes arrive."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fovea.service.errors import BadHttp, HeaderTooLarge, RequestError
from fovea.service.http.known_heads import KnownHeads, RequestHead
from fovea.service.http.request_parser import MAX_HEADER_BYTES, RequestParser


class ParsedRequest(NamedTuple):
    """Head and body of a request."""

    head: RequestHead
    body: bytes


def parse_stream(pieces: list[bytes], known_heads: KnownHeads | None = None) -> list[ParsedRequest]:
    """Return the requests in a stream that arrives in these pieces."""
    parser, requests, body = RequestParser(known_heads or KnownHeads()), [], b""
    for piece in pieces:
        start = 0
        while start < len(piece):
            start = parser.feed(piece, memoryview(piece), start, len(piece))
            body += parser.take_body()
            if parser.is_complete and parser.head:
                requests.append(ParsedRequest(parser.head, body))
                body = b""
                parser.start_next()
    return requests


def chunk(content: bytes, size: int, trailers: bytes = b"") -> bytes:
    chunks = [content[start : start + size] for start in range(0, len(content), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in chunks) + b"0\r\n" + trailers + b"\r\n"


BODY = b"\r\n\r\nGET / HTTP/1.1\r\n\r\n0\r\n\r\n" + bytes(range(256))
HEAD = b"POST /v1/classify?top_k=3 HTTP/1.1\r\nHost: x\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
REQUESTS = [
    b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n",
    HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
    HEAD + b"Content-Length: 0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(BODY, 7),
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(BODY, 300, b"A: b\r\nHost: y\r\n"),
    HEAD + UPGRADE + b"Content-Length: 3\r\n\r\nabc",
    HEAD + UPGRADE + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(BODY, 30),
    b"\r\n\r\n\r\nGET /b HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
]
EXPECTED_BODIES = [b"", BODY, b"", BODY, BODY, b"abc", BODY, b""]


def cut_stream(stream: bytes, cuts: list[int]) -> list[bytes]:
    positions = [0, *sorted({cut % len(stream) for cut in cuts}), len(stream)]
    return [stream[start:end] for start, end in pairwise(positions) if start < end]


def test_whole_stream_gives_every_request() -> None:
    requests = parse_stream([b"".join(REQUESTS)])
    assert [one.body for one in requests] == EXPECTED_BODIES
    assert [one.head.method for one in requests] == [b"GET", *[b"POST"] * 6, b"GET"]
    assert all(
        b"host" not in dict(one.head.headers) or dict(one.head.headers)[b"host"] == b"x" for one in requests
    )


def test_single_bytes_give_the_same_requests() -> None:
    stream = b"".join(REQUESTS)
    assert parse_stream([bytes([one]) for one in stream]) == parse_stream([stream])


@given(order=st.permutations(range(len(REQUESTS))), cuts=st.lists(st.integers(0, 1 << 20), max_size=12))
@settings(max_examples=300)
def test_any_order_and_segmentation_gives_the_same_requests(order: list[int], cuts: list[int]) -> None:
    stream = b"".join(REQUESTS[index] for index in order)
    requests = parse_stream(cut_stream(stream, cuts))
    assert requests == [parse_stream([REQUESTS[index]])[0] for index in order]


@given(
    index=st.integers(0, len(REQUESTS) - 1),
    changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 1 << 20), max_size=6),
)
@settings(max_examples=600)
def test_changed_bytes_are_refused_or_parsed_alike_in_any_segmentation(
    index: int, changes: list[tuple[int, int]], cuts: list[int]
) -> None:
    """A proxy before the service may cut the stream elsewhere: both must see the same requests."""
    stream = bytearray(REQUESTS[index])
    for position, byte in changes:
        stream[position % len(stream)] = byte
    stream += REQUESTS[0]

    def parse(pieces: list[bytes], known_heads: KnownHeads) -> list[ParsedRequest] | type[RequestError]:
        try:
            return parse_stream(pieces, known_heads)
        except RequestError as error:
            return type(error)

    expected = parse([bytes(stream)], KnownHeads())
    assert parse(cut_stream(bytes(stream), cuts), KnownHeads()) == expected
    known_heads = KnownHeads()
    parse_stream(REQUESTS, known_heads)
    for _ in range(2):  # the second time, the changed head is known too if it is valid
        assert parse([bytes(stream)], known_heads) == expected


def test_head_is_known_whatever_its_content_length() -> None:
    known_heads = KnownHeads()
    head = b"POST /a HTTP/1.1\r\nHost: x\r\ncontent-LENGTH:%d\r\nExpect: 100-continue\r\n\r\n"
    for length in (3, 0, 12):
        content = head % length
        assert (known_heads.find(content) is None) == (length == 3)
        (request,) = parse_stream([content + b"x" * length], known_heads)
        assert known_heads.find(content) == request.head
        assert request == parse_stream([content + b"x" * length])[0]
        request.head.headers.clear()  # each request has headers of its own
    known_head = known_heads.find(head % 7)
    assert known_head and known_head.content_length == 7 and dict(known_head.headers)[b"host"] == b"x"


def test_rest_of_a_head_is_not_a_known_head() -> None:
    """A client that cuts a head in the middle could otherwise begin another request there."""
    known_heads = KnownHeads()
    whole_head = HEAD + b"Content-Length: 3\r\n\r\n"
    parse_stream([whole_head + b"abc"], known_heads)
    with pytest.raises(BadHttp):  # a header without a colon
        parse_stream([b"GET / HTTP/1.1\r\nHost: x\r\n", whole_head + b"abc"], known_heads)
    (request,) = parse_stream([b"GET / HTTP/1.1\r\nHost: x\r\nA: ", whole_head.replace(b"Host: x\r\n", b"")
                              + b"abc"], known_heads)  # fmt: skip
    assert request.head.method == b"GET" and dict(request.head.headers)[b"a"].startswith(b"POST")


@pytest.mark.parametrize(
    "content",
    [
        HEAD + b"Content-Length: 3\r\nTraceparent: 00-1\r\n\r\nabc",
        HEAD + b"Content-Length: 3\r\nA: " + b"x" * 1024 + b"\r\n\r\nabc",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_head_that_will_not_come_again_is_not_kept(content: bytes) -> None:
    known_heads = KnownHeads()
    parse_stream([content], known_heads)
    assert known_heads.find(content[: content.index(b"\r\n\r\n") + 4]) is None


def test_number_of_known_heads_is_limited() -> None:
    known_heads = KnownHeads()
    for number in range(2000):
        parse_stream([b"POST /%d HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx" % number], known_heads)
    known_count = sum(
        known_heads.find(b"POST /%d HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n" % number) is not None
        for number in range(2000)
    )
    assert 0 < known_count <= 512


@pytest.mark.parametrize(
    "stream",
    [
        b"GET / HTTP/1.1\r\nA: " + b"x" * MAX_HEADER_BYTES,
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * MAX_HEADER_BYTES,
        b"\r\n" * MAX_HEADER_BYTES,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * MAX_HEADER_BYTES,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * MAX_HEADER_BYTES,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nA: " + b"x" * MAX_HEADER_BYTES,
    ],
)
def test_head_and_trailers_have_a_size_limit(stream: bytes) -> None:
    for pieces in ([stream], cut_stream(stream, list(range(0, len(stream), 1000)))):
        with pytest.raises(HeaderTooLarge):
            parse_stream(pieces)


def test_head_with_an_upgrade_offer_is_checked() -> None:
    with pytest.raises(BadHttp, match="0 Host headers"):
        parse_stream([b"GET / HTTP/1.1\r\n" + UPGRADE + b"\r\n"])


def test_connect_is_refused() -> None:
    with pytest.raises(BadHttp, match="no proxy"):
        parse_stream([b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n"])

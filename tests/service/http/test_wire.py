"""HTTP/1.1 according to RFC 9110 and RFC 9112: answers, refusals, and ends of connections."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pictures import make_jpeg
from tests.raw import CLASSIFY_HEAD, LIVE_REQUEST, Wire, classify_request
from tests.servers import Server

IMAGE = make_jpeg()
LAST = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
"""The last request of a connection that is still open."""

CHUNKED = CLASSIFY_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = b"%x\r\n" % len(IMAGE) + IMAGE + b"\r\n0\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


@pytest.fixture(scope="module")
def wire_server(small_zoo: Path) -> Iterator[Server]:
    """A server that answers every request of this module without an internal error."""
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_BODY_BYTES="1000000") as server:
        yield server
    assert "Traceback" not in server.log


def send_and_read(server: Server, content: bytes, *, half_close: bool = False) -> bytes:
    """Return all that the server answers until it closes the connection."""
    with Wire(server.url) as wire:
        wire.send(content)
        if half_close:
            wire.socket.shutdown(socket.SHUT_WR)
        reply = b""
        try:
            while piece := wire.socket.recv(1 << 16):
                reply += piece
        except ConnectionResetError:  # after the answer, if the server has not read everything
            pass
        return reply


def read_statuses(reply: bytes) -> list[int]:
    return [int(status) for status in _STATUS.findall(reply)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # --- framing: RFC 9112, sections 6 and 7 ---
        (CLASSIFY_HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + LAST, [400]),
        (CLASSIFY_HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + LAST, [400]),
        (CLASSIFY_HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc" + LAST, [400]),
        (CLASSIFY_HEAD + b"Content-Length: 3, 4\r\n\r\nabc" + LAST, [400]),
        (CLASSIFY_HEAD + b"Content-Length: +3\r\n\r\nabc" + LAST, [400]),
        (CLASSIFY_HEAD + b"Content-Length: -3\r\n\r\nabc" + LAST, [400]),
        (CLASSIFY_HEAD + b"Content-Length: 0x3\r\n\r\nabc" + LAST, [400]),
        (CLASSIFY_HEAD + b"Content-Length: \t3 \t\r\n\r\nabc" + LAST, [415, 200]),
        (CLASSIFY_HEAD + b"Content-Length : 3\r\n\r\nabc" + LAST, [400]),
        (CLASSIFY_HEAD + b"Content-Length: 99999999999999999999999\r\n\r\nabc" + LAST, [400]),
        (CLASSIFY_HEAD + b"Content-Length: 18446744073709551615\r\n\r\nabc", [413]),
        (CLASSIFY_HEAD + b"Transfer-Encoding: identity\r\n\r\n" + LAST, [400]),
        (CLASSIFY_HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + LAST, [400]),
        (CLASSIFY_HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + LAST, [400]),
        (CLASSIFY_HEAD + b"Transfer-Encoding: deflate\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [400]),
        (CLASSIFY_HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + LAST, [400]),
        (CLASSIFY_HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n" + LAST, [400]),
        (CLASSIFY_HEAD + b"Transfer-Encoding: CHUNKED\r\n\r\n" + WHOLE + b"\r\n" + LAST, [200, 200]),
        (b"POST /v1/classify HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", [400]),
        (CHUNKED + b'3;a=b;c="d"\r\nabc\r\n0\r\n\r\n' + LAST, [415, 200]),
        (CHUNKED + b"3;a\nabc\r\n0\r\n\r\n" + LAST, [400]),
        (CHUNKED + b"3\nabc\n0\n\n" + LAST, [400]),
        (CHUNKED + b"3\r\nabcXX0\r\n\r\n" + LAST, [400]),
        (CHUNKED + b"3 \r\nabc\r\n0\r\n\r\n" + LAST, [400]),
        (CHUNKED + b"-1\r\nabc\r\n0\r\n\r\n" + LAST, [400]),
        (CHUNKED + b"10000000000000003\r\nabc\r\n0\r\n\r\n" + LAST, [400]),
        # --- lines: RFC 9112, sections 2 and 5 ---
        (CLASSIFY_HEAD + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n" + LAST, [400]),
        (CLASSIFY_HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + LAST, [400]),
        (b"GET /health/live HTTP/1.1\nHost: x\n\n", [400]),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\n\n", [400]),
        (b"GET /health/live HTTP/1.1\r\nHost: x\rX: y\r\n\r\n", [400]),
        (b"GET /health/live HTTP/1.1\r\nHost: x\0y\r\n\r\n", [400]),
        (b"\r\n\r\n\r\n" + LAST, [200]),
        (b"GET /health/live HTTP/1.1\r\nhOST: x\r\ncONNECTION: cLOSE\r\n\r\n", [200]),
        (b"get /health/live HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
        # --- versions: RFC 9110, section 2.5 ---
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
        (b"GET /health/live HTTP/2.0\r\nHost: x\r\n\r\n", [400]),
        (b"GET /health/live HTTP/0.9\r\nHost: x\r\n\r\n", [400]),
        (b"GET /health/live\r\n\r\n", [400]),
        # --- CONNECT, Upgrade: RFC 9110, sections 9.3.6 and 7.8 ---
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n" + LAST, [400]),
        (b"CONNECT /health/live HTTP/1.1\r\nHost: a\r\n\r\n" + LAST, [400]),
        (b"CONNECT http://a/health/live HTTP/1.1\r\nHost: a\r\n\r\n" + LAST, [400]),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc" + LAST, [400]),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n" + UPGRADE + b"\r\n" + LAST, [400]),
        (b"GET /health/live HTTP/1.1\r\nHost: a\r\n" + UPGRADE + b"\r\nCONNECT / HTTP/1.1\r\nHost: a\r\n\r\n",
         [200, 400]),
        (CLASSIFY_HEAD + UPGRADE + b"Content-Length: 3\r\n\r\nabc" + LAST, [415, 200]),
        (CLASSIFY_HEAD + UPGRADE + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + LAST,
         [415, 200]),
        # --- targets and Host: RFC 9112, section 3.2 ---
        (b"GET http://other/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", [200]),
        (b"GET http://other:80 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", [200]),
        (b"GET http://other?a=b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", [200]),
        (b"GET http://[::1]:80/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", [200]),
        (b"POST http://other HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + LAST, [415, 200]),
        (b"POST http://x/v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + LAST, [415, 200]),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n" + LAST, [200, 200]),
        (b"GET * HTTP/1.1\r\nHost: x\r\n\r\n" + LAST, [400]),
        (b"GET other:80 HTTP/1.1\r\nHost: x\r\n\r\n" + LAST, [400]),
        (b"GET /health/live HTTP/1.1\r\n\r\n" + LAST, [400]),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n" + LAST, [400]),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\nHOST: y\r\n\r\n" + LAST, [400]),
        (b"GET /health/live HTTP/1.1\r\nHost: a b\r\n\r\n" + LAST, [400]),
        (b"GET /health/live HTTP/1.1\r\nHost: a/b\r\n\r\n" + LAST, [400]),
        (b"GET /health/live HTTP/1.1\r\nHost: x:y\r\n\r\n" + LAST, [400]),
        (b"GET /health/live HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n", [200]),
        (b"GET /health/live HTTP/1.1\r\nHost: [fe80::1]:8000\r\nConnection: close\r\n\r\n", [200]),
        (b"GET /health/live HTTP/1.1\r\nHost: a_b.example:80\r\nConnection: close\r\n\r\n", [200]),
        (b"POST /v1/classify HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(IMAGE) + IMAGE, [400]),
        (LIVE_REQUEST + b"GET /health/live HTTP/1.1\r\n\r\n" + LAST, [200, 400]),
        (b"GET /health/live HTTP/1.0\r\n\r\n", [200]),
        (b"GET /health/live HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", [400]),
        # --- methods and bodies ---
        (b"PURGE /health/live HTTP/1.1\r\nHost: x\r\n\r\n" + LAST, [405, 200]),
        (b"OPTIONS /v1/classify HTTP/1.1\r\nHost: x\r\n\r\n" + LAST, [405, 200]),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + LAST, [200, 200]),
        (b"HEAD /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + LAST, [200, 200]),
        (3 * classify_request(IMAGE) + LAST, [200, 200, 200, 200]),
        (classify_request(IMAGE, b"Connection: close") + LAST, [200]),
        # --- Expect: RFC 9110, section 10.1.1 ---
        (classify_request(IMAGE, b"Expect: 100-continue") + LAST, [100, 200, 200]),
        (CLASSIFY_HEAD + b"Expect: 100-Continue\r\nTransfer-Encoding: chunked\r\n\r\n" + WHOLE
         + b"\r\n" + LAST, [100, 200, 200]),
        (CLASSIFY_HEAD + b"Expect: 100-continue\r\nContent-Length: 999999999\r\n\r\n", [413]),
        (b"POST /nowhere HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc" + LAST,
         [404, 200]),
        (b"POST /v1/models/none/classify HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
         b"Content-Length: 3\r\n\r\nabc" + LAST, [404, 200]),
        (b"POST /v1/classify HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc", [415]),
        (CLASSIFY_HEAD + b"Expect: 200-ok\r\nContent-Length: 3\r\n\r\nabc" + LAST, [415, 200]),
        # --- trailers: RFC 9110, section 6.5 ---
        (CHUNKED + WHOLE + b"Content-Type: application/json\r\n\r\n" + LAST, [200, 200]),
        (CHUNKED + WHOLE + b"X-Deadline-Ms: nonsense\r\nHost: y\r\n\r\n" + LAST, [200, 200]),
        (CHUNKED + WHOLE + b"Content-Length: 3\r\nTransfer-Encoding: x\r\n\r\n" + LAST, [400]),
    ],
)  # fmt: skip
def test_request_is_answered_according_to_the_rfcs(
    wire_server: Server, content: bytes, expected: list[int]
) -> None:
    assert read_statuses(send_and_read(wire_server, content)) == expected


def test_trailers_affect_no_request(wire_server: Server) -> None:
    trailers = b"X-Request-Id: from-a-trailer\r\nContent-Encoding: gzip\r\n\r\n"
    reply = send_and_read(wire_server, CHUNKED + WHOLE + trailers + CHUNKED + WHOLE + b"\r\n" + LAST)
    assert read_statuses(reply) == [200, 200, 200]
    assert b"from-a-trailer" not in reply


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (classify_request(IMAGE), [200]),
        (CHUNKED + WHOLE + b"\r\n", [200]),
        (LIVE_REQUEST, [200]),
        (classify_request(IMAGE) + LIVE_REQUEST + classify_request(IMAGE), [200, 200, 200]),
        (classify_request(IMAGE).replace(b"HTTP/1.1", b"HTTP/1.0"), [200]),
        (classify_request(IMAGE) + classify_request(IMAGE)[:-1], [200]),
        (classify_request(IMAGE) + LIVE_REQUEST[:9], [200]),
        (classify_request(IMAGE)[:-1], []),
        (CHUNKED + WHOLE, []),
        (LIVE_REQUEST[:9], []),
    ],
)
def test_half_closed_connection_gets_answers_to_whole_requests(
    wire_server: Server, content: bytes, expected: list[int]
) -> None:
    reply = send_and_read(wire_server, content, half_close=True)
    assert read_statuses(reply) == expected
    assert reply.count(b"HTTP/1.1") == len(expected)


@pytest.mark.long
def test_http_1_0_is_answered_without_chunks(wire_server: Server) -> None:
    """An answer of unknown length ends with the connection; one of known length need not."""
    head = b"POST /v1/explain?method=occlusion&progress=true HTTP/1.0\r\nConnection: keep-alive\r\n"
    reply = send_and_read(wire_server, head + b"Content-Length: %d\r\n\r\n" % len(IMAGE) + IMAGE)
    headers, body = reply.split(b"\r\n\r\n", 1)
    assert b"chunked" not in headers
    assert b"connection: close" in headers
    assert body.startswith(b'{"progress"')
    assert b'"result"' in body
    assert body.endswith(b"}\n")
    live_request = b"GET /health/live HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"
    classify_head = (
        b"POST /v1/classify HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: %d\r\n\r\n" % len(IMAGE)
    )
    reply = send_and_read(
        wire_server, live_request + classify_head + IMAGE + live_request.replace(b"Keep-Alive", b"close")
    )
    assert read_statuses(reply) == [200, 200, 200]
    assert reply.count(b"connection: keep-alive") == 2
    assert reply.count(b"connection: close") == 1


def test_bad_pipelined_request_is_answered_in_order(wire_server: Server) -> None:
    reply = send_and_read(
        wire_server,
        classify_request(IMAGE)
        + LIVE_REQUEST
        + classify_request(IMAGE).replace(b"Host", b"Ghost")
        + LIVE_REQUEST,
    )
    assert read_statuses(reply) == [200, 200, 400]
    assert b"0 Host headers" in reply


def test_requests_before_a_broken_body_are_answered(wire_server: Server) -> None:
    reply = send_and_read(wire_server, classify_request(IMAGE) + CHUNKED + b"3\r\nabcXX" + LIVE_REQUEST)
    assert read_statuses(reply) == [200, 400]

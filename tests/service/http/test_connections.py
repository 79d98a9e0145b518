"""Limits of connections: their requests, their time and their number."""

from __future__ import annotations

import re
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.pictures import make_jpeg
from tests.raw import CLASSIFY_HEAD, LIVE_REQUEST, Wire, classify_request
from tests.servers import Server

HASTY = {"FOVEA_HEADER_TIMEOUT": "0.3", "FOVEA_KEEP_ALIVE": "0.4", "FOVEA_BODY_TIMEOUT": "0.5"}


@pytest.fixture(scope="module")
def hasty(small_zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(small_zoo), **HASTY) as running:
        yield running


# --- slow clients --------------------------------------------------------------------------------


def test_slow_headers_get_a_408_and_the_connection_ends(hasty: Server) -> None:
    before = hasty.read_metric("fovea_errors_total", reason="header_timeout")
    with Wire(hasty.url) as wire:
        wire.send(CLASSIFY_HEAD)
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (408, "header_timeout", True)
        assert "0.3 s (FOVEA_HEADER_TIMEOUT)" in answer.json["error"]["message"]
        assert wire.is_closed()
    assert hasty.read_metric("fovea_errors_total", reason="header_timeout") == before + 1


def test_headers_that_drip_get_no_more_time(hasty: Server) -> None:
    with Wire(hasty.url) as wire:
        wire.socket.settimeout(0.05)
        for _ in range(100):
            try:
                wire.send(b"G" if not _ else b"E")
                if wire.socket.recv(1 << 16).startswith(b"HTTP/1.1 4"):
                    return
            except TimeoutError:
                continue
    pytest.fail("a client that sends a byte at a time was served for five seconds")


def test_a_further_request_gets_as_long_as_the_first(hasty: Server) -> None:
    with Wire(hasty.url) as wire:
        for _ in range(2):
            wire.send(LIVE_REQUEST)
            assert wire.read_response().status == 200
        wire.send(LIVE_REQUEST[:10])
        assert wire.read_response().error_code == "header_timeout"
        assert wire.is_closed()


def test_headers_begun_before_an_answer_have_their_time_after_it(hasty: Server) -> None:
    with Wire(hasty.url) as wire:
        wire.send(classify_request(make_jpeg()), LIVE_REQUEST[:10])
        assert wire.read_response().status == 200
        assert wire.read_response().error_code == "header_timeout"


def test_who_says_nothing_is_left_without_a_word(hasty: Server) -> None:
    with Wire(hasty.url) as wire:
        assert wire.is_closed()
    with Wire(hasty.url) as wire:
        wire.send(LIVE_REQUEST)
        assert wire.read_response().status == 200
        assert wire.is_closed()


def test_the_rest_of_a_refused_body_is_not_read_for_ever(hasty: Server) -> None:
    with Wire(hasty.url) as wire:
        wire.send(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n", b"x")
        answer = wire.read_response()
        assert (answer.status, answer.is_closing) == (404, False)
        assert wire.is_closed()


def test_a_connection_lives_on_after_a_refused_body(hasty: Server) -> None:
    with Wire(hasty.url) as wire:
        wire.send(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n", b"x")
        assert wire.read_response().status == 404
        wire.send(b"x" * 99, LIVE_REQUEST)
        assert wire.read_response().status == 200
        assert wire.is_closed()  # idle again, and for no longer than any other


def test_an_answer_survives_the_body_that_it_refuses(server: Server) -> None:
    """As nginx asks by default: `Connection: close`, and a body larger than what is taken."""
    with Wire(server.url) as wire:
        wire.send(CLASSIFY_HEAD, b"Connection: close\r\nContent-Length: 50000000\r\n\r\n")
        for _ in range(50):
            wire.send(b"x" * 100_000)
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (413, "body_too_large", True)


# --- what is not HTTP ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the first bytes of TLS
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        CLASSIFY_HEAD + b"Transfer-Encoding: chunked\r\n\r\nnot a number\r\n",
        CLASSIFY_HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"CONNECT other:443 HTTP/1.1\r\nHost: other\r\n\r\n",
    ],
)
def test_what_is_not_http_is_told_so_and_counted(server: Server, nonsense: bytes) -> None:
    before = server.read_metric("fovea_errors_total", reason="bad_http")
    with Wire(server.url) as wire:
        wire.send(nonsense)
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (400, "bad_http", True)
        assert answer.json["error"]["request_id"] == answer.headers["x-request-id"]
        assert wire.is_closed()
    assert server.read_metric("fovea_errors_total", reason="bad_http") == before + 1
    assert server.read_metric("fovea_requests_in_flight") == 1


@pytest.mark.parametrize(
    "flood",
    [
        b"GET /health/live HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 70_000 + b"\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 70_000,
        b"GET /" + b"x" * 70_000,
        b"GET /health/live HTTP/1.1\r\n" + b"Header: x\r\n" * 10_000 + b"\r\n",
        CLASSIFY_HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n" + b"Trailer: x\r\n" * 10_000,
        CLASSIFY_HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nTrailer: " + b"x" * 400_000,
        CLASSIFY_HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n1;" + b"x" * 400_000,
    ],
)
def test_headers_have_a_size(server: Server, flood: bytes) -> None:
    before = server.read_metric("fovea_errors_total", reason="header_too_large")
    with Wire(server.url) as wire:
        wire.send(flood)
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (431, "header_too_large", True)
    assert server.read_metric("fovea_errors_total", reason="header_too_large") == before + 1


def test_a_connection_has_so_many_requests_waiting(server: Server) -> None:
    before = server.read_metric("fovea_errors_total", reason="overloaded")
    with Wire(server.url) as wire:
        wire.send(LIVE_REQUEST * 1000)
        answers = [wire.read_response() for _ in range(101)]  # one is at work, and a hundred wait
        assert {answer.status for answer in answers} == {200}
        assert [answer.is_closing for answer in answers].index(True) == 100
        assert wire.is_closed()
    assert server.read_metric("fovea_errors_total", reason="overloaded") == before + 1


def test_what_came_before_nonsense_is_answered(server: Server) -> None:
    with Wire(server.url) as wire:
        wire.send(classify_request(make_jpeg()), LIVE_REQUEST, b"nonsense\r\n\r\n")
        assert "predictions" in wire.read_response().json
        assert wire.read_response().json == {"status": "live"}
        assert wire.is_closed()


@pytest.mark.parametrize("pause", [False, True])
def test_an_offer_to_upgrade_is_passed_over(server: Server, pause: bool) -> None:
    """As Java's HttpClient makes it by default; the body must not be taken for another request."""
    upgrade = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk")
    request = classify_request(make_jpeg(), *upgrade)
    head, body = request.split(b"\r\n\r\n", 1)
    with Wire(server.url) as wire:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            if pause:
                wire.send(head, b"\r\n\r\n")
                server.client.get("/health/live")
                wire.send(body)
            else:
                wire.send(request, request)
                assert wire.read_response().status == 200
            assert wire.read_response().status == 200
        wire.send(CLASSIFY_HEAD, *(line + b"\r\n" for line in upgrade), b"Transfer-Encoding: chunked\r\n\r\n")
        wire.send(b"%x\r\n" % len(body), body, b"\r\n0\r\n\r\n", LIVE_REQUEST)
        assert wire.read_response().status == 200
        assert wire.read_response().json == {"status": "live"}


# --- how many ------------------------------------------------------------------------------------


def test_further_connections_wait_for_one_to_end(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_CONNECTIONS="3") as running, ExitStack() as stack:
        first, *_ = [stack.enter_context(Wire(running.url)) for _ in range(3)]
        first.send(LIVE_REQUEST)
        assert first.read_response().status == 200
        fourth = stack.enter_context(Wire(running.url))
        fourth.send(LIVE_REQUEST)
        fourth.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            fourth.read_response()
        first.socket.close()
        fourth.socket.settimeout(30)
        assert fourth.read_response().status == 200


def _limit_files(words: str) -> dict[str, list[str]]:
    """Start the service under this `ulimit`."""
    return {"args": ["sh", "-c", f'ulimit {words}; exec "$0" -m fovea.service', sys.executable]}


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ulimit_is_minded_at_the_start(small_zoo: Path, workers: str) -> None:
    """The limit also holds while the service stops and more connections than that wait."""
    limited = Server(_limit_files("-n 150"), FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS=workers)
    with ExitStack() as stack, limited as starting:
        for _ in range(200):
            stack.enter_context(Wire(starting.url))
        assert _cpu_seconds(starting, while_waiting=0.5) < 0.2
    (said,) = re.findall(
        r"at most (\d+) connections, as `ulimit -n` is 150; .*=4096 needs (\d+)", starting.log
    )
    assert 20 < int(said[0]) < 100
    assert int(said[1]) == 4096 + 150 - int(said[0])
    assert "cannot accept" not in starting.log


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_soft_limit_of_files_is_raised_to_what_the_connections_need(
    small_zoo: Path, workers: str
) -> None:
    settings = {"FOVEA_WORKERS": workers, "FOVEA_CONNECTIONS": "300"}
    with (
        Server(_limit_files("-S -n 128"), FOVEA_MODELS=str(small_zoo), **settings) as running,
        ExitStack() as stack,
    ):
        wires = [stack.enter_context(Wire(running.url)) for _ in range(250)]
        for wire in wires:
            wire.send(LIVE_REQUEST)
        for wire in wires:
            assert wire.read_response().status == 200
    assert "at most" not in running.log


@pytest.mark.long
def test_no_file_left_is_survived(small_zoo: Path) -> None:
    """Files can also go to others than connections; then accepting one fails."""
    with Server(FOVEA_MODELS=str(small_zoo)) as running:
        pid = running.process.pid
        assert running.client.get("/health/live").status_code == 200
        with ExitStack() as stack:
            _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(
                pid, resource.RLIMIT_NOFILE, (len(list(Path(f"/proc/{pid}/fd").iterdir())) + 5, hard)
            )
            wires = [stack.enter_context(Wire(running.url)) for _ in range(40)]
            wires[-1].send(LIVE_REQUEST)
            assert running.client.get("/health/live").status_code == 200  # on its open connection
            assert _cpu_seconds(running, while_waiting=0.5) < 0.2
            for wire in wires[:-1]:
                wire.socket.close()
            assert wires[-1].read_response().status == 200
        for _ in range(10):
            assert httpx.post(f"{running.url}/v1/classify", content=make_jpeg()).status_code == 200
        assert running.read_metric("fovea_connections_starved_total") >= 1
    assert "cannot accept connections: Too many open files" in running.log


def _cpu_seconds(server: Server, *, while_waiting: float) -> float:
    """Processor time that the server takes in this time, in which nobody asks it for anything."""
    ours, other = socket.socketpair()
    with ours, other:
        ours.settimeout(while_waiting)
        before = _read_cpu_seconds(server)
        with pytest.raises(TimeoutError):
            ours.recv(1)
        return _read_cpu_seconds(server) - before


def _read_cpu_seconds(server: Server) -> float:
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_a_flood_of_requests_that_are_refused_has_a_bound(server: Server) -> None:
    """Each would be answered at once: thousands in one packet would hold all other connections up."""
    with Wire(server.url) as wire:
        wire.send(5000 * classify_request(b""))
        codes = []
        try:
            while True:
                codes.append(wire.read_response().error_code)
        except (EOFError, ConnectionResetError):
            pass
    assert codes[0] == "bad_request"
    assert len(codes) <= 102

"""Limits of connections: their requests, their time and their number."""

from __future__ import annotations

import re
import resource
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.pictures import make_jpeg
from tests.raw import CLASSIFY_HEAD, LIVE_REQUEST, Wire, classify_request
from tests.servers import Server

SHORT_TIMEOUTS = {"FOVEA_HEADER_TIMEOUT": "0.3", "FOVEA_KEEP_ALIVE": "0.4", "FOVEA_BODY_TIMEOUT": "0.5"}


@pytest.fixture(scope="module")
def short_timeout_server(small_zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(small_zoo), **SHORT_TIMEOUTS) as server:
        yield server


# --- slow clients --------------------------------------------------------------------------------


def test_slow_headers_get_408_and_close_the_connection(short_timeout_server: Server) -> None:
    before = short_timeout_server.read_metric("fovea_errors_total", reason="header_timeout")
    with Wire(short_timeout_server.url) as wire:
        wire.send(CLASSIFY_HEAD)
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (408, "header_timeout", True)
        assert "0.3 s (FOVEA_HEADER_TIMEOUT)" in answer.json["error"]["message"]
        assert wire.is_closed()
    assert short_timeout_server.read_metric("fovea_errors_total", reason="header_timeout") == before + 1


def test_dripping_headers_do_not_extend_the_timeout(short_timeout_server: Server) -> None:
    with Wire(short_timeout_server.url) as wire:
        wire.socket.settimeout(0.05)
        for number in range(100):
            try:
                wire.send(b"G" if not number else b"E")
                if wire.socket.recv(1 << 16).startswith(b"HTTP/1.1 4"):
                    return
            except TimeoutError:
                continue
    pytest.fail("a client that sends a byte at a time was served for five seconds")


def test_later_request_on_a_connection_has_the_header_timeout(short_timeout_server: Server) -> None:
    with Wire(short_timeout_server.url) as wire:
        for _ in range(2):
            wire.send(LIVE_REQUEST)
            assert wire.read_response().status == 200
        wire.send(LIVE_REQUEST[:10])
        assert wire.read_response().error_code == "header_timeout"
        assert wire.is_closed()


def test_partial_pipelined_headers_time_out_after_the_answer(short_timeout_server: Server) -> None:
    with Wire(short_timeout_server.url) as wire:
        wire.send(classify_request(make_jpeg()), LIVE_REQUEST[:10])
        assert wire.read_response().status == 200
        assert wire.read_response().error_code == "header_timeout"


def test_idle_connection_is_closed_without_an_answer(short_timeout_server: Server) -> None:
    with Wire(short_timeout_server.url) as wire:
        assert wire.is_closed()
    with Wire(short_timeout_server.url) as wire:
        wire.send(LIVE_REQUEST)
        assert wire.read_response().status == 200
        assert wire.is_closed()


def test_unfinished_refused_body_closes_the_connection(short_timeout_server: Server) -> None:
    with Wire(short_timeout_server.url) as wire:
        wire.send(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n", b"x")
        answer = wire.read_response()
        assert (answer.status, answer.is_closing) == (404, False)
        assert wire.is_closed()


def test_connection_is_reused_after_a_refused_body(short_timeout_server: Server) -> None:
    with Wire(short_timeout_server.url) as wire:
        wire.send(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n", b"x")
        assert wire.read_response().status == 404
        wire.send(b"x" * 99, LIVE_REQUEST)
        assert wire.read_response().status == 200
        assert wire.is_closed()  # the idle timeout applies again


def test_client_gets_413_after_sending_a_large_body(server: Server) -> None:
    """The request is like those of nginx by default, with `Connection: close`; its body is over the limit."""
    with Wire(server.url) as wire:
        wire.send(CLASSIFY_HEAD, b"Connection: close\r\nContent-Length: 50000000\r\n\r\n")
        for _ in range(50):
            wire.send(b"x" * 100_000)
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (413, "body_too_large", True)


# --- malformed and excessive requests ------------------------------------------------------------


@pytest.mark.parametrize(
    "malformed_request",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the first bytes of TLS
        b"hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        CLASSIFY_HEAD + b"Transfer-Encoding: chunked\r\n\r\nnot a number\r\n",
        CLASSIFY_HEAD + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"CONNECT other:443 HTTP/1.1\r\nHost: other\r\n\r\n",
    ],
)
def test_malformed_http_gets_400_and_is_counted(server: Server, malformed_request: bytes) -> None:
    before = server.read_metric("fovea_errors_total", reason="bad_http")
    with Wire(server.url) as wire:
        wire.send(malformed_request)
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (400, "bad_http", True)
        assert answer.json["error"]["request_id"] == answer.headers["x-request-id"]
        assert wire.is_closed()
    assert server.read_metric("fovea_errors_total", reason="bad_http") == before + 1
    assert server.read_metric("fovea_requests_in_flight") == 1


@pytest.mark.parametrize(
    "oversized_request",
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
def test_oversized_headers_get_431(server: Server, oversized_request: bytes) -> None:
    before = server.read_metric("fovea_errors_total", reason="header_too_large")
    with Wire(server.url) as wire:
        wire.send(oversized_request)
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (431, "header_too_large", True)
    assert server.read_metric("fovea_errors_total", reason="header_too_large") == before + 1


def test_every_pipelined_request_is_answered(server: Server) -> None:
    with Wire(server.url) as wire:
        wire.send(LIVE_REQUEST * 1000)
        answers = [wire.read_response() for _ in range(1000)]
    assert {answer.status for answer in answers} == {200}
    assert not any(answer.is_closing for answer in answers)


def test_requests_before_a_malformed_one_are_answered(server: Server) -> None:
    with Wire(server.url) as wire:
        wire.send(classify_request(make_jpeg()), LIVE_REQUEST, b"nonsense\r\n\r\n")
        assert "predictions" in wire.read_response().json
        assert wire.read_response().json == {"status": "live"}
        assert wire.read_response().error_code == "bad_http"
        assert wire.is_closed()


@pytest.mark.parametrize("has_pause", [False, True])
def test_upgrade_offer_is_ignored(server: Server, has_pause: bool) -> None:
    """Java's HttpClient makes this offer by default; the body must not be taken for another request."""
    upgrade = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk")
    request = classify_request(make_jpeg(), *upgrade)
    head, body = request.split(b"\r\n\r\n", 1)
    with Wire(server.url) as wire:
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            if has_pause:
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


# --- number of connections -----------------------------------------------------------------------


def test_excess_connection_waits_until_another_closes(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_CONNECTIONS="3") as server, ExitStack() as stack:
        first, *_ = [stack.enter_context(Wire(server.url)) for _ in range(3)]
        first.send(LIVE_REQUEST)
        assert first.read_response().status == 200
        fourth = stack.enter_context(Wire(server.url))
        fourth.send(LIVE_REQUEST)
        fourth.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            fourth.read_response()
        first.socket.close()
        fourth.socket.settimeout(30)
        assert fourth.read_response().status == 200


def _make_ulimit_arguments(options: str) -> dict[str, list[str]]:
    """Return arguments for `Popen` that start the service under this `ulimit`."""
    return {"args": ["sh", "-c", f'ulimit {options}; exec "$0" -m fovea.service', sys.executable]}


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_low_ulimit_lowers_the_connection_limit(small_zoo: Path, workers: str) -> None:
    """The limit also holds while the service stops and more connections wait."""
    server = Server(_make_ulimit_arguments("-n 150"), FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS=workers)
    with ExitStack() as stack, server:
        for _ in range(200):
            stack.enter_context(Wire(server.url))
        assert _measure_cpu_seconds(server, while_waiting=0.5) < 0.2
    (numbers,) = re.findall(
        r"at most (\d+) connections, as `ulimit -n` is 150; .*=4096 needs (\d+)", server.log
    )
    assert 20 < int(numbers[0]) < 100
    assert int(numbers[1]) == 4096 + 150 - int(numbers[0])
    assert "cannot accept" not in server.log


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_soft_file_limit_is_raised_for_the_connections(small_zoo: Path, workers: str) -> None:
    settings = {"FOVEA_WORKERS": workers, "FOVEA_CONNECTIONS": "300"}
    with (
        Server(_make_ulimit_arguments("-S -n 128"), FOVEA_MODELS=str(small_zoo), **settings) as server,
        ExitStack() as stack,
    ):
        wires = [stack.enter_context(Wire(server.url)) for _ in range(250)]
        for wire in wires:
            wire.send(LIVE_REQUEST)
        for wire in wires:
            assert wire.read_response().status == 200
    assert "at most" not in server.log


@pytest.mark.long
def test_server_survives_running_out_of_files(small_zoo: Path) -> None:
    """Other files than connections can use up the limit; then a connection cannot be accepted."""
    with Server(FOVEA_MODELS=str(small_zoo)) as server:
        pid = server.process.pid
        assert server.client.get("/health/live").status_code == 200
        with ExitStack() as stack:
            _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(
                pid, resource.RLIMIT_NOFILE, (len(list(Path(f"/proc/{pid}/fd").iterdir())) + 5, hard)
            )
            wires = [stack.enter_context(Wire(server.url)) for _ in range(40)]
            wires[-1].send(LIVE_REQUEST)
            assert server.client.get("/health/live").status_code == 200  # on its open connection
            assert _measure_cpu_seconds(server, while_waiting=0.5) < 0.2
            for wire in wires[:-1]:
                wire.socket.close()
            assert wires[-1].read_response().status == 200
        for _ in range(10):
            assert httpx.post(f"{server.url}/v1/classify", content=make_jpeg()).status_code == 200
        assert server.read_metric("fovea_connections_starved_total") >= 1
    assert "cannot accept connections: Too many open files" in server.log


def _measure_cpu_seconds(server: Server, *, while_waiting: float) -> float:
    """Return the processor time that the server uses in so many seconds without requests."""
    waiter, other = socket.socketpair()
    with waiter, other:
        waiter.settimeout(while_waiting)
        before = _read_cpu_seconds(server)
        with pytest.raises(TimeoutError):
            waiter.recv(1)
        return _read_cpu_seconds(server) - before


def _read_cpu_seconds(server: Server) -> float:
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_pipelined_requests_do_not_delay_other_connections(server: Server) -> None:
    """Each is refused at once, so thousands in one packet could keep the event loop from all others."""
    before = server.read_metric("fovea_errors_total", reason="bad_request")

    def ask(wire: Wire) -> set[str]:
        wire.send(5000 * classify_request(b""))
        return {wire.read_response().error_code for _ in range(5000)}

    counts = []
    with Wire(server.url) as wire, ThreadPoolExecutor(1) as executor:
        answers = executor.submit(ask, wire)
        while not answers.done():
            counts.append(server.read_metric("fovea_errors_total", reason="bad_request"))
        assert answers.result() == {"bad_request"}
    assert any(before < count < before + 5000 for count in counts)
    assert server.read_metric("fovea_errors_total", reason="bad_request") == before + 5000

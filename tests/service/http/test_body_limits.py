"""Limits on bodies that hold on every route, and on what a connection keeps in memory."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from fovea.service.resources.body_memory import BodyMemory
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.raw import CLASSIFY_HEAD, LIVE_REQUEST, Wire, classify_request
from tests.servers import Server, wait_until

pytestmark = pytest.mark.long

BODY_BYTES = 1_000_000
"""Limit of one body, and of all bodies together."""

MAX_GROWTH = 40 << 20
"""Bytes by which the service may grow: its own limit, and memory that Python keeps."""

TIMEOUTS = {"FOVEA_BODY_TIMEOUT": "0.6", "FOVEA_HEADER_TIMEOUT": "30", "FOVEA_KEEP_ALIVE": "30"}

ROUTES = [
    b"POST /v1/classify",
    b"PUT /v1/models/small/classify",
    b"POST /v1/explain",
    b"POST /v2/models/small/infer",
    b"POST /v2/repository/index",
    b"POST /v2/repository/models/small/unload",
    b"POST /v1/models/small:predict",
    b"POST /predictions/small",
    b"POST /models/small",
    b"POST /nowhere",
    b"POST /v2/nowhere",
    b"GET /health/live",
    b"GET /v1/models",
    b"DELETE /v1/models",
    b"OPTIONS *",
]


@pytest.fixture(scope="module")
def short_timeout_server(small_zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_BODY_BYTES=str(BODY_BYTES), **TIMEOUTS) as server:
        yield server
    assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def low_memory_server(small_zoo: Path) -> Iterator[Server]:
    limits = {"FOVEA_BODY_BYTES": str(BODY_BYTES), "FOVEA_BODIES_BYTES": str(BODY_BYTES)}
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_LOG_LEVEL="warning", **limits) as server:
        yield server
    assert "Traceback" not in server.log


# --- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES, ids=bytes.decode)
@pytest.mark.parametrize("framing", [b"Content-Length: 500000", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("is_dripping", [False, True], ids=["stops", "drips"])
def test_unfinished_body_times_out_on_every_route(
    short_timeout_server: Server, route: bytes, framing: bytes, is_dripping: bool
) -> None:
    """The client never ends its body.

    A route that needs no body may answer earlier; then the connection ends.
    """
    with Wire(short_timeout_server.url) as wire:
        wire.socket.settimeout(0.05 if is_dripping else 20)
        wire.send(b"%b HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % (route, framing))
        received = b""
        for _ in range(400):
            try:
                piece = wire.socket.recv(1 << 16)
                received += piece
                if not piece:
                    break
                continue
            except TimeoutError:
                pass
            except ConnectionError:
                break
            try:
                wire.send(b"1\r\nx\r\n" if b"chunked" in framing else b"x")
            except OSError:
                break
        else:
            pytest.fail("the connection was kept for twenty seconds")
    status = int(received[9:12])
    assert received.count(b"HTTP/1.1") == 1
    if status == 408:
        assert b'"body_timeout"' in received
        assert b"\r\nconnection: close\r\n" in received


@pytest.mark.parametrize(
    "first_request", [LIVE_REQUEST, classify_request(make_jpeg())], ids=["live", "image"]
)
@pytest.mark.parametrize(
    "framing", [b"Content-Length: 500", b"Content-Length: 500000", b"Transfer-Encoding: chunked"]
)
def test_unfinished_body_behind_another_request_times_out(
    short_timeout_server: Server, first_request: bytes, framing: bytes
) -> None:
    """Its beginning has waited while the first request was answered."""
    with Wire(short_timeout_server.url) as wire:
        wire.send(first_request, CLASSIFY_HEAD + framing + b"\r\n\r\n", b"1\r\nx\r\n")
        assert wire.read_response().status == 200
        assert wire.read_response().error_code == "body_timeout"
        assert wire.is_closed()


def test_body_timeout_pauses_while_earlier_request_is_answered(small_zoo: Path) -> None:
    """The time limit does not run while the service lets the client wait."""
    with Server(FOVEA_MODELS=str(small_zoo), **TIMEOUTS) as server, Wire(server.url) as wire:
        with stop_runners(server):
            wire.send(classify_request(make_jpeg()), classify_request(make_jpeg(900, 900))[:-1])
            wire.socket.settimeout(1.5)  # more than twice the limit
            with pytest.raises(TimeoutError):
                wire.read_response()
        wire.socket.settimeout(30)
        assert wire.read_response().status == 200
        wire.send(classify_request(make_jpeg(900, 900))[-1:])
        assert wire.read_response().status == 200


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES, ids=bytes.decode)
def test_body_size_is_limited_on_every_route(short_timeout_server: Server, route: bytes) -> None:
    with Wire(short_timeout_server.url) as wire:
        wire.send(b"%b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (route, BODY_BYTES + 1))
        answer = wire.read_response()
        assert answer.is_closing
        assert (answer.status, str(BODY_BYTES) in answer.body.decode()) in (
            (413, True),
            (404, False),
            (403, False),
        )
        assert wire.socket.recv(1) == b""


@pytest.mark.parametrize("route", ROUTES, ids=bytes.decode)
def test_chunked_body_size_is_limited_on_every_route(server: Server, route: bytes) -> None:
    """The limit also holds for a discarded body: the connection ends long before the time limit."""
    piece = b"186a0\r\n" + bytes(100_000) + b"\r\n"
    with Wire(server.url) as wire:
        wire.send(b"%b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" % route)
        wire.socket.settimeout(15)
        sent_bytes = 0
        try:
            while sent_bytes < 1 << 30:
                wire.send(piece)
                sent_bytes += len(piece)
        except OSError:  # the service has closed the connection
            pass
        assert sent_bytes < 1 << 30


# --- memory --------------------------------------------------------------------------------------


@contextmanager
def stop_runners(server: Server) -> Iterator[None]:
    """Stop the runners, so that no image is classified inside the block."""
    runners = server.runner_pids
    for pid in runners:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in runners:
            os.kill(pid, signal.SIGCONT)


def read_resident_bytes(server: Server) -> int:
    """Return the bytes that the service has in memory, without memory shared with its runners."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return sum(int(size) << 10 for size in re.findall(r"(?:RssAnon|RssFile):\s+(\d+)", status))


def open_flood(server: Server, head: bytes, piece: bytes, *, connections: int) -> list[Wire]:
    """Open connections, and send `head` and then as many `piece`s as the service takes."""
    wires = []
    for _ in range(connections):
        wire = Wire(server.url)
        wires.append(wire)
        wire.socket.settimeout(0.001)
        try:
            wire.send(head)
            while True:
                wire.send(piece)
        except OSError:  # the service takes no more, or has refused the request
            continue
    server.client.get("/health/live")  # an answer shows that the service has read the bytes above
    return wires


FIRST_REQUEST = classify_request(make_jpeg())
LARGE_REQUEST = classify_request(bytes(200_000))
LIVE_START = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
CHUNKED_START = CLASSIFY_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKED_REQUEST = CHUNKED_START + b"30d40\r\n" + bytes(200_000) + b"\r\n0\r\n\r\n"
LARGE_START = CLASSIFY_HEAD + b"Content-Length: 900000\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (FIRST_REQUEST, LARGE_REQUEST),
        (FIRST_REQUEST, LARGE_REQUEST.replace(b"/v1/classify", b"/nowhere")),
        (FIRST_REQUEST, CHUNKED_REQUEST),
        (FIRST_REQUEST, LIVE_START + b"A: " + b"x" * 60_000 + b"\r\n\r\n"),
        (FIRST_REQUEST, 1000 * LIVE_REQUEST),
        (FIRST_REQUEST + LIVE_REQUEST + LARGE_START, bytes(100_000)),
        (LIVE_START, 20 * (b"A: " + b"x" * 1000 + b"\r\n")),
        (LIVE_START + b"A: ", b"x" * 20_000),
        (FIRST_REQUEST + LIVE_START + b"A: ", b"x" * 20_000),
    ],
    ids=[
        "bodies", "bodies for an unknown path", "chunked bodies", "headers", "small requests",
        "a body in pieces", "headers that never end", "a header that never ends",
        "an endless header behind a request",
    ],
)  # fmt: skip
def test_pipelined_requests_use_bounded_memory(low_memory_server: Server, head: bytes, piece: bytes) -> None:
    with stop_runners(low_memory_server), ExitStack() as stack:
        before = read_resident_bytes(low_memory_server)
        for wire in open_flood(low_memory_server, head, piece, connections=250):
            stack.enter_context(wire)
        growth = read_resident_bytes(low_memory_server) - before
        assert growth < MAX_GROWTH, f"the service has grown by {growth / 1e6:.0f} MB"
    low_memory_server.wait_for_metric(1, "fovea_requests_in_flight")
    low_memory_server.wait_for_metric(1, "fovea_connections")
    assert low_memory_server.client.post("/v1/classify", content=make_jpeg()).status_code == 200


@pytest.mark.parametrize(
    ("start", "piece", "statuses"),
    [
        (LIVE_START + b"A: ", b"x" * 20_000, [200, 431]),
        (LIVE_START, 20 * (b"A: " + b"x" * 1000 + b"\r\n"), [200, 431]),
        (b"nonsense\r\n\r\n", b"x" * 20_000, [200, 400]),
        (CHUNKED_START, b"186a0\r\n" + bytes(100_000) + b"\r\n", [200, 413]),
    ],
    ids=["a header that never ends", "headers that never end", "nonsense", "a chunked body that never ends"],
)
def test_nothing_is_read_behind_a_refused_pipelined_request(
    low_memory_server: Server, start: bytes, piece: bytes, statuses: list[int]
) -> None:
    """The service read and dropped gigabytes a second while an earlier request was being answered."""
    with Wire(low_memory_server.url) as wire:
        with stop_runners(low_memory_server):
            wire.send(FIRST_REQUEST, start)
            wire.socket.settimeout(0.5)
            sent_bytes = 0
            with suppress(TimeoutError):
                while sent_bytes < 1 << 28:
                    wire.send(piece)
                    sent_bytes += len(piece)
            assert sent_bytes < 1 << 28
        wire.socket.settimeout(30)
        assert [wire.read_response().status for _ in statuses] == statuses
        assert wire.is_closed()


def test_pipelined_requests_beyond_memory_are_refused_in_order(low_memory_server: Server) -> None:
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(low_memory_server.url)) for _ in range(20)]
        pool = stack.enter_context(ThreadPoolExecutor(len(wires)))
        requests = (classify_request(make_jpeg()), classify_request(bytes(100_000)), LIVE_REQUEST)
        with stop_runners(low_memory_server):
            sends = [pool.submit(wire.send, *requests) for wire in wires]
            # The system takes everything, or lacks memory: then the rest is sent when the service reads.
            wait(sends, timeout=5)
            low_memory_server.client.get("/health/live")
        assert {wire.read_response().status for wire in wires} == {200}
        codes = [wire.read_response().error_code for wire in wires]
        assert set(codes) == {"unsupported_format", "overloaded"}
        refused_index, accepted_index = codes.index("overloaded"), codes.index("unsupported_format")
        assert wires[accepted_index].read_response().json == {"status": "live"}
        assert wires[refused_index].socket.recv(1) == b""  # nothing after the refused request is read


def test_disconnect_of_a_pipelining_client_is_noticed(low_memory_server: Server) -> None:
    """The service reads nothing from the connection then, and still notices the end before it answers."""
    before = low_memory_server.read_metric("fovea_errors_total", reason="client_left")
    with stop_runners(low_memory_server):
        for later_requests in (
            b"",
            LIVE_REQUEST,
            LIVE_REQUEST * 50,
            classify_request(bytes(150_000)),
            classify_request(bytes(150_000))[:-9],
            LIVE_REQUEST[:20],
        ):
            with Wire(low_memory_server.url) as wire:
                wire.send(classify_request(make_jpeg()), later_requests)
                low_memory_server.wait_for_metric(2, "fovea_requests_in_flight")
            low_memory_server.wait_for_metric(1, "fovea_requests_in_flight")
            before += 1
            assert low_memory_server.read_metric("fovea_errors_total", reason="client_left") == before


def test_half_closing_client_gets_all_its_answers(low_memory_server: Server) -> None:
    """The client closes its side while its first request is at work, with and without paused reading."""
    cases: list[tuple[bytes, list[int]]] = [
        (b"", [200]),
        (LIVE_REQUEST, [200, 200]),
        (classify_request(bytes(150_000)) + LIVE_REQUEST, [200, 415, 200]),
    ]
    for later_requests, expected in cases:
        with Wire(low_memory_server.url) as wire:
            with stop_runners(low_memory_server):
                wire.send(classify_request(make_jpeg()))
                low_memory_server.wait_for_metric(2, "fovea_requests_in_flight")
                wire.send(later_requests)
                wire.socket.shutdown(socket.SHUT_WR)
                # the service has seen the end, and the request still waits
                low_memory_server.wait_for_metric(2, "fovea_requests_in_flight")
            assert [wire.read_response().status for _ in expected] == expected
            assert wire.is_closed()


# --- unread answers ------------------------------------------------------------------------------


@pytest.mark.slow
def test_unread_answers_use_bounded_memory(tmp_path: Path) -> None:
    """Clients request all of a thousand labels for sixty images, and read nothing of 4 MB."""
    labels = [f"label {number} " + "x" * 40 for number in range(1000)]
    root = add_to_repository(build_model(labels=labels), tmp_path)
    image = make_jpeg()
    parts = b"".join(
        b"--b\r\nContent-Disposition: form-data; name=f; filename=f\r\n\r\n%b\r\n" % image for _ in range(60)
    )
    body = parts + b"--b--\r\n"
    head = (
        b"POST /v1/classify?top_k=0 HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    )
    request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    limits = {"FOVEA_BODY_BYTES": "1000000", "FOVEA_BODIES_BYTES": "12000000"}
    with Server(FOVEA_MODELS=str(root), **limits) as server, ExitStack() as stack:
        with Wire(server.url) as wire:
            wire.send(request)
            answer = wire.read_response()
        assert answer.status == 200
        assert len(answer.body) > 4_000_000
        wires = []
        for number in range(15):
            if number == 5:  # the heap has its final size
                before = read_resident_bytes(server)
            wire = stack.enter_context(Wire(server.url))
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            wire.send(request)
            server.wait_for_metric(number + 2, "fovea_requests_total", route="/v1/classify")
            wires.append(wire)
        growth = read_resident_bytes(server) - before
        assert growth < 30 << 20, f"10 answers of {len(answer.body) / 1e6:.1f} MB: {growth / 1e6:.0f} MB more"
        is_whole = wires[-1].read_response().body == answer.body  # the newest answer is kept
        assert is_whole
        assert _is_cut_off(wires[0])
        assert server.client.post("/v1/classify", content=image).status_code == 200
    assert "cut off" in server.log


def _is_cut_off(wire: Wire) -> bool:
    try:
        wire.read_response()
    except (ConnectionError, EOFError):
        return True
    return False


def test_answer_larger_than_the_memory_limit_is_refused(tmp_path: Path) -> None:
    root = add_to_repository(build_model(labels=[f"label {number}" for number in range(2000)]), tmp_path)
    limits = {"FOVEA_BODY_BYTES": "1000000", "FOVEA_BODIES_BYTES": "1000000"}
    files = [("f", make_jpeg())] * 8
    with Server(FOVEA_MODELS=str(root), **limits) as server:
        reply = server.client.post("/v1/classify?top_k=0", files=files)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_request")
        message = reply.json()["error"]["message"]
        assert "16000 labels" in message
        assert "1000000 (FOVEA_BODIES_BYTES)" in message
        assert server.client.post("/v1/classify?top_k=5", files=files).status_code == 200
        assert server.client.post("/v1/classify?top_k=0", files=files[:3]).status_code == 200
        assert server.read_metric("fovea_images_in_flight") == 0


class _SilentReader:
    """A client that reads nothing."""

    def __init__(self) -> None:
        self.is_cut_off = False

    def cut_off(self) -> None:
        self.is_cut_off = True


def test_bodies_displace_unread_answers() -> None:
    memory, readers = BodyMemory(100), [_SilentReader() for _ in range(3)]
    for reader in readers:
        memory.reserve_answer(reader, 30)
    assert memory.reserve(10)
    assert memory.used_bytes == 100
    assert not any(reader.is_cut_off for reader in readers)
    assert memory.reserve(20)
    assert [reader.is_cut_off for reader in readers] == [True, False, False]
    assert memory.reserve(70)
    assert not memory.reserve(1)
    assert all(reader.is_cut_off for reader in readers)
    assert memory.used_bytes == 100
    memory.release(100)
    assert memory.used_bytes == 0


def test_newest_unread_answer_is_not_cut_off() -> None:
    memory, readers = BodyMemory(100), [_SilentReader() for _ in range(2)]
    for reader in readers:
        memory.reserve_answer(reader, 150)
    assert [reader.is_cut_off for reader in readers] == [True, False]
    memory.reserve_answer(readers[1], 90)
    assert memory.used_bytes == 90
    memory.release_answer(readers[1])
    memory.release_answer(readers[1])
    assert memory.used_bytes == 0


def test_large_bodies_leave_room_for_small_bodies(small_zoo: Path) -> None:
    limits = {"FOVEA_BODY_BYTES": "4000000", "FOVEA_BODIES_BYTES": "8000000"}
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n"
    with Server(FOVEA_MODELS=str(small_zoo), **limits) as server, ExitStack() as stack:
        for _ in range(2):
            wire = stack.enter_context(Wire(server.url))
            wire.send(head, b"x" * 2_900_000)
            # else the body below could take the memory, and a large one would be refused
            wait_until(wire.is_all_read)
        wait_until(lambda: server.client.post("/v1/classify", content=b"x" * 2_000_000).status_code == 503)
        assert server.client.post("/v1/classify", content=make_jpeg()).status_code == 200

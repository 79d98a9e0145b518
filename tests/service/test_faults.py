"""Faults of clients, deadlines, logs and clocks are counted and isolated."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import make_jpeg, make_png_header
from tests.poison import BlockingImage, make_poison_environment
from tests.raw import CLASSIFY_HEAD, LIVE_REQUEST, Wire, WireResponse, classify_request
from tests.servers import ROOT, Server, sum_samples, wait_until

PICTURE = make_jpeg()
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@pytest.fixture
def blocking_image(tmp_path: Path) -> BlockingImage:
    """Return an image that blocks the runner until it is released."""
    return BlockingImage(tmp_path / "gate")


@contextmanager
def block_server(zoo: Path, folder: Path, blocking_image: BlockingImage) -> Iterator[Server]:
    """Start a server whose only runner is busy until the blocking image is released."""
    settings = {
        "FOVEA_RUNNERS": "1",
        "FOVEA_QUEUE_IMAGES": "8",
        "FOVEA_REQUEST_IMAGES": "4",
        "FOVEA_BATCH_TIMEOUT": "600",
        **make_poison_environment(folder),
    }
    with Server(FOVEA_MODELS=str(zoo), **settings) as server, Wire(server.url) as wire:
        wire.send(classify_request(blocking_image.image))
        server.wait_for_metric(1, "fovea_images_in_flight")
        yield server


@pytest.fixture
def blocked_server(small_zoo: Path, tmp_path: Path, blocking_image: BlockingImage) -> Iterator[Server]:
    with block_server(small_zoo, tmp_path, blocking_image) as server:
        yield server


# --- deadlines -----------------------------------------------------------------------------------


def test_request_late_in_queue_gets_504_without_inference(
    blocked_server: Server, blocking_image: BlockingImage
) -> None:
    with Wire(blocked_server.url) as wire:
        wire.send(classify_request(PICTURE, b"X-Deadline-Ms: 200"))
        answer = wire.read_response()
        assert (answer.status, answer.error_code) == (504, "deadline_exceeded")
        assert "0.2 s (X-Deadline-Ms)" in answer.json["error"]["message"]
    assert blocked_server.read_metric("fovea_images_in_flight") == 1
    blocking_image.release()
    assert blocked_server.client.post("/v1/classify", content=PICTURE).status_code == 200
    assert blocked_server.read_metric("fovea_batch_images_sum") == 1
    assert blocked_server.read_metric("fovea_errors_total", reason="deadline_exceeded") == 1


@pytest.mark.parametrize("value", ["soon", "0", "-5", "nan", "inf", ""])
def test_invalid_deadline_header_is_refused(server: Server, value: str) -> None:
    reply = server.client.post("/v1/classify", content=PICTURE, headers={"X-Deadline-Ms": value})
    assert reply.json()["error"]["code"] == "bad_request"
    assert "X-Deadline-Ms" in reply.json()["error"]["message"]


@pytest.mark.parametrize("value", ["60000", "59999.5", "6e4"])
def test_distant_deadline_is_accepted(server: Server, value: str) -> None:
    reply = server.client.post("/v1/classify", content=PICTURE, headers={"X-Deadline-Ms": value})
    assert reply.status_code == 200


# --- a full queue --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_server(small_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server whose queue is full."""
    folder = tmp_path_factory.mktemp("full")
    blocking_image = BlockingImage(folder / "gate")
    with block_server(small_zoo, folder, blocking_image) as server, ExitStack() as stack:
        for _ in range(7):
            stack.enter_context(Wire(server.url)).send(classify_request(PICTURE))
        server.wait_for_metric(8, "fovea_images_in_flight")
        yield server
        blocking_image.release()  # else the shutdown waits for the runner


@pytest.fixture
def count_more(full_server: Server) -> Callable[..., float]:
    """Return a function that returns by how much a metric has grown since the beginning of the test."""
    before = full_server.client.get("/metrics").text

    def count(name: str, **labels: str) -> float:
        return full_server.read_metric(name, **labels) - sum_samples(before, name, **labels)

    return count


def _is_refused(response: WireResponse) -> bool:
    return (response.status, response.error_code, response.is_closing) == (503, "overloaded", False)


def test_full_queue_refuses_before_body_and_keeps_connection(
    full_server: Server, count_more: Callable[..., float]
) -> None:
    (model,) = full_server.client.get("/v1/models").json()["models"]
    model_start = b"POST /v1/models/%s/classify HTTP/1.1\r\nHost: x\r\n" % model["name"].encode()
    with Wire(full_server.url) as wire:
        for start in (CLASSIFY_HEAD, b"PUT /v1/classify HTTP/1.1\r\nHost: x\r\n", model_start):
            wire.send(start, b"X-Request-ID: mine\r\nContent-Length: %d\r\n\r\n" % len(PICTURE))
            answer = wire.read_response()  # before any byte of the body
            assert _is_refused(answer)
            assert answer.json["error"]["request_id"] == answer.headers["x-request-id"] == "mine"
            assert int(answer.headers["retry-after"]) >= 1
            wire.send(PICTURE)
        wire.send(LIVE_REQUEST)
        assert wire.read_response().status == 200
    assert count_more("fovea_requests_total", model=model["name"], status="503") == 3
    assert count_more("fovea_requests_total", route="/v1/models/{name}/classify", status="503") == 1
    assert count_more("fovea_request_seconds_count", route="/v1/classify") == 2
    assert count_more("fovea_errors_total", reason="overloaded") == 3
    assert full_server.read_metric("fovea_requests_in_flight") == 9  # the scrape is one


def test_full_queue_sends_no_100_continue(full_server: Server) -> None:
    with Wire(full_server.url) as wire:
        wire.send(CLASSIFY_HEAD, b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n")
        assert _is_refused(wire.read_response())


def test_full_queue_refuses_pipelined_requests_in_order(full_server: Server) -> None:
    id_headers = [b"X-Request-ID: %d" % number for number in range(20)]
    with Wire(full_server.url) as wire:
        wire.send(LIVE_REQUEST, *(classify_request(PICTURE, header) for header in id_headers), LIVE_REQUEST)
        assert wire.read_response().status == 200
        for number in range(20):
            answer = wire.read_response()
            assert _is_refused(answer)
            assert answer.headers["x-request-id"] == str(number)
        assert wire.read_response().status == 200


def test_full_queue_still_reports_other_errors(full_server: Server, count_more: Callable[..., float]) -> None:
    for path, status in (("/v1/models/none/classify", 404), ("/nowhere", 404)):
        assert full_server.client.post(path, content=PICTURE).status_code == status
    assert full_server.client.get("/v1/classify").status_code == 405
    with Wire(full_server.url) as wire:
        wire.send(classify_request(PICTURE), b"nonsense\r\n\r\n")
        answer = wire.read_response()
        assert _is_refused(answer)
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (400, "bad_http", True)
        assert wire.is_closed()
    assert count_more("fovea_errors_total", reason="bad_http") == 1


def test_full_queue_answers_invalid_chunked_body_once(
    full_server: Server, count_more: Callable[..., float]
) -> None:
    with Wire(full_server.url) as wire:
        wire.send(CLASSIFY_HEAD, b"Transfer-Encoding: chunked\r\n\r\n", b"nonsense\r\n")
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (400, "bad_http", True)
        assert wire.is_closed()
    assert count_more("fovea_requests_total", status="400") == 1
    assert count_more("fovea_requests_total", status="0") == 0


def test_full_queue_closes_connection_on_request(full_server: Server) -> None:
    with Wire(full_server.url) as wire:
        wire.send(classify_request(PICTURE, b"Connection: close"))
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (503, "overloaded", True)
        assert wire.is_closed()


# --- clients -------------------------------------------------------------------------------------


def test_disconnect_frees_queue_places_without_inference(
    blocked_server: Server, blocking_image: BlockingImage
) -> None:
    for round_ in range(1, 4):
        with ExitStack() as stack:
            wires = [stack.enter_context(Wire(blocked_server.url)) for _ in range(7)]
            for wire in wires:
                wire.send(classify_request(PICTURE))
            blocked_server.wait_for_metric(7, "fovea_queue_images")
            refusal = blocked_server.client.post("/v1/classify", content=PICTURE)
            assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "overloaded")
        blocked_server.wait_for_metric(1, "fovea_images_in_flight")
        blocked_server.wait_for_metric(0, "fovea_queue_images")
        assert blocked_server.read_metric("fovea_errors_total", reason="client_left") == 7 * round_
        assert blocked_server.read_metric("fovea_requests_total", status="0") == 7 * round_
    blocking_image.release()
    assert blocked_server.client.post("/v1/classify", content=PICTURE).status_code == 200
    assert blocked_server.read_metric("fovea_batch_images_sum") == 1


def test_tensor_rows_of_gone_or_late_client_are_not_inferred(
    blocked_server: Server, blocking_image: BlockingImage
) -> None:
    """Each row occupies a place until then. Bodies above 64 KB lie in memory shared with the runners."""
    header = b'{"inputs": [{"name": "image", "shape": [4], "datatype": "BYTES"}]}'
    images = 4 * (struct.pack("<I", len(PICTURE) + 20_000) + PICTURE + bytes(20_000))
    head = (
        b"POST /v2/models/small/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: %d\r\n"
        % len(header)
    )
    head += b"Content-Length: %d\r\n" % (len(header) + len(images))
    with Wire(blocked_server.url) as wire:
        wire.send(head, b"\r\n", header, images)
        blocked_server.wait_for_metric(5, "fovea_images_in_flight")
    blocked_server.wait_for_metric(1, "fovea_images_in_flight")
    with Wire(blocked_server.url) as late_wire:
        late_wire.send(head, b"X-Deadline-Ms: 200\r\n\r\n", header, images)
        answer = late_wire.read_response()
    assert (answer.status, answer.json["code"]) == (504, "deadline_exceeded")
    blocked_server.wait_for_metric(1, "fovea_images_in_flight")
    blocking_image.release()
    assert blocked_server.client.post("/v1/classify", content=PICTURE).status_code == 200
    assert blocked_server.read_metric("fovea_batch_images_sum") == 1
    assert blocked_server.read_metric("fovea_errors_total", reason="client_left") == 1


@pytest.mark.long
def test_total_body_memory_is_bounded_and_released(small_zoo: Path) -> None:
    settings = {"FOVEA_BODY_BYTES": "200000", "FOVEA_BODIES_BYTES": "500000"}
    first_part, last_part = b"x" * 120_000, b"x" * 1_000
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
        for refusals in (4, 8, 12):
            with ExitStack() as stack:
                wires = [stack.enter_context(Wire(server.url)) for _ in range(8)]
                for wire in wires:
                    wire.send(
                        CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(first_part + last_part), first_part
                    )
                server.wait_for_metric(refusals, "fovea_errors_total", reason="overloaded")
                for wire in wires:
                    wire.send(last_part)
                codes = sorted(wire.read_response().error_code for wire in wires)
                assert codes == ["overloaded"] * 4 + ["unsupported_format"] * 4
        assert server.client.post("/v1/classify", content=PICTURE).status_code == 200
        assert server.read_metric("fovea_errors_total", reason="overloaded") == 12


@pytest.fixture(scope="module")
def short_timeout_server(small_zoo: Path) -> Iterator[Server]:
    """Yield a server that waits only 0.5 s for a body."""
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_BODY_TIMEOUT="0.5") as server:
        yield server


def _send_half(wire: Wire) -> None:
    wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(PICTURE), PICTURE[:100])


def _send_byte_by_byte(wire: Wire) -> None:
    """Send single bytes for longer than the body timeout."""
    _send_half(wire)
    wire.socket.settimeout(0.05)
    for byte in PICTURE[100:200]:
        wire.send(bytes([byte]))
        try:
            wire.socket.recv(1, socket.MSG_PEEK)
            break
        except TimeoutError:
            pass
    wire.socket.settimeout(30)


def _reset_connection(wire: Wire) -> None:
    _send_half(wire)
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.socket.close()


def _close_connection(wire: Wire) -> None:
    _send_half(wire)
    wire.socket.close()


@pytest.mark.parametrize(
    ("reason", "misbehave"),
    [
        ("bad_image", lambda wire: wire.send(classify_request(PICTURE[: len(PICTURE) // 2]))),
        ("unsupported_format", lambda wire: wire.send(classify_request(b"rubbish"))),
        ("too_many_pixels", lambda wire: wire.send(classify_request(make_png_header(60_000, 60_000)))),
        ("bad_request", lambda wire: wire.send(classify_request(b""))),
        ("body_timeout", _send_half),
        ("body_timeout", _send_byte_by_byte),
        ("client_left", _close_connection),
        ("client_left", _reset_connection),
    ],
)
def test_every_bad_client_is_counted_by_reason(
    short_timeout_server: Server, reason: str, misbehave: Callable[[Wire], None]
) -> None:
    before = (
        short_timeout_server.read_metric("fovea_errors_total"),
        short_timeout_server.read_metric("fovea_errors_total", reason=reason),
    )
    with Wire(short_timeout_server.url) as wire:
        misbehave(wire)
        if reason != "client_left":
            assert wire.read_response().error_code == reason
        wait_until(
            lambda: short_timeout_server.read_metric("fovea_errors_total", reason=reason) == before[1] + 1
        )
    assert short_timeout_server.read_metric("fovea_errors_total") == before[0] + 1
    assert short_timeout_server.read_metric("fovea_requests_in_flight") == 1
    assert short_timeout_server.read_metric("fovea_images_in_flight") == 0


# --- logs ----------------------------------------------------------------------------------------


def _full_stderr() -> dict[str, Any]:
    return {"stderr": os.open("/dev/full", os.O_WRONLY)}


def _broken_stderr() -> dict[str, Any]:
    read, write = os.pipe()
    os.close(read)
    return {"stderr": write}


def _closed_stderr() -> dict[str, Any]:
    return {
        "args": ["sh", "-c", 'exec "$0" -m fovea.service 2>&-', sys.executable],
        "stderr": subprocess.DEVNULL,
    }


@pytest.mark.long
@pytest.mark.parametrize("make_stderr", [_full_stderr, _broken_stderr, _closed_stderr])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_unwritable_log_does_not_disturb_service(
    small_zoo: Path, tmp_path: Path, make_stderr: Callable[[], dict[str, Any]], workers: str
) -> None:
    settings = {"FOVEA_RUNNERS": "1", "FOVEA_WORKERS": workers, **make_poison_environment(tmp_path)}
    with Server(make_stderr(), FOVEA_MODELS=str(small_zoo), **settings) as server:
        for _ in range(20):  # each writes a traceback to the log of the runner and of the service
            reply = server.client.post("/v1/classify", content=b"POISON raise")
            assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
        reply = server.client.post("/v1/classify", content=b"POISON exit")
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
        assert server.client.post("/v1/classify", content=PICTURE).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0


@pytest.mark.long
def test_closed_stderr_becomes_dev_null(small_zoo: Path) -> None:
    with Server(_closed_stderr(), FOVEA_MODELS=str(small_zoo)) as server:
        for pid in (server.process.pid, *server.runner_pids):
            assert Path(f"/proc/{pid}/fd/2").readlink() == Path(os.devnull)


# --- clocks --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.needs("faketime")
def test_clock_jumps_do_not_disturb_service(small_zoo: Path, tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0")
    faketime_environment = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    limits = {"FOVEA_BATCH_TIMEOUT": "5", "FOVEA_HEADER_TIMEOUT": "5", "FOVEA_BODY_TIMEOUT": "5"}
    with Server(
        FOVEA_MODELS=str(small_zoo), FOVEA_DEADLINE_MS="5000", **faketime_environment, **limits
    ) as server:
        for jump in ("+86400", "-86400", "+3153600000", "+0"):
            with Wire(server.url) as wire:
                wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(PICTURE), PICTURE[:100])
                before = _read_date(server)
                clock.write_text(jump)
                wait_until(lambda before=before: abs((_read_date(server) - before).total_seconds()) > 3600)  # type: ignore[misc]
                wire.send(PICTURE[100:])
                assert wire.read_response().status == 200
        seconds = server.read_metric("fovea_request_seconds_sum")
        assert 0 < seconds < 60
        assert server.read_metric("fovea_stage_seconds_sum", stage="queue") >= 0
        assert server.read_metric("fovea_errors_total") == 0
        assert server.read_metric("fovea_runner_deaths_total") == 0
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0


def _read_date(server: Server) -> Any:
    return parsedate_to_datetime(server.client.get("/health/live").headers["Date"])


def test_wall_clock_is_read_only_for_displayed_dates() -> None:
    uses = [
        (path.relative_to(ROOT / "service").parts[0], use[0])
        for path in (ROOT / "service").rglob("*.py")
        for line in path.read_text().splitlines()
        if (use := re.search(r"\btime\.time\(|\bdatetime\.\w+|perf_counter", line))
    ]
    assert sorted(uses) == [
        ("api", "datetime.fromtimestamp"),  # formats the time since when a version has its state
        ("api", "time.time("),  # the last inference, in the statistics of the Open Inference Protocol
        ("http", "time.time("),  # the header Date
        ("http", "time.time("),  # whether a certificate is valid now
        ("http", "time.time("),  # the start of a trace
        ("rollout", "datetime.now"),  # the time of a verdict on a model version
        ("rollout", "time.time("),  # the last update of the copy of a store, in its index
        ("rollout", "time.time("),  # the same, as a metric
        ("serving", "time.time("),  # the time since when a version has its state
        ("serving", "time.time("),  # the time since when a version is refused
    ]

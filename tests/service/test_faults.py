"""Faults around the service: clients, deadlines, logs and clocks. Each fault is counted and isolated."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import make_jpeg, make_png_header
from tests.poison import BlockingImage, make_poison_environment
from tests.raw import CLASSIFY_HEAD, LIVE_REQUEST, Wire, WireResponse, classify_request
from tests.servers import ROOT, Server, wait_until

PICTURE = make_jpeg()
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@pytest.fixture
def gate(tmp_path: Path) -> BlockingImage:
    return BlockingImage(tmp_path / "gate")


@pytest.fixture
def gated(small_zoo: Path, tmp_path: Path, gate: BlockingImage) -> Iterator[Server]:
    """Its one runner is busy until the gate is opened."""
    settings = {
        "FOVEA_RUNNERS": "1",
        "FOVEA_QUEUE_IMAGES": "8",
        "FOVEA_REQUEST_IMAGES": "4",
        **make_poison_environment(tmp_path),
    }
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running, Wire(running.url) as wire:
        wire.send(classify_request(gate.image))
        running.wait_for_metric(1, "fovea_images_in_flight")
        yield running


# --- deadlines -----------------------------------------------------------------------------------


def test_what_is_late_in_the_queue_is_504_and_costs_no_inference(gated: Server, gate: BlockingImage) -> None:
    with Wire(gated.url) as late:
        late.send(classify_request(PICTURE, b"X-Deadline-Ms: 200"))
        answer = late.read_response()
        assert (answer.status, answer.error_code) == (504, "deadline_exceeded")
        assert "0.2 s (X-Deadline-Ms)" in answer.json["error"]["message"]
    assert gated.read_metric("fovea_images_in_flight") == 1
    gate.release()
    assert gated.client.post("/v1/classify", content=PICTURE).status_code == 200
    assert gated.read_metric("fovea_batch_images_sum") == 1
    assert gated.read_metric("fovea_errors_total", reason="deadline_exceeded") == 1


@pytest.mark.parametrize("value", ["soon", "0", "-5", "nan", "inf", ""])
def test_a_deadline_that_is_none_is_refused(server: Server, value: str) -> None:
    reply = server.client.post("/v1/classify", content=PICTURE, headers={"X-Deadline-Ms": value})
    assert reply.json()["error"]["code"] == "bad_request"
    assert "X-Deadline-Ms" in reply.json()["error"]["message"]


@pytest.mark.parametrize("value", ["60000", "59999.5", "6e4"])
def test_a_deadline_far_off_changes_nothing(server: Server, value: str) -> None:
    reply = server.client.post("/v1/classify", content=PICTURE, headers={"X-Deadline-Ms": value})
    assert reply.status_code == 200


# --- a full queue --------------------------------------------------------------------------------


@pytest.fixture
def full(gated: Server, gate: BlockingImage) -> Iterator[Server]:
    """Its queue has no place left."""
    with ExitStack() as stack:
        for _ in range(7):
            stack.enter_context(Wire(gated.url)).send(classify_request(PICTURE))
        gated.wait_for_metric(8, "fovea_images_in_flight")
        yield gated
    gate.release()  # else the runner is waited for


def _is_refused(answer: WireResponse) -> bool:
    return (answer.status, answer.error_code, answer.is_closing) == (503, "overloaded", False)


def test_a_full_queue_refuses_by_the_headers_and_the_connection_goes_on(full: Server) -> None:
    (model,) = full.client.get("/v1/models").json()["models"]
    named = b"POST /v1/models/%s/classify HTTP/1.1\r\nHost: x\r\n" % model["name"].encode()
    with Wire(full.url) as wire:
        for start in (CLASSIFY_HEAD, b"PUT /v1/classify HTTP/1.1\r\nHost: x\r\n", named):
            wire.send(start, b"X-Request-ID: mine\r\nContent-Length: %d\r\n\r\n" % len(PICTURE))
            answer = wire.read_response()  # the body is not even begun
            assert _is_refused(answer)
            assert answer.json["error"]["request_id"] == answer.headers["x-request-id"] == "mine"
            assert int(answer.headers["retry-after"]) >= 1
            wire.send(PICTURE)
        wire.send(LIVE_REQUEST)
        assert wire.read_response().status == 200
    assert full.read_metric("fovea_requests_total", model=model["name"], status="503") == 3
    assert full.read_metric("fovea_requests_total", route="/v1/models/{name}/classify", status="503") == 1
    assert full.read_metric("fovea_request_seconds_count", route="/v1/classify") == 2
    assert full.read_metric("fovea_errors_total", reason="overloaded") == 3
    assert full.read_metric("fovea_requests_in_flight") == 9  # the scrape is one


def test_a_full_queue_sends_no_100_continue(full: Server) -> None:
    with Wire(full.url) as wire:
        wire.send(CLASSIFY_HEAD, b"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n")
        assert _is_refused(wire.read_response())


def test_a_full_queue_refuses_pipelined_requests_in_their_order(full: Server) -> None:
    ids = [b"X-Request-ID: %d" % number for number in range(20)]
    with Wire(full.url) as wire:
        wire.send(LIVE_REQUEST, *(classify_request(PICTURE, one) for one in ids), LIVE_REQUEST)
        assert wire.read_response().status == 200
        for number in range(20):
            answer = wire.read_response()
            assert _is_refused(answer)
            assert answer.headers["x-request-id"] == str(number)
        assert wire.read_response().status == 200


def test_a_full_queue_still_answers_what_is_wrong_otherwise(full: Server) -> None:
    for path, status in (("/v1/models/none/classify", 404), ("/nowhere", 404)):
        assert full.client.post(path, content=PICTURE).status_code == status
    assert full.client.get("/v1/classify").status_code == 405
    with Wire(full.url) as wire:
        wire.send(classify_request(PICTURE), b"nonsense\r\n\r\n")
        answer = wire.read_response()
        assert _is_refused(answer)
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (400, "bad_http", True)
        assert wire.is_closed()
    assert full.read_metric("fovea_errors_total", reason="bad_http") == 1


def test_a_body_that_turns_into_nonsense_has_one_answer(full: Server) -> None:
    with Wire(full.url) as wire:
        wire.send(CLASSIFY_HEAD, b"Transfer-Encoding: chunked\r\n\r\n", b"nonsense\r\n")
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (400, "bad_http", True)
        assert wire.is_closed()
    assert full.read_metric("fovea_requests_total", status="400") == 1
    assert full.read_metric("fovea_requests_total", status="0") == 0


def test_who_closes_after_a_refusal_is_answered_so(full: Server) -> None:
    with Wire(full.url) as wire:
        wire.send(classify_request(PICTURE, b"Connection: close"))
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (503, "overloaded", True)
        assert wire.is_closed()


# --- clients -------------------------------------------------------------------------------------


def test_who_leaves_gives_the_place_back_and_costs_no_inference(gated: Server, gate: BlockingImage) -> None:
    for round_ in range(1, 4):
        with ExitStack() as stack:
            wires = [stack.enter_context(Wire(gated.url)) for _ in range(7)]
            for wire in wires:
                wire.send(classify_request(PICTURE))
            gated.wait_for_metric(7, "fovea_queue_images")
            full = gated.client.post("/v1/classify", content=PICTURE)
            assert (full.status_code, full.json()["error"]["code"]) == (503, "overloaded")
        gated.wait_for_metric(1, "fovea_images_in_flight")
        gated.wait_for_metric(0, "fovea_queue_images")
        assert gated.read_metric("fovea_errors_total", reason="client_left") == 7 * round_
        assert gated.read_metric("fovea_requests_total", status="0") == 7 * round_
    gate.release()
    assert gated.client.post("/v1/classify", content=PICTURE).status_code == 200
    assert gated.read_metric("fovea_batch_images_sum") == 1


def test_rows_of_who_has_left_or_is_late_cost_no_inference(gated: Server, gate: BlockingImage) -> None:
    """A place each, until then; above 64 KB the body lies in memory that the runners share."""
    asked = b'{"inputs": [{"name": "image", "shape": [4], "datatype": "BYTES"}]}'
    images = 4 * (struct.pack("<I", len(PICTURE) + 20_000) + PICTURE + bytes(20_000))
    head = (
        b"POST /v2/models/small/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: %d\r\n"
        % len(asked)
    )
    head += b"Content-Length: %d\r\n" % (len(asked) + len(images))
    with Wire(gated.url) as leaving:
        leaving.send(head, b"\r\n", asked, images)
        gated.wait_for_metric(5, "fovea_images_in_flight")
    gated.wait_for_metric(1, "fovea_images_in_flight")
    with Wire(gated.url) as late:
        late.send(head, b"X-Deadline-Ms: 200\r\n\r\n", asked, images)
        answer = late.read_response()
    assert (answer.status, answer.json["code"]) == (504, "deadline_exceeded")
    gated.wait_for_metric(1, "fovea_images_in_flight")
    gate.release()
    assert gated.client.post("/v1/classify", content=PICTURE).status_code == 200
    assert gated.read_metric("fovea_batch_images_sum") == 1
    assert gated.read_metric("fovea_errors_total", reason="client_left") == 1


@pytest.mark.long
def test_all_bodies_together_have_a_bound_and_give_it_back(small_zoo: Path) -> None:
    settings = {"FOVEA_BODY_BYTES": "200000", "FOVEA_BODIES_BYTES": "500000"}
    half, rest = b"x" * 120_000, b"x" * 1_000
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running:
        for refused in (4, 8, 12):
            with ExitStack() as stack:
                wires = [stack.enter_context(Wire(running.url)) for _ in range(8)]
                for wire in wires:
                    wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(half + rest), half)
                running.wait_for_metric(refused, "fovea_errors_total", reason="overloaded")
                for wire in wires:
                    wire.send(rest)
                codes = sorted(wire.read_response().error_code for wire in wires)
                assert codes == ["overloaded"] * 4 + ["unsupported_format"] * 4
        assert running.client.post("/v1/classify", content=PICTURE).status_code == 200
        assert running.read_metric("fovea_errors_total", reason="overloaded") == 12


@pytest.fixture(scope="module")
def hasty(small_zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_BODY_TIMEOUT="0.5") as running:
        yield running


def _send_half(wire: Wire) -> None:
    wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(PICTURE), PICTURE[:100])


def _send_byte_by_byte(wire: Wire) -> None:
    """One after the other, for longer than is waited for."""
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
    hasty: Server, reason: str, misbehave: Callable[[Wire], None]
) -> None:
    before = hasty.read_metric("fovea_errors_total"), hasty.read_metric("fovea_errors_total", reason=reason)
    with Wire(hasty.url) as wire:
        misbehave(wire)
        if reason != "client_left":
            assert wire.read_response().error_code == reason
        wait_until(lambda: hasty.read_metric("fovea_errors_total", reason=reason) == before[1] + 1)
    assert hasty.read_metric("fovea_errors_total") == before[0] + 1
    assert hasty.read_metric("fovea_requests_in_flight") == 1
    assert hasty.read_metric("fovea_images_in_flight") == 0


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
@pytest.mark.parametrize("stderr", [_full_stderr, _broken_stderr, _closed_stderr])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_log_that_cannot_be_written_harms_nothing(
    small_zoo: Path, tmp_path: Path, stderr: Callable[[], dict[str, Any]], workers: str
) -> None:
    settings = {"FOVEA_RUNNERS": "1", "FOVEA_WORKERS": workers, **make_poison_environment(tmp_path)}
    with Server(stderr(), FOVEA_MODELS=str(small_zoo), **settings) as running:
        for _ in range(20):  # each is a trace in the runner's log and one in the service's
            reply = running.client.post("/v1/classify", content=b"POISON raise")
            assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
        reply = running.client.post("/v1/classify", content=b"POISON exit")
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
        assert running.client.post("/v1/classify", content=PICTURE).status_code == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=20) == 0


@pytest.mark.long
def test_a_closed_stderr_is_no_socket(small_zoo: Path) -> None:
    with Server(_closed_stderr(), FOVEA_MODELS=str(small_zoo)) as running:
        for pid in (running.process.pid, *running.runner_pids):
            assert Path(f"/proc/{pid}/fd/2").readlink() == Path(os.devnull)


# --- clocks --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.needs("faketime")
def test_the_clock_may_jump(small_zoo: Path, tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0")
    faked = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    limits = {"FOVEA_BATCH_TIMEOUT": "5", "FOVEA_HEADER_TIMEOUT": "5", "FOVEA_BODY_TIMEOUT": "5"}
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DEADLINE_MS="5000", **faked, **limits) as running:
        for jump in ("+86400", "-86400", "+3153600000", "+0"):
            with Wire(running.url) as wire:
                wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(PICTURE), PICTURE[:100])
                before = _read_date(running)
                clock.write_text(jump)
                wait_until(lambda before=before: abs((_read_date(running) - before).total_seconds()) > 3600)  # type: ignore[misc]
                wire.send(PICTURE[100:])
                assert wire.read_response().status == 200
        seconds = running.read_metric("fovea_request_seconds_sum")
        assert 0 < seconds < 60
        assert running.read_metric("fovea_stage_seconds_sum", stage="queue") >= 0
        assert running.read_metric("fovea_errors_total") == 0
        assert running.read_metric("fovea_runner_deaths_total") == 0
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=20) == 0


def _read_date(server: Server) -> Any:
    return parsedate_to_datetime(server.client.get("/health/live").headers["Date"])


def test_the_wall_clock_is_read_only_for_dates_that_are_shown() -> None:
    uses = [
        (path.relative_to(ROOT / "service").parts[0], use[0])
        for path in (ROOT / "service").rglob("*.py")
        for line in path.read_text().splitlines()
        if (use := re.search(r"\btime\.time\(|\bdatetime\.\w+|perf_counter", line))
    ]
    assert sorted(uses) == [
        ("api", "time.time("),  # the last inference, in the statistics of the Open Inference Protocol
        ("http", "time.time("),  # the header Date
        ("http", "time.time("),  # the start of a trace
        ("rollout", "datetime.now"),  # the time of a verdict on a model version
    ]

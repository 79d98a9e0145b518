"""The log of a real server, for each kind of stream."""

from __future__ import annotations

import json
import os
import pty
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fovea.service.observability.metrics import STAGES
from tests.pictures import make_jpeg
from tests.raw import Wire
from tests.servers import Server, wait_until

CLASSIFY = "/v1/classify"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SECRET = "hunter2"


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_request_lines(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(path) if line["event"] == "request"]


@pytest.fixture
def start(small_zoo: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[Server, Path]]]:
    """A server whose log goes to a file."""
    running: list[Server] = []

    def begin(**settings: str) -> tuple[Server, Path]:
        path = tmp_path / "log"
        with path.open("w") as file:
            server = Server({"stderr": file}, FOVEA_MODELS=str(small_zoo), **settings)
            running.append(server.__enter__())
        return server, path

    yield begin
    for server in running:
        if server.process.poll() is None:
            server.__exit__(None, None, None)


def stop_server(server: Server) -> None:
    server.__exit__(None, None, None)


def test_every_request_has_a_line_with_its_ids_model_status_and_stages(start: Any) -> None:
    server, path = start(FOVEA_BODY_BYTES="100000")
    headers = {"X-Request-Id": "my-own-id", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    assert server.client.post(CLASSIFY, content=make_jpeg(), headers=headers).status_code == 200
    assert server.client.post(f"{CLASSIFY}?top_k=2", files=[("a", make_jpeg())] * 3).status_code == 200
    unreadable = server.client.post(CLASSIFY, content=b"nonsense")
    assert server.client.get("/nothing").status_code == 404
    stop_server(server)
    first, several, refused, missing = read_request_lines(path)
    assert list(first)[:3] == ["timestamp", "level", "event"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", first["timestamp"])
    wanted = {
        "level": "info", "request_id": "my-own-id", "trace_id": TRACE, "method": "POST", "route": CLASSIFY,
        "model": "small", "version": "1", "status": 200, "images": 1, "batch_images": 1,
    }  # fmt: skip
    assert first.items() >= wanted.items()
    assert "reason" not in first
    assert list(first["stage_seconds"]) == list(STAGES)
    assert 0 < sum(first["stage_seconds"].values()) <= first["request_seconds"] < 5
    assert (several["images"], several["status"]) == (3, 200)
    assert set(several["stage_seconds"]) == set(STAGES)
    assert (refused["status"], refused["reason"]) == (415, "unsupported_format")
    assert refused["request_id"] == unreadable.headers["x-request-id"]
    assert set(refused["stage_seconds"]) == {"read", "queue"}
    assert (missing["route"], missing["reason"], "model" in missing) == ("unmatched", "not_found", False)


@pytest.mark.long
def test_no_body_no_key_and_no_query_is_told(start: Any) -> None:
    server, path = start(FOVEA_LOG_LEVEL="debug")
    headers = {"Authorization": f"Bearer {SECRET}", "Cookie": SECRET, "X-Api-Key": SECRET}
    for content in (make_jpeg(), SECRET.encode()):
        server.client.post(f"{CLASSIFY}?key={SECRET}", content=content, headers=headers)
        server.client.get(f"/nothing/{SECRET}?key={SECRET}", headers=headers)
    stop_server(server)
    assert len(read_request_lines(path)) == 4
    assert SECRET not in path.read_text()


def test_a_request_that_is_no_http_or_whose_caller_leaves_is_told_of(start: Any) -> None:
    server, path = start()
    with Wire(server.url) as wire:
        wire.send(b"GET nonsense\r\n\r\n")
        assert wire.read_response().status == 400
    with Wire(server.url) as wire:
        wire.send(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        wait_until(lambda: server.read_metric("fovea_requests_in_flight") == 2)  # and the one that asks
    wait_until(lambda: len(read_request_lines(path)) == 2)
    malformed, left = read_request_lines(path)
    assert (malformed["status"], malformed["reason"]) == (400, "bad_http")
    assert (left["status"], left["reason"], left["model"]) == (0, "client_left", "small")


@pytest.mark.long
def test_an_image_among_others_that_fails_is_told_of(start: Any) -> None:
    server, path = start()
    files = [("image", one) for one in (make_jpeg(), b"nonsense", make_jpeg(), b"rubbish", make_jpeg()[:-40])]
    assert server.client.post(CLASSIFY, files=files).status_code == 200
    assert server.read_metric("fovea_errors_total", reason="unsupported_format") == 2
    stop_server(server)
    (line,) = read_request_lines(path)
    assert (line["status"], "reason" in line, line["images"]) == (200, False, 5)
    assert line["image_errors"] == {"unsupported_format": 2, "bad_image": 1}


def test_what_waited_in_vain_says_how_long(start: Any) -> None:
    server, path = start(FOVEA_RUNNERS="1", FOVEA_BATCH_WAIT_MS="1000")
    assert (
        server.client.post(CLASSIFY, content=make_jpeg(), headers={"X-Deadline-Ms": "50"}).status_code == 504
    )
    stop_server(server)
    (line,) = read_request_lines(path)
    assert (line["level"], line["reason"]) == ("warning", "deadline_exceeded")
    assert 0.04 < line["stage_seconds"]["queue"] <= line["request_seconds"]


@pytest.mark.long
@pytest.mark.parametrize("is_direct", [True, False])
def test_what_is_cut_at_the_end_is_told_of_once(start: Any, is_direct: bool) -> None:
    server, path = start(FOVEA_DRAIN_LIMIT="0.2")
    length = b"Content-Length: 1000" if is_direct else b"Transfer-Encoding: chunked"
    with Wire(server.url) as wire:
        wire.send(
            b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nX-Request-Id: my-own-id\r\n", length, b"\r\n\r\n"
        )
        wait_until(lambda: server.read_metric("fovea_requests_in_flight") == 2)  # and the one that asks
        server.process.terminate()
        answer = wire.read_response()
    stop_server(server)
    assert (answer.status, answer.headers["x-request-id"]) == (503, "my-own-id")
    (line,) = (one for one in read_request_lines(path) if one["route"] != "/metrics")
    fields = (line["status"], line["reason"], line["request_id"], line["route"])
    assert fields == (503, "draining", "my-own-id", CLASSIFY)


def test_callers_faults_do_not_hide_the_services(start: Any) -> None:
    server, path = start(FOVEA_LOG_REQUESTS="1", FOVEA_BATCH_WAIT_MS="1000", FOVEA_RUNNERS="1")
    for _ in range(20):
        server.client.get("/nothing")
    late = server.client.post(CLASSIFY, content=make_jpeg(), headers={"X-Deadline-Ms": "1"})
    stop_server(server)
    assert late.status_code == 504
    assert [line["reason"] for line in read_request_lines(path) if line["status"] >= 500] == [
        "deadline_exceeded"
    ]


@pytest.mark.long
def test_probes_and_scrapes_are_told_of_to_whoever_debugs(start: Any) -> None:
    server, path = start()
    for each in ("/health/live", "/health/ready", "/metrics", "/docs"):
        assert server.client.get(each).status_code == 200
    stop_server(server)
    assert read_request_lines(path) == []
    server, path = start(FOVEA_LOG_LEVEL="debug")
    server.client.get("/health/live")
    stop_server(server)
    (line,) = read_request_lines(path)
    assert (line["level"], line["route"], line["status"]) == ("debug", "/health/live", 200)


@pytest.mark.long
def test_of_too_many_some_are_told_of_and_the_others_counted(start: Any) -> None:
    server, path = start(FOVEA_LOG_REQUESTS="5")
    for number in range(120):
        server.client.post(CLASSIFY, content=make_jpeg() if number % 2 else b"nonsense")
    time.sleep(1.1)  # the next second, in which there is room again
    for content in (make_jpeg(), b"nonsense"):
        server.client.post(CLASSIFY, content=content)
    stop_server(server)
    for status in (200, 415):
        lines = [line for line in read_request_lines(path) if line["status"] == status]
        assert len(lines) < 61
        assert len(lines) + sum(line.get("left_out", 0) for line in lines) == 61


def test_it_can_be_silent(start: Any) -> None:
    server, path = start(FOVEA_LOG_REQUESTS="0")
    server.client.post(CLASSIFY, content=make_jpeg())
    stop_server(server)
    assert read_request_lines(path) == []
    assert read_lines(path)  # of the start


@pytest.mark.long
def test_every_line_of_all_workers_is_whole(start: Any) -> None:
    server, path = start(FOVEA_WORKERS="2", FOVEA_RUNNERS="1")
    for _ in range(10):
        assert httpx.post(f"{server.url}{CLASSIFY}", content=make_jpeg()).status_code == 200
    stop_server(server)
    assert len(read_request_lines(path)) == 10


@pytest.mark.long
def test_a_terminal_gets_text(small_zoo: Path) -> None:
    ours, theirs = pty.openpty()
    with Server({"stderr": theirs}, FOVEA_MODELS=str(small_zoo)) as server:
        server.client.post(CLASSIFY, content=make_jpeg(), headers={"X-Request-Id": "my-own-id"})
        written = ""
        while "my-own-id" not in written or "encode" not in written:
            written += os.read(ours, 4096).decode()
    os.close(theirs)
    os.close(ours)
    plain = re.sub(r"\x1b\[[\d;]*m", "", written)
    (line,) = [line for line in plain.splitlines() if "my-own-id" in line]
    assert re.search(r"\[info +\] request +request_id=my-own-id", line)
    assert re.search(r"status=200 .*inference=\d+\.\dms", line)


@pytest.mark.long
def test_a_log_that_nobody_reads_holds_nobody_up(small_zoo: Path) -> None:
    read, write = os.pipe()
    with Server({"stderr": write}, FOVEA_MODELS=str(small_zoo), FOVEA_LOG_REQUESTS="100000") as server:
        os.close(write)
        content = make_jpeg()
        for _ in range(1500):  # 400 bytes each: the pipe has 64 KiB, and 1,000 lines may wait
            assert server.client.post(CLASSIFY, content=content).status_code == 200
        stopping = time.monotonic()
    assert server.process.returncode == 0
    assert time.monotonic() - stopping < 10
    os.close(read)

"""The log of a real server in a file, on a terminal, and in a pipe."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.typing import EventDict

from fovea.service.http import access_log
from fovea.service.http.access_log import _join_lines
from fovea.service.observability.metrics import STAGES
from tests.pictures import make_jpeg
from tests.raw import Wire
from tests.servers import Server, wait_until

CLASSIFY = "/v1/classify"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SECRET = "hunter2"


def read_lines(path: Path) -> list[dict[str, Any]]:
    whole_lines, _, _ = path.read_text().rpartition("\n")  # another line may just be being written
    return [json.loads(line) for line in whole_lines.splitlines()]


def read_request_lines(path: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(path) if line["event"] == "request"]


def test_lines_are_joined_up_to_what_a_pipe_takes_as_a_whole() -> None:
    lines = [b"a" * 2000 + b"\n", b"b" * 2000 + b"\n", b"c" * 2000 + b"\n", b"d" * 5000 + b"\n", b"e\n"]
    pieces = list(_join_lines(lines))
    assert [len(piece) for piece in pieces] == [4002, 2001, 5001, 2]
    assert b"".join(pieces) == b"".join(lines)


@pytest.fixture
def log_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[access_log._ThreadedHandler, int]]:
    """A handler that writes events as they are and gathers for an hour, and the reading end of its pipe."""

    def render_event(_logger: Any, _level: str, event: EventDict) -> str:
        return str(event["event"])

    monkeypatch.setattr(access_log, "_GATHER_SECONDS", 3600)
    read_end, write_end = os.pipe()
    yield access_log._ThreadedHandler(logging.Formatter(), [render_event], write_end), read_end
    os.close(read_end)


def _can_read(descriptor: int, seconds: float) -> bool:
    return bool(select.select([descriptor], [], [], seconds)[0])


def test_lines_of_requests_are_gathered_and_other_lines_are_written_at_once(
    log_pipe: tuple[access_log._ThreadedHandler, int],
) -> None:
    handler, read_end = log_pipe
    handler.write_event("info", {"event": "first"})
    handler.write_event("info", {"event": "second"})
    assert not _can_read(read_end, 0.2)
    handler.emit(logging.makeLogRecord({"msg": "an error"}))
    assert _can_read(read_end, 60)
    assert os.read(read_end, 4096) == b"first\nsecond\nan error\n", (
        "in the order in which they came, as one piece"
    )


def test_gathered_lines_are_written_when_the_process_ends(
    log_pipe: tuple[access_log._ThreadedHandler, int],
) -> None:
    handler, read_end = log_pipe
    handler.write_event("info", {"event": "last"})
    handler.flush()
    assert _can_read(read_end, 60)
    assert os.read(read_end, 4096) == b"last\n"


def test_many_lines_are_written_before_the_queue_is_full(
    log_pipe: tuple[access_log._ThreadedHandler, int],
) -> None:
    handler, read_end = log_pipe
    for _ in range(access_log._MAX_QUEUED_LINES // 2 + 2):
        handler.write_event("info", {"event": "line"})
    assert _can_read(read_end, 60)


@pytest.fixture
def start_server(small_zoo: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[Server, Path]]]:
    """A function that starts a server, and returns it and the file of its log."""
    servers: list[Server] = []

    def start(**settings: str) -> tuple[Server, Path]:
        path = tmp_path / "log"
        with path.open("w") as file:
            server = Server({"stderr": file}, FOVEA_MODELS=str(small_zoo), **settings)
            servers.append(server.__enter__())
        return server, path

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def logged_server(small_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server, and the file of its log."""
    path = tmp_path_factory.mktemp("log") / "log"
    with path.open("w") as file, Server({"stderr": file}, FOVEA_MODELS=str(small_zoo)) as server:
        yield server, path


def stop_server(server: Server) -> None:
    server.__exit__(None, None, None)


def test_log_line_has_ids_model_status_and_stages(logged_server: tuple[Server, Path]) -> None:
    server, path = logged_server
    earlier_lines = read_request_lines(path)
    headers = {"X-Request-Id": "my-own-id", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    assert server.client.post(CLASSIFY, content=make_jpeg(), headers=headers).status_code == 200
    assert server.client.post(f"{CLASSIFY}?top_k=2", files=[("a", make_jpeg())] * 3).status_code == 200
    unreadable_reply = server.client.post(CLASSIFY, content=b"nonsense")
    assert server.client.get("/nothing").status_code == 404
    wait_until(lambda: len(read_request_lines(path)) == len(earlier_lines) + 4)
    image_line, form_line, refused_line, missing_line = read_request_lines(path)[-4:]
    assert list(image_line)[:3] == ["timestamp", "level", "event"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", image_line["timestamp"])
    expected = {
        "level": "info", "request_id": "my-own-id", "trace_id": TRACE, "method": "POST", "route": CLASSIFY,
        "model": "small", "version": "1", "status": 200, "images": 1, "batch_images": 1,
    }  # fmt: skip
    assert image_line.items() >= expected.items()
    assert "reason" not in image_line
    assert list(image_line["stage_seconds"]) == list(STAGES)
    assert 0 < sum(image_line["stage_seconds"].values()) <= image_line["request_seconds"] < 5
    assert (form_line["images"], form_line["status"]) == (3, 200)
    assert set(form_line["stage_seconds"]) == set(STAGES)
    assert (refused_line["status"], refused_line["reason"]) == (415, "unsupported_format")
    assert refused_line["request_id"] == unreadable_reply.headers["x-request-id"]
    assert set(refused_line["stage_seconds"]) == {"read", "queue"}
    assert (missing_line["route"], missing_line["reason"], "model" in missing_line) == (
        "unmatched",
        "not_found",
        False,
    )


@pytest.mark.long
def test_log_contains_no_body_key_or_query(start_server: Any) -> None:
    server, path = start_server(FOVEA_LOG_LEVEL="debug")
    headers = {"Authorization": f"Bearer {SECRET}", "Cookie": SECRET, "X-Api-Key": SECRET}
    for content in (make_jpeg(), SECRET.encode()):
        server.client.post(f"{CLASSIFY}?key={SECRET}", content=content, headers=headers)
        server.client.get(f"/nothing/{SECRET}?key={SECRET}", headers=headers)
    stop_server(server)
    assert len(read_request_lines(path)) == 4
    assert SECRET not in path.read_text()


def test_malformed_and_abandoned_requests_are_logged(logged_server: tuple[Server, Path]) -> None:
    server, path = logged_server
    earlier_lines = read_request_lines(path)
    with Wire(server.url) as wire:
        wire.send(b"GET nonsense\r\n\r\n")
        assert wire.read_response().status == 400
    with Wire(server.url) as wire:
        wire.send(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        wait_until(lambda: server.read_metric("fovea_requests_in_flight") == 2)  # this request and the scrape
    wait_until(lambda: len(read_request_lines(path)) == len(earlier_lines) + 2)
    malformed_line, abandoned_line = read_request_lines(path)[-2:]
    assert (malformed_line["status"], malformed_line["reason"]) == (400, "bad_http")
    assert (abandoned_line["status"], abandoned_line["reason"], abandoned_line["model"]) == (
        0,
        "client_left",
        "small",
    )


@pytest.mark.long
def test_failed_images_of_a_request_are_logged(logged_server: tuple[Server, Path]) -> None:
    server, path = logged_server
    earlier_lines = read_request_lines(path)
    before = server.read_metric("fovea_errors_total", reason="unsupported_format")
    files = [
        ("image", content)
        for content in (make_jpeg(), b"nonsense", make_jpeg(), b"rubbish", make_jpeg()[:-40])
    ]
    assert server.client.post(CLASSIFY, files=files).status_code == 200
    assert server.read_metric("fovea_errors_total", reason="unsupported_format") == before + 2
    wait_until(lambda: len(read_request_lines(path)) == len(earlier_lines) + 1)
    line = read_request_lines(path)[-1]
    assert (line["status"], "reason" in line, line["images"]) == (200, False, 5)
    assert line["image_errors"] == {"unsupported_format": 2, "bad_image": 1}


def test_missed_deadline_logs_the_queue_time(start_server: Any) -> None:
    server, path = start_server(FOVEA_RUNNERS="1", FOVEA_BATCH_WAIT_MS="1000")
    assert (
        server.client.post(CLASSIFY, content=make_jpeg(), headers={"X-Deadline-Ms": "300"}).status_code == 504
    )
    stop_server(server)
    (line,) = read_request_lines(path)
    assert (line["level"], line["reason"]) == ("warning", "deadline_exceeded")
    assert 0.04 < line["stage_seconds"]["queue"] <= line["request_seconds"]


@pytest.mark.long
@pytest.mark.parametrize("is_direct", [True, False])
def test_request_cut_off_at_shutdown_is_logged_once(start_server: Any, is_direct: bool) -> None:
    server, path = start_server(FOVEA_DRAIN_LIMIT="0.2")
    length = b"Content-Length: 1000" if is_direct else b"Transfer-Encoding: chunked"
    with Wire(server.url) as wire:
        wire.send(
            b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nX-Request-Id: my-own-id\r\n", length, b"\r\n\r\n"
        )
        wait_until(lambda: server.read_metric("fovea_requests_in_flight") == 2)  # this request and the scrape
        server.process.terminate()
        reply = wire.read_response()
    stop_server(server)
    assert (reply.status, reply.headers["x-request-id"]) == (503, "my-own-id")
    (line,) = (line for line in read_request_lines(path) if line["route"] != "/metrics")
    fields = (line["status"], line["reason"], line["request_id"], line["route"])
    assert fields == (503, "draining", "my-own-id", CLASSIFY)


def test_client_errors_do_not_hide_server_errors_in_the_log(start_server: Any) -> None:
    server, path = start_server(FOVEA_LOG_REQUESTS="1", FOVEA_BATCH_WAIT_MS="1000", FOVEA_RUNNERS="1")
    for _ in range(20):
        server.client.get("/nothing")
    late_reply = server.client.post(CLASSIFY, content=make_jpeg(), headers={"X-Deadline-Ms": "1"})
    stop_server(server)
    assert late_reply.status_code == 504
    assert [line["reason"] for line in read_request_lines(path) if line["status"] >= 500] == [
        "deadline_exceeded"
    ]


@pytest.mark.long
def test_probes_and_scrapes_are_logged_only_at_debug_level(start_server: Any) -> None:
    server, path = start_server()
    for route in ("/health/live", "/health/ready", "/metrics", "/docs"):
        assert server.client.get(route).status_code == 200
    stop_server(server)
    assert read_request_lines(path) == []
    server, path = start_server(FOVEA_LOG_LEVEL="debug")
    server.client.get("/health/live")
    stop_server(server)
    (line,) = read_request_lines(path)
    assert (line["level"], line["route"], line["status"]) == ("debug", "/health/live", 200)


@pytest.mark.long
def test_log_rate_limit_counts_left_out_requests(start_server: Any) -> None:
    server, path = start_server(FOVEA_LOG_REQUESTS="5")
    for number in range(120):
        server.client.post(CLASSIFY, content=make_jpeg() if number % 2 else b"nonsense")
    time.sleep(1.1)  # the limit is per second
    for content in (make_jpeg(), b"nonsense"):
        server.client.post(CLASSIFY, content=content)
    stop_server(server)
    for status in (200, 415):
        lines = [line for line in read_request_lines(path) if line["status"] == status]
        assert len(lines) < 61
        assert len(lines) + sum(line.get("left_out", 0) for line in lines) == 61


@pytest.mark.long
def test_request_log_can_be_switched_off(start_server: Any) -> None:
    server, path = start_server(FOVEA_LOG_REQUESTS="0")
    server.client.post(CLASSIFY, content=make_jpeg())
    stop_server(server)
    assert read_request_lines(path) == []
    assert read_lines(path)  # the lines of the start


@pytest.mark.long
def test_log_lines_of_two_workers_are_whole(start_server: Any) -> None:
    server, path = start_server(FOVEA_WORKERS="2", FOVEA_RUNNERS="1")
    for _ in range(10):
        assert httpx.post(f"{server.url}{CLASSIFY}", content=make_jpeg()).status_code == 200
    stop_server(server)
    assert len(read_request_lines(path)) == 10


@pytest.mark.long
def test_log_on_a_terminal_is_text(small_zoo: Path) -> None:
    reading_end, terminal = pty.openpty()
    with Server({"stderr": terminal}, FOVEA_MODELS=str(small_zoo)) as server:
        server.client.post(CLASSIFY, content=make_jpeg(), headers={"X-Request-Id": "my-own-id"})
        output = ""
        while "my-own-id" not in output or "encode" not in output:
            output += os.read(reading_end, 4096).decode()
    os.close(terminal)
    os.close(reading_end)
    text = re.sub(r"\x1b\[[\d;]*m", "", output)
    (line,) = [line for line in text.splitlines() if "my-own-id" in line]
    assert re.search(r"\[info +\] request +request_id=my-own-id", line)
    assert re.search(r"status=200 .*inference=\d+\.\dms", line)


@pytest.mark.long
def test_unread_log_blocks_neither_requests_nor_stop(small_zoo: Path) -> None:
    reading_end, writing_end = os.pipe()
    with Server({"stderr": writing_end}, FOVEA_MODELS=str(small_zoo), FOVEA_LOG_REQUESTS="100000") as server:
        os.close(writing_end)
        content = make_jpeg()
        for _ in range(1500):  # 400 bytes each: the pipe has 64 KiB, and 1,000 lines may wait
            assert server.client.post(CLASSIFY, content=content).status_code == 200
    assert server.process.returncode == 0
    os.close(reading_end)

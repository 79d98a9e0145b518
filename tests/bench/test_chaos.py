"""`make chaos`: its clients notice wrong answers, and one short run against a real service finds none."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from fovea.bench import gallery
from fovea.bench.caller import BrokenConnection, Connection, Response, build_request
from fovea.bench.chaos import __main__ as chaos
from fovea.bench.chaos.legs import LegResult
from fovea.bench.chaos.options import GAPS
from fovea.bench.chaos.state import ServedVersions, parse_error_code
from fovea.bench.gallery import REQUEST_FORMATS, Picture
from fovea.bench.groups import create_limited_group
from fovea.bench.processes import start_process
from fovea.bench.workloads import ROOT

CAT = {"cat": 0.7, "dog": 0.3}
DOG = {"dog": 0.7, "cat": 0.3}
PICTURES = [Picture("first", b"1", {0: CAT, 1: DOG}), Picture("second", b"2", {0: DOG, 1: CAT})]
NATIVE = next(request_format for request_format in REQUEST_FORMATS if request_format.name == "native, form")
VERSIONLESS = next(
    request_format for request_format in REQUEST_FORMATS if request_format.name == "TorchServe"
)


def make_native_body(*rows: dict[str, float] | None, version: str = "2") -> bytes:
    results = [
        {"predictions": [{"label": label, "probability": value} for label, value in
                         sorted(row.items(), key=lambda pair: -pair[1])]}
        if row is not None else {"error": {"code": "internal"}}
        for row in rows
    ]  # fmt: skip
    return json.dumps({"model": {"name": "x", "version": version}, "results": results}).encode()


# --- wrong answers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "versions"),
    [
        (make_native_body(CAT, DOG), {"2"}),
        (make_native_body(DOG, CAT, version="3"), {"2", "3"}),
        (make_native_body(None, DOG), {"2"}),
    ],
)
def test_right_answers_are_accepted(content: bytes, versions: set[str]) -> None:
    assert gallery.find_mistake(NATIVE, PICTURES, content, frozenset(versions)) == ""


@pytest.mark.parametrize(
    ("content", "versions", "message"),
    [
        (make_native_body(DOG, CAT), {"2"}, "first is 'dog' by 0.7000, not 0.3000"),
        (make_native_body(CAT, CAT), {"2"}, "second is 'cat'"),
        (make_native_body(CAT, DOG), {"3"}, "by version 2, and 3 is served"),
        (make_native_body(CAT, DOG, version="3"), {"2", "3"}, "first is 'cat'"),
        (make_native_body(CAT), {"2"}, "1 answers to 2 pictures"),
        (
            make_native_body({"dog": 0.3}, DOG),
            {"2"},
            "the first label is 'dog', which is not the most probable",
        ),
        (make_native_body({}, DOG), {"2"}, "first has no labels"),
        (b"{}", {"2"}, "cannot be read"),
        (b"<html>", {"2"}, "cannot be read"),
    ],
)
def test_wrong_answers_are_found(content: bytes, versions: set[str], message: str) -> None:
    assert message in gallery.find_mistake(NATIVE, PICTURES, content, frozenset(versions))


def test_answer_without_a_version_must_fit_a_served_version() -> None:
    def find_complaint(rows: list[dict[str, float]], *versions: str) -> str:
        return gallery.find_mistake(VERSIONLESS, PICTURES, json.dumps(rows).encode(), frozenset(versions))

    assert find_complaint([CAT, DOG], "2") == ""
    assert find_complaint([CAT, DOG], "2", "3") == ""
    assert "first is 'cat'" in find_complaint([CAT, DOG], "3")
    assert "is 'cat'" in find_complaint([CAT, CAT], "2", "3")  # one picture by each version


def test_pictures_with_equal_answers_are_filtered() -> None:
    twin = Picture("twin", b"3", {0: DOG, 1: CAT})
    other = Picture("other", b"4", {0: {"cat": 0.5, "dog": 0.5}, 1: {"cat": 0.4, "dog": 0.6}})
    assert gallery.filter_distinct([PICTURES[0], twin, other]) == [PICTURES[0], other]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({"error": {"code": "bad_image"}}, "bad_image"),
        ({"error": "of Open Inference", "code": "bad_image"}, "bad_image"),
        ({"code": 422, "type": "of TorchServe", "reason": "bad_image"}, "bad_image"),
    ],
)
def test_error_code_is_found_in_every_protocol(content: Any, code: str) -> None:
    assert parse_error_code(Response(422, b"", json.dumps(content).encode())) == (code, "")
    assert parse_error_code(Response(422, b"", b"oh"))[1].startswith("an error 422 without a code")


def test_version_is_served_from_its_swap_to_the_next() -> None:
    versions = ServedVersions("1", overlap_seconds=0.0)
    before = time.monotonic()
    versions.add_version("2")
    during = time.monotonic()
    versions.keep_only("2")
    after = time.monotonic()
    assert versions.versions_between(before - 1, before - 0.5) == {"1"}
    assert versions.versions_between(before - 1, during) == {"1", "2"}
    assert versions.versions_between(after + 0.001, after + 1) == {"2"}


def test_missing_events_are_reported() -> None:
    complete_result = LegResult(1, swaps=1, kinds={"explanation: 200": 3, "giant, 12 MP JPEG: 200": 1})
    assert chaos._find_missing_events(complete_result) == []
    refused_kinds = {"explanation: 503": 3, "giant, 12 MP JPEG: 413": 1}
    assert len(chaos._find_missing_events(LegResult(1, kinds=refused_kinds))) == 3


# --- client connections --------------------------------------------------------------------------


def _run_with_reply(reply: bytes, use_connection: Callable[[Connection], Awaitable[Any]]) -> Any:
    """Connect to a server that sends `reply` and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        writer.close()

    async def connect_and_run() -> Any:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            connection = await Connection.open(server.sockets[0].getsockname()[:2])
            await connection.send(build_request("/", b"", {}))
            try:
                return await use_connection(connection)
            finally:
                connection.abort()

    return asyncio.run(connect_and_run())


@pytest.mark.parametrize(
    ("reply", "content"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"hi"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nh\r\n1\r\ni\r\n0\r\n\r\n", b"hi"),
    ],
)
def test_complete_answers_are_read(reply: bytes, content: bytes) -> None:
    assert _run_with_reply(reply, lambda connection: connection.receive())[::2] == (200, content)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nh\r\n",
        b"hello\r\n\r\n",
    ],
)
def test_incomplete_answers_raise_broken_connection(reply: bytes) -> None:
    with pytest.raises(BrokenConnection):
        _run_with_reply(reply, lambda connection: connection.receive())


# --- the machine ---------------------------------------------------------------------------------


def test_group_limits_memory_and_is_removed() -> None:
    with create_limited_group(64 << 20) as group:
        if group is None:
            pytest.skip("no control group with a memory limit can be made here: be root, or delegate one")
        greedy_command = group.wrap_command([sys.executable, "-c", "bytearray(1 << 28)"])
        assert subprocess.run(greedy_command, check=False).returncode == -9
        assert group.kill_count == 1
        sleeping_command = group.wrap_command([sys.executable, "-c", "input()"])
        with start_process(sleeping_command, stdin=subprocess.PIPE) as process:
            while process.pid not in group.pids:
                assert process.poll() is None
    assert not group.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_undisturbed_service_has_no_complaints(workers: int, tmp_path: Path) -> None:
    """There are only swaps, unloads, leavers, deadlines, bombs and giants."""
    gap_options = [f"--gap={name}=9999" for name in GAPS if name.startswith(("kill", "stop"))]
    command = [sys.executable, "-m", "fovea.bench.chaos", "--minutes=0.2", f"--workers={workers}",
               "--memory=0", "--seed=1", f"--out={tmp_path / 'chaos.json'}", "--gap=swap=5", "--gap=unload=6",
               "--gap=giant=2", *gap_options]  # fmt: skip
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    (leg,) = json.loads((tmp_path / "chaos.json").read_text())["legs"]
    assert leg["swaps"] > 0
    assert sum(number for kind, number in leg["kinds"].items() if kind.startswith("good")) > 50

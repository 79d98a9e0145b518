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
NATIVE = next(one for one in REQUEST_FORMATS if one.name == "native, form")
NAMELESS = next(one for one in REQUEST_FORMATS if one.name == "TorchServe")


def native_body(*rows: dict[str, float] | None, version: str = "2") -> bytes:
    results = [
        {"predictions": [{"label": label, "probability": value} for label, value in
                         sorted(row.items(), key=lambda pair: -pair[1])]}
        if row is not None else {"error": {"code": "internal"}}
        for row in rows
    ]  # fmt: skip
    return json.dumps({"model": {"name": "x", "version": version}, "results": results}).encode()


# --- wrong answers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "served"),
    [
        (native_body(CAT, DOG), {"2"}),
        (native_body(DOG, CAT, version="3"), {"2", "3"}),
        (native_body(None, DOG), {"2"}),
    ],
)
def test_right_answers_are_right(content: bytes, served: set[str]) -> None:
    assert gallery.find_mistake(NATIVE, PICTURES, content, frozenset(served)) == ""


@pytest.mark.parametrize(
    ("content", "served", "what"),
    [
        (native_body(DOG, CAT), {"2"}, "first is 'dog' by 0.7000, not 0.3000"),
        (native_body(CAT, CAT), {"2"}, "second is 'cat'"),
        (native_body(CAT, DOG), {"3"}, "by version 2, and 3 is served"),
        (native_body(CAT, DOG, version="3"), {"2", "3"}, "first is 'cat'"),
        (native_body(CAT), {"2"}, "1 answers to 2 pictures"),
        (native_body({"dog": 0.3}, DOG), {"2"}, "the first label is 'dog', which is not the most probable"),
        (native_body({}, DOG), {"2"}, "first has no labels"),
        (b"{}", {"2"}, "cannot be read"),
        (b"<html>", {"2"}, "cannot be read"),
    ],
)
def test_wrong_answers_are_found(content: bytes, served: set[str], what: str) -> None:
    assert what in gallery.find_mistake(NATIVE, PICTURES, content, frozenset(served))


def test_an_answer_without_a_version_must_be_of_one_that_was_served() -> None:
    def find_complaint(rows: list[dict[str, float]], *served: str) -> str:
        return gallery.find_mistake(NAMELESS, PICTURES, json.dumps(rows).encode(), frozenset(served))

    assert find_complaint([CAT, DOG], "2") == ""
    assert find_complaint([CAT, DOG], "2", "3") == ""
    assert "first is 'cat'" in find_complaint([CAT, DOG], "3")
    assert "is 'cat'" in find_complaint([CAT, CAT], "2", "3")  # one picture by each version


def test_pictures_have_answers_of_their_own() -> None:
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
def test_an_error_s_code_is_found_in_every_protocol(content: Any, code: str) -> None:
    assert parse_error_code(Response(422, b"", json.dumps(content).encode())) == (code, "")
    assert parse_error_code(Response(422, b"", b"oh"))[1].startswith("an error 422 without a code")


def test_versions_are_served_from_their_swap_to_the_next() -> None:
    served = ServedVersions("1", overlap_seconds=0.0)
    before = time.monotonic()
    served.add_version("2")
    during = time.monotonic()
    served.keep_only("2")
    after = time.monotonic()
    assert served.versions_between(before - 1, before - 0.5) == {"1"}
    assert served.versions_between(before - 1, during) == {"1", "2"}
    assert served.versions_between(after + 0.001, after + 1) == {"2"}


def test_what_never_happened_is_said() -> None:
    shown = LegResult(1, swaps=1, kinds={"explanation: 200": 3, "giant, 12 MP JPEG: 200": 1})
    assert chaos._find_missing_events(shown) == []
    refused = {"explanation: 503": 3, "giant, 12 MP JPEG: 413": 1}
    assert len(chaos._find_missing_events(LegResult(1, kinds=refused))) == 3


# --- what clients do -----------------------------------------------------------------------------


def _run_with_reply(answer: bytes, use_connection: Callable[[Connection], Awaitable[Any]]) -> Any:
    """Connect to a server that sends `answer` and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
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
    ("sent", "content"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"hi"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nh\r\n1\r\ni\r\n0\r\n\r\n", b"hi"),
    ],
)
def test_answers_are_read_whole(sent: bytes, content: bytes) -> None:
    assert _run_with_reply(sent, lambda connection: connection.receive())[::2] == (200, content)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nh\r\n",
        b"hello\r\n\r\n",
    ],
)
def test_a_broken_answer_is_broken(sent: bytes) -> None:
    with pytest.raises(BrokenConnection):
        _run_with_reply(sent, lambda connection: connection.receive())


# --- the machine ---------------------------------------------------------------------------------


def test_a_group_limits_memory_and_is_gone_afterwards() -> None:
    with create_limited_group(64 << 20) as group:
        if group is None:
            pytest.skip("no control group with a memory limit can be made here: be root, or delegate one")
        greedy = group.wrap_command([sys.executable, "-c", "bytearray(1 << 28)"])
        assert subprocess.run(greedy, check=False).returncode == -9
        assert group.kill_count == 1
        sleeper = group.wrap_command([sys.executable, "-c", "input()"])
        with start_process(sleeper, stdin=subprocess.PIPE) as process:
            while process.pid not in group.pids:
                assert process.poll() is None
    assert not group.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_service_that_nobody_disturbs_has_no_complaints(workers: int, tmp_path: Path) -> None:
    """Swaps, unloads, leavers, deadlines, bombs and giants alone."""
    never = [f"--gap={name}=9999" for name in GAPS if name.startswith(("kill", "stop"))]
    command = [sys.executable, "-m", "fovea.bench.chaos", "--minutes=0.4", f"--workers={workers}",
               "--memory=0", "--seed=1", f"--out={tmp_path / 'chaos.json'}", *never]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (leg,) = json.loads((tmp_path / "chaos.json").read_text())["legs"]
    assert leg["swaps"] > 0
    assert sum(number for kind, number in leg["kinds"].items() if kind.startswith("good")) > 100

"""Child processes that break the protocol, are silent, or die: whoever waits gets an error at once."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from prometheus_client import CollectorRegistry

from fovea.service.errors import BadImage, GoldenError, Interrupted, ModelError, Unproven
from fovea.service.observability.metrics import Metrics
from fovea.service.rollout import trial
from fovea.service.rollout.trial import (
    ShadowTestReply,
    ShadowTestRequest,
    ShadowTestResult,
    ShadowTests,
    is_lasting,
)
from fovea.service.runners.batch_messages import BatchReport, ImageRequest, Item
from fovea.service.runners.child_process import ChildProcess
from fovea.service.runners.connection import RunnerConnection
from fovea.service.runners.frames import receive_frame
from fovea.service.runners.lane import INFINITY, Lane
from fovea.service.runners.load_messages import (
    LoadCommand,
    LoadedModel,
    LoadReply,
    ProcessPlan,
    Setup,
    SetupReply,
)
from fovea.service.runners.messages import Failure
from fovea.service.runners.runner_interface import RunnerLost
from fovea.service.runners.runner_process import RunnerProcess
from tests.graphs import build_model
from tests.peers import replace_peer
from tests.servers import is_running, wait_until

PLAN = ProcessPlan("cpu", 8, 1, 0, 1, 1_000_000, 1 << 28, 1)
LOAD = LoadCommand(3, "model.onnx", "model.onnx", [1], PLAN)
MODEL = LoadedModel("{}", "cpu", 8, 1e6, 0.1, {})
NOISE = struct.pack("<II", 1 << 31, 1 << 31)


@pytest.fixture
def runner() -> Iterator[RunnerProcess]:
    lock, bodies = os.memfd_create("lock"), os.memfd_create("bodies")
    process = RunnerProcess(Setup(0, PLAN, [LOAD]), lock, bodies, timeout=60)
    yield process
    process.kill_and_wait()
    os.close(lock)
    os.close(bodies)


# --- the start -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (NOISE, "sent a message of 4294967296 bytes"),
        (SetupReply(1, [MODEL], "", [], []).to_bytes(), "answered request 1 instead of 0"),
        (SetupReply(0, [], "", [], []).to_bytes(), "loaded 0 models instead of 1"),
        (LoadReply(0, MODEL).to_bytes(), "sent an unexpected message 'LoadReply'"),
        (b"\0" * 7, "has not loaded its models within 2 s"),
    ],
    ids=["noise", "number", "count", "kind", "silence"],
)
def test_runner_with_wrong_first_reply_is_killed(runner: RunnerProcess, reply: bytes, message: str) -> None:
    if "within 2 s" in message:
        runner._timeout, runner._deadline = 2, time.monotonic() + 2
    with replace_peer(runner) as peer:
        peer.sendall(reply)
        with pytest.raises(Interrupted, match=f"runner {runner.pid} {message}.*it is killed"):
            runner.wait_ready()
        assert runner.wait_exit() == -signal.SIGKILL


def test_failed_start_keeps_its_reason(runner: RunnerProcess) -> None:
    with replace_peer(runner) as peer:
        peer.sendall(Failure(0, "wrong logits", is_golden_error=True).to_bytes())
        with pytest.raises(GoldenError, match="wrong logits"):
            runner.wait_ready()


def test_child_ends_with_its_stream() -> None:
    process = ChildProcess("explain.process")
    assert not process.has_exited
    process.stop()
    assert process.wait_exit() == 0, "it was killed"


def test_stopped_child_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fovea.service.runners.child_process._EXIT_SECONDS", 0.5)
    process = ChildProcess("explain.process")
    os.kill(process.pid, signal.SIGSTOP)
    process.stop()
    assert process.wait_exit() == -signal.SIGKILL


def test_child_outlives_signals_to_the_whole_group(tmp_path: Path) -> None:
    """A trial that SIGTERM had ended would refuse a version for ever."""
    path = tmp_path / "model.onnx"
    onnx.save(build_model(), path)
    process = ChildProcess("rollout.trial_process", 1 << 32, 60)
    try:
        status = Path(f"/proc/{process.pid}/status")

        def ignores_signals() -> bool:
            line = next(one for one in status.read_text().splitlines() if one.startswith("SigIgn"))
            return bool(int(line.split()[1], 16) & 1 << signal.SIGTERM - 1)

        wait_until(ignores_signals)
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
        deadline = time.monotonic() + 60
        load = LoadCommand(0, str(path), str(path), [], PLAN)
        process.send(ShadowTestRequest(0, load, None, [], False).to_pieces(), deadline)
        reply = process.receive_reply(0, ShadowTestReply, deadline)
        assert reply == ShadowTestReply(0, ShadowTestResult(0, 0, 1.0))
    finally:
        process.kill_and_wait()


# --- a connected runner --------------------------------------------------------------------------


class _Calls:
    """A batch of two images and a load that wait for a runner."""

    def __init__(self, process: RunnerProcess, batch_timeout: float = 60) -> None:
        self.outcomes: list[Any] = []
        self.lost = 0
        self.metrics = Metrics(CollectorRegistry())
        self.connection = RunnerConnection(process, self.metrics, batch_timeout, lambda _: self._count_lost())

    def _count_lost(self) -> None:
        self.lost += 1

    def start_batch(self, items: Sequence[Item] = (b"a", b"b")) -> None:
        self.connection.start_batch(
            Lane[Any, Any](3, 4),
            items,
            [INFINITY] * len(items),
            exclusive=False,
            separate=False,
            memory=0,
            on_finish=self.outcomes.append,
        )

    async def run(self, peer: socket.socket, replies: Sequence[bytes]) -> BaseException | None:
        """Send a batch (number 1) and a load (number 2), and then the replies. Return the load's error."""
        await self.connection.connect()
        self.start_batch()
        task = asyncio.create_task(self.connection.load_model(LOAD, timeout=60))
        await asyncio.sleep(0)
        for reply in replies:
            peer.sendall(reply)
        await asyncio.wait([task], timeout=30)
        return task.exception()


REPORT = BatchReport([BadImage("a"), BadImage("b")], [0.0, 0.0], 0.0, 0, 1)

WRONG_REPLIES = {
    "noise": (NOISE, "sent a message of 4294967296 bytes"),
    "header": (struct.pack("<II", 3, 0) + b"[1]", "sent a header that cannot be read"),
    "kind": (SetupReply(1, [], "", [], []).to_bytes(), "sent an unexpected message 'SetupReply'"),
    "batch": (BatchReport([], [], 0.0, 0, 2).to_bytes(), "answered batch 2 instead of batch 1"),
    "failed batch": (Failure(7, "").to_bytes(), "answered batch 7 instead of batch 1"),
    "load": (LoadReply(1, MODEL).to_bytes(), "answered load 1, which is not open"),
    "count": (BatchReport([BadImage("a")], [0.0], 0.0, 0, 1).to_bytes(), "gave 1 answers to 2 images"),
    "twice": (REPORT.to_bytes() * 2, "answered batch 1 instead of nothing"),
    "report": (REPORT.to_bytes().replace(b'"logits":0', b'"logits":8'), "sent a report that cannot be read"),
}


@pytest.mark.parametrize("name", WRONG_REPLIES)
def test_runner_with_wrong_reply_is_killed(
    runner: RunnerProcess, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    reply, message = WRONG_REPLIES[name]

    async def work() -> None:
        with replace_peer(runner) as peer:
            calls = _Calls(runner)
            error = await calls.run(peer, [reply])
            assert isinstance(error, Interrupted)
            assert calls.lost == 1
            (outcome,) = calls.outcomes
            assert isinstance(outcome, RunnerLost) == (name != "twice")
            assert calls.connection.is_lost
            with pytest.raises(Interrupted, match="has died before"):
                await calls.connection.load_model(LOAD, timeout=60)

    asyncio.run(work())
    assert runner.wait_exit() == -signal.SIGKILL
    assert f"runner {runner.pid} {message}" in caplog.text
    assert "; it is killed" in caplog.text


def test_right_replies_arrive_in_any_pieces(runner: RunnerProcess) -> None:
    stream = Failure(2, "no", is_golden_error=True).to_bytes() + REPORT.to_bytes()

    async def work() -> None:
        with replace_peer(runner) as peer:
            calls = _Calls(runner)
            error = await calls.run(peer, [stream[start : start + 7] for start in range(0, len(stream), 7)])
            assert isinstance(error, GoldenError)
            while not calls.outcomes:
                await asyncio.sleep(0.001)
            assert [list(map(str, outcome)) for outcome in calls.outcomes] == [["a", "b"]]
            assert not calls.connection.is_lost
            calls.connection.close()

    asyncio.run(work())


def test_silent_runner_is_killed(runner: RunnerProcess, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        with replace_peer(runner) as peer:
            calls = _Calls(runner, batch_timeout=0.3)
            error = await calls.run(peer, [])
            assert isinstance(error, Interrupted)
            assert isinstance(calls.outcomes[0], RunnerLost)
            calls.metrics.fold()
            busy_seconds = calls.metrics.registry.get_sample_value("fovea_runner_busy_seconds_total")
            assert busy_seconds and busy_seconds >= 0.3

    asyncio.run(work())
    assert (
        f"runner {runner.pid} has not answered for 0.3 s (FOVEA_BATCH_TIMEOUT); it is killed" in caplog.text
    )


def test_boxes_have_the_time_of_all_their_batches(
    runner: RunnerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """Nine boxes are three batches of at most four. Otherwise a slow model would lose its runners to them."""

    async def work() -> None:
        with replace_peer(runner):
            calls = _Calls(runner, batch_timeout=0.2)
            await calls.connection.connect()
            started_at = time.monotonic()
            calls.start_batch([ImageRequest(b"a", boxes=((0, 0, 1, 1),) * 9)])
            while not calls.outcomes:
                await asyncio.sleep(0.001)
            assert isinstance(calls.outcomes[0], RunnerLost)
            assert time.monotonic() - started_at >= 0.6

    asyncio.run(work())
    assert f"runner {runner.pid} has not answered for 0.6 s (FOVEA_BATCH_TIMEOUT)" in caplog.text


def test_request_to_a_dying_runner_fails_at_once(runner: RunnerProcess) -> None:
    """The event loop does not know yet that the process has ended."""

    async def work() -> None:
        calls = _Calls(runner)
        await calls.connection.connect()
        runner.kill_and_wait()
        calls.start_batch()
        calls.connection.give_up()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert isinstance(calls.outcomes[0], RunnerLost)

    asyncio.run(work())


# --- a shadow test -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "error_type", "message", "lasting"),
    [
        (NOISE, Unproven, "its trial process sent a message of", False),
        (ShadowTestReply(1, ShadowTestResult(0, 0, 1.0)).to_bytes(), Unproven, "answered request 1", False),
        (b"\0\0", Unproven, "it could not be tried within 10 times 0.05 s", False),
        (Failure(0, "no labels").to_bytes(), ModelError, "no labels", True),
        (None, ModelError, "its trial process ended with exit code 0", True),
    ],
    ids=["noise", "number", "silence", "failure", "end"],
)
def test_shadow_test_ends_whatever_its_process_sends(
    monkeypatch: pytest.MonkeyPatch,
    reply: bytes | None,
    error_type: type[Exception],
    message: str,
    lasting: bool,
) -> None:
    processes: list[ChildProcess] = []
    peers: list[socket.socket] = []

    def start(_module: str, *arguments: int, quiet: bool) -> ChildProcess:
        process = ChildProcess("explain.process", quiet=quiet)
        peer = replace_peer(process)
        processes.append(process)
        peers.append(peer)
        if reply is None:
            os.kill(process.pid, signal.SIGCONT)
            assert process.wait_exit() == 0
            peer.close()
        else:
            peer.sendall(reply)
        return process

    monkeypatch.setattr(trial, "ChildProcess", start)
    seconds = 0.05 if "0.05 s" in message else 60
    with pytest.raises(error_type, match=message) as refusal:
        ShadowTests(seconds=seconds, memory=1 << 32).run(LOAD, None, [])
    assert type(refusal.value) is error_type
    assert is_lasting(refusal.value) == lasting
    assert not is_running(processes[0].pid)
    if reply is not None:
        frame = receive_frame(peers[0])
        assert frame is not None
        assert ShadowTestRequest.from_frame(frame).candidate == LOAD
        peers[0].close()

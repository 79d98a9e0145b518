"""A change and its replies: each request gets one reply, late replies do no harm, others are faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from fovea.service.artifact.repository import ServingState, find_versions
from fovea.service.errors import Draining, GoldenError, Interrupted, ModelNotFound
from fovea.service.observability.metrics import Metrics
from fovea.service.rollout.manager import ModelManager
from fovea.service.runners.frames import FrameError
from fovea.service.serving.classifier import Classifier
from fovea.service.settings import load_settings
from fovea.service.supervisor.coordinator import Coordinator
from fovea.service.supervisor.messages import (
    AbandonCommand,
    ChangeReply,
    ErrorValues,
    LoadModelRequest,
    PrepareReply,
    PrepareRequest,
    ServeCommand,
    SupervisorMessage,
    UnloadModelRequest,
    VersionValues,
    WorkerMessage,
)
from fovea.service.supervisor.participant import Participant
from tests.graphs import add_to_repository, build_model

STATE = ServingState({}, None)
GOLDEN, INTERRUPTED = ErrorValues("GoldenError", "not reproduced"), ErrorValues("Interrupted", "no memory")


class _Worker:
    """A worker that records what it is sent, and replies when the test says so."""

    def __init__(self) -> None:
        self.messages: list[SupervisorMessage] = []
        self.is_killed = False

    def send_message(self, message: SupervisorMessage) -> None:
        if self.is_killed:
            raise BrokenPipeError
        self.messages.append(message)

    def kill(self) -> None:
        self.is_killed = True

    @property
    def request(self) -> PrepareRequest:
        """The latest request to prepare."""
        return next(one for one in reversed(self.messages) if isinstance(one, PrepareRequest))


class _Supervisor:
    """A coordinator and its workers."""

    def __init__(self, worker_count: int, timeout: float = 60.0) -> None:
        self.workers = [_Worker() for _ in range(worker_count)]
        self.end_count = 0
        self.coordinator = Coordinator(lambda: self.workers, self._count_end, state=STATE, timeout=timeout)

    def _count_end(self) -> None:
        self.end_count += 1

    async def start_change(self) -> asyncio.Task[None]:
        """Begin to prepare a change, and return when the first worker is asked."""
        task = asyncio.create_task(self.coordinator.prepare("a", []))
        await asyncio.sleep(0)
        return task

    async def reply(self, worker: _Worker, error: ErrorValues | None = None) -> None:
        self.coordinator.handle_reply(worker, PrepareReply(worker.request.number, error))
        for _ in range(5):  # until the task has taken the reply
            await asyncio.sleep(0)


def test_first_worker_prepares_alone_and_all_get_the_state() -> None:
    async def work() -> None:
        supervisor = _Supervisor(3)
        first, *others = supervisor.workers
        task = await supervisor.start_change()
        assert [len(one.messages) for one in supervisor.workers] == [1, 0, 0]
        await supervisor.reply(first)
        assert [len(one.messages) for one in supervisor.workers] == [1, 1, 1]
        for worker in others:
            assert not task.done()
            await supervisor.reply(worker)
        await task
        supervisor.coordinator.serve(STATE)
        assert all(one.messages[1:] == [ServeCommand.from_state(STATE)] for one in supervisor.workers)
        assert supervisor.end_count == 1

    asyncio.run(work())


def test_verdict_on_the_file_counts_more_than_an_interruption() -> None:
    async def work() -> None:
        supervisor = _Supervisor(3)
        task = await supervisor.start_change()
        for worker, error in zip(supervisor.workers, (None, INTERRUPTED, GOLDEN), strict=True):
            await supervisor.reply(worker, error)
        with pytest.raises(GoldenError, match="not reproduced"):
            await task
        assert all(one.messages[-1] == AbandonCommand("a") for one in supervisor.workers)

    asyncio.run(work())


@pytest.mark.parametrize("dead_count", [1, 2])
def test_change_does_not_wait_for_dead_workers(dead_count: int) -> None:
    async def work() -> None:
        supervisor = _Supervisor(2)
        first, second = supervisor.workers
        task = await supervisor.start_change()
        supervisor.coordinator.on_worker_lost(first)
        await asyncio.sleep(0.01)
        if dead_count == 2:
            supervisor.coordinator.on_worker_lost(second)
            with pytest.raises(Interrupted, match="died or hung"):
                await task
        else:
            await supervisor.reply(second)
            await task

    asyncio.run(work())


def test_reply_to_an_abandoned_request_is_expected_once_and_answers_no_later_request() -> None:
    async def work() -> None:
        supervisor = _Supervisor(1)
        (worker,) = supervisor.workers
        first_task = await supervisor.start_change()
        first_number = worker.request.number
        first_task.cancel()
        with suppress(asyncio.CancelledError):
            await first_task
        second_task = await supervisor.start_change()
        assert worker.request.number != first_number
        late_reply = PrepareReply(first_number, GOLDEN)
        supervisor.coordinator.handle_reply(worker, late_reply)
        with pytest.raises(FrameError, match=f"answered request {first_number}, which is not open"):
            supervisor.coordinator.handle_reply(worker, late_reply)
        assert not second_task.done()
        await supervisor.reply(worker)
        await second_task

    asyncio.run(work())


def test_worker_that_does_not_reply_in_time_is_killed_and_may_still_reply() -> None:
    async def work() -> None:
        supervisor = _Supervisor(1, timeout=0.01)
        (worker,) = supervisor.workers
        task = await supervisor.start_change()
        with pytest.raises(Interrupted, match="died or hung"):
            await task
        assert worker.is_killed
        await supervisor.reply(worker)  # the reply was on its way
        with pytest.raises(FrameError, match="not open"):
            await supervisor.reply(worker)

    asyncio.run(work())


def test_reply_of_another_worker_is_a_fault() -> None:
    async def work() -> None:
        supervisor = _Supervisor(2)
        first, second = supervisor.workers
        task = await supervisor.start_change()
        with pytest.raises(FrameError, match="not open"):
            supervisor.coordinator.handle_reply(second, PrepareReply(first.request.number, None))
        task.cancel()

    asyncio.run(work())


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return add_to_repository(build_model(), tmp_path / "zoo")


def _run_with_participant(
    zoo: Path, work: Callable[[Participant, list[Any]], Coroutine[Any, Any, None]]
) -> None:
    """Run `work` with a participant, and the list of all that it sends."""
    classifier = Classifier(load_settings(models=zoo, runners=1), Metrics(CollectorRegistry()))

    async def run() -> None:
        await classifier.start()
        manager = ModelManager(classifier)
        sent: list[WorkerMessage] = []
        participant = Participant()
        participant.attach(sent.append, manager)
        try:
            await work(participant, sent)
        finally:
            manager.close()
            await classifier.close()

    asyncio.run(run())


def test_callers_get_the_replies_to_their_own_requests(zoo: Path) -> None:
    async def work(participant: Participant, sent: list[Any]) -> None:
        load, unload = (
            asyncio.create_task(one) for one in (participant.load("a", "2"), participant.unload("b"))
        )
        await asyncio.sleep(0)
        assert sent == [LoadModelRequest(0, "a", "2"), UnloadModelRequest(1, "b")]
        participant.handle_message(ChangeReply(1, ErrorValues("ModelNotFound", "no model 'b'")))
        with pytest.raises(ModelNotFound, match="no model 'b'"):
            await unload
        assert not load.done()
        participant.handle_message(ChangeReply(0, None))
        await load

    _run_with_participant(zoo, work)


def test_reply_to_a_caller_who_has_left_is_expected_once(zoo: Path) -> None:
    async def work(participant: Participant, sent: list[Any]) -> None:
        load = asyncio.create_task(participant.load("a"))
        await asyncio.sleep(0)
        load.cancel()
        with suppress(asyncio.CancelledError):
            await load
        participant.handle_message(ChangeReply(sent[0].number, ErrorValues("SwapRefused", "too slow")))
        with pytest.raises(FrameError, match="answered request 0, which is not open"):
            participant.handle_message(ChangeReply(sent[0].number, None))

    _run_with_participant(zoo, work)


def test_requests_fail_at_once_when_the_supervisor_has_ended(zoo: Path) -> None:
    async def work(participant: Participant, sent: list[Any]) -> None:
        load = asyncio.create_task(participant.load("a"))
        await asyncio.sleep(0)
        participant.fail_pending()
        for request in (load, participant.unload("a")):
            with pytest.raises(Draining, match="the supervisor has ended"):
                await request
        assert len(sent) == 1

    _run_with_participant(zoo, work)


def test_broken_version_is_refused_with_the_number_of_the_request(zoo: Path) -> None:
    async def work(participant: Participant, sent: list[Any]) -> None:
        (zoo / "small" / "2").mkdir()
        (zoo / "small" / "2" / "model.onnx").write_bytes(b"no model")
        (version,) = find_versions(zoo, "small", "2")
        participant.handle_message(PrepareRequest(7, "small", [VersionValues.from_version(version)], False))
        while not sent:
            await asyncio.sleep(0.01)
        (reply,) = sent
        assert (reply.number, reply.error.kind) == (7, "ModelError")

    _run_with_participant(zoo, work)

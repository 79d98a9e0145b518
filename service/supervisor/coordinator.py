"""Two-phase commit of changes to the served models: all workers prepare a change, or none commits it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from itertools import count
from typing import Protocol, TypeAlias

from fovea.service.artifact.repository import ModelVersion, ServingState
from fovea.service.errors import Interrupted
from fovea.service.runners.frames import FrameError
from fovea.service.supervisor.messages import (
    AbandonCommand,
    PrepareReply,
    PrepareRequest,
    ServeCommand,
    SupervisorMessage,
    VersionValues,
)

log = logging.getLogger(__name__)

_Outcome: TypeAlias = PrepareReply | None
"""Reply of a worker, or None if it has died or hangs."""


class Worker(Protocol):
    """Interface of a worker process for changes."""

    def send_message(self, message: SupervisorMessage) -> None:
        """Send a message to the worker. Raises `OSError` when the worker does not read."""

    def kill(self) -> None:
        """Kill the worker. Another worker takes its place."""


class Coordinator:
    """Coordinator of changes in a supervisor, as a `RolloutTarget`.

    Every method must be called on the event loop.
    """

    def __init__(
        self,
        workers: Callable[[], Collection[Worker]],
        on_end: Callable[[], None],
        *,
        state: ServingState,
        timeout: float,
    ) -> None:
        """Set the workers, the callback for the end of a change, the first state, and the time limit.

        The time limit is in seconds.

        `workers` returns the active workers. No worker may join between the beginning of a change and its
        end, which `on_end` reports. A worker that is not ready within `timeout` hangs and is killed, because
        all its own limits have passed by then.
        """
        self._workers = workers
        self._timeout = timeout
        self._on_end = on_end
        self.is_changing = False
        self._request_numbers = count()
        self._open_requests: dict[tuple[Worker, int], asyncio.Future[_Outcome]] = {}
        """Requests to prepare without a reply, by worker and number, also those that nobody waits for."""
        self.state = state
        """State that the workers serve. A worker that has loaded other versions must start again."""

    async def prepare(
        self, name: str | None, versions: Sequence[ModelVersion], *, force: bool = False
    ) -> None:
        """Let all workers prepare a change, as `RolloutTarget` describes.

        The first worker prepares before the others: if it refuses, the others need not try. If all prepared
        at once, requests would also lose more processor time. If there is no worker, later workers start with
        the new versions.
        """
        values = [VersionValues.from_version(one) for one in versions]
        request = PrepareRequest(next(self._request_numbers), name, values, force)
        self.is_changing = True
        workers = list(self._workers())
        try:
            outcomes: list[_Outcome] = []
            for group in (workers[:1], workers[1:]):
                outcomes += await self._prepare_workers(group, request)
                _check_outcomes(outcomes)
            if outcomes and not any(outcomes):  # none has prepared it
                raise Interrupted("a worker died or hung during the change")
        except BaseException:
            for worker in workers:
                self._send(worker, AbandonCommand(name))
            self._end()
            raise

    async def _prepare_workers(self, workers: Sequence[Worker], request: PrepareRequest) -> list[_Outcome]:
        """Ask workers to prepare a change, and return the outcomes.

        The replacement of a worker that has died starts with the versions that are served then.
        """
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[_Outcome]] = []
        for worker in workers:
            future = loop.create_future()
            futures.append(future)
            if worker not in self._workers():  # it has died while another worker prepared
                future.set_result(None)
                continue
            self._open_requests[worker, request.number] = future
            if not self._send(worker, request):
                future.set_result(None)
                worker.kill()  # it would not receive the new state either
        timeout_timer = loop.call_later(self._timeout, self._give_up)
        try:
            return list(await asyncio.gather(*futures))
        finally:
            timeout_timer.cancel()

    def serve(self, state: ServingState) -> None:
        """Make all workers serve `state`, as `RolloutTarget` describes."""
        # The state changes first: `_end` admits workers that have loaded their models meanwhile, and those
        # with other versions must start again.
        self.state = state
        for worker in self._workers():
            self.send_state(worker)
        if self.is_changing:
            self._end()

    def send_state(self, worker: Worker) -> None:
        """Make a worker serve the current state, or kill it if it cannot be told."""
        if not self._send(worker, ServeCommand.from_state(self.state)):
            worker.kill()  # it would go on serving the old state

    def handle_reply(self, worker: Worker, reply: PrepareReply) -> None:
        """Handle a worker's reply. The supervisor calls this on the event loop.

        Raises `FrameError` if no open request expects the reply.
        """
        future = self._open_requests.pop((worker, reply.number), None)
        if future is None:
            raise FrameError(f"answered request {reply.number}, which is not open")
        if not future.done():  # done: the change was abandoned meanwhile
            future.set_result(reply)

    def on_worker_lost(self, worker: Worker) -> None:
        """Close the requests to a worker that has died, so that `prepare` does not wait for it."""
        for key in [one for one in self._open_requests if one[0] is worker]:
            future = self._open_requests.pop(key)
            if not future.done():
                future.set_result(None)

    def _give_up(self) -> None:
        """Kill the workers that have not replied in time."""
        for (worker, _), future in self._open_requests.items():
            if not future.done():
                log.error("a worker has not prepared a change within %g s; it is killed", self._timeout)
                worker.kill()
                future.set_result(None)

    def _end(self) -> None:
        """End the change, so that workers may join again."""
        self.is_changing = False
        self._on_end()

    def _send(self, worker: Worker, message: SupervisorMessage) -> bool:
        """Send a message to a worker and return whether that was possible."""
        try:
            worker.send_message(message)
        except OSError:  # it has died, or does not read
            return False
        return True


def _check_outcomes(outcomes: Sequence[_Outcome]) -> None:
    """Raise `ModelError` if a worker has refused.

    A verdict on the file takes precedence over an interruption.
    """
    refusals = [one.error.to_exception() for one in outcomes if one and one.error]
    if refusals:
        raise min(refusals, key=lambda one: isinstance(one, Interrupted))

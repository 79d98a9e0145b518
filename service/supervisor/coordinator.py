"""Two-phase commit of changes to the served models: all workers prepare a change, or none commits it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, Protocol

from fovea.service.artifact.repository import ModelVersion, RefusedVersion
from fovea.service.errors import GoldenError, Interrupted, ModelError, Unproven

log = logging.getLogger(__name__)

_LOST: Final = "lost"
"""Kind of the answer on behalf of a worker that has died."""

_KINDS: Final = {kind.__name__: kind for kind in (Interrupted, Unproven, GoldenError)}


class Worker(Protocol):
    """Interface of a worker process for changes."""

    def tell(self, **message: Any) -> None:
        """Send a message to the worker. Raises `OSError` when the worker does not read."""

    def kill(self) -> None:
        """Kill the worker. Another worker takes its place."""


class Broadcast:
    """Coordinator of changes in a supervisor, as a `RolloutTarget` of `service.rollout.watcher`.

    Every method must be called on the event loop.
    """

    def __init__(
        self, workers: Callable[[], Collection[Worker]], on_end: Callable[[], None], *, timeout: float
    ) -> None:
        """Set the workers, the callback for the end of a change, and the time limit in seconds.

        `workers` returns the active workers. No worker may join between the beginning of a change and its
        end, which `on_end` reports. A worker that is not ready within `timeout` seconds hangs and is killed,
        because all its own limits have passed by then.
        """
        self._workers = workers
        self._timeout = timeout
        self._on_end = on_end
        self.is_changing = False
        self._changes = 0
        self._waiting: dict[Worker, asyncio.Future[dict[str, Any]]] = {}
        self._prepared: Sequence[Worker] = ()
        self.generation = 0
        """Number of committed changes. A worker that loaded an earlier generation must start again."""

    async def prepare(self, name: str | None, found: Sequence[ModelVersion], *, force: bool = False) -> None:
        """Have all workers prepare a change, as `service.rollout.watcher.RolloutTarget` describes.

        The first worker prepares alone: if it refuses, the others need not try. If all prepared at once,
        requests would also lose more processor time. If there is no worker, later workers start with the new
        versions.
        """
        self._changes += 1
        self.is_changing = True
        self._prepared = list(self._workers())
        try:
            answers: list[dict[str, Any]] = []
            for group in (self._prepared[:1], self._prepared[1:]):
                answers += await self._ask(group, name, found, force=force)
                _check(answers)
            if answers and all(answer["error"] for answer in answers):
                raise Interrupted(answers[0]["error"])  # all workers died; none has prepared it
        except BaseException:
            for worker in self._prepared:
                self._tell(worker, abandon=name)
            self._end()
            raise

    async def _ask(
        self, workers: Sequence[Worker], name: str | None, found: Sequence[ModelVersion], *, force: bool
    ) -> list[dict[str, Any]]:
        """Ask workers to prepare a change and return their answers.

        A worker that has died counts as lost. The worker that takes its place starts with the versions served
        then.
        """
        loop = asyncio.get_running_loop()
        self._waiting = {worker: loop.create_future() for worker in workers}
        plain = [one.to_plain() for one in found]
        for worker in workers:
            if worker in self._workers():  # it may have died while another worker prepared
                if not self._tell(worker, prepare=plain, name=name, change=self._changes, force=force):
                    worker.kill()  # it would not receive the commit either
            else:
                self.lost(worker)
        alarm = loop.call_later(self._timeout, self._give_up)
        try:
            return list(await asyncio.gather(*self._waiting.values()))
        finally:
            alarm.cancel()

    def commit(self, name: str | None) -> None:
        """Make all prepared workers switch, as `service.rollout.watcher.RolloutTarget` describes."""
        self.generation += 1
        for worker in self._prepared:
            if not self._tell(worker, commit=name):
                worker.kill()  # it would go on serving the old versions
        self._end()

    def choose(self, default: str | None) -> None:
        """Set the default model in all workers, as `service.rollout.watcher.RolloutTarget` describes."""
        self.generation += 1
        for worker in self._workers():
            if not self._tell(worker, default=default):
                worker.kill()  # it would go on with the old default

    def note(self, refused: Sequence[RefusedVersion], *, waits: bool) -> None:
        """Send the refused versions to all workers, as `service.rollout.watcher.RolloutTarget` describes."""
        for worker in self._workers():
            self._tell(worker, refused=refused, waits=waits)

    def told(self, worker: Worker, message: dict[str, Any]) -> None:
        """Handle a worker's answer to a prepare message."""
        # An answer to an earlier change is ignored.
        if message["prepared"] == self._changes:
            self._settle(worker, message)

    def lost(self, worker: Worker) -> None:
        """Settle the answer of a worker that has died or hangs."""
        self._settle(worker, {"error": "a worker died meanwhile, or hangs", "kind": _LOST})

    def _give_up(self) -> None:
        """Kill the workers that have not answered in time."""
        for worker, answer in self._waiting.items():
            if not answer.done():
                log.error("a worker was not ready for a change within %g s; it is killed", self._timeout)
                worker.kill()
                self.lost(worker)

    def _end(self) -> None:
        """End the change, so that workers may join again."""
        self.is_changing = False
        self._on_end()

    def _settle(self, worker: Worker, answer: dict[str, Any]) -> None:
        """Set a worker's answer, unless it is already set."""
        waiting = self._waiting.get(worker)
        if waiting and not waiting.done():
            waiting.set_result(answer)

    def _tell(self, worker: Worker, **message: Any) -> bool:
        """Send a message to a worker and return whether that was possible."""
        try:
            worker.tell(**message)
        except OSError:  # it has died, or does not read
            self.lost(worker)
            return False
        return True


def _check(answers: Sequence[dict[str, Any]]) -> None:
    """Raise `ModelError` if a worker has refused.

    A verdict on the file takes precedence over an interruption.
    """
    refusals = [answer for answer in answers if answer["error"] and answer["kind"] != _LOST]
    if refusals:
        worst = min(refusals, key=lambda one: one["kind"] == Interrupted.__name__)
        raise _KINDS.get(worst["kind"], ModelError)(worst["error"])

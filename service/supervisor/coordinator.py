"""Changes to what all workers serve, in two phases: all have it ready, or none switches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, Protocol

from fovea.service.artifact.repository import Found, Refused
from fovea.service.errors import GoldenError, Interrupted, ModelError, Unproven

log = logging.getLogger(__name__)

_LOST: Final = "lost"
"""The kind of the answer of a worker that is gone."""

_KINDS: Final = {kind.__name__: kind for kind in (Interrupted, Unproven, GoldenError)}


class Worker(Protocol):
    """One worker process, as far as changes go."""

    def tell(self, **message: Any) -> None:
        """Send it a message. Raises `OSError` when it does not listen."""

    def kill(self) -> None:
        """End it; another takes its place."""


class Broadcast:
    """The `Stage` of `service.rollout.watcher` in a supervisor. Call its methods on the event loop."""

    def __init__(
        self, workers: Callable[[], Collection[Worker]], on_end: Callable[[], None], *, timeout: float
    ) -> None:
        """`workers` are those that are at work now. There must be no more of them from the beginning of a
        change to its end, of which `on_end` tells. One that is not ready after `timeout` seconds, in which
        all its own limits have passed, hangs: it is killed."""
        self._workers = workers
        self._timeout = timeout
        self._on_end = on_end
        self.is_changing = False
        self._changes = 0
        self._waiting: dict[Worker, asyncio.Future[dict[str, Any]]] = {}
        self._prepared: Sequence[Worker] = ()
        self.generation = 0
        """How many changes there have been: whoever has loaded what was served before must load anew."""

    async def prepare(self, name: str | None, found: Sequence[Found], *, force: bool = False) -> None:
        """See `service.rollout.watcher.Stage`.

        One worker goes first: if it refuses, the others need not try; and all at once would take more from
        those who wait for answers. Where there is no worker, those that come will serve it.
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
                raise Interrupted(answers[0]["error"])  # of those that are gone; nobody has it ready
        except BaseException:
            for worker in self._prepared:
                self._tell(worker, abandon=name)
            self._end()
            raise

    async def _ask(
        self, workers: Sequence[Worker], name: str | None, found: Sequence[Found], *, force: bool
    ) -> list[dict[str, Any]]:
        """What these say once they have it ready, or cannot. One that has died meanwhile says nothing: the
        one that takes its place begins with what is served then."""
        loop = asyncio.get_running_loop()
        self._waiting = {worker: loop.create_future() for worker in workers}
        plain = [one.to_plain() for one in found]
        for worker in workers:
            if worker in self._workers():  # it may have died while another prepared
                if not self._tell(worker, prepare=plain, name=name, change=self._changes, force=force):
                    worker.kill()  # it could not follow the change either
            else:
                self.lost(worker)
        alarm = loop.call_later(self._timeout, self._give_up)
        try:
            return list(await asyncio.gather(*self._waiting.values()))
        finally:
            alarm.cancel()

    def commit(self, name: str | None) -> None:
        """See `service.rollout.watcher.Stage`."""
        self.generation += 1
        for worker in self._prepared:
            if not self._tell(worker, commit=name):
                worker.kill()  # it would go on with what is not served any more
        self._end()

    def choose(self, default: str | None) -> None:
        """See `service.rollout.watcher.Stage`."""
        self.generation += 1
        for worker in self._workers():
            if not self._tell(worker, default=default):
                worker.kill()  # it would go on with another

    def note(self, refused: Sequence[Refused], *, waits: bool) -> None:
        """See `service.rollout.watcher.Stage`."""
        for worker in self._workers():
            self._tell(worker, refused=refused, waits=waits)

    def told(self, worker: Worker, message: dict[str, Any]) -> None:
        """What a worker says of a change that it was to prepare."""
        if message["prepared"] == self._changes:
            self._settle(worker, message)

    def lost(self, worker: Worker) -> None:
        """A worker has died, or is not heard of."""
        self._settle(worker, {"error": "a worker died meanwhile, or hangs", "kind": _LOST})

    def _give_up(self) -> None:
        for worker, answer in self._waiting.items():
            if not answer.done():
                log.error("a worker was not ready for a change within %g s; it is killed", self._timeout)
                worker.kill()
                self.lost(worker)

    def _end(self) -> None:
        self.is_changing = False
        self._on_end()

    def _settle(self, worker: Worker, answer: dict[str, Any]) -> None:
        waiting = self._waiting.get(worker)
        if waiting and not waiting.done():
            waiting.set_result(answer)

    def _tell(self, worker: Worker, **message: Any) -> bool:
        """Whether it could be told."""
        try:
            worker.tell(**message)
        except OSError:  # it has died, or does not listen
            self.lost(worker)
            return False
        return True


def _check(answers: Sequence[dict[str, Any]]) -> None:
    """Raise `ModelError` where a worker has refused; a verdict on the file counts more than an
    interruption."""
    refusals = [answer for answer in answers if answer["error"] and answer["kind"] != _LOST]
    if refusals:
        worst = min(refusals, key=lambda one: one["kind"] == Interrupted.__name__)
        raise _KINDS.get(worst["kind"], ModelError)(worst["error"])

"""Changes to what all workers serve, in two phases: all have it ready, or none switches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from service.errors import Interrupted, ModelError
from service.layout import Found


class Worker(Protocol):
    """One worker process, as far as changes go."""

    def tell(self, **message: Any) -> None:
        """Send it a message. Raises `OSError` when it does not listen."""

    def kill(self) -> None:
        """End it; another takes its place."""


class Broadcast:
    """What `service.watch` changes (`service.watch.Stage`). All methods are for the event loop."""

    def __init__(
        self, workers: Callable[[], Collection[Worker]], on_end: Callable[[], None], *, timeout: float
    ) -> None:
        """`workers` are those that are at work now. There must be no more of them from the beginning of a
        change to its end, of which `on_end` tells. One that is not ready after `timeout` seconds is taken
        for lost."""
        self._workers = workers
        self._timeout = timeout
        self._on_end = on_end
        self.is_changing = False
        self._changes = 0
        self._waiting: dict[Worker, asyncio.Future[dict[str, Any]]] = {}
        self._prepared: Sequence[Worker] = ()
        self.generation = 0
        """How many changes there have been: whoever has loaded what was served before must load anew."""

    async def prepare(self, name: str | None, found: Sequence[Found]) -> None:
        """See `service.watch.Stage`.

        One worker goes first: if it refuses, the others need not try; and all at once would take more from
        those who wait for answers. Where there is no worker, those that come will serve it.
        """
        self._changes += 1
        self.is_changing = True
        self._prepared = list(self._workers())
        for group in (self._prepared[:1], self._prepared[1:]):
            refusals = [answer for answer in await self._ask(group, name, found) if answer["error"]]
            if refusals:
                for worker in self._prepared:
                    self._tell(worker, abandon=name)
                self._end()
                kind = Interrupted if all(one["interrupted"] for one in refusals) else ModelError
                raise kind(refusals[0]["error"])

    async def _ask(
        self, workers: Sequence[Worker], name: str | None, found: Sequence[Found]
    ) -> list[dict[str, Any]]:
        """What these say once they have it ready, or cannot."""
        loop = asyncio.get_running_loop()
        self._waiting = {worker: loop.create_future() for worker in workers}
        plain = [one.to_plain() for one in found]
        for worker in workers:
            self._tell(worker, prepare=plain, name=name, change=self._changes)
        alarm = loop.call_later(self._timeout, self._give_up)
        answers = await asyncio.gather(*self._waiting.values())
        alarm.cancel()
        return answers

    def commit(self, name: str | None) -> None:
        """See `service.watch.Stage`."""
        self.generation += 1
        for worker in self._prepared:
            if not self._tell(worker, commit=name):
                worker.kill()  # it would go on with what is not served any more
        self._end()

    def choose(self, default: str | None) -> None:
        """See `service.watch.Stage`."""
        self.generation += 1
        for worker in self._workers():
            if not self._tell(worker, default=default):
                worker.kill()  # it would go on with another

    def told(self, worker: Worker, message: dict[str, Any]) -> None:
        """What a worker says of a change that it was to prepare."""
        if message["prepared"] == self._changes:
            self._settle(worker, message)

    def lost(self, worker: Worker) -> None:
        """A worker has died, or is not heard of."""
        self._settle(worker, {"error": "a worker died meanwhile, or hangs", "interrupted": True})

    def _give_up(self) -> None:
        for worker in self._waiting:
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

"""Greedy batching: callers await one item each, and runners that have room take whatever waits.

A runner takes its share of what waits, up to the largest batch; nobody waits for company unless told to.
It has room for two batches: one that it works on, and one that it finds when it is done, so that it need
not wait for the event loop. All of it happens on that loop, so nothing here needs a lock. It knows no HTTP,
no images, and not what a runner is.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar

from service.metrics import Metrics

Item = TypeVar("Item")
Result = TypeVar("Result")

FOREVER: Final = float("inf")
"""A deadline that never comes."""

_ROOM: Final = 2
"""Batches that a runner may have: the one that it works on, and the next."""

_SMOOTHING: Final = 0.1
"""Weight of the newest batch in the moving average of seconds per item."""


class RunnerLost(Exception):
    """The runner has died. If it was `at_work` on this batch, its items run once more, each by itself."""

    def __init__(self, message: str, *, at_work: bool) -> None:
        super().__init__(message)
        self.at_work = at_work


class Runner(Protocol):
    """What works on batches, one after the other."""

    is_wide: bool
    """It has more threads for a batch that is alone."""

    def start(
        self,
        lane: Lane[Any, Any],
        items: Sequence[Any],
        deadlines: Sequence[float],
        *,
        alone: bool,
        done: Done,
    ) -> Drop:
        """Begin a batch of items of one lane, and call `done` once, later, on the event loop.

        With one result, or error, for each item, in order; or with an error that concerns them all:
        `RunnerLost` when the runner is no more. Batches are done in the order in which they were begun; no
        work is spent on items whose deadline has passed by then, or that are dropped by what this returns.
        """


Drop: TypeAlias = Callable[[int], None]
"""Tells a runner that nobody wants the item at this place of a batch any more."""

Done: TypeAlias = Callable[[Sequence[Any] | Exception], None]


@dataclass(slots=True, eq=False)
class _Job:
    item: Any = field(repr=False)  # an image has no place in a log
    answer: asyncio.Future[Any]
    deadline: float
    """When the answer is of no more use. On the monotonic clock, in seconds."""
    since: float
    """When it came, on the same clock."""
    lost: bool = False
    """It was in the batch at which a runner died."""
    drop: Callable[[], None] | None = None
    """Tells the runner that has it that nobody wants it any more."""

    def is_wanted(self, now: float) -> bool:
        """False once the caller has left or the deadline has passed: then it costs nothing more."""
        return not self.answer.done() and now < self.deadline


@dataclass(eq=False)
class Lane(Generic[Item, Result]):
    """Where the items of one model wait: only they share a batch."""

    index: int
    """Its place among the models."""
    batch_max: int
    """Most items in one batch."""
    weight_max: float = FOREVER
    """Most weight in one batch, but for an item that is alone in it."""
    weigh: Callable[[Item], float] = lambda item: 0.0
    shares: bool = True
    """Make batches smaller where that gives every runner some: right unless only large ones are fast."""
    wait: float = 0.0
    """How long an item may wait for company, in seconds."""
    jobs: deque[_Job] = field(default_factory=deque)

    def patience(self, now: float) -> float:
        """Seconds until a batch is due; `FOREVER` while nothing waits."""
        if not self.jobs:
            return FOREVER
        return 0.0 if len(self.jobs) >= self.batch_max else self.jobs[0].since + self.wait - now

    def take(self, room: int, now: float) -> list[_Job]:
        """The next batch, where there is room for so many; without those that nobody wants any more."""
        batch: list[_Job] = []
        weight = 0.0
        share = math.ceil(len(self.jobs) / room) if self.shares else self.batch_max
        while self.jobs and len(batch) < min(share, self.batch_max):
            job = self.jobs[0]
            if job.is_wanted(now):
                weight += self.weigh(job.item)
                if batch and (weight > self.weight_max or job.lost):
                    break
                batch.append(job)
            self.jobs.popleft()
            if job.lost and batch:
                break
        return batch


class Batcher:
    """The lanes, and the runners that are free. Every method must be called on the event loop."""

    def __init__(self, lanes: Sequence[Lane[Any, Any]], metrics: Metrics) -> None:
        """What may wait is bounded by whoever submits."""
        self._lanes = lanes
        self._metrics = metrics
        self._runners: dict[Runner, deque[list[_Job]]] = {}
        """The batches that each one has: the one that it works on, and the next."""
        self._dispatching = False
        self._timer: asyncio.TimerHandle | None = None
        self._seconds_per_item = 0.0
        self._finished = 0.0
        """When the last batch was finished; 0 if there was nothing to do since."""

    def add(self, runner: Runner) -> None:
        """Give it work from now on."""
        self._runners[runner] = deque()
        self._dispatch_soon()

    def remove(self, runner: Runner) -> None:
        """Give it no more work."""
        self._runners.pop(runner, None)

    def submit(
        self, item: Item, lane: Lane[Item, Result], *, deadline: float = FOREVER
    ) -> asyncio.Future[Result]:
        """Queue `item`. The future gets its result, or the error that it or its batch has met.

        Whoever cancels the future, or lets the deadline (monotonic, in seconds) pass, gives the place
        back: what is not wanted any more is not worked on. The deadline does not end the future.
        """
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        job = _Job(item, answer, deadline, time.monotonic())
        lane.jobs.append(job)
        answer.add_done_callback(partial(self._forget, lane, job))
        self._dispatch_soon()
        return answer

    def _forget(self, lane: Lane[Any, Any], job: _Job, answer: asyncio.Future[Any]) -> None:
        """Items of callers who leave would pile up while no runner is free."""
        if answer.cancelled():
            if job.drop:
                job.drop()
            else:
                with suppress(ValueError):  # it was passed over as nobody wanted it
                    lane.jobs.remove(job)
            self._dispatch_soon()

    def drain_seconds(self, items: int) -> float:
        """How long `items` items take, by the measured rate; 0 before anything was measured."""
        return items * self._seconds_per_item

    def _dispatch_soon(self) -> None:
        """After all that the event loop has read by now: those items are then shared out together."""
        if not self._dispatching:
            self._dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        now = time.monotonic()
        while room := sum(_ROOM - len(batches) for batches in self._runners.values()):
            due = [lane for lane in self._lanes if lane.patience(now) <= 0]
            if not due:
                self._dispatch_later(now)
                break
            lane = min(due, key=lambda lane: lane.jobs[0].since)
            if batch := lane.take(room, now):
                self._start(lane, batch, now)
        self._metrics.queue_images.set(self._waiting(now))

    def _waiting(self, now: float) -> int:
        """Items that wait for a runner, or behind the batch that theirs works on."""
        behind = (
            job for batches in self._runners.values() for batch in islice(batches, 1, None) for job in batch
        )
        return sum(len(lane.jobs) for lane in self._lanes) + sum(job.is_wanted(now) for job in behind)

    def _dispatch_later(self, now: float) -> None:
        """When what waits for company has waited long enough."""
        waits = [patience for lane in self._lanes if (patience := lane.patience(now)) > 0]
        wait = min(waits, default=FOREVER)
        if wait < FOREVER and (self._timer is None or self._timer.when() < asyncio.get_running_loop().time()):
            self._timer = asyncio.get_running_loop().call_later(wait, self._dispatch_soon)

    def _start(self, lane: Lane[Any, Any], batch: list[_Job], now: float) -> None:
        for job in batch:
            self._metrics.stage_seconds["queue"].observe(now - job.since)
        busy = any(self._runners.values())
        alone = len(batch) == 1 and not busy and not any(other.jobs for other in self._lanes)
        runner = min(self._runners, key=lambda one: (len(self._runners[one]), not one.is_wide))
        self._runners[runner].append(batch)
        drop = runner.start(
            lane,
            [job.item for job in batch],
            [job.deadline for job in batch],
            alone=alone,
            done=partial(self._finish, runner, lane, batch, now),
        )
        for index, job in enumerate(batch):
            job.drop = partial(drop, index)

    def _finish(
        self,
        runner: Runner,
        lane: Lane[Any, Any],
        batch: list[_Job],
        started: float,
        outcome: Sequence[Any] | Exception,
    ) -> None:
        if runner in self._runners:
            self._runners[runner].popleft()
        if isinstance(outcome, RunnerLost):
            self._retry(lane, batch, outcome)
            self._dispatch_soon()
            return
        self._measure(started, len(batch))
        self._dispatch()  # before the answers: the runner should not wait for them
        _answer(batch, outcome)

    def _retry(self, lane: Lane[Any, Any], batch: list[_Job], error: RunnerLost) -> None:
        """Once more, each by itself: so what kills runners is found out, and harms no neighbour twice."""
        guilty = [job for job in batch if job.lost and error.at_work]
        _answer(guilty, error)
        for job in reversed(batch):
            if job not in guilty:
                job.lost = job.lost or error.at_work
                job.drop = None
                if not job.answer.done():
                    lane.jobs.appendleft(job)

    def _measure(self, started: float, items: int) -> None:
        """Average the time between two finished batches, per item; only while there is always work."""
        now = time.monotonic()
        if self._finished or not self._seconds_per_item:
            newest = (now - (self._finished or started)) / items
            weight = _SMOOTHING if self._seconds_per_item else 1.0
            self._seconds_per_item += weight * (newest - self._seconds_per_item)
        self._finished = now if any(self._runners.values()) else 0.0


def _answer(batch: list[_Job], answers: Sequence[Any] | Exception) -> None:
    for index, job in enumerate(batch):
        if job.answer.done():  # its caller has left
            continue
        outcome = answers if isinstance(answers, Exception) else answers[index]
        if isinstance(outcome, Exception):
            job.answer.set_exception(outcome)
        else:
            job.answer.set_result(outcome)

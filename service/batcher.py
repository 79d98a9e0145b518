"""Greedy batching: callers await one item each, and runners that have room take whatever waits.

A runner takes its share of what waits, up to the largest batch; nobody waits for company unless told to.
It has room for two batches: one that it works on, and one that it finds when it is done, so that it need
not wait for the event loop. That one may come in parts, which it may put together. All of it happens on the
event loop, so nothing here needs a lock. It knows no HTTP, no images, and not what a runner is.

Lanes have equal shares of the runners' time: the next batch is of the one that has had the least since it
last had something to do (start-time fair queueing: Goyal, Vin and Cheng, 1996).
"""

from __future__ import annotations

import asyncio
import logging
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

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

FOREVER: Final = float("inf")
"""A deadline that never comes."""

_FULL: Final = 1 + 1e-9
"""A batch, by what its items take of it; rounding included."""

_ROOM: Final = 2
"""Batches of which a runner may have less and still be given one: the one that it works on, and the next."""

_SMOOTHING: Final = 0.1
"""Weight of the newest batch in the moving average of seconds per item."""


class RunnerLost(Exception):
    """The runner has died. If it may have been `at_work` on this batch, each item runs once more, apart."""

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
        apart: bool,
        done: Done,
    ) -> Drop:
        """Begin a batch of items of one lane, and call `done` once, later, on the event loop.

        With one result, or error, for each item, in order; or with an error that concerns them all:
        `RunnerLost` when the runner is no more. Batches are done in the order in which they were begun,
        those of one lane perhaps together, unless they are to stay `apart`. No work is spent on items whose
        deadline has passed by then, or that are dropped by what this returns.
        """


Drop: TypeAlias = Callable[[int], None]
"""Tells a runner that nobody wants the item at this place of a batch any more."""

Done: TypeAlias = Callable[[Sequence[Any] | Exception], None]


Answered: TypeAlias = Callable[[Any, "Job"], None]
"""Called once with an item's result, or with the error that it or its batch has met; and with its job."""


@dataclass(slots=True, eq=False)
class Job:
    """An item on its way."""

    item: Any = field(repr=False)  # an image has no place in a log
    lane: Lane[Any, Any] = field(repr=False)
    answered: Answered
    deadline: float
    """When the answer is of no more use. On the monotonic clock, in seconds."""
    since: float
    """When it came, on the same clock."""
    fill: float
    """How much of a batch it takes; 1 at most."""
    begun: float = 0.0
    """When a runner got it, on that clock."""
    over: bool = False
    """It was answered, or its caller has left."""
    lost: bool = False
    """It was in a batch at which a runner may have died."""
    drop: Drop | None = None
    """Tells the runner that has it that nobody wants it any more."""
    place: int = 0
    """In its batch."""

    def is_wanted(self, now: float) -> bool:
        """False once the caller has left or the deadline has passed: then it costs nothing more."""
        return not self.over and now < self.deadline

    def answer(self, outcome: Any) -> None:
        """Tell the caller, unless it has left."""
        if not self.over:
            self.over = True
            self.answered(outcome, self)


@dataclass(eq=False)
class Lane(Generic[Item, Result]):
    """Where the items of one model wait: only they share a batch."""

    index: int
    """What runners call its model."""
    batch_max: int
    """Most items in one batch."""
    weight_max: float = FOREVER
    """Most weight in one batch, but for an item that is alone in it."""
    weigh: Callable[[Item], float] = lambda item: 0.0
    shares: bool = True
    """Make batches smaller where that gives every runner some: right unless only large ones are fast."""
    wait: float = 0.0
    """How long an item may wait for company, in seconds."""
    jobs: deque[Job] = field(default_factory=deque)
    error: Exception | None = None
    """No runner has its model any more: the answer of every item that still comes."""
    turn: float = 0.0
    """When its next batch is due among those of other lanes, in seconds of runners' time."""
    seconds_per_item: float = 0.0
    """Of a runner's time; a moving average, 0 before anything was measured."""

    def fill(self, item: Item) -> float:
        """How much of the largest batch an item takes: 1 at most."""
        return max(1 / self.batch_max, min(1.0, self.weigh(item) / self.weight_max))

    def patience(self, now: float) -> float:
        """Seconds until a batch is due; `FOREVER` while nothing waits."""
        if not self.jobs:
            return FOREVER
        return 0.0 if len(self.jobs) >= self.batch_max else self.jobs[0].since + self.wait - now

    def take(self, room: float, now: float) -> list[Job]:
        """The next batch, where there is room for so many such; without those that nobody wants any more."""
        batch: list[Job] = []
        filled = 0.0
        share = math.ceil(len(self.jobs) / room) if self.shares else self.batch_max
        while self.jobs and len(batch) < min(share, self.batch_max):
            job = self.jobs[0]
            if job.is_wanted(now):
                filled += job.fill
                if batch and (filled > _FULL or job.lost):
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
        self._lanes = list(lanes)
        self._metrics = metrics
        self._runners: dict[Runner, deque[list[Job]]] = {}
        """The batches that each one has; on the first it works."""
        self._rested: dict[Runner, float] = {}
        """When each one has finished its last batch."""
        self._turn = 0.0
        """Of the lane that had the last batch."""
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
        self._rested.pop(runner, None)

    def open(self, lane: Lane[Any, Any]) -> None:
        """Take items for one lane more."""
        self._lanes.append(lane)

    def close(self, lane: Lane[Any, Any]) -> None:
        """Forget a lane in which nothing waits any more."""
        self._lanes.remove(lane)

    def put(self, item: Item, lane: Lane[Item, Result], answered: Answered, *, deadline: float) -> Job:
        """Queue `item`; `answered` is called on the event loop, unless `cancel` is called before.

        What is not wanted any more when `deadline` (monotonic, in seconds) passes is not worked on; the
        caller is then told nothing, or of an error.
        """
        job = Job(item, lane, answered, deadline, time.monotonic(), lane.fill(item))
        if lane.error is not None:
            asyncio.get_running_loop().call_soon(job.answer, lane.error)
            return job
        if not lane.jobs:  # it has saved nothing up while there was nothing to do
            lane.turn = max(lane.turn, self._turn)
        lane.jobs.append(job)
        self._dispatch_soon()
        return job

    def cancel(self, job: Job) -> None:
        """Its caller has left: give the place back. Such items would pile up while no runner is free."""
        if job.over:
            return
        job.over = True
        if job.drop:
            job.drop(job.place)
        else:
            with suppress(ValueError):  # it was passed over as nobody wanted it
                job.lane.jobs.remove(job)
        self._dispatch_soon()

    def refuse(self, lane: Lane[Any, Any], error: Exception) -> None:
        """Answer all items of a lane with `error`, those that wait and those that still come."""
        lane.error = error
        waiting = list(lane.jobs)
        lane.jobs.clear()
        _answer(waiting, error)
        self._dispatch_soon()

    def expire(self, before: float, error: Exception) -> float | None:
        """Answer with `error` the items that came at `before` (monotonic, in seconds) or earlier, and still
        wait.

        Return when the oldest of the others came; None where nothing waits any more.
        """
        for lane in self._lanes:
            late = [job for job in lane.jobs if job.since <= before]
            kept = [job for job in lane.jobs if job.since > before]
            lane.jobs.clear()
            lane.jobs.extend(kept)
            _answer(late, error)
        self._dispatch_soon()
        return min((job.since for lane in self._lanes for job in lane.jobs), default=None)

    def submit(
        self,
        item: Item,
        lane: Lane[Item, Result],
        *,
        deadline: float = FOREVER,
        read: Callable[[Any, Job], Any] = lambda outcome, job: outcome,
    ) -> asyncio.Future[Any]:
        """As `put`, for who awaits: a future that gets the result or the error. To cancel it is to leave.

        `read` makes of either what the future gets, as soon as it is there. The deadline does not end the
        future.
        """
        future: _Future = _Future(self.cancel, read)
        future.job = self.put(item, lane, future.settle, deadline=deadline)
        return future

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
        while self._runners:
            due = [lane for lane in self._lanes if lane.patience(now) <= 0]
            if not due:
                self._dispatch_later(now)
                break
            lane = min(due, key=lambda lane: (lane.turn, lane.jobs[0].since))
            room = {runner: _room(batches) for runner, batches in self._runners.items()}
            runner = max(room, key=lambda one: (room[one], one.is_wide))
            if room[runner] <= 0:
                break
            if batch := lane.take(sum(one for one in room.values() if one > 0), now):
                self._start(runner, lane, batch, now)
        self._metrics.queue_images.set(self._waiting())

    def _waiting(self) -> int:
        """Items that wait for a runner, or behind the batch that theirs works on."""
        behind = (islice(batches, 1, None) for batches in self._runners.values())
        wanted = sum(not job.over for batches in behind for batch in batches for job in batch)
        return sum(len(lane.jobs) for lane in self._lanes) + wanted

    def _dispatch_later(self, now: float) -> None:
        """When what waits for company has waited long enough."""
        waits = [patience for lane in self._lanes if (patience := lane.patience(now)) > 0]
        wait = min(waits, default=FOREVER)
        if wait < FOREVER and (self._timer is None or self._timer.when() < asyncio.get_running_loop().time()):
            self._timer = asyncio.get_running_loop().call_later(wait, self._dispatch_soon)

    def _start(self, runner: Runner, lane: Lane[Any, Any], batch: list[Job], now: float) -> None:
        for job in batch:
            job.begun = now
            self._metrics.stage_seconds["queue"].observe(now - job.since)
        busy = any(self._runners.values())
        alone = len(batch) == 1 and not busy and not any(other.jobs for other in self._lanes)
        self._turn = lane.turn
        lane.turn += len(batch) * lane.seconds_per_item
        self._runners[runner].append(batch)
        drop = runner.start(
            lane,
            [job.item for job in batch],
            [job.deadline for job in batch],
            alone=alone,
            apart=batch[0].lost,
            done=partial(self._finish, runner, lane, batch, now),
        )
        for place, job in enumerate(batch):
            job.drop, job.place = drop, place

    def _finish(
        self,
        runner: Runner,
        lane: Lane[Any, Any],
        batch: list[Job],
        started: float,
        outcome: Sequence[Any] | Exception,
    ) -> None:
        if runner in self._runners:
            self._runners[runner].popleft()
        if isinstance(outcome, RunnerLost):
            if outcome.at_work:
                lane.turn += time.monotonic() - max(started, self._rested.get(runner, 0.0))
            self._retry(lane, batch, outcome)
            self._dispatch_soon()
            return
        self._measure(started, len(batch))
        self._charge(runner, lane, started, len(batch))
        self._dispatch()  # before the answers: the runner should not wait for them
        _answer(batch, outcome)

    def _retry(self, lane: Lane[Any, Any], batch: list[Job], error: RunnerLost) -> None:
        """Once more, each by itself: so what kills runners is found out, and harms no neighbour twice."""
        guilty = [job for job in batch if job.lost and error.at_work]
        _answer(guilty, error)
        for job in reversed(batch):
            if job not in guilty:
                job.lost = job.lost or error.at_work
                job.drop = None
                if not job.over:
                    lane.jobs.appendleft(job)

    def _measure(self, started: float, items: int) -> None:
        """Average the time between two finished batches, per item; only while there is always work."""
        now = time.monotonic()
        if self._finished or not self._seconds_per_item:
            newest = (now - (self._finished or started)) / items
            weight = _SMOOTHING if self._seconds_per_item else 1.0
            self._seconds_per_item += weight * (newest - self._seconds_per_item)
        self._finished = now if any(self._runners.values()) else 0.0

    def _charge(self, runner: Runner, lane: Lane[Any, Any], started: float, items: int) -> None:
        """Average a runner's time per item of a lane: it works on one batch after the other."""
        now = time.monotonic()
        newest = (now - max(started, self._rested.get(runner, 0.0))) / items
        if runner in self._runners:
            self._rested[runner] = now
        weight = _SMOOTHING if lane.seconds_per_item else 1.0
        lane.seconds_per_item += weight * (newest - lane.seconds_per_item)


def _room(batches: Sequence[list[Job]]) -> float:
    """How many of the largest batches more a runner may have."""
    return _ROOM - sum(job.fill for batch in batches for job in batch)


def _answer(batch: list[Job], answers: Sequence[Any] | Exception) -> None:
    for place, job in enumerate(batch):
        try:
            job.answer(answers if isinstance(answers, Exception) else answers[place])
        except Exception:  # a bug of one caller is not to cost the others their answers
            log.exception("an answer could not be given")


class _Future(asyncio.Future[Any]):
    """What an awaiting caller has of its item."""

    job: Job | None = None

    def __init__(self, leave: Callable[[Job], None], read: Callable[[Any, Job], Any]) -> None:
        super().__init__()
        self._leave = leave
        self._read = read

    def settle(self, outcome: Any, job: Job) -> None:
        self.job = None  # it refers back: only the collector would find the two
        outcome = self._read(outcome, job)
        if isinstance(outcome, Exception):
            self.set_exception(outcome)
        else:
            self.set_result(outcome)

    def cancel(self, msg: Any = None) -> bool:
        if self.job:
            self._leave(self.job)
            self.job = None
        return super().cancel(msg)

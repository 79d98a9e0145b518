"""Greedy batching: callers await one item each, and runners that have room take whatever waits.

A runner takes its share of what waits, up to the largest batch; nobody waits for company unless told to.
It has room for two batches: one that it works on, and one that it finds when it is done, so that it need
not wait for the event loop. That one may come in parts, which it may put together. All of it happens on the
event loop, so nothing here needs a lock. It knows no HTTP, no images, and not what a runner is.

Lanes have equal shares of the runners' time: the next batch is of the one that has had the least since it
last had something to do (start-time fair queueing: Goyal, Vin and Cheng, 1996). Lanes of expensive items have
smaller shares, and only some of the runners, so that cheap items are never held up for long. Items that need
much memory wait here until there is enough, and not in a runner.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar

from fovea.service.observability.metrics import Metrics

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

FOREVER: Final = float("inf")
"""A deadline that never comes."""

_FULL: Final = 1 + 1e-9
"""A batch, by what its items take of it; rounding included."""

_ROOM: Final = 2
"""Batches of which a runner may have less and still be given one: the one that it works on, and the next."""

_PRICES: Final = (1.0, 4.0, 8.0)
"""What a second of a runner's time costs a lane, by its level: where all levels have work, the cheapest has
1 / (1 + 1/4 + 1/8) = 73 % of the time."""

LEVELS: Final = len(_PRICES)
"""How many levels of expense there are: 0 is the cheapest."""

_RECENT: Final = 1.0
"""Seconds for which runners stay free for cheaper items after the last one came."""

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
        memory: int,
        done: Done,
    ) -> Drop:
        """Begin a batch of items of one lane, and call `done` once, later, on the event loop.

        `memory` is what is reserved for it, in bytes, beyond what the runner has of its own.

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
    memory: int = 0
    """Bytes that must be reserved before a runner may begin; 0 where a runner has enough of its own."""

    def is_wanted(self, now: float) -> bool:
        """False once the caller has left or the deadline has passed: then it costs nothing more."""
        return not self.over and now < self.deadline

    def answer(self, outcome: Any) -> None:
        """Tell the caller, unless it has left. Should that raise, the caller is told of the error instead."""
        if self.over:
            return
        self.over = True
        try:
            self.answered(outcome, self)
        except Exception as error:  # a bug of one caller is not to cost the others their answers
            log.exception("an answer could not be given")
            if not isinstance(outcome, Exception):
                with suppress(Exception):
                    self.answered(error, self)


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
    level: int = 0
    """How expensive its items are. From level 1 on they are run by themselves."""
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

    def head(self, now: float) -> Job | None:
        """The first item that somebody wants; those before it are forgotten."""
        while self.jobs and not self.jobs[0].is_wanted(now):
            self.jobs.popleft()
        return self.jobs[0] if self.jobs else None

    def take(self, room: float, now: float, memory: float = FOREVER) -> list[Job]:
        """The next batch, where there is room for so many such, and so much memory to reserve; without those
        that nobody wants any more."""
        batch: list[Job] = []
        filled = 0.0
        share = math.ceil(len(self.jobs) / room) if self.shares else self.batch_max
        while self.jobs and len(batch) < min(share, self.batch_max):
            job = self.jobs[0]
            if job.is_wanted(now):
                filled += job.fill
                memory -= job.memory
                if batch and (filled > _FULL or job.lost or memory < 0):
                    break
                batch.append(job)
            self.jobs.popleft()
            if job.lost and batch:
                break
        return batch


class Batcher:
    """The lanes, and the runners that are free. Every method must be called on the event loop."""

    def __init__(self, metrics: Metrics, *, memory: float = FOREVER) -> None:
        """What may wait is bounded by whoever submits; `memory`: how many bytes may be reserved together."""
        self._lanes: dict[Lane[Any, Any], None] = {}
        """Those in which something waits, or has waited until a moment ago."""
        self._metrics = metrics
        self._memory = self._most_memory = memory
        self._came = [-FOREVER] * LEVELS
        """When the last item of each level came, or was begun."""
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

    def put(
        self,
        item: Item,
        lane: Lane[Item, Result],
        answered: Answered,
        *,
        deadline: float,
        memory: int = 0,
    ) -> Job:
        """Queue `item`; `answered` is called on the event loop, unless `cancel` is called before.

        What is not wanted any more when `deadline` (monotonic, in seconds) passes is not worked on; the
        caller is then told nothing, or of an error. It is begun when `memory` bytes can be reserved: all
        that there are, if it needs more.
        """
        now = time.monotonic()
        self._came[lane.level] = now
        needed = int(min(memory, self._most_memory))
        job = Job(item, lane, answered, deadline, now, lane.fill(item), memory=needed)
        if lane.error is not None:
            asyncio.get_running_loop().call_soon(job.answer, lane.error)
            return job
        if not lane.jobs:  # it has saved nothing up while there was nothing to do
            lane.turn = max(lane.turn, self._turn)
        lane.jobs.append(job)
        self._lanes[lane] = None
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
        for lane in list(self._lanes):
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
        memory: int = 0,
        read: Callable[[Any, Job], Any] = lambda outcome, job: outcome,
    ) -> asyncio.Future[Any]:
        """As `put`, for who awaits: a future that gets the result or the error. To cancel it is to leave.

        `read` makes of either what the future gets, as soon as it is there. The deadline does not end the
        future.
        """
        future: _Future = _Future(self.cancel, read)
        future.job = self.put(item, lane, future.settle, deadline=deadline, memory=memory)
        return future

    def reserve(self, size: int) -> bool:
        """Take memory for something else, until `give_back`; False when it is not free now."""
        if size > self._memory - self._reserved():
            return False
        self._memory -= size
        return True

    def give_back(self, size: int) -> None:
        """Have memory again that was reserved for something else."""
        self._memory += size
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
        self._lanes = {lane: None for lane in self._lanes if lane.jobs}
        while self._runners:
            due = [lane for lane in self._lanes if lane.patience(now) <= 0]
            if not due:
                break
            room = {runner: _room(batches) for runner, batches in self._runners.items()}
            free = self._memory - self._reserved()
            pair = self._pair(due, room, free, now)
            if pair is None:
                break
            lane, runner = pair
            if batch := lane.take(sum(one for one in room.values() if one > 0), now, free):
                self._start(runner, lane, batch, now)
        self._dispatch_later(now)
        try:
            self._metrics.queue_images.set(self._waiting())
            self._metrics.queue_costly_images.set(self.waiting(LEVELS - 1))
            self._metrics.decode_reserved_bytes.set(self._reserved())
        except Exception:  # what must happen has happened
            log.exception("the queue could not be counted")

    def _pair(
        self, due: list[Lane[Any, Any]], room: Mapping[Runner, float], free: float, now: float
    ) -> tuple[Lane[Any, Any], Runner] | None:
        """The lane whose turn it is, of those that can go on now, and a runner for it. `free` bytes can be
        reserved.

        Memory is reserved in the order of turns: who needs much of it is not overtaken by who needs less.
        """
        is_short = False
        for lane in sorted(due, key=lambda lane: (lane.turn, lane.jobs[0].since)):
            head = lane.head(now)
            if head is None:
                continue
            is_short = is_short or (head.memory > 0 and head.memory > free)
            if head.memory and is_short:
                continue
            runners = [runner for runner in self._allowed(lane.level, now) if room[runner] > 0]
            if runners:
                return lane, max(runners, key=lambda one: (room[one], one.is_wide))
        return None

    def _allowed(self, level: int, now: float) -> list[Runner]:
        """The runners that may have items of this level: not all of them, unless it is the cheapest.

        Half of them while cheaper items come, so that these keep the other half. The most expensive ones
        never have all, as the next cheap item would wait for the end of one.
        """
        allowed = list(self._runners)
        count = len(allowed)
        for least in range(1, level + 1):
            having = [one for one in self._runners if _level(self._runners[one]) >= least]
            is_shared = any(now - came < _RECENT for came in self._came[:least])
            most = count // 2 if is_shared else count - (least == LEVELS - 1)
            if len(having) >= max(1, most):
                allowed = [one for one in allowed if one in having]
        return allowed

    def waiting(self, level: int) -> int:
        """How many items of this level wait for a runner."""
        return sum(len(lane.jobs) for lane in self._lanes if lane.level == level)

    def _reserved(self) -> int:
        """Bytes, of all batches that runners have."""
        return sum(job.memory for batches in self._runners.values() for batch in batches for job in batch)

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
        self._came[lane.level] = now
        memory = sum(job.memory for job in batch)
        busy = any(self._runners.values())
        alone = len(batch) == 1 and not busy and not any(other.jobs for other in self._lanes)
        self._turn = lane.turn
        lane.turn += len(batch) * lane.seconds_per_item * _PRICES[lane.level]
        self._runners[runner].append(batch)
        for job in batch:
            job.begun = now
        try:
            drop = runner.start(
                lane,
                [job.item for job in batch],
                [job.deadline for job in batch],
                alone=alone,
                apart=batch[0].lost or lane.level > 0,
                memory=memory,
                done=partial(self._finish, runner, lane, batch, now),
            )
        except Exception as error:  # it is our own bug: nobody is to wait for these, and others go on
            log.exception("a batch could not be sent to its runner")
            self._runners[runner].remove(batch)
            _answer(batch, error)
            return
        for place, job in enumerate(batch):
            job.drop, job.place = drop, place
        try:
            for job in batch:
                self._metrics.stage_seconds["queue"].observe(now - job.since)
        except Exception:  # what must happen has happened
            log.exception("the time in the queue could not be counted")

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
                seconds = time.monotonic() - max(started, self._rested.get(runner, 0.0))
                lane.turn += seconds * _PRICES[lane.level]
            self._retry(lane, batch, outcome)
            self._dispatch_soon()
            return
        try:
            self._measure(started, len(batch))
            self._charge(runner, lane, started, len(batch))
            self._dispatch()  # before the answers: the runner should not wait for them
        finally:
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
                    self._lanes[lane] = None

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
    """How many of the largest batches more a runner may have: none behind the most expensive items."""
    if _level(batches) == LEVELS - 1:
        return 0.0
    return _ROOM - sum(job.fill for batch in batches for job in batch)


def _level(batches: Sequence[list[Job]]) -> int:
    """The highest level of what a runner has; 0 when that is nothing."""
    return max((batch[0].lane.level for batch in batches), default=0)


def _answer(batch: list[Job], answers: Sequence[Any] | Exception) -> None:
    for place, job in enumerate(batch):
        job.answer(answers if isinstance(answers, Exception) else answers[place])


class _Future(asyncio.Future[Any]):
    """What an awaiting caller has of its item."""

    job: Job | None = None

    def __init__(self, leave: Callable[[Job], None], read: Callable[[Any, Job], Any]) -> None:
        super().__init__()
        self._leave = leave
        self._read = read

    def settle(self, outcome: Any, job: Job) -> None:
        self.job = None  # it refers back: only the collector would find the two
        try:
            outcome = self._read(outcome, job)
        except Exception as error:  # our own bug: the caller is told of it, and does not wait for ever
            log.exception("an outcome could not be read")
            outcome = error
        if isinstance(outcome, Exception):
            self.set_exception(outcome)
        else:
            self.set_result(outcome)

    def cancel(self, msg: Any = None) -> bool:
        if self.job:
            self._leave(self.job)
            self.job = None
        return super().cancel(msg)

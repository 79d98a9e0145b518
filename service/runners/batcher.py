"""Greedy batching: callers await single items, and free runners take the items that wait.

A runner takes its share of the waiting items, up to the largest batch. No item waits for others, unless
`Lane.wait` says so. A runner has room for two batches: one in work, and one that it finds when the first is
done, so that the runner need not wait for the event loop. The second batch may come in parts, which the
runner may combine. Everything happens on the event loop, so this module needs no locks. The module knows
neither HTTP, nor images, nor the implementation of a runner.

Lanes have equal shares of the runners' time: the next batch comes from the lane that has had the least time
since it was last idle (start-time fair queueing: Goyal, Vin and Cheng, 1996). Lanes of expensive items have
smaller shares and only some of the runners, so that cheap items are never delayed for long. Items that need
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
"""Deadline that never passes."""

_FULL: Final = 1 + 1e-9
"""Fill of a full batch, with a tolerance for rounding."""

_ROOM: Final = 2
"""Number of batches that a runner has room for: the batch in work, and the next one."""

_PRICES: Final = (1.0, 4.0, 8.0)
"""Price of a second of a runner's time for a lane, by its level.

When all levels have work, the cheapest level gets 1 / (1 + 1/4 + 1/8) = 73 % of the time.
"""

LEVELS: Final = len(_PRICES)
"""Number of levels of expense; level 0 is the cheapest."""

_RECENT: Final = 1.0
"""Seconds for which runners stay free for cheaper items after the last cheaper item."""

_SMOOTHING: Final = 0.1
"""Weight of the newest batch in the moving average of seconds per item."""


class RunnerLost(Exception):
    """The death of a runner.

    If the runner may have been `at_work` on this batch, each item runs once more, in a batch of its own.
    """

    def __init__(self, message: str, *, at_work: bool) -> None:
        super().__init__(message)
        self.at_work = at_work


class Runner(Protocol):
    """A worker that runs one batch after another."""

    is_wide: bool
    """True if the runner has more threads for a batch that runs alone."""

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

        `memory` is the number of bytes reserved for the batch beyond the runner's own share. `alone` promises
        that nothing else runs.

        `done` gets a list with one result or error for each item, in order, or one error for all items
        (`RunnerLost` when the runner has died). Batches finish in the order in which they began. Batches of
        one lane may run together, unless they must stay `apart`.

        The returned function drops one item. The runner does no work for dropped items, or for items whose
        `deadlines` (monotonic, in seconds) have passed.
        """


Drop: TypeAlias = Callable[[int], None]
"""Function that tells a runner that no caller wants the item at this place of a batch any more."""

Done: TypeAlias = Callable[[Sequence[Any] | Exception], None]


Answered: TypeAlias = Callable[[Any, "Job"], None]
"""Callback for an item, called once with its result or error, and with its job."""


@dataclass(slots=True, eq=False)
class Job:
    """An item with its state."""

    item: Any = field(repr=False)  # images must not appear in logs
    lane: Lane[Any, Any] = field(repr=False)
    answered: Answered
    deadline: float
    """Time after which the answer is useless, on the monotonic clock, in seconds."""
    since: float
    """Arrival time on the monotonic clock, in seconds."""
    fill: float
    """Share of a batch that the item takes; at most 1."""
    begun: float = 0.0
    """Time at which a runner got the item, on the monotonic clock, in seconds."""
    over: bool = False
    """True if the item was answered or its caller has left."""
    lost: bool = False
    """True if the item was in a batch on which a runner may have died."""
    drop: Drop | None = None
    """Function that tells the item's runner that the item is not wanted any more; None in the queue."""
    place: int = 0
    """Index of the item in its batch."""
    memory: int = 0
    """Bytes to reserve before a runner may begin; 0 if the runner's own share is enough."""

    def is_wanted(self, now: float) -> bool:
        """Return False once the caller has left or the deadline has passed: no more work is done then."""
        return not self.over and now < self.deadline

    def answer(self, outcome: Any) -> None:
        """Pass the outcome to the caller, unless the caller has left.

        If the caller's function raises, pass the error instead.
        """
        if self.over:
            return
        self.over = True
        try:
            self.answered(outcome, self)
        except Exception as error:  # a bug of one caller must not cost the others their answers
            log.exception("an answer could not be given")
            if not isinstance(outcome, Exception):
                with suppress(Exception):
                    self.answered(error, self)


@dataclass(eq=False)
class Lane(Generic[Item, Result]):
    """The queue of one model. Only items of one lane share a batch."""

    index: int
    """Id of the model in messages to runners."""
    batch_max: int
    """Limit of items in one batch."""
    weight_max: float = FOREVER
    """Limit of the weight of one batch. A batch of a single item may exceed it."""
    weigh: Callable[[Item], float] = lambda item: 0.0
    shares: bool = True
    """True to make batches smaller so that every runner gets some items.

    This is right unless only large batches are fast.
    """
    wait: float = 0.0
    """Time for which an item may wait for others, in seconds."""
    level: int = 0
    """Level of expense of the items. From level 1 on, batches run separately."""
    jobs: deque[Job] = field(default_factory=deque)
    error: Exception | None = None
    """Answer to every further item, because no runner has the model any more; None in normal operation."""
    turn: float = 0.0
    """Virtual time of the next batch among those of other lanes, in seconds of runners' time."""
    seconds_per_item: float = 0.0
    """Runner time per item in seconds: a moving average, 0 before the first measurement."""

    def fill(self, item: Item) -> float:
        """Return the share of the largest batch that an item takes; at most 1."""
        return max(1 / self.batch_max, min(1.0, self.weigh(item) / self.weight_max))

    def patience(self, now: float) -> float:
        """Return the seconds until a batch is due; `FOREVER` while no item waits."""
        if not self.jobs:
            return FOREVER
        return 0.0 if len(self.jobs) >= self.batch_max else self.jobs[0].since + self.wait - now

    def head(self, now: float) -> Job | None:
        """Return the first wanted item, and remove unwanted items before it."""
        while self.jobs and not self.jobs[0].is_wanted(now):
            self.jobs.popleft()
        return self.jobs[0] if self.jobs else None

    def take(self, room: float, now: float, memory: float = FOREVER) -> list[Job]:
        """Remove and return the next batch, without items that are not wanted any more.

        `room` is the number of such batches that all runners together have room for. `memory` is the number
        of bytes that can be reserved.
        """
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
    """The lanes and the runners. Call every method on the event loop."""

    def __init__(self, metrics: Metrics, *, memory: float = FOREVER) -> None:
        """Create a batcher that may reserve `memory` bytes.

        The number of waiting items has no limit here: the caller of `put` must limit it.
        """
        self._lanes: dict[Lane[Any, Any], None] = {}
        """Lanes in which items wait, or have waited until a moment ago."""
        self._metrics = metrics
        self._memory = self._most_memory = memory
        self._came = [-FOREVER] * LEVELS
        """Time at which the last item of each level arrived or was begun, on the monotonic clock."""
        self._runners: dict[Runner, deque[list[Job]]] = {}
        """Batches of each runner. The runner works on the first one."""
        self._rested: dict[Runner, float] = {}
        """Time at which each runner finished its last batch, on the monotonic clock."""
        self._turn = 0.0
        """Virtual time of the lane that got the last batch."""
        self._dispatching = False
        self._timer: asyncio.TimerHandle | None = None
        self._seconds_per_item = 0.0
        self._finished = 0.0
        """Time at which the last batch was finished; 0 if the runners have been idle since."""

    def add(self, runner: Runner) -> None:
        """Give work to a runner from now on."""
        self._runners[runner] = deque()
        self._dispatch_soon()

    def remove(self, runner: Runner) -> None:
        """Give a runner no more work."""
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
        """Queue `item`.

        `answered` is called on the event loop, unless `cancel` is called before. If `deadline` (monotonic, in
        seconds) passes first, no work is done; `answered` then gets an error or is not called. The item
        begins when `memory` bytes can be reserved; if it needs more than there are, it reserves all of them.
        """
        now = time.monotonic()
        self._came[lane.level] = now
        needed = int(min(memory, self._most_memory))
        job = Job(item, lane, answered, deadline, now, lane.fill(item), memory=needed)
        if lane.error is not None:
            # Not at once: the caller does not have the job yet.
            asyncio.get_running_loop().call_soon(job.answer, lane.error)
            return job
        if not lane.jobs:  # an idle lane saves up no claim to time
            lane.turn = max(lane.turn, self._turn)
        lane.jobs.append(job)
        self._lanes[lane] = None
        self._dispatch_soon()
        return job

    def cancel(self, job: Job) -> None:
        """Remove an item whose caller has left.

        Such items would otherwise pile up while no runner is free.
        """
        if job.over:
            return
        job.over = True
        if job.drop:
            job.drop(job.place)
        else:
            with suppress(ValueError):  # it was removed before, because it was not wanted
                job.lane.jobs.remove(job)
        self._dispatch_soon()

    def refuse(self, lane: Lane[Any, Any], error: Exception) -> None:
        """Answer all items of a lane with `error`, both waiting and future items."""
        lane.error = error
        waiting = list(lane.jobs)
        lane.jobs.clear()
        _answer(waiting, error)
        self._dispatch_soon()

    def expire(self, before: float, error: Exception) -> float | None:
        """Answer waiting items that arrived at `before` (monotonic, in seconds) or earlier with `error`.

        Return the arrival time of the oldest remaining item; None if no item waits any more.
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
        """Queue `item` like `put`; return a future of the result or error. Cancel the future to leave.

        `read` converts the outcome to the value of the future, as soon as there is an outcome. The deadline
        does not end the future.
        """
        future: _Future = _Future(self.cancel, read)
        future.job = self.put(item, lane, future.settle, deadline=deadline, memory=memory)
        return future

    def reserve(self, size: int) -> bool:
        """Reserve memory for another use until `give_back`. Return False if it is not free now."""
        if size > self._memory - self._reserved():
            return False
        self._memory -= size
        return True

    def give_back(self, size: int) -> None:
        """Return memory that was reserved for another use."""
        self._memory += size
        self._dispatch_soon()

    def drain_seconds(self, items: int) -> float:
        """Return the seconds that `items` items take at the measured rate; 0 before the first measurement."""
        return items * self._seconds_per_item

    def _dispatch_soon(self) -> None:
        """Schedule a dispatch after all input that the event loop has read by now.

        The items in that input are then shared out together.
        """
        if not self._dispatching:
            self._dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Give batches to runners until no lane is due, no runner has room, or memory is short."""
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
        except Exception:  # the work has been dispatched; metrics are optional
            log.exception("the queue could not be counted")

    def _pair(
        self, due: list[Lane[Any, Any]], room: Mapping[Runner, float], free: float, now: float
    ) -> tuple[Lane[Any, Any], Runner] | None:
        """Return the lane whose turn it is, among lanes that can start now, and a runner for it.

        `free` is the number of bytes that can be reserved. Memory is reserved in the order of turns: an item
        that needs much memory is not overtaken by an item that needs less.
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
        """Return the runners that may take items of this level: all for level 0, some for other levels.

        While cheaper items arrive, this is half of the runners, so that the cheaper items keep the other
        half. The most expensive items never get all runners, because the next cheap item would have to wait
        for one to end.
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
        """Return the number of items of this level that wait for a runner."""
        return sum(len(lane.jobs) for lane in self._lanes if lane.level == level)

    def _reserved(self) -> int:
        """Return the number of bytes reserved for the batches of all runners."""
        return sum(job.memory for batches in self._runners.values() for batch in batches for job in batch)

    def _waiting(self) -> int:
        """Return the number of items that wait for a runner, or behind the batch in work."""
        behind = (islice(batches, 1, None) for batches in self._runners.values())
        wanted = sum(not job.over for batches in behind for batch in batches for job in batch)
        return sum(len(lane.jobs) for lane in self._lanes) + wanted

    def _dispatch_later(self, now: float) -> None:
        """Schedule the next dispatch for the time when a lane has waited long enough for more items."""
        waits = [patience for lane in self._lanes if (patience := lane.patience(now)) > 0]
        wait = min(waits, default=FOREVER)
        if wait < FOREVER and (self._timer is None or self._timer.when() < asyncio.get_running_loop().time()):
            self._timer = asyncio.get_running_loop().call_later(wait, self._dispatch_soon)

    def _start(self, runner: Runner, lane: Lane[Any, Any], batch: list[Job], now: float) -> None:
        """Send a batch to a runner. If that fails, answer its items with the error."""
        self._came[lane.level] = now
        memory = sum(job.memory for job in batch)
        busy = any(self._runners.values())
        alone = len(batch) == 1 and not busy and not any(other.jobs for other in self._lanes)
        self._turn = lane.turn
        # Charge the estimated time now, so that the next choice of a lane takes this batch into account.
        lane.turn += len(batch) * lane.seconds_per_item * _PRICES[lane.level]
        self._runners[runner].append(batch)
        for job in batch:
            job.begun = now
        try:
            # From here on the runner owns the batch. `_finish` is called once, even when the runner dies.
            drop = runner.start(
                lane,
                [job.item for job in batch],
                [job.deadline for job in batch],
                alone=alone,
                apart=batch[0].lost or lane.level > 0,
                memory=memory,
                done=partial(self._finish, runner, lane, batch, now),
            )
        except Exception as error:  # a bug in Fovea: answer these items, and go on
            log.exception("a batch could not be sent to its runner")
            self._runners[runner].remove(batch)
            _answer(batch, error)
            return
        for place, job in enumerate(batch):
            job.drop, job.place = drop, place
        try:
            for job in batch:
                self._metrics.stage_seconds["queue"].observe(now - job.since)
        except Exception:  # the batch has been sent; metrics are optional
            log.exception("the time in the queue could not be counted")

    def _finish(
        self,
        runner: Runner,
        lane: Lane[Any, Any],
        batch: list[Job],
        started: float,
        outcome: Sequence[Any] | Exception,
    ) -> None:
        """Take the outcome of a batch from its runner: answer the items, or queue them again.

        Runners call this once for each batch, in the order in which the batches were begun.
        """
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
            self._dispatch()  # before the answers, so that the runner need not wait
        finally:
            _answer(batch, outcome)

    def _retry(self, lane: Lane[Any, Any], batch: list[Job], error: RunnerLost) -> None:
        """Queue the items again: each in a batch of its own, if the runner may have been at work on them.

        This identifies an item that kills runners, and harms other items at most once. An item that was in a
        lost batch for the second time gets the error as its answer.
        """
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
        """Average the time between two finished batches, per item, while the runners are never idle."""
        now = time.monotonic()
        if self._finished or not self._seconds_per_item:
            newest = (now - (self._finished or started)) / items
            weight = _SMOOTHING if self._seconds_per_item else 1.0
            self._seconds_per_item += weight * (newest - self._seconds_per_item)
        self._finished = now if any(self._runners.values()) else 0.0

    def _charge(self, runner: Runner, lane: Lane[Any, Any], started: float, items: int) -> None:
        """Average a runner's time per item of a lane. A runner works on one batch after another."""
        now = time.monotonic()
        newest = (now - max(started, self._rested.get(runner, 0.0))) / items
        if runner in self._runners:
            self._rested[runner] = now
        weight = _SMOOTHING if lane.seconds_per_item else 1.0
        lane.seconds_per_item += weight * (newest - lane.seconds_per_item)


def _room(batches: Sequence[list[Job]]) -> float:
    """Return the number of largest batches that a runner still has room for.

    A runner with the most expensive items has none.
    """
    if _level(batches) == LEVELS - 1:
        return 0.0
    return _ROOM - sum(job.fill for batch in batches for job in batch)


def _level(batches: Sequence[list[Job]]) -> int:
    """Return the highest level of a runner's batches; 0 if it has none."""
    return max((batch[0].lane.level for batch in batches), default=0)


def _answer(batch: list[Job], answers: Sequence[Any] | Exception) -> None:
    for place, job in enumerate(batch):
        job.answer(answers if isinstance(answers, Exception) else answers[place])


class _Future(asyncio.Future[Any]):
    """A future for an awaiting caller."""

    job: Job | None = None

    def __init__(self, leave: Callable[[Job], None], read: Callable[[Any, Job], Any]) -> None:
        super().__init__()
        self._leave = leave
        self._read = read

    def settle(self, outcome: Any, job: Job) -> None:
        """Set the outcome of the future. The batcher calls this once, unless the item was cancelled."""
        self.job = None  # breaks the reference cycle, which only the garbage collector would free
        try:
            outcome = self._read(outcome, job)
        except Exception as error:  # a bug in Fovea: report it to the caller, who would wait for ever
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

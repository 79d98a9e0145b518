"""Jobs, and the lanes in which they wait for a runner: one lane for each model.

Everything here runs on the event loop, so no locks are needed.
"""

from __future__ import annotations

import asyncio
import logging
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeAlias, TypeVar

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

INFINITY: Final = float("inf")
"""Deadline that never passes."""

_FULL_BATCH: Final = 1 + 1e-9
"""Fill of a full batch, with a tolerance for rounding."""

_MAX_IDLE_CALLERS: Final = 64
"""Number of callers without items whose turns a lane keeps. It forgets them when there are more."""

DropItem: TypeAlias = Callable[[int], None]
"""Function that tells a runner that no caller wants the item at this index of a batch any more."""

JobCallback: TypeAlias = Callable[[Any, "Job"], None]
"""Callback for an item: the batcher calls it on the event loop with the outcome and the job."""


@dataclass(slots=True, eq=False)
class Job:
    """An item with its state. Only code on the event loop reads or changes it."""

    item: Any = field(repr=False)  # images must not appear in logs
    lane: Lane[Any, Any] = field(repr=False)
    on_outcome: JobCallback
    deadline: float
    """Time after which the answer is useless, on the monotonic clock, in seconds."""
    arrived_at: float
    """Arrival time on the monotonic clock, in seconds."""
    batch_share: float
    """Share of a batch that the item takes; at most 1."""
    started_at: float = 0.0
    """Time at which a runner got the item, on the monotonic clock, in seconds."""
    is_over: bool = False
    """True if the item was answered or its caller has left."""
    is_suspect: bool = False
    """True if the item was in a batch on which a runner may have died."""
    drop_item: DropItem | None = None
    """Function that tells the item's runner that the item is not wanted any more; None in the queue."""
    index: int = 0
    """Index of the item in its batch."""
    memory: int = 0
    """Bytes to reserve before a runner may begin; 0 if the runner's own share is enough."""
    size: int = 1
    """Number of items for which the item counts in averages and limits. More than 1 fills a batch."""
    caller: str | None = None
    """Name of the caller whose items wait in turn with those of other callers; None without turns."""
    turn: float = 0.0
    """Turn of the item in its lane; items with lower turns run first."""

    def is_wanted(self, now: float) -> bool:
        """Return False once the caller has left or the deadline has passed: no more work is done then."""
        return not self.is_over and now < self.deadline

    def deliver_outcome(self, outcome: Any) -> None:
        """Pass the outcome to the caller, unless the caller has left.

        If the caller's function raises, pass the error instead.
        """
        if self.is_over:
            return
        # Before the callback, which may call `Batcher.cancel` for this job.
        self.is_over = True
        try:
            self.on_outcome(outcome, self)
        except Exception as error:  # a bug of one caller must not cost the others their answers
            log.exception("the callback of an item raised an exception")
            if not isinstance(outcome, Exception):
                with suppress(Exception):
                    self.on_outcome(error, self)


def deliver_outcomes(batch: list[Job], outcome: Sequence[Any] | Exception) -> None:
    """Pass to each job of a batch its own outcome, or one error to all of them."""
    for index, job in enumerate(batch):
        job.deliver_outcome(outcome if isinstance(outcome, Exception) else outcome[index])


@dataclass(eq=False)
class Lane(Generic[Item, Result]):
    """The queue of one model. Only items of one lane share a batch."""

    model_id: int
    """Id of the model in messages to runners."""
    batch_max: int
    """Limit of items in one batch."""
    weight_max: float = INFINITY
    """Limit of the weight of one batch. A batch of a single item may exceed it."""
    weigh: Callable[[Item], float] = lambda item: 0.0
    split_evenly: bool = True
    """True to make batches smaller so that every runner gets some of the items.

    This is faster, unless a model needs large batches to be fast.
    """
    max_wait: float = 0.0
    """Time for which an item may wait for others, in seconds."""
    level: int = 0
    """Level of expense of the items. From level 1 on, batches run separately."""
    jobs: deque[Job] = field(default_factory=deque)
    error: Exception | None = None
    """Error with which every further item is answered: no runner has the model any more. Normally None."""
    virtual_time: float = 0.0
    """Virtual time of the next batch, in seconds of runners' time. The lane with the lowest value is next."""
    seconds_per_item: float = 0.0
    """Runner time per item in seconds: a moving average, 0 before the first measurement."""

    turn: float = 0.0
    """Turn of the last item that left the lane for a runner."""
    next_turns: dict[str, float] = field(default_factory=dict)
    """Turn of the next item of each caller, by the caller's name."""

    def add_job(self, job: Job) -> None:
        """Add an item to the queue: at the end, or in its caller's turn.

        Each caller has one item in each turn, so that a caller with one item waits for one item of each other
        caller and not for all items of a caller with many. This is start-time fair queueing, as among lanes,
        with the number of items as the time.
        """
        if job.caller is None:
            self.jobs.append(job)
            return
        job.turn = max(self.turn, self.next_turns.get(job.caller, 0.0))
        self.next_turns[job.caller] = job.turn + job.size
        if len(self.next_turns) > 2 * len(self.jobs) + _MAX_IDLE_CALLERS:
            waiting = {other.caller for other in self.jobs} | {job.caller}
            self.next_turns = {name: turn for name, turn in self.next_turns.items() if name in waiting}
        if self.jobs and self.jobs[-1].turn > job.turn:
            self.jobs.insert(bisect_right(self.jobs, job.turn, key=_get_turn), job)
        else:
            self.jobs.append(job)

    def remove_job(self, job: Job) -> None:
        """Remove an item that nobody wants any more, and give its turn to the caller's next item."""
        with suppress(ValueError):  # the item has left the queue already: its deadline had passed
            self.jobs.remove(job)
            if job.caller in self.next_turns:
                self.next_turns[job.caller] -= job.size

    def compute_share(self, item: Item) -> float:
        """Return the share of the largest batch that an item takes; at most 1."""
        return max(1 / self.batch_max, min(1.0, self.weigh(item) / self.weight_max))

    def is_due(self, now: float) -> bool:
        """Return whether a batch is due: items wait, and there are enough or the first has waited enough."""
        jobs = self.jobs
        return bool(jobs) and (
            not self.max_wait or len(jobs) >= self.batch_max or jobs[0].arrived_at + self.max_wait <= now
        )

    def first_wanted_job(self, now: float) -> Job | None:
        """Return the first wanted item, and remove unwanted items before it."""
        while self.jobs and not self.jobs[0].is_wanted(now):
            self.jobs.popleft()
        return self.jobs[0] if self.jobs else None

    def pop_batch(self, capacity: float, now: float, memory: float = INFINITY) -> list[Job]:
        """Remove and return the next batch, without items that are not wanted any more.

        `capacity` is the number of largest batches that all runners together have room for. `memory` is the
        number of bytes that can be reserved.
        """
        batch: list[Job] = []
        total_share = 0.0
        max_items = math.ceil(len(self.jobs) / capacity) if self.split_evenly else self.batch_max
        while self.jobs and len(batch) < min(max_items, self.batch_max):
            job = self.jobs[0]
            if job.is_wanted(now):
                total_share += job.batch_share
                memory -= job.memory
                if batch and (total_share > _FULL_BATCH or job.is_suspect or memory < 0):
                    break
                batch.append(job)
            self.jobs.popleft()
            if job.is_suspect and batch:
                break
        if batch and batch[-1].turn > self.turn:
            self.turn = batch[-1].turn
        return batch


def _get_turn(job: Job) -> float:
    return job.turn


class JobFuture(asyncio.Future[Any]):
    """A future that an awaiting caller of `Batcher.submit` gets. Cancelling it cancels the job."""

    job: Job | None = None

    def __init__(self, on_cancel: Callable[[Job], None], convert: Callable[[Any, Job], Any]) -> None:
        super().__init__()
        self._on_cancel = on_cancel
        self._convert = convert

    def set_outcome(self, outcome: Any, job: Job) -> None:
        """Set the outcome of the future.

        The batcher calls this on the event loop, once, unless the item was cancelled: `cancel` ends the job
        before the future, so the future cannot have an outcome yet.
        """
        self.job = None  # breaks the reference cycle, which only the garbage collector would free
        try:
            outcome = self._convert(outcome, job)
        except Exception as error:  # a bug in Fovea: report it to the caller, who would wait for ever
            log.exception("the outcome of an item could not be converted for its caller")
            outcome = error
        if isinstance(outcome, Exception):
            self.set_exception(outcome)
        else:
            self.set_result(outcome)

    def cancel(self, msg: Any = None) -> bool:
        """Cancel the job and the future. asyncio calls this when the awaiting task is cancelled."""
        if self.job:
            self._on_cancel(self.job)
            self.job = None
        return super().cancel(msg)

"""Greedy batching: callers await single items, and free runners take the items that wait.

A runner takes its share of the waiting items, up to the largest batch. No item waits for others, unless
`Lane.max_wait` says so. A runner has room for two batches: one in work, and one that it finds when the first
batch is done, so that the runner need not wait for the event loop. The second batch may come in parts, which
the runner may combine. Everything happens on the event loop, so this module needs no locks. The module knows
neither HTTP, nor images, nor the implementation of a runner.

Lanes have equal shares of the runners' time: the next batch comes from the lane that has had the least time
since it was last idle (start-time fair queueing: Goyal, Vin and Cheng, 1996). Lanes of expensive items have
smaller shares and only some of the runners, so that cheap items are never delayed for long. Items that need
much memory wait in this queue until there is enough, not in a runner. Inside a lane, the items of callers
with names take turns (`Lane.add_job`); all other items wait in the order of their arrival.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Final

from fovea.service.observability.metrics import Metrics
from fovea.service.runners.lane import (
    INFINITY,
    Item,
    Job,
    JobCallback,
    JobFuture,
    Lane,
    Result,
    deliver_outcomes,
)
from fovea.service.runners.runner_interface import Runner, RunnerLost

log = logging.getLogger(__name__)

_RUNNER_CAPACITY: Final = 2
"""Number of batches that a runner has room for: the batch in work, and the next one."""

_LEVEL_PRICES: Final = (1.0, 4.0, 8.0)
"""Price of a second of a runner's time for a lane, by the level of the lane.

When all levels have work, the cheapest level gets 1 / (1 + 1/4 + 1/8) = 73 % of the time.
"""

LEVEL_COUNT: Final = len(_LEVEL_PRICES)
"""Number of levels of expense; level 0 is the cheapest."""

_RECENT_SECONDS: Final = 1.0
"""Time for which runners stay free for cheaper items after the last cheaper item, in seconds."""

_SMOOTHING: Final = 0.1
"""Weight of the newest batch in the moving average of seconds per item."""


class Batcher:
    """The lanes and the runners. Call every method on the event loop."""

    def __init__(self, metrics: Metrics, *, memory: float = INFINITY) -> None:
        """Create a batcher that may reserve `memory` bytes.

        The number of waiting items has no limit here: the caller of `enqueue` must limit it.
        """
        self._lanes: dict[Lane[Any, Any], None] = {}
        """Lanes in which items wait, or have waited until a moment ago."""
        self._metrics = metrics
        self._memory = self._total_memory = memory
        self._last_arrivals = [-INFINITY] * LEVEL_COUNT
        """Time at which the last item of each level arrived or was begun, on the monotonic clock."""
        self._runners: dict[Runner, deque[list[Job]]] = {}
        """Batches of each runner. The runner works on the first one."""
        self._reserved_bytes = 0
        """Number of bytes reserved for the batches of all runners."""
        self._finish_times: dict[Runner, float] = {}
        """Time at which each runner finished its last batch, on the monotonic clock."""
        self._virtual_time = 0.0
        """Virtual time of the lane that got the last batch."""
        self._is_dispatch_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._seconds_per_item = 0.0
        self._last_finish = 0.0
        """Time at which the last batch was finished; 0 if the runners have been idle since."""
        metrics.add_gauge_setter(self._set_gauges)

    def add_runner(self, runner: Runner) -> None:
        """Give work to a runner from now on."""
        self._runners[runner] = deque()
        self._dispatch_soon()

    def remove_runner(self, runner: Runner) -> None:
        """Give a runner no more work."""
        for batch in self._runners.pop(runner, ()):
            self._reserved_bytes -= _sum_memory(batch)
        self._finish_times.pop(runner, None)

    def enqueue(
        self,
        item: Item,
        lane: Lane[Item, Result],
        on_outcome: JobCallback,
        *,
        deadline: float,
        memory: int = 0,
        size: int = 1,
        caller: str | None = None,
    ) -> Job:
        """Queue `item`.

        `on_outcome` is called on the event loop, unless `cancel` is called before. If `deadline` (monotonic,
        in seconds) passes first, no work is done; `on_outcome` then gets an error or is not called. The item
        begins when `memory` bytes can be reserved; if it needs more than there are, it reserves all of them.
        `size` and `caller` are those of `Job`.
        """
        now = time.monotonic()
        self._last_arrivals[lane.level] = now
        needed_bytes = int(min(memory, self._total_memory))
        share = lane.compute_share(item)
        job = Job(item, lane, on_outcome, deadline, now, share, memory=needed_bytes, size=size, caller=caller)
        if lane.error is not None:
            # Later, not at once: the caller does not have the job yet, and must get it before the outcome.
            asyncio.get_running_loop().call_soon(job.deliver_outcome, lane.error)
            return job
        if not lane.jobs:  # an idle lane saves up no claim to time
            lane.virtual_time = max(lane.virtual_time, self._virtual_time)
        lane.add_job(job)
        self._lanes[lane] = None
        self._dispatch_soon()
        return job

    def cancel(self, job: Job) -> None:
        """Remove an item whose caller has left.

        Otherwise such items would pile up while no runner is free. The job's `on_outcome` is not called any
        more.
        """
        if job.is_over:
            return
        # First: an item that a runner has is not removed from its batch, but its answer is ignored.
        job.is_over = True
        if job.drop_item:
            job.drop_item(job.index)
        else:
            job.lane.remove_job(job)
        self._dispatch_soon()

    def close_lane(self, lane: Lane[Any, Any], error: Exception) -> None:
        """Answer all items of a lane with `error`, both waiting and future items."""
        # Set the error and empty the queue before the callbacks, which may queue more items.
        lane.error = error
        jobs = list(lane.jobs)
        lane.jobs.clear()
        deliver_outcomes(jobs, error)
        self._dispatch_soon()

    def expire_jobs(self, cutoff: float, error: Exception) -> float | None:
        """Answer waiting items that arrived at `cutoff` (monotonic, in seconds) or earlier with `error`.

        Return the arrival time of the oldest remaining item; None if no item waits any more.
        """
        for lane in list(self._lanes):
            late_jobs = [job for job in lane.jobs if job.arrived_at <= cutoff]
            remaining_jobs = [job for job in lane.jobs if job.arrived_at > cutoff]
            lane.jobs.clear()
            lane.jobs.extend(remaining_jobs)
            deliver_outcomes(late_jobs, error)
        self._dispatch_soon()
        return min((job.arrived_at for lane in self._lanes for job in lane.jobs), default=None)

    def submit(
        self,
        item: Item,
        lane: Lane[Item, Result],
        *,
        deadline: float = INFINITY,
        memory: int = 0,
        size: int = 1,
        caller: str | None = None,
        convert: Callable[[Any, Job], Any] = lambda outcome, job: outcome,
    ) -> asyncio.Future[Any]:
        """Queue `item` like `enqueue`; return a future of the result or error. Cancel the future to leave.

        `convert` converts the outcome to the value of the future, as soon as there is an outcome. The
        deadline does not end the future.
        """
        future: JobFuture = JobFuture(self.cancel, convert)
        future.job = self.enqueue(
            item, lane, future.set_outcome, deadline=deadline, memory=memory, size=size, caller=caller
        )
        return future

    def reserve_memory(self, size: int) -> bool:
        """Reserve `size` bytes for another use until `release_memory`; return False if they are not free."""
        if size > self._memory - self._reserved_bytes:
            return False
        self._memory -= size
        return True

    def release_memory(self, size: int) -> None:
        """Release `size` bytes that `reserve_memory` has reserved."""
        self._memory += size
        self._dispatch_soon()

    def drain_seconds(self, item_count: int) -> float:
        """Return the seconds that `item_count` items take at the measured rate.

        The result is 0 before the first measurement.
        """
        return item_count * self._seconds_per_item

    def _dispatch_soon(self) -> None:
        """Schedule a dispatch after all input that the event loop has read by now.

        The items in that input are then divided among the runners together.
        """
        if not self._is_dispatch_scheduled:
            self._is_dispatch_scheduled = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Give batches to runners until no lane is due, no runner has room, or memory is short."""
        self._is_dispatch_scheduled = False
        if self._lanes:
            now = time.monotonic()
            self._lanes = {lane: None for lane in self._lanes if lane.jobs}
            self._start_due_batches(now)
            self._dispatch_later(now)
        if self._metrics.is_shared:
            self._metrics.fold()

    def _start_due_batches(self, now: float) -> None:
        while due_lanes := [lane for lane in self._lanes if lane.is_due(now)]:
            capacity: dict[Runner, float] = {}
            total_capacity = 0.0
            for runner, batches in self._runners.items():
                capacity[runner] = free_capacity = _free_capacity(batches)
                if free_capacity > 0:
                    total_capacity += free_capacity
            free_memory = self._memory - self._reserved_bytes
            pair = self._choose_pair(due_lanes, capacity, free_memory, now) if total_capacity else None
            if pair is None:
                return
            lane, runner = pair
            if batch := lane.pop_batch(total_capacity, now, free_memory):
                self._start_batch(runner, lane, batch, now)

    def _set_gauges(self) -> None:
        """Set the gauges of the queue."""
        self._metrics.queue_images.set(self._count_queued())
        self._metrics.queue_costly_images.set(self.count_waiting(LEVEL_COUNT - 1))
        self._metrics.decode_reserved_bytes.set(self._reserved_bytes)

    def _choose_pair(
        self,
        due_lanes: list[Lane[Any, Any]],
        capacity: Mapping[Runner, float],
        free_memory: float,
        now: float,
    ) -> tuple[Lane[Any, Any], Runner] | None:
        """Return the lane with the lowest virtual time among lanes that can start now, and a runner for it.

        `free_memory` is the number of bytes that can be reserved. Memory is reserved in the order of virtual
        time: an item that needs much memory is not overtaken by another item that needs memory.
        """
        is_memory_short = False
        if len(due_lanes) > 1:
            due_lanes.sort(key=lambda lane: (lane.virtual_time, lane.jobs[0].arrived_at))
        for lane in due_lanes:
            job = lane.first_wanted_job(now)
            if job is None:
                continue
            is_memory_short = is_memory_short or (job.memory > 0 and job.memory > free_memory)
            if job.memory and is_memory_short:
                continue
            best_runner: Runner | None = None
            best_claim = (0.0, False)
            for runner in self._list_eligible_runners(lane.level, now) if lane.level else self._runners:
                claim = capacity[runner], runner.is_multi_threaded
                if claim[0] > 0 and claim > best_claim:
                    best_runner, best_claim = runner, claim
            if best_runner:
                return lane, best_runner
        return None

    def _list_eligible_runners(self, level: int, now: float) -> list[Runner]:
        """Return the runners that may take items of this level: all for level 0, some for other levels.

        While cheaper items arrive, a level gets half of the runners, so that the cheaper items keep the other
        half. The most expensive items never get all runners, because the next cheap item would have to wait
        until one of them is finished.
        """
        eligible = list(self._runners)
        count = len(eligible)
        for min_level in range(1, level + 1):
            costly_runners = [one for one in self._runners if _max_level(self._runners[one]) >= min_level]
            is_shared = any(now - arrival < _RECENT_SECONDS for arrival in self._last_arrivals[:min_level])
            max_runners = count // 2 if is_shared else count - (min_level == LEVEL_COUNT - 1)
            if len(costly_runners) >= max(1, max_runners):
                eligible = [one for one in eligible if one in costly_runners]
        return eligible

    def count_waiting(self, level: int) -> int:
        """Return the number of items of this level that wait for a runner, by their sizes."""
        return sum(job.size for lane in self._lanes if lane.level == level for job in lane.jobs)

    def count_callers(self, level: int) -> Counter[str | None]:
        """Return the number of waiting items of this level by caller, by their sizes."""
        counts: Counter[str | None] = Counter()
        for lane in self._lanes:
            if lane.level == level:
                for job in lane.jobs:
                    counts[job.caller] += job.size
        return counts

    def _count_queued(self) -> int:
        """Return the number of items that wait for a runner, or behind the batch in work, by their sizes."""
        queued_batches = (islice(batches, 1, None) for batches in self._runners.values())
        queued_items = sum(
            job.size for batches in queued_batches for batch in batches for job in batch if not job.is_over
        )
        return sum(job.size for lane in self._lanes for job in lane.jobs) + queued_items

    def _dispatch_later(self, now: float) -> None:
        """Schedule the next dispatch for the time when a lane has waited long enough for more items."""
        wait = INFINITY
        for lane in self._lanes:
            if lane.max_wait and lane.jobs and not lane.is_due(now):
                wait = min(wait, lane.jobs[0].arrived_at + lane.max_wait - now)
        if wait < INFINITY and (
            self._timer is None or self._timer.when() < asyncio.get_running_loop().time()
        ):
            self._timer = asyncio.get_running_loop().call_later(wait, self._dispatch_soon)

    def _start_batch(self, runner: Runner, lane: Lane[Any, Any], batch: list[Job], now: float) -> None:
        """Send a batch to a runner. If that fails, answer the items of the batch with the error."""
        self._last_arrivals[lane.level] = now
        memory = _sum_memory(batch)
        is_busy = any(self._runners.values())
        exclusive = len(batch) == 1 and not is_busy and not any(other.jobs for other in self._lanes)
        self._virtual_time = lane.virtual_time
        # Charge the estimated time now, so that the next choice of a lane takes this batch into account.
        lane.virtual_time += _count_items(batch) * lane.seconds_per_item * _LEVEL_PRICES[lane.level]
        # Before the runner has the batch: `_finish_batch` removes the first batch of the runner.
        self._runners[runner].append(batch)
        self._reserved_bytes += memory
        for job in batch:
            job.started_at = now
        try:
            # From here on the runner owns the batch. It calls `_finish_batch` once, even when it dies.
            drop_item = runner.start_batch(
                lane,
                [job.item for job in batch],
                [job.deadline for job in batch],
                exclusive=exclusive,
                separate=batch[0].is_suspect or lane.level > 0,
                memory=memory,
                on_finish=partial(self._finish_batch, runner, lane, batch, now),
            )
        except Exception as error:  # a bug in Fovea: answer these items, and go on
            log.exception("a batch could not be sent to its runner")
            self._runners[runner].remove(batch)
            self._reserved_bytes -= memory
            deliver_outcomes(batch, error)
            return
        # From here on `cancel` informs the runner. There was no `await`, so no caller can have left before.
        for index, job in enumerate(batch):
            job.drop_item, job.index = drop_item, index
        try:
            for job in batch:
                self._metrics.seconds_by_stage["queue"].observe(now - job.arrived_at)
        except Exception:  # the batch has been sent; metrics are optional
            log.exception("the time in the queue could not be counted in the metrics")

    def _finish_batch(
        self,
        runner: Runner,
        lane: Lane[Any, Any],
        batch: list[Job],
        started_at: float,
        outcome: Sequence[Any] | Exception,
    ) -> None:
        """Take the outcome of a batch from its runner: answer the items, or queue them again.

        Runners call this on the event loop, once for each batch, in the order in which the batches were
        begun. Only a dead runner reports its batches in reverse order, after `remove_runner`: see
        `_retry_batch`.
        """
        if runner in self._runners:
            self._runners[runner].popleft()
            self._reserved_bytes -= _sum_memory(batch)
        if isinstance(outcome, RunnerLost):
            if outcome.is_suspect:
                seconds = time.monotonic() - max(started_at, self._finish_times.get(runner, 0.0))
                lane.virtual_time += seconds * _LEVEL_PRICES[lane.level]
            self._retry_batch(lane, batch, outcome)
            self._dispatch_soon()
            return
        try:
            item_count = _count_finished_items(batch, outcome)
            self._update_rate(started_at, item_count)
            self._update_lane_cost(runner, lane, started_at, item_count)
            # Before the answers: callbacks take a while, and the runner should not wait for them.
            self._dispatch()
        finally:
            deliver_outcomes(batch, outcome)

    def _retry_batch(self, lane: Lane[Any, Any], batch: list[Job], error: RunnerLost) -> None:
        """Queue the items again: each in a batch of its own, if the runner may have been at work on them.

        This identifies an item that kills runners, and delays other items at most once. An item that was in a
        lost batch for the second time gets the error as its answer. Each batch goes to the head of the queue,
        so the last batch of a runner must come first.
        """
        failed_jobs = [job for job in batch if job.is_suspect and error.is_suspect]
        deliver_outcomes(failed_jobs, error)
        for job in reversed(batch):
            if job not in failed_jobs:
                job.is_suspect = job.is_suspect or error.is_suspect
                job.drop_item = None
                if not job.is_over:
                    lane.jobs.appendleft(job)
                    self._lanes[lane] = None

    def _update_rate(self, started_at: float, item_count: int) -> None:
        """Average the time between two finished batches, per item, while the runners are never idle."""
        now = time.monotonic()
        if self._last_finish or not self._seconds_per_item:
            newest = (now - (self._last_finish or started_at)) / item_count
            weight = _SMOOTHING if self._seconds_per_item else 1.0
            self._seconds_per_item += weight * (newest - self._seconds_per_item)
        self._last_finish = now if any(self._runners.values()) else 0.0

    def _update_lane_cost(
        self, runner: Runner, lane: Lane[Any, Any], started_at: float, item_count: int
    ) -> None:
        """Average a runner's time per item of a lane. A runner works on one batch after another."""
        now = time.monotonic()
        newest = (now - max(started_at, self._finish_times.get(runner, 0.0))) / item_count
        if runner in self._runners:
            self._finish_times[runner] = now
        weight = _SMOOTHING if lane.seconds_per_item else 1.0
        lane.seconds_per_item += weight * (newest - lane.seconds_per_item)


def _count_items(batch: Sequence[Job]) -> int:
    """Return the number of items for which a batch counts."""
    return batch[0].size if len(batch) == 1 else len(batch)


def _count_finished_items(batch: Sequence[Job], outcome: Sequence[Any] | Exception) -> int:
    """Return the number of items for which a finished batch counts in averages.

    A large item that failed counts as one item: it may have failed long before the work was done.
    """
    has_failed = isinstance(outcome, Exception) or isinstance(outcome[0], Exception)
    return len(batch) if has_failed else _count_items(batch)


def _sum_memory(batch: Sequence[Job]) -> int:
    """Return the number of bytes that are reserved for a batch."""
    memory = 0
    for job in batch:
        memory += job.memory
    return memory


def _free_capacity(batches: Iterable[list[Job]]) -> float:
    """Return the number of largest batches that a runner still has room for.

    A runner with the most expensive items has none.
    """
    capacity: float = _RUNNER_CAPACITY
    for batch in batches:
        if batch[0].lane.level == LEVEL_COUNT - 1:
            return 0.0
        for job in batch:
            capacity -= job.batch_share
    return capacity


def _max_level(batches: Sequence[list[Job]]) -> int:
    """Return the highest level of a runner's batches; 0 if it has none."""
    return max((batch[0].lane.level for batch in batches), default=0)

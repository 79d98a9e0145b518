"""Greedy batching: many callers await one row each, a few runners take whatever waits.

A free runner takes all that waits, up to the largest batch; nobody waits for company. Everything
but the model call itself happens on the event loop, so nothing here needs a lock. It knows no HTTP
and no images.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from service.metrics import Metrics

Row: TypeAlias = npt.NDArray[Any]

_SMOOTHING: Final = 0.1
"""Weight of the newest batch in the moving average of seconds per row."""


@dataclass(frozen=True)
class _Waiting:
    row: Row
    answer: asyncio.Future[Row]
    since: float
    """On the monotonic clock, in seconds."""


class Batcher:
    """Rows in, rows out. Every method must be called on the event loop."""

    def __init__(self, run: Callable[[Row], Row], *, runners: int, batch_max: int, metrics: Metrics) -> None:
        """`run` maps a batch (n, …) to (n, …), is called from `runners` threads and never from two
        of them with the same batch. The queue is bounded by whoever submits."""
        self._run = run
        self.batch_max = batch_max
        self._metrics = metrics
        self._idle = runners
        self._runners = runners
        self._waiting: deque[_Waiting] = deque()
        self._threads = ThreadPoolExecutor(runners, thread_name_prefix="runner")
        self._seconds_per_row = 0.0

    async def submit(self, row: Row) -> Row:
        """Wait for this row's turn and return its result. Raises what `run` raised for its batch."""
        answer: asyncio.Future[Row] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(row, answer, time.monotonic()))
        self._metrics.queue_images.inc()
        self._dispatch()
        return await answer

    def drain_seconds(self, rows: int) -> float:
        """How long `rows` rows take, by the measured rate; 0 before anything was measured."""
        return rows * self._seconds_per_row

    def close(self) -> None:
        """End the threads, after the calls that they are in."""
        self._threads.shutdown()

    def _dispatch(self) -> None:
        while self._idle and (batch := self._take()):
            self._idle -= 1
            call = asyncio.get_running_loop().run_in_executor(self._threads, self._call, batch)
            call.add_done_callback(partial(self._finish, batch))

    def _take(self) -> list[_Waiting]:
        """The next batch; those whose caller has left are dropped and cost no inference."""
        batch: list[_Waiting] = []
        while self._waiting and len(batch) < self.batch_max:
            waiting = self._waiting.popleft()
            self._metrics.queue_images.dec()
            if not waiting.answer.done():
                batch.append(waiting)
        return batch

    def _call(self, batch: list[_Waiting]) -> Row:
        """In a runner's thread."""
        started = time.monotonic()
        for waiting in batch:
            self._metrics.stage_seconds.labels("queue").observe(started - waiting.since)
        rows = self._run(np.stack([waiting.row for waiting in batch]))
        elapsed = time.monotonic() - started
        self._metrics.stage_seconds.labels("inference").observe(elapsed)
        self._metrics.batch_images.observe(len(batch))
        newest = elapsed / len(batch) / self._runners
        weight = _SMOOTHING if self._seconds_per_row else 1.0
        self._seconds_per_row += weight * (newest - self._seconds_per_row)
        return rows

    def _finish(self, batch: list[_Waiting], call: asyncio.Future[Row]) -> None:
        self._idle += 1
        error = call.exception()
        for index, waiting in enumerate(batch):
            if waiting.answer.done():
                continue
            if error:
                waiting.answer.set_exception(error)
            else:
                waiting.answer.set_result(call.result()[index])
        self._dispatch()

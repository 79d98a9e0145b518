"""The connection to a runner process on the service's event loop: batches and loads, with their answers."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from fovea.service.errors import Interrupted, ModelError
from fovea.service.observability.metrics import Metrics
from fovea.service.runners.batch_messages import (
    Answer,
    Batch,
    BatchReport,
    DropCommand,
    Item,
    count_results,
)
from fovea.service.runners.frame_stream import FrameStream
from fovea.service.runners.frames import Frame, FrameError
from fovea.service.runners.lane import INFINITY, Lane
from fovea.service.runners.load_messages import (
    LoadCommand,
    LoadedModel,
    LoadReply,
    LoadRequest,
    UnloadCommand,
)
from fovea.service.runners.messages import Failure
from fovea.service.runners.runner_interface import BatchCallback, RunnerLost
from fovea.service.runners.runner_process import RunnerProcess

log = logging.getLogger(__name__)


class _PendingBatch(NamedTuple):
    """A batch that was sent to a runner and has no answer yet."""

    number: int
    on_finish: BatchCallback
    lane: Lane[Any, Any]
    items: Sequence[Item]
    separate: bool


def _count_suspects(pending: Sequence[_PendingBatch]) -> int:
    """Return the number of batches, from the first on, on which a runner may have been working.

    This follows the grouping in `process._pop_group`, which decides in the runner. Both must change together.
    """
    if not pending or pending[0].separate:
        return min(len(pending), 1)
    lane, images, weight = pending[0].lane, 0, 0.0
    for number, batch in enumerate(pending):
        images, weight = images + len(batch.items), weight + sum(map(lane.weigh, batch.items))
        is_separate = (
            batch.separate or batch.lane is not lane or images > lane.batch_max or weight > lane.weight_max
        )
        if is_separate and number:
            return number
    return len(pending)


class RunnerConnection(FrameStream):
    """The connection to one runner, which works on one batch after another.

    It implements `service.runners.runner_interface.Runner`. All methods run on the event loop, so that
    messages are queued in the order of the calls. The runner answers batches in the order in which they were
    sent: `_pending_batches` must have the same order.
    """

    process: RunnerProcess

    def __init__(
        self,
        process: RunnerProcess,
        metrics: Metrics,
        batch_timeout: float,
        on_lost: Callable[[RunnerConnection], None],
    ) -> None:
        """Prepare the connection to `process`.

        `on_lost` is called once, on the event loop, before the callers of unanswered batches get an error. It
        must keep the batcher from sending more work to this runner.
        """
        super().__init__(process)
        self.is_multi_threaded = process.is_multi_threaded
        self.has_answered = False
        self.models: dict[int, LoadedModel] = {}
        """Loaded models by id."""
        self.needs_replacement = True
        """True if another runner takes its place when it ends."""
        self._metrics = metrics
        self._batch_timeout = self._watchdog_seconds = batch_timeout
        self._on_lost = on_lost
        self._last_number = 0
        """Number of the last request; batches and loads have one sequence."""
        self._pending_batches: deque[_PendingBatch] = deque()
        self._pending_loads: dict[int, asyncio.Future[LoadedModel]] = {}
        """Loads without a reply, by number."""

    async def load_model(self, load: LoadCommand, *, timeout: float) -> None:
        """Load one more model while batches run.

        Raises `ModelError` when the model cannot be loaded. Raises `Interrupted` when the runner is dead,
        dies in the meantime, or needs more than `timeout` seconds; the runner is killed then.
        """
        loop = asyncio.get_running_loop()
        if self.is_lost:
            raise Interrupted(f"runner {self.process.pid} has died before it could load the model")
        future: asyncio.Future[LoadedModel] = loop.create_future()
        self._last_number += 1
        # Before the message is sent: the reply, or the loss of the connection, must find the future.
        self._pending_loads[self._last_number] = future
        timer = loop.call_later(timeout, self._handle_load_timeout, future, timeout)
        try:
            self.send(LoadRequest(self._last_number, load).to_pieces())
            # This wait ends: `_handle_load_reply`, `_handle_load_timeout` or `_fail_pending` sets the future.
            loaded_model = await future
        finally:
            timer.cancel()
        if self.is_lost:
            # The connection may have been lost between the reply and this task's turn on the event loop.
            raise Interrupted(f"runner {self.process.pid} has died just after it loaded the model")
        self.models[load.model_id] = loaded_model

    def _handle_load_timeout(self, future: asyncio.Future[LoadedModel], timeout: float) -> None:
        """Kill a runner that exceeded the time limit of a load, and fail the load."""
        reason = (
            f"runner {self.process.pid} has not loaded a model within {timeout:g} s (10 times "
            "FOVEA_TRIAL_SECONDS); it is killed"
        )
        log.error(reason)
        self.give_up()
        if not future.done():
            future.set_exception(Interrupted(reason))

    def unload_model(self, model_id: int) -> None:
        """Unload a model that will get no more batches. The runner sends no reply."""
        self.models.pop(model_id, None)
        self.send(UnloadCommand(model_id).to_pieces())

    def start_batch(
        self,
        lane: Lane[Item, Answer],
        items: Sequence[Item],
        deadlines: Sequence[float],
        *,
        exclusive: bool,
        separate: bool,
        memory: int,
        on_finish: BatchCallback,
    ) -> Callable[[int], None]:
        """Send a batch. See `service.runners.runner_interface.Runner`."""
        number = self._last_number + 1
        limits = [None if deadline == INFINITY else deadline for deadline in deadlines]
        batch = Batch(number, lane.model_id, items, limits, exclusive, separate, memory)
        # Encode before anything is recorded: a batch that cannot be encoded is never sent, and a pending
        # batch without an answer would make the next answer look like an answer to another batch.
        pieces = list(batch.to_pieces())
        # Record before the first byte is written: if the connection is lost, `_fail_pending` must find the
        # batch.
        self._last_number = number
        self._pending_batches.append(_PendingBatch(number, on_finish, lane, items, separate))
        if len(self._pending_batches) == 1:
            self._watch_first_batch()
        self.send(pieces)
        return partial(self._drop_item, number)

    def _watch_first_batch(self) -> None:
        """Start the watchdog for the first batch. An image with boxes takes one batch after another."""
        lane, items = self._pending_batches[0].lane, self._pending_batches[0].items
        call_count = math.ceil(count_results(items[0]) / lane.batch_max) if len(items) == 1 else 1
        self._watchdog_seconds = call_count * self._batch_timeout
        self._start_watchdog(self._watchdog_seconds)

    def _drop_item(self, batch_number: int, index: int) -> None:
        """Tell the runner to drop an image, unless it may already work on the batch or has answered it."""
        if self._pending_batches and batch_number > self._pending_batches[0].number:
            self.send(DropCommand(batch_number, index).to_pieces())

    def _handle_lost(self, watched_seconds: float) -> None:
        """Inform all callers that wait for the runner.

        The callers are informed last: a lost batch goes back to the queue, from which it must not reach this
        runner again.
        """
        try:
            self._on_lost(self)
        finally:  # even if this fails, no caller may wait for ever
            self._fail_pending()
        self._metrics.busy_seconds.add(watched_seconds)

    def _fail_pending(self) -> None:
        """Report the death to all callers that wait for the process.

        Batches are reported in reverse order, because the batcher puts each of them back at the head of its
        queue.
        """
        for future in self._pending_loads.values():
            if not future.done():
                future.set_exception(Interrupted(f"runner {self.process.pid} died while it loaded the model"))
        suspect_count = _count_suspects(list(self._pending_batches))
        while self._pending_batches:
            batch = self._pending_batches.pop()
            is_suspect = len(self._pending_batches) < suspect_count
            try:
                batch.on_finish(
                    RunnerLost(f"runner {self.process.pid} died before it answered", is_suspect=is_suspect)
                )
            except Exception:  # the other batches have callers too
                log.exception("a batch of dead runner %d could not be queued again", self.process.pid)

    def _handle_fault(self, error: FrameError | TimeoutError) -> None:
        reason = str(error) or f"has not answered for {self._watchdog_seconds:g} s (FOVEA_BATCH_TIMEOUT)"
        log.error("runner %d %s; it is killed", self.process.pid, reason)

    def _handle_frame(self, frame: Frame) -> None:
        """Handle one message: the outcome of a load, or the answer to the oldest batch.

        A runner that answers another request is killed, because its answers cannot be trusted.
        """
        if frame.kind == BatchReport.__name__:
            self._handle_batch_reply(BatchReport.from_frame(frame))
        elif frame.kind == LoadReply.__name__:
            self._handle_load_reply(LoadReply.from_frame(frame))
        else:
            failure = Failure.from_frame(frame)
            if failure.number in self._pending_loads:
                self._handle_load_reply(failure)
            else:
                self._handle_batch_reply(failure)

    def _handle_load_reply(self, reply: LoadReply | Failure) -> None:
        """Pass the outcome of a load to its waiting caller. Raises `FrameError`."""
        if (future := self._pending_loads.pop(reply.number, None)) is None:
            raise FrameError(f"answered load {reply.number}, which is not open")
        if future.done():  # the waiting caller has left
            return
        if isinstance(reply, LoadReply):
            future.set_result(reply.model)
            return
        if reply.trace:
            log.error("a model could not be loaded in runner %d\n%s", self.process.pid, reply.trace)
        future.set_exception(reply.to_exception())

    def _handle_batch_reply(self, reply: BatchReport | Failure) -> None:
        """Pass the outcome of the oldest batch to the batcher. Raises `FrameError`."""
        busy_seconds = self._stop_watchdog()
        pending = self._pending_batches[0] if self._pending_batches else None
        if pending is None or reply.number != pending.number:
            expected = f"batch {pending.number}" if pending else "nothing"
            raise FrameError(f"answered batch {reply.number} instead of {expected}")
        if isinstance(reply, BatchReport) and len(reply.answers) != len(pending.items):
            raise FrameError(f"gave {len(reply.answers)} answers to {len(pending.items)} images")
        # The reply has been checked, so the answers cannot go to the wrong callers.
        self.has_answered = True
        # Remove the batch and restart the watchdog before the callback: the batcher may call `start_batch` of
        # this runner from within `on_finish`.
        self._pending_batches.popleft()
        if self._pending_batches:
            self._watch_first_batch()
        if isinstance(reply, Failure):
            log.error("a batch failed in runner %d\n%s", self.process.pid, reply.trace)
            pending.on_finish(ModelError(reply.reason))
        else:
            pending.on_finish(reply.answers)
        try:
            self._record_metrics(reply, busy_seconds)
        except Exception:  # a metric is no reason to give up a working runner
            log.exception("a batch could not be counted in the metrics")

    def _record_metrics(self, report: BatchReport | Failure, busy_seconds: float) -> None:
        """Update the metrics of an answered batch. The runner was at work for `busy_seconds`."""
        self._metrics.busy_seconds.add(busy_seconds)
        if isinstance(report, BatchReport):
            histograms = self._metrics.seconds_by_stage
            for seconds in report.decode_seconds:
                histograms["decode"].observe(seconds)
            if report.batch_size:
                histograms["inference"].observe(report.inference_seconds)
                self._metrics.batch_sizes.observe(report.batch_size)
        if self._metrics.is_shared:
            self._metrics.fold()

"""The connection to a runner process on the service's event loop: batches and loads, with their answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from fovea.service.errors import Interrupted, ModelError
from fovea.service.observability.metrics import Metrics
from fovea.service.runners.batch_messages import Answer, Batch, BatchReport, DropCommand, Item
from fovea.service.runners.frames import Frame, FrameDecoder
from fovea.service.runners.lane import INFINITY, Lane
from fovea.service.runners.load_messages import Failure, LoadCommand, LoadedModel, LoadReply, UnloadCommand
from fovea.service.runners.process_handle import RunnerProcess
from fovea.service.runners.runner_interface import BatchCallback, RunnerLost

log = logging.getLogger(__name__)

_BUFFER_BYTES: Final = 64 << 10
"""Receive buffer size for one runner, in bytes."""


class _PendingBatch(NamedTuple):
    """A batch that was sent to a runner and has no answer yet."""

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


class RunnerConnection(asyncio.BufferedProtocol):
    """The connection to one runner, which works on one batch after another.

    It implements `service.runners.runner_interface.Runner`. All methods run on the event loop, so that
    messages are queued in the order of the calls. The runner answers batches in the order in which they were
    sent: `_pending_batches` must have the same order.
    """

    def __init__(
        self,
        process: RunnerProcess,
        metrics: Metrics,
        batch_timeout: float,
        on_lost: Callable[[RunnerConnection], None],
    ) -> None:
        """Prepare the connection to `process`. asyncio calls `connection_made` next.

        `on_lost` is called once, on the event loop, before the callers of unanswered batches get an error. It
        must keep the batcher from sending more work to this runner.
        """
        self.process = process
        self.is_multi_threaded = process.is_multi_threaded
        self.has_answered = False
        self.models: dict[int, LoadedModel] = {}
        """Loaded models by id."""
        self.is_given_up = False
        """True if the runner gets no more work and is killed."""
        self.needs_replacement = True
        """True if another runner takes its place when it ends."""
        self._metrics = metrics
        self._batch_timeout = batch_timeout
        self._on_lost = on_lost
        self._decoder = FrameDecoder()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._send_queue: deque[memoryview] = deque()
        self._is_paused = False
        self._watchdog: asyncio.TimerHandle | None = None
        self._busy_since = 0.0
        self._pending_batches: deque[_PendingBatch] = deque()
        self._last_batch_number = 0
        self._pending_loads: dict[int, asyncio.Future[LoadedModel]] = {}

    @property
    def is_lost(self) -> bool:
        """True if the process has ended or is about to end: it answers no more batches."""
        return self.is_given_up or bool(self._transport.is_closing())

    async def load_model(self, load: LoadCommand, *, timeout: float) -> None:
        """Load one more model while batches run.

        Raises `ModelError` when the model cannot be loaded. Raises `Interrupted` when the runner is dead,
        dies in the meantime, or needs more than `timeout` seconds; the runner is killed then.
        """
        loop = asyncio.get_running_loop()
        if self.is_lost:
            raise Interrupted(f"runner {self.process.pid} has died before it could load the model")
        future: asyncio.Future[LoadedModel] = loop.create_future()
        # Before the message is sent: the reply, or the loss of the connection, must find the future.
        self._pending_loads[load.model_id] = future
        timer = loop.call_later(timeout, self._handle_load_timeout, future, timeout)
        try:
            self._send_message(load.to_bytes())
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
        self._send_message(UnloadCommand(model_id).to_bytes())

    def give_up(self) -> None:
        """Kill the process, and treat it as dead even if the system takes longer to end it."""
        self.is_given_up = True
        self.process.send_sigkill()
        # asyncio calls `connection_lost` in a later round of the event loop, also if the process hangs.
        self._transport.abort()

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
        number = self._last_batch_number + 1
        limits = [None if deadline == INFINITY else deadline for deadline in deadlines]
        batch = Batch(number, lane.model_id, items, limits, exclusive, separate, memory)
        # Encode before anything is recorded: a batch that cannot be encoded is never sent, and a pending
        # batch without an answer would make the next answer look like an answer to another batch.
        pieces = list(batch.to_pieces())
        # Record before the first byte is written: if the connection is lost, `_fail_pending` must find the
        # batch.
        self._last_batch_number = number
        self._pending_batches.append(_PendingBatch(on_finish, lane, items, separate))
        if len(self._pending_batches) == 1:
            self._start_watchdog()
        self._send_queue.extend(pieces)
        self._write_next()
        return partial(self._drop_item, number)

    def _drop_item(self, batch_number: int, index: int) -> None:
        """Tell the runner to drop an image, unless it may already work on the batch or has answered it."""
        first_pending = self._last_batch_number - len(self._pending_batches) + 1
        if batch_number > first_pending:
            self._send_message(DropCommand(batch_number, index).to_bytes())

    def _send_message(self, message: bytes) -> None:
        self._send_queue.append(memoryview(message))
        self._write_next()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport. asyncio calls this once, before any other callback."""
        self._transport: Any = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the receive buffer. asyncio fills it and then calls `buffer_updated`."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Handle every message that is complete with these bytes. asyncio calls this after `get_buffer`."""
        # Copy the bytes: the transport fills the buffer again, while answers keep views of their frames.
        for frame in self._decoder.feed(bytes(self._buffer[:nbytes])):
            # Check before each frame: the frame before may have made `_handle_message` give up the runner.
            if self.is_lost:
                return
            self._handle_message(frame)

    def pause_writing(self) -> None:
        """Stop writing. asyncio calls this when the socket buffer is full (backpressure)."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """Continue writing. asyncio calls this when the socket buffer has room again."""
        self._is_paused = False
        self._write_next()

    def connection_lost(self, _error: Exception | None) -> None:
        """Give up the runner and inform all callers that wait for it.

        asyncio calls this once, after the stream has ended or `abort` was called. The callers are informed
        last: a lost batch goes back to the queue, from which it must not reach this runner again.
        """
        self.is_given_up = True
        self._send_queue.clear()
        busy_seconds = self._stop_watchdog()
        try:
            self._on_lost(self)
        finally:  # even if this fails, no caller may wait for ever
            self._fail_pending()
        self._metrics.runner_busy_seconds.inc(busy_seconds)

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

    def close(self) -> None:
        """Close the connection. asyncio calls `connection_lost` in a later round of the event loop."""
        self._transport.abort()

    def _write_next(self) -> None:
        """Write one piece of the send queue. The next piece follows after other callbacks of the event loop.

        All messages go through this one queue, so that no message begins between two pieces of another
        message.
        """
        if self._send_queue and not self._is_paused:
            self._transport.write(self._send_queue.popleft())
            if self._send_queue and not self._is_paused:
                asyncio.get_running_loop().call_soon(self._write_next)

    def _start_watchdog(self) -> None:
        """Start the watchdog for the first pending batch, on which the runner now works."""
        self._busy_since = time.monotonic()
        self._watchdog = asyncio.get_running_loop().call_later(
            self._batch_timeout, self._handle_batch_timeout
        )

    def _handle_batch_timeout(self) -> None:
        """Kill a runner that has not answered a batch in time."""
        log.error(
            "runner %d has not answered for %g s (FOVEA_BATCH_TIMEOUT); it is killed",
            self.process.pid,
            self._batch_timeout,
        )
        self.give_up()

    def _stop_watchdog(self) -> float:
        """Stop the watchdog; return the seconds for which the runner was at work."""
        if self._watchdog is None:
            return 0.0
        self._watchdog.cancel()
        self._watchdog = None
        return time.monotonic() - self._busy_since

    def _handle_load_reply(self, reply: LoadReply) -> None:
        """Pass the outcome of a load to its waiting caller."""
        future = self._pending_loads.pop(reply.model_id)
        if future.done():  # the waiting caller has left
            return
        if isinstance(reply.outcome, LoadedModel):
            future.set_result(reply.outcome)
            return
        if reply.outcome.trace:
            log.error("a model could not be loaded in runner %d\n%s", self.process.pid, reply.outcome.trace)
        future.set_exception(reply.outcome.to_exception())

    def _handle_message(self, frame: Frame) -> None:
        """Handle one message: the outcome of a load, or the answer to the oldest batch.

        A runner that answers another batch is killed, because its answers cannot be trusted.
        """
        if reply := LoadReply.from_frame(frame):
            self._handle_load_reply(reply)
            return
        busy_seconds = self._stop_watchdog()
        report = BatchReport.from_frame(frame)
        expected_number = self._last_batch_number - len(self._pending_batches) + 1
        if not self._pending_batches or report.batch_number != expected_number:
            log.error(
                "runner %d answered batch %d instead of batch %d; it is killed",
                self.process.pid,
                report.batch_number,
                expected_number,
            )
            self.give_up()
            return
        # The number has been checked, so the answer cannot go to the wrong callers.
        self.has_answered = True
        # Remove the batch and restart the watchdog before the callback: the batcher may call `start_batch` of
        # this runner from within `on_finish`.
        on_finish = self._pending_batches.popleft().on_finish
        if self._pending_batches:
            self._start_watchdog()
        if isinstance(report, Failure):
            log.error("a batch failed in runner %d\n%s", self.process.pid, report.trace)
            on_finish(ModelError(report.reason))
        else:
            on_finish(report.answers)
        try:
            self._record_metrics(report, busy_seconds)
        except Exception:  # a metric is no reason to give up a working runner
            log.exception("a batch could not be counted in the metrics")

    def _record_metrics(self, report: BatchReport | Failure, busy_seconds: float) -> None:
        """Update the metrics of an answered batch. The runner was at work for `busy_seconds`."""
        self._metrics.runner_busy_seconds.inc(busy_seconds)
        if isinstance(report, Failure):
            return
        histograms = self._metrics.seconds_by_stage
        for seconds in report.decode_seconds:
            histograms["decode"].observe(seconds)
        if report.batch_size:
            histograms["inference"].observe(report.inference_seconds)
            self._metrics.batch_images.observe(report.batch_size)

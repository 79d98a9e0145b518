"""The pool of runner processes in the service: it starts them, gives them work, and replaces dead ones."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, NamedTuple

from fovea.service.errors import GoldenError, Interrupted, ModelError, NotReady
from fovea.service.observability.metrics import Metrics
from fovea.service.runners import spawn
from fovea.service.runners.batch_messages import Answer, Batch, BatchReport, DropCommand, Item
from fovea.service.runners.batcher import INFINITY, BatchCallback, Batcher, Lane, RunnerLost
from fovea.service.runners.frames import Frame, FrameDecoder, receive_message
from fovea.service.runners.load_messages import (
    Failure,
    LoadCommand,
    LoadedModel,
    LoadReply,
    ProcessPlan,
    Setup,
    SetupReply,
    UnloadCommand,
)
from fovea.service.runners.shared_memory import SharedBodies

log = logging.getLogger(__name__)

_BUFFER_BYTES: Final = 64 << 10
"""Receive buffer size for one runner, in bytes."""

_EXIT_SECONDS: Final = 5.0
"""Seconds that a runner has to exit after its socket is closed."""

_BACKOFF_SECONDS: Final = 1.0
"""Delay before replacing a runner that died without any answer, in seconds; doubled each time."""

_MAX_BACKOFF_SECONDS: Final = 30.0

_MAX_LOAD_DEATHS: Final = 1
"""Number of runners that may die while they load the same model before the load is given up.

One death may be chance; a second death points at the model.
"""

_START_SECONDS: Final = 15.0
"""Additional time limit for the start of a process, in seconds.

A start takes about 1 s of processor time, but other processes may run too. When the service starts, all
runners start together and the limit is four times as long.
"""

_NEXT_MODEL_SHARE: Final = 0.1
"""Time limit for each further model at the start of a runner, as a share of the limit for one model.

The limit for one model allows for a busy machine, where a load may take ten times its processor time
(`spawn.LOAD_TIMEOUT_FACTOR`).
"""


class RunnerProcess:
    """A runner process and its socket. The process loads the models in `setup` at once.

    Only one thread at a time may read the socket. `wait_ready` reads it first; then the socket belongs to a
    `_RunnerConnection` on the event loop. `send_sigkill` and `kill_and_wait` may be called from any thread.
    """

    def __init__(self, setup: Setup, lock_descriptor: int, bodies_descriptor: int, *, timeout: float) -> None:
        """Start the process, which must be ready within `timeout` seconds.

        `lock_descriptor` and `bodies_descriptor` are the descriptors of files that all runners share.

        Raises `ModelError` when the system has no files, memory or processes left.
        """
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        try:
            self.socket, child_socket = socket.socketpair()
            with child_socket:
                # The child inherits its end. `with` closes the copy in this process: otherwise the stream
                # would not end when the child dies.
                self._process = spawn.start_process(
                    "runners.process", [child_socket.fileno(), lock_descriptor, bodies_descriptor]
                )
        except OSError as error:
            raise ModelError(f"a runner cannot be started: {error.strerror}") from None
        self.is_multi_threaded = any(load.plan.wide_threads > load.plan.threads for load in setup.models)
        self.pid = self._process.pid
        self.socket.settimeout(timeout)
        # Before the process can read: the socket buffer holds the message, so this rarely waits.
        with contextlib.suppress(OSError):  # dead or hanging: `wait_ready` reports it
            self.socket.sendall(setup.to_bytes())

    def wait_ready(self) -> SetupReply:
        """Block until the process has loaded its models. Call this once, in a thread that may wait.

        Raises `ModelError` when a model cannot be loaded. Raises `Interrupted` when the process dies or
        exceeds the time limit; the process is killed then.
        """
        try:
            self.socket.settimeout(max(0.001, self._deadline - time.monotonic()))
            frame = receive_message(self.socket)
        except TimeoutError:
            self.send_sigkill()
            raise Interrupted(
                f"runner {self.pid} has not loaded its models within {self._timeout:g} s (10 times "
                "FOVEA_TRIAL_SECONDS, once more for each further model, and the time to start); it is killed"
            ) from None
        except OSError:
            frame = None
        if frame is None:
            status = self._wait_exit()
            raise Interrupted(f"a runner died while it loaded the models, exit status {status}")
        reply = SetupReply.from_frame(frame)
        if isinstance(reply, Failure):
            raise reply.to_exception()
        return reply

    def stop(self) -> None:
        """Close the socket and wait for the process. Kill the process when it takes too long."""
        self.socket.close()
        try:
            self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._wait_exit()

    def kill_and_wait(self) -> int | None:
        """Kill the process and wait for it.

        Return its exit status; None when it does not end within `_EXIT_SECONDS` seconds.
        """
        self.send_sigkill()
        # Another thread may wait in `wait_ready`. `shutdown` wakes it; `close` alone would not.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        return self._wait_exit()

    def _wait_exit(self) -> int | None:
        """Return the exit status; None after `_EXIT_SECONDS` seconds.

        A process that waits for an unresponsive disk cannot be killed, so the wait has a limit.
        """
        try:
            return self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def send_sigkill(self) -> None:
        """Kill the process without waiting for its end."""
        self._process.kill()


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


class _RunnerConnection(asyncio.BufferedProtocol):
    """The connection to one runner, which works on one batch after another.

    It implements `service.runners.batcher.Runner`. All methods run on the event loop, so that messages are
    queued in the order of the calls. The runner answers batches in the order in which they were sent:
    `_pending_batches` must have the same order.
    """

    def __init__(
        self,
        process: RunnerProcess,
        metrics: Metrics,
        batch_timeout: float,
        on_lost: Callable[[_RunnerConnection], None],
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
        """Send a batch. See `service.runners.batcher.Runner`."""
        # Before the first byte is written: if the connection is lost, `_fail_pending` must find the batch.
        self._pending_batches.append(_PendingBatch(on_finish, lane, items, separate))
        if len(self._pending_batches) == 1:
            self._start_watchdog()
        self._last_batch_number += 1
        limits = [None if deadline == INFINITY else deadline for deadline in deadlines]
        batch = Batch(self._last_batch_number, lane.model_id, items, limits, exclusive, separate, memory)
        self._send_queue.extend(batch.to_pieces())
        self._write_next()
        return partial(self._drop_item, self._last_batch_number)

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
        histograms = self._metrics.stage_seconds
        for seconds in report.decode_seconds:
            histograms["decode"].observe(seconds)
        if report.batch_size:
            histograms["inference"].observe(report.inference_seconds)
            self._metrics.batch_images.observe(report.batch_size)


class RunnerPool:
    """All runners. They are alike, except that the first runner has more threads for an exclusive call.

    `__init__` blocks until all runners are ready. From `attach` on, every method runs on the event loop, and
    the blocking steps of a start run in threads (`_start_and_wait`).
    """

    def __init__(
        self,
        plan: ProcessPlan,
        loads: Sequence[LoadCommand],
        metrics: Metrics,
        shared_bodies: SharedBodies,
        *,
        batch_timeout: float,
        load_timeout: float,
        runner_wait: float,
    ) -> None:
        """Start the runners of `plan` and block until all of them have loaded `loads`.

        Large images are in `shared_bodies`. A runner is killed and replaced when it has not answered a batch
        within `batch_timeout` seconds, or has not loaded one more model within `load_timeout` seconds. While
        there is no runner, work waits for `runner_wait` seconds and then fails.

        Raises `ModelError` if a runner cannot load the models.
        """
        self._plan = plan
        self._loads = {load.model_id: load for load in loads}
        """Load commands by model id, for the models that each runner must have loaded before it gets work."""
        self._bodies_descriptor = shared_bodies.descriptor
        self._metrics = metrics
        self._batch_timeout = batch_timeout
        self._load_timeout = load_timeout
        self._runner_wait = runner_wait
        self._connections: dict[int, _RunnerConnection] = {}
        self._runner_ready = asyncio.Event()
        """Event that is set whenever a runner becomes ready."""
        self._absent_since: float | None = None
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._replacement_tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False
        # An empty file that the runners inherit and lock in turn (`service.inference.decode_memory`).
        self._lock_descriptor = os.memfd_create("fovea")
        self._processes: list[RunnerProcess] = []
        try:
            for index in range(plan.processes):
                self._processes.append(self._spawn_process(self._create_setup(index), 4 * _START_SECONDS))
            replies = [process.wait_ready() for process in self._processes]
        except ModelError:
            for process in self._processes:
                process.kill_and_wait()
            raise
        self.setup_reply = replies[0]

    async def load_model(self, load: LoadCommand) -> LoadedModel:
        """Load one more model in all runners while they run batches.

        The runners load one after another; the others take more of the batches in the meantime. When a runner
        dies, the others continue, and its replacement loads the model too.

        Raises `ModelError` if a runner cannot load the model, and `Interrupted` if too many runners died or
        there is none.
        """
        deaths = 0
        try:
            # Look again after each load: runners may have died or joined during the `await`.
            while target := await self._find_runner_without(load.model_id):
                index, connection = target
                try:
                    await self._load_on_runner(connection, load, index)
                except Interrupted as error:
                    deaths += 1
                    if deaths > _MAX_LOAD_DEATHS:
                        raise
                    log.warning("%s; the other runners load it", error)
        except BaseException:
            self.unload_model(load.model_id)
            raise
        self._loads[load.model_id] = load  # from here on new runners start with it
        return next(
            connection.models[load.model_id]
            for connection in self._connections.values()
            if load.model_id in connection.models
        )

    async def _find_runner_without(self, model_id: int) -> tuple[int, _RunnerConnection] | None:
        """Return a runner that lacks a model; None when all have it.

        Raises `Interrupted` when there is no runner for `runner_wait` seconds.
        """
        deadline = time.monotonic() + self._runner_wait
        while True:
            connections = [
                (index, connection)
                for index, connection in self._connections.items()
                if not connection.is_lost
            ]
            if connections:
                return next((one for one in connections if model_id not in one[1].models), None)
            self._runner_ready.clear()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._runner_ready.wait()
            except TimeoutError:
                raise Interrupted(
                    f"no runner was there to load the model for {self._runner_wait:g} s (FOVEA_RUNNER_WAIT); "
                    "the log says why runners cannot be started"
                ) from None

    async def _load_on_runner(self, connection: _RunnerConnection, load: LoadCommand, index: int) -> None:
        await connection.load_model(_adapt_load(load, index), timeout=self._load_timeout)

    def unload_model(self, model_id: int) -> None:
        """Unload a model that will get no more batches.

        A runner that starts at this moment loads the model, and `_connect_runner` unloads it.
        """
        self._loads.pop(model_id, None)
        for connection in self._connections.values():
            connection.unload_model(model_id)

    async def attach(self, batcher: Batcher, on_model_dropped: Callable[[int, ModelError], None]) -> None:
        """Give the runners to `batcher` on the running event loop, and replace dead runners from now on.

        `on_model_dropped` is called on the event loop with the id of a model that no runner has any more and
        no new runner can load. The model must not be served any more, and the callback must leave no item
        waiting for it.
        """
        self._batcher = batcher
        self._on_model_dropped = on_model_dropped
        for index, process in enumerate(self._processes):
            await self._connect_runner(
                index, process, self._index_loaded_models(self.setup_reply, self._loads)
            )

    async def close(self) -> None:
        """End all runners."""
        # First: a thread in `_start_and_wait` checks the flag after it has stored its process. Either it sees
        # the flag, or the process is in the list below.
        self._is_closing = True
        for task in self._replacement_tasks:
            task.cancel()
        if self._expiry_timer:
            self._expiry_timer.cancel()
        connected_processes = {connection.process for connection in self._connections.values()}
        for connection in list(self._connections.values()):
            connection.close()
        # Connected runners end when their socket is closed, after the batch in work. The others may hang.
        stop_functions = (
            process.stop if process in connected_processes else process.kill_and_wait
            for process in self._processes
        )
        await asyncio.gather(*(asyncio.to_thread(stop) for stop in stop_functions))
        os.close(self._lock_descriptor)

    @property
    def alive_count(self) -> int:
        """Number of runners that are connected: idle or at work."""
        return len(self._connections)

    @property
    def absence_seconds(self) -> float:
        """Seconds since there was no runner; 0 while there is one."""
        return 0.0 if self._absent_since is None else time.monotonic() - self._absent_since

    @staticmethod
    def _index_loaded_models(reply: SetupReply, loads: Mapping[int, LoadCommand]) -> dict[int, LoadedModel]:
        return dict(zip(loads, reply.models, strict=True))

    async def _connect_runner(
        self,
        index: int,
        process: RunnerProcess,
        loaded_models: Mapping[int, LoadedModel],
        *,
        can_drop_models: bool = False,
    ) -> None:
        """Connect a process that has these `loaded_models`, and let the batcher give work to it.

        Before that, the process loads the models that were added since it started.

        Raises `ModelError` when the process cannot load one of them; the process is killed then. With
        `can_drop_models`, the model is removed instead, unless another runner exists.
        """

        def on_lost(connection: _RunnerConnection) -> None:
            # Called once on the event loop, possibly before the connection is in `_connections`.
            self._handle_lost_runner(index, connection)

        process.socket.setblocking(False)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_unix_connection(
            lambda: _RunnerConnection(process, self._metrics, self._batch_timeout, on_lost),
            sock=process.socket,
        )
        connection.models.update(loaded_models)
        try:
            # Check again after each load: models may be added or removed during the `await`.
            while missing_load := next(
                (one for model_id, one in self._loads.items() if model_id not in connection.models), None
            ):
                try:
                    await self._load_on_runner(connection, missing_load, index)
                except Interrupted:
                    raise
                except ModelError as error:
                    if not can_drop_models or self._connections:
                        raise
                    self._drop_model(missing_load, error)
        except ModelError:
            if connection.is_lost:  # it died, and `_handle_lost_runner` is replacing it
                return
            connection.needs_replacement = False  # the caller tries again
            connection.give_up()
            raise
        if self._is_closing:
            connection.close()
        if connection.is_lost:
            return
        # Models that were removed while this runner started.
        for model_id in connection.models.keys() - self._loads.keys():
            connection.unload_model(model_id)
        # There was no `await` since the last check of `_loads`: the runner has exactly these models.
        self._connections[index] = connection
        self._absent_since = None
        self._runner_ready.set()
        self._batcher.add_runner(connection)  # from here on the batcher may start a batch on it at any time
        self._metrics.runners.set(self.alive_count)

    def _drop_model(self, load: LoadCommand, error: ModelError) -> None:
        """Remove a model that no runner has and no new runner can load."""
        log.error("no runner has %s any more, and no new runner can load it: %s", load.path, error)
        self._loads.pop(load.model_id, None)
        self._on_model_dropped(load.model_id, error)

    def _handle_lost_runner(self, index: int, connection: _RunnerConnection) -> None:
        """Remove a dead runner and start its replacement. The connection calls this once, on the event loop.

        The replacement and the expiry of waiting work come before the metrics, which may raise.
        """
        # First, so that the batcher cannot send another batch to the dead runner.
        self._batcher.remove_runner(connection)
        if self._connections.get(index) is connection:
            del self._connections[index]
        if not self._is_closing and connection.needs_replacement:
            task = asyncio.get_running_loop().create_task(self._replace_runner(index, connection))
            self._replacement_tasks.add(task)
            task.add_done_callback(self._replacement_tasks.discard)
        if not self._is_closing and not self._connections and self._absent_since is None:
            self._absent_since = time.monotonic()
            self._schedule_expiry(self._runner_wait)
        self._metrics.runners.set(self.alive_count)
        if not self._is_closing and connection.needs_replacement:
            self._metrics.runner_deaths.inc()

    def _schedule_expiry(self, seconds: float) -> None:
        if self._expiry_timer:
            self._expiry_timer.cancel()
        self._expiry_timer = asyncio.get_running_loop().call_later(seconds, self._expire_jobs)

    def _expire_jobs(self) -> None:
        """Answer callers that have waited too long while there is no runner. A timer calls this."""
        if self._connections or self._is_closing:
            return
        now = time.monotonic()
        error = NotReady(
            f"all runners have died, and no new runner was ready within {self._runner_wait:g} s "
            "(FOVEA_RUNNER_WAIT); runners are being started, try again later",
            retry_after=max(1.0, self._runner_wait),
        )
        oldest = self._batcher.expire_jobs(now - self._runner_wait, error)
        self._schedule_expiry(max(0.01, oldest + self._runner_wait - now) if oldest else self._runner_wait)

    async def _replace_runner(self, index: int, lost_connection: _RunnerConnection) -> None:
        """Start another runner: at once if the lost runner had answered a batch, otherwise after a delay.

        Repeat until a runner has started or the service ends, whatever goes wrong: no other code would ever
        fill this place. The method runs in a task of its own; waiting for processes happens in threads.
        """
        is_dead = False
        delay, failures = (0.0 if lost_connection.has_answered else _BACKOFF_SECONDS), 0
        while not self._is_closing:
            try:
                if not is_dead:
                    # End the old process first: there may be no memory for both.
                    status = await asyncio.to_thread(lost_connection.process.kill_and_wait)
                    is_dead = True
                    log.error(
                        "runner %d died, exit status %s; it is replaced", lost_connection.process.pid, status
                    )
                await asyncio.sleep(delay)
                await self._start_replacement(index, failures)
                return
            except Exception as error:
                failures += 1
                delay = min(max(2 * delay, _BACKOFF_SECONDS), _MAX_BACKOFF_SECONDS)
                is_bug = not isinstance(error, ModelError)
                log.error("a runner cannot be replaced, next try in %g s: %s", delay, error, exc_info=is_bug)
                reason = "golden" if isinstance(error, GoldenError) else "other"
                with contextlib.suppress(Exception):  # a metric is not worth a runner
                    self._metrics.runner_start_failures.labels(reason).inc()

    async def _start_replacement(self, index: int, failures: int) -> None:
        """Start a runner with all models.

        If there is no other runner and the start has failed before, start without models and load one after
        another. One model that cannot be loaded must not keep the other models from answering.
        """
        loads = dict(self._loads)
        try:
            process, reply = await asyncio.to_thread(self._start_and_wait, index, self._create_setup(index))
        except ModelError:
            if loads != self._loads:  # a model that was unloaded in the meantime may be the cause
                await self._start_replacement(index, failures)
                return
            if self._connections or not failures or not loads:
                raise
            process, reply = await asyncio.to_thread(self._start_and_wait, index, Setup(self._plan, []))
            await self._connect_runner(index, process, {}, can_drop_models=True)
            return
        await self._connect_runner(index, process, self._index_loaded_models(reply, loads))

    def _create_setup(self, index: int) -> Setup:
        return Setup(self._plan, [_adapt_load(load, index) for load in self._loads.values()])

    def _spawn_process(self, setup: Setup, start_seconds: float = _START_SECONDS) -> RunnerProcess:
        other_count = max(0, len(setup.models) - 1)
        timeout = start_seconds + self._load_timeout * (1 + _NEXT_MODEL_SHARE * other_count)
        return RunnerProcess(setup, self._lock_descriptor, self._bodies_descriptor, timeout=timeout)

    def _start_and_wait(self, index: int, setup: Setup) -> tuple[RunnerProcess, SetupReply]:
        """Start a process and block until it is ready. This runs in a thread.

        Raises `ModelError`; the process is killed then.
        """
        # Store the process before the check: see `close`, which may run on the event loop at this moment.
        process = self._processes[index] = self._spawn_process(setup)
        try:
            if self._is_closing:
                raise Interrupted("the service is stopping")
            return process, process.wait_ready()
        except ModelError:
            process.kill_and_wait()
            raise


def _adapt_load(load: LoadCommand, index: int) -> LoadCommand:
    """Return the load for one runner. Only the first runner has extra threads for an exclusive call."""
    return replace(load, plan=replace(load.plan, wide_threads=0)) if index else load

"""Supervisor of several worker processes behind one port.

Connections are spread evenly (`service.supervisor.dispatcher`), and dead workers are replaced.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, assert_never

from fovea.service import signals
from fovea.service.access.caller_table import CallerTable
from fovea.service.access.key_watcher import KeyWatcher
from fovea.service.artifact.repository import ModelVersion, ServingState
from fovea.service.errors import Internal, RequestError, StartError
from fovea.service.http.lifecycle import KILL_DELAY
from fovea.service.http.listener import Listener
from fovea.service.observability.multiprocess import SharedMetrics
from fovea.service.observability.process_metrics import reap_orphans
from fovea.service.rollout.refusals import Refusals
from fovea.service.rollout.startup import is_broken
from fovea.service.rollout.store_sync import StoreSync
from fovea.service.rollout.trial import compute_change_timeout
from fovea.service.rollout.watcher import Watcher
from fovea.service.runners.child_process import stop_fork_server
from fovea.service.settings import Settings
from fovea.service.supervisor.channel import HEARTBEAT_INTERVAL
from fovea.service.supervisor.coordinator import Coordinator
from fovea.service.supervisor.dispatcher import ConnectionDispatcher
from fovea.service.supervisor.messages import (
    ChangeReply,
    ChangeRequest,
    ConnectionReport,
    ErrorValues,
    LoadModelRequest,
    LostModelReport,
    NoMoreConnections,
    PrepareReply,
    ReadyReport,
    RefusedVersionReport,
    StartFailure,
    StartingHeartbeat,
    StopSignal,
    UnloadModelRequest,
    WorkerMessage,
)
from fovea.service.supervisor.worker import WorkerProcess, kill_workers, start_worker

log = logging.getLogger(__name__)

_MIN_STABLE_TIME: Final = 10.0
"""Time in seconds after which the death of a worker is not related to its start."""

_BACKOFF_DELAYS: Final = (0.1, 10.0)
"""Time in seconds before a worker that died at its start is replaced: the first delay, which doubles each
time, and the maximum."""


class Supervisor:
    """Manager of the worker processes.

    It starts workers, passes them connections, replaces dead workers, and stops all workers in order.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        settings: Settings,
        *,
        listener: Listener,
        metrics: SharedMetrics,
        serving_state: ServingState,
        refusals: Refusals,
        on_listening: Callable[[ReadyReport], None],
        caller_file: int | None = None,
        key_watcher: KeyWatcher | None = None,
    ) -> None:
        """Set the workers' command and environment, and the shared resources.

        The file descriptors of the channel, of the metrics files and of the table of callers (`caller_file`)
        are appended to `command`. Each worker reads the versions to serve from its standard input, and the
        keys that `key_watcher` has in force; the first workers read `serving_state`. `on_listening` is called
        with the description of the served models.
        """
        self._command = command
        self._environment = environment
        self._settings = settings
        self._refusals = refusals
        self._listener = listener
        self._metrics = metrics
        self._caller_file = caller_file
        self._key_watcher = key_watcher
        self._on_listening = on_listening
        patience = compute_change_timeout(settings.trial_seconds)
        self._coordinator = Coordinator(
            self._admitted_workers, self._admit_ready_workers, state=serving_state, timeout=patience
        )
        self._store_sync = StoreSync(settings, metrics.process_metrics) if settings.store_uri else None
        self._watcher = Watcher(
            settings.models,
            serving_state,
            self._coordinator,
            configured_default=settings.default_model,
            single_name=settings.model_name,
            refusals=refusals,
            has_limits=settings.swap_flips < 1 or settings.swap_slowdown > 0,
            change_timeout=2 * patience,
            is_broken=self._is_broken,
            update_copy=self._store_sync.update if self._store_sync else None,
        )
        self._workers: set[WorkerProcess] = set()
        self._dispatcher = ConnectionDispatcher(listener, self._available_workers)
        self._early_death_count = 0
        self._is_stopping = False
        self._ending_workers: set[WorkerProcess] = set()
        """Workers that have closed their end of the channel and whose processes may still run."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._trial_lock = threading.Lock()
        """Lock that a thread holds while it waits for child processes of its own."""

    async def run(self) -> None:
        """Serve until a signal arrives. Raises `StartError` if a worker cannot start at first."""
        self._loop = asyncio.get_running_loop()
        self._start_future: asyncio.Future[None] = self._loop.create_future()
        self._end_event = asyncio.Event()
        signals.install_serving_handlers(
            self._handle_signal, lambda: self._start_task(self._watcher.reload())
        )
        try:
            self._metrics.process_metrics.workers_expected.set(self._settings.workers)
            for _ in range(self._settings.workers):
                try:
                    self._start_worker()
                except OSError as error:
                    raise StartError(f"cannot start a worker: {error.strerror}") from None
            if self._key_watcher:
                self._start_task(self._key_watcher.run())
            self._checked_at = time.monotonic()
            self._check_workers()
            await self._start_future
            if not self._is_stopping:
                self._listener.start(self._dispatcher.pass_connection)
                self._on_listening(next(one.served_models for one in self._workers if one.served_models))
                self._start_task(self._watcher.run(self._settings.watch))
                if self._store_sync:
                    self._start_task(self._store_sync.run())
            await self._end_event.wait()
        finally:
            for task in self._tasks:
                task.cancel()
            self._kill_workers()

    # --- workers ---

    def _start_worker(self) -> None:
        """Start a worker. Raises `OSError` when the system has no room for it."""
        worker, metric_files = start_worker(
            self._command,
            self._environment,
            self._coordinator.state,
            # Not the file itself, which may be broken now: a worker must start nevertheless.
            keys=self._key_watcher.content if self._key_watcher else b"",
            metrics_index=self._metrics.index,
            caller_file=self._caller_file,
            caller_column=self._take_caller_column(),
        )
        self._workers.add(worker)
        self._loop.add_reader(worker.channel.socket, self._read_messages, worker)
        self._metrics.add(worker.process.pid, metric_files)

    def _take_caller_column(self) -> int:
        """Return an empty column of the table of callers.

        Each process has a column of its own, so that the images in flight of a dead worker can be removed. A
        worker is replaced only after its process has ended, so that there is always a free column.
        """
        processes = (*self._workers, *self._ending_workers)
        column = min(set(range(self._settings.workers)) - {one.caller_column for one in processes})
        if self._caller_file is not None:
            table = CallerTable.open(self._caller_file, column=column)
            table.clear_column()
            table.close()
        return column

    def _read_messages(self, worker: WorkerProcess) -> None:
        """Handle all messages that have arrived from a worker."""
        while worker in self._workers:
            try:
                packet, _ = worker.channel.receive_packet()
            except BlockingIOError:
                return
            if not packet:
                self._on_worker_lost(worker)
                return
            if worker.mark_alive():
                self._dispatcher.pass_waiting_connections()
                self._update_worker_metric()
            try:
                message = worker.channel.decode(packet)
                if message is not None:
                    self._handle_message(worker, message)
            except Exception:  # no message of this worker can be trusted any more
                log.exception(
                    "worker %d is killed, because its message is invalid: %.200r", worker.process.pid, packet
                )
                worker.kill()

    def _check_workers(self) -> None:
        """Check every `HEARTBEAT_INTERVAL` seconds which workers are silent."""
        self._loop.call_later(HEARTBEAT_INTERVAL, self._check_workers)
        now = time.monotonic()
        # Time in which this process itself did not run. No worker is to blame for it.
        own_delay = max(0.0, now - self._checked_at - 2 * HEARTBEAT_INTERVAL)
        self._checked_at = now
        self._reap_orphans()
        for worker in self._workers:
            worker.check_silence(now, own_delay)
        self._update_worker_metric()

    def _reap_orphans(self) -> None:
        """Reap orphans (`reap_orphans`), but not while a thread needs the exit codes of its processes."""
        if self._trial_lock.acquire(blocking=False):
            try:
                awaited_pids = [one.process.pid for one in (*self._workers, *self._ending_workers)]
                if self._store_sync:
                    awaited_pids += self._store_sync.awaited_pids
                reap_orphans(awaited_pids)
            finally:
                self._trial_lock.release()

    def _is_broken(self, version: ModelVersion) -> bool:
        """Return whether a starting worker cannot load a version. The watcher calls this in a thread."""
        with self._trial_lock:
            try:
                return is_broken(self._settings, self._refusals, version)
            finally:
                stop_fork_server()  # the memory plan has no room for it beside those of the workers

    def _handle_message(self, worker: WorkerProcess, message: WorkerMessage) -> None:
        """Handle a message of a worker, on the event loop and in the order in which the worker sent it.

        Nothing here may wait: a change, which takes long, runs in a task.
        """
        match message:
            case ConnectionReport():
                self._dispatcher.update_connections(worker, message)
            case StartingHeartbeat():
                pass  # `_read_messages` has noted it
            case PrepareReply():
                self._coordinator.handle_reply(worker, message)
            case LostModelReport(name, is_lost):
                self._watcher.count_lost_model(name, is_lost)
            case RefusedVersionReport(version, reason, is_lasting):
                self._watcher.refuse_version(version.to_version(), reason, is_lasting)
            case LoadModelRequest() | UnloadModelRequest():
                self._start_task(self._change_models(worker, message))
            case ReadyReport():
                worker.loaded_models = message
                self._admit_worker(worker)
            case StartFailure(reason):
                self._handle_start_failure(reason)
            case NoMoreConnections():
                self._release_worker(worker)
            case _:
                assert_never(message)

    def _handle_start_failure(self, reason: str) -> None:
        """End the service if it is starting, or replace the versions that a worker could not load."""
        if not self._start_future.done():
            self._start_future.set_exception(StartError(reason))
        elif self._start_future.exception() is None:
            log.error("a worker could not start: %s", reason)
            self._watcher.handle_start_failure()

    def _admitted_workers(self) -> list[WorkerProcess]:
        """Return the workers that are admitted and not stopping."""
        return [one for one in self._workers if one.served_models and not one.is_stopping]

    def _available_workers(self) -> list[WorkerProcess]:
        """Return the workers that may get connections.

        Silent workers still take part in changes to the served models.
        """
        return [one for one in self._admitted_workers() if not one.is_silent]

    def _admit_ready_workers(self) -> None:
        """Admit every worker that is ready."""
        for worker in list(self._workers):
            self._admit_worker(worker)

    def _admit_worker(self, worker: WorkerProcess) -> None:
        """Admit a worker that is ready, unless a change is under way."""
        if worker.loaded_models is None or worker.served_models or self._coordinator.is_changing:
            return
        if worker.starting_versions != self._coordinator.state.versions_by_model:
            log.info(
                "worker %d has loaded versions that are no longer served, and is replaced", worker.process.pid
            )
            worker.kill()
            return
        worker.served_models = worker.loaded_models
        self._coordinator.send_state(worker)  # the rest of it may have changed while the worker started
        if not self._start_future.done() and all(one.served_models for one in self._workers):
            self._start_future.set_result(None)
        self._dispatcher.pass_waiting_connections()
        self._update_worker_metric()

    async def _change_models(self, worker: WorkerProcess, request: ChangeRequest) -> None:
        """Make a change that a worker's caller requests, and send the outcome to the worker."""
        error = None
        try:
            if isinstance(request, LoadModelRequest):
                await self._watcher.load(request.name, request.version)
            else:
                await self._watcher.unload(request.name)
        except RequestError as refusal:
            error = ErrorValues.from_exception(refusal)
        except Exception:  # a caller waits for an answer in any case
            log.exception("a change of the served models failed")
            bug = Internal("the change failed; the log of the service has the reason")
            error = ErrorValues.from_exception(bug)
        with suppress(OSError):  # the worker has died meanwhile
            worker.send_message(ChangeReply(request.number, error))

    def _on_worker_lost(self, worker: WorkerProcess) -> None:
        """Handle the end of a worker's channel: the worker has died."""
        # The replacement is scheduled first, so that no error in the bookkeeping below can prevent it.
        self._workers.discard(worker)
        self._ending_workers.add(worker)
        self._start_task(self._handle_worker_exit(worker))
        worker.channel.close()
        self._dispatcher.take_back_connections(worker)
        with _log_exceptions("the coordinator could not handle the death of a worker"):
            self._coordinator.on_worker_lost(worker)
        self._update_worker_metric()

    async def _handle_worker_exit(self, worker: WorkerProcess) -> None:
        """Replace a dead worker, or end with the last worker. Bookkeeping comes after that."""
        try:
            code = await worker.wait_for_exit()
        finally:
            self._ending_workers.discard(worker)
        reason, description = worker.describe_exit(code)
        if not self._start_future.done():
            self._start_future.set_exception(StartError(f"a worker {description} while it started"))
        if self._start_future.exception():  # `run` ends and kills the other workers
            return
        if self._is_stopping:
            self._end_if_finished()
        else:
            self._start_task(self._replace_worker(worker))
            log.error("worker %d %s; it is replaced", worker.process.pid, description)
        with _log_exceptions("the metrics of worker %d are lost", worker.process.pid):
            if not self._is_stopping:
                self._metrics.process_metrics.worker_deaths.labels(reason).inc()
            self._metrics.merge_dead_worker(worker.process.pid)

    async def _replace_worker(self, worker: WorkerProcess) -> None:
        """Start another worker, with as many attempts as needed."""
        delay = self._next_backoff_delay(worker)
        while True:
            await asyncio.sleep(delay)
            if self._is_stopping:
                return
            try:
                self._start_worker()
                return
            except OSError as error:
                first, longest = _BACKOFF_DELAYS
                delay = min(max(2 * delay, first), longest)
                log.error("a worker cannot be started, next try in %g s: %s", delay, error.strerror)

    def _update_worker_metric(self) -> None:
        """Update the metric of the workers that may get connections."""
        self._metrics.process_metrics.workers.set(len(self._available_workers()))

    def _next_backoff_delay(self, worker: WorkerProcess) -> float:
        """Return the time in seconds before a worker is replaced."""
        if worker.served_models and time.monotonic() - worker.started_at > _MIN_STABLE_TIME:
            self._early_death_count = 0
            return 0.0
        first, longest = _BACKOFF_DELAYS
        self._early_death_count += 1
        return float(min(longest, first * 2 ** min(self._early_death_count - 1, 16)))

    # --- the end ---

    def _handle_signal(self, number: int) -> None:
        """Handle a signal: pass it to all workers and start the shutdown."""
        if not self._start_future.done():
            self._start_future.set_result(None)
        if not self._is_stopping:
            self._is_stopping = True
            longest = self._settings.drain_grace + self._settings.drain_limit + KILL_DELAY
            self._loop.call_later(longest, self._kill_workers)
        for worker in self._workers:
            if not worker.served_models:
                worker.kill()
                continue
            try:
                worker.send_message(StopSignal(number))
            except OSError:  # it has died, or hangs and will be killed
                log.warning("worker %d could not be sent signal %d", worker.process.pid, number)
        self._end_if_finished()

    def _release_worker(self, worker: WorkerProcess) -> None:
        """Stop passing connections to a worker that stops.

        The last worker that stops also closes the port.
        """
        if not any(one.served_models and not one.is_stopping for one in self._workers if one is not worker):
            # Close the port before the stream ends: the last accepted connections can go to this worker.
            self._listener.close()
        worker.is_stopping = True
        with suppress(OSError):  # it has died
            worker.channel.socket.shutdown(socket.SHUT_WR)

    def _end_if_finished(self) -> None:
        """End `run` when all processes have ended."""
        if not self._workers and not self._ending_workers:
            self._end_event.set()

    def _kill_workers(self) -> None:
        """Kill all remaining workers at once and wait for their end."""
        kill_workers((*self._workers, *self._ending_workers))

    def _start_task(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Start a task and keep a reference to it."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        """Log the exception of a failed task, because no other code waits for the task."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a task of the supervisor has failed", exc_info=error)


@contextmanager
def _log_exceptions(message: str, *values: object) -> Iterator[None]:
    """Log an exception that the block raises, and continue, because the following code is more important."""
    try:
        yield
    except Exception:
        log.exception(message, *values)

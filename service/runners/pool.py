"""The pool of runner processes in the service: it starts them, gives them work, and replaces dead ones."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from fovea.service.errors import GoldenError, Interrupted, ModelError, NotReady
from fovea.service.observability.metrics import Metrics
from fovea.service.runners.batcher import Batcher
from fovea.service.runners.connection import RunnerConnection
from fovea.service.runners.load_messages import LoadCommand, LoadedModel, ProcessPlan, Setup, SetupReply
from fovea.service.runners.runner_process import RunnerProcess
from fovea.service.runners.shared_memory import SharedBodies

log = logging.getLogger(__name__)

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
(`child_process.LOAD_TIMEOUT_FACTOR`).
"""


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
        self._connections: dict[int, RunnerConnection] = {}
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

    async def _find_runner_without(self, model_id: int) -> tuple[int, RunnerConnection] | None:
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

    async def _load_on_runner(self, connection: RunnerConnection, load: LoadCommand, index: int) -> None:
        await connection.load_model(_adapt_load(load, index), timeout=self._load_timeout)

    def unload_model(self, model_id: int) -> None:
        """Unload a model that will get no more batches.

        A runner that starts at this moment loads the model, and `_connect_runner` unloads it.
        """
        self._loads.pop(model_id, None)
        for connection in self._connections.values():
            connection.unload_model(model_id)

    async def attach(self, batcher: Batcher, on_model_dropped: Callable[[int], None]) -> None:
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

        def on_lost(connection: RunnerConnection) -> None:
            # Called once on the event loop, possibly before the connection is in `_connections`.
            self._handle_lost_runner(index, connection)

        connection = RunnerConnection(process, self._metrics, self._batch_timeout, on_lost)
        await connection.connect()
        connection.models.update(loaded_models)
        try:
            await self._load_missing_models(index, connection, can_drop_models=can_drop_models)
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

    async def _load_missing_models(
        self, index: int, connection: RunnerConnection, *, can_drop_models: bool
    ) -> None:
        """Load on a new runner the models that were added since its process started.

        Raises `ModelError` as `_connect_runner` does.
        """
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

    def _drop_model(self, load: LoadCommand, error: ModelError) -> None:
        """Remove a model that no runner has and no new runner can load."""
        log.error("no runner has %s any more, and no new runner can load it: %s", load.path, error)
        self._loads.pop(load.model_id, None)
        self._on_model_dropped(load.model_id)

    def _handle_lost_runner(self, index: int, connection: RunnerConnection) -> None:
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

    async def _replace_runner(self, index: int, lost_connection: RunnerConnection) -> None:
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
            process, reply = await asyncio.to_thread(self._start_and_wait, index, Setup(0, self._plan, []))
            await self._connect_runner(index, process, {}, can_drop_models=True)
            return
        await self._connect_runner(index, process, self._index_loaded_models(reply, loads))

    def _create_setup(self, index: int) -> Setup:
        return Setup(0, self._plan, [_adapt_load(load, index) for load in self._loads.values()])

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

"""The runner processes as seen by the service: started, given batches, and replaced when they die."""

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
from fovea.service.runners.batcher import FOREVER, Batcher, Done, Lane, RunnerLost
from fovea.service.runners.messages import (
    Answer,
    Batch,
    Drop,
    Failure,
    Frame,
    Item,
    Load,
    Loaded,
    Plan,
    Ready,
    Report,
    Setup,
    Stream,
    Told,
    Unload,
    receive,
)
from fovea.service.runners.shared_memory import Slots

log = logging.getLogger(__name__)

_BUFFER: Final = 64 << 10
"""Receive buffer size for one runner, in bytes."""

_END: Final = 5.0
"""Seconds that a runner has to exit after its socket is closed."""

_BACK_OFF: Final = 1.0
"""Delay before replacing a runner that died without any answer, in seconds; doubled each time."""

_BACK_OFF_MAX: Final = 30.0

_DEATHS: Final = 1
"""Number of runners that may die while they load the same model before the load is given up.

One death may be chance; a second death points at the model.
"""

_START: Final = 15.0
"""Additional time limit for the start of a process, in seconds.

A start takes about 1 s of processor time, but other processes may run too. When the service starts, all
runners start together and the limit is four times as long.
"""

_START_SHARE: Final = 0.1
"""Time limit for each further model at the start of a runner, as a share of the limit for one model.

The limit for one model allows for a busy machine, where a load may take ten times its processor time
(`spawn.PATIENCE`).
"""


class Process:
    """One runner process and its socket. The process loads the models in `setup` at once."""

    def __init__(self, setup: Setup, lock: int, bodies: int, *, timeout: float) -> None:
        """Start the process, which must be ready within `timeout` seconds.

        `lock` and `bodies` are the descriptors of files that all runners share.

        Raises `ModelError` when the system has no files, memory or processes left.
        """
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        try:
            self.socket, theirs = socket.socketpair()
            with theirs:
                # `with theirs` closes our copy of the child's end, so that we see the end of the stream.
                self._process = spawn.start("runners.process", [theirs.fileno(), lock, bodies])
        except OSError as error:
            raise ModelError(f"a runner cannot be started: {error.strerror}") from None
        self.is_wide = any(load.plan.wide_threads > load.plan.threads for load in setup.models)
        self.pid = self._process.pid
        self.socket.settimeout(timeout)
        with contextlib.suppress(OSError):  # dead or hanging: `wait_ready` reports it
            self.socket.sendall(setup.write())

    def wait_ready(self) -> Ready:
        """Block until the process has loaded its models.

        Raises `ModelError` when a model cannot be loaded. Raises `Interrupted` when the process dies or
        exceeds the time limit; the process is killed then.
        """
        try:
            self.socket.settimeout(max(0.001, self._deadline - time.monotonic()))
            frame = receive(self.socket)
        except TimeoutError:
            self.shoot()
            raise Interrupted(
                f"runner {self.pid} has not loaded its models within {self._timeout:g} s (ten times "
                "FOVEA_TRIAL_SECONDS, once more for each further model, and the time to start); it is killed"
            ) from None
        except OSError:
            frame = None
        if frame is None:
            status = self._wait()
            raise Interrupted(f"a runner died while it loaded the models, exit status {status}")
        ready = Ready.read(frame)
        if isinstance(ready, Failure):
            raise ready.error()
        return ready

    def end(self) -> None:
        """Close the socket and wait for the process. Kill the process when it takes too long."""
        self.socket.close()
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._wait()

    def kill(self) -> int | None:
        """Kill the process and wait for it.

        Return its exit status; None when it does not end within `_END` seconds.
        """
        self.shoot()
        with contextlib.suppress(OSError):  # wakes a thread that waits in `wait_ready`
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        return self._wait()

    def _wait(self) -> int | None:
        """Return the exit status; None after `_END` seconds.

        A process that waits for an unresponsive disk cannot be killed, so the wait has a limit.
        """
        try:
            return self._process.wait(_END)
        except subprocess.TimeoutExpired:
            return None

    def shoot(self) -> None:
        """Kill the process without waiting for its end."""
        self._process.kill()


class _Begun(NamedTuple):
    """A batch that was sent to a runner and has no answer yet."""

    done: Done
    lane: Lane[Any, Any]
    items: Sequence[Item]
    apart: bool


def _suspects(begun: Sequence[_Begun]) -> int:
    """Return on how many of the first batches a runner may have been working.

    This follows the grouping in `process._group`.
    """
    if not begun or begun[0].apart:
        return min(len(begun), 1)
    lane, images, weight = begun[0].lane, 0, 0.0
    for number, batch in enumerate(begun):
        images, weight = images + len(batch.items), weight + sum(map(lane.weigh, batch.items))
        apart = batch.apart or batch.lane is not lane or images > lane.batch_max or weight > lane.weight_max
        if apart and number:
            return number
    return len(begun)


class _Link(asyncio.BufferedProtocol):
    """The connection to one runner, which works on one batch after another.

    All methods run on the event loop.
    """

    def __init__(
        self, process: Process, metrics: Metrics, batch_timeout: float, on_lost: Callable[[_Link], None]
    ) -> None:
        self.process = process
        self.is_wide = process.is_wide
        self.answered = False
        self.models: dict[int, Loaded] = {}
        """Loaded models by slot."""
        self.is_given_up = False
        """True if the runner gets no more work and is killed."""
        self.is_replaced = True
        """True if another runner takes its place when it ends."""
        self._metrics = metrics
        self._batch_timeout = batch_timeout
        self._on_lost = on_lost
        self._stream = Stream()
        self._buffer = memoryview(bytearray(_BUFFER))
        self._unsent: deque[memoryview] = deque()
        self._paused = False
        self._watchdog: asyncio.TimerHandle | None = None
        self._busy_since = 0.0
        self._begun: deque[_Begun] = deque()
        self._number = 0
        self._loads: dict[int, asyncio.Future[Loaded]] = {}

    @property
    def is_lost(self) -> bool:
        """True if the process has ended or is about to end: it answers no more batches."""
        return self.is_given_up or bool(self._transport.is_closing())

    async def load(self, load: Load, *, timeout: float) -> None:
        """Load one more model beside the batches.

        Raises `ModelError` when the model cannot be loaded. Raises `Interrupted` when the runner is dead,
        dies in the meantime, or needs more than `timeout` seconds; the runner is killed then.
        """
        loop = asyncio.get_running_loop()
        if self.is_lost:
            raise Interrupted(f"runner {self.process.pid} has died before it could load the model")
        told: asyncio.Future[Loaded] = loop.create_future()
        self._loads[load.slot] = told
        alarm = loop.call_later(timeout, self._load_hung, told, timeout)
        try:
            self._write(load.write())
            # Set by `_told`, `_load_hung` or `_answer_all`, so this wait always ends.
            loaded = await told
        finally:
            alarm.cancel()
        if self.is_lost:
            # The connection may have been lost between the reply and this task's turn on the event loop.
            raise Interrupted(f"runner {self.process.pid} has died just after it loaded the model")
        self.models[load.slot] = loaded

    def _load_hung(self, told: asyncio.Future[Loaded], timeout: float) -> None:
        """Kill a runner that exceeded the time limit of a load, and fail the load."""
        reason = f"runner {self.process.pid} has not loaded a model within {timeout:g} s; it is killed"
        log.error(reason)
        self.give_up()
        if not told.done():
            told.set_exception(Interrupted(reason))

    def unload(self, slot: int) -> None:
        """Unload a model that will get no more batches."""
        self.models.pop(slot, None)
        self._write(Unload(slot).write())

    def give_up(self) -> None:
        """Kill the process, and treat it as dead even if the system takes longer to end it."""
        self.is_given_up = True
        self.process.shoot()
        self._transport.abort()

    def start(
        self,
        lane: Lane[Item, Answer],
        items: Sequence[Item],
        deadlines: Sequence[float],
        *,
        alone: bool,
        apart: bool,
        memory: int,
        done: Done,
    ) -> Callable[[int], None]:
        """Send a batch. See `service.runners.batcher.Runner`."""
        self._begun.append(_Begun(done, lane, items, apart))
        if len(self._begun) == 1:
            self._watch()
        self._number += 1
        limits = [None if deadline == FOREVER else deadline for deadline in deadlines]
        batch = Batch(self._number, lane.index, items, limits, alone, apart, memory)
        self._unsent.extend(batch.pieces())
        self._send()
        return partial(self._drop, self._number)

    def _drop(self, number: int, index: int) -> None:
        """Tell the runner to drop an image of a batch on which it cannot be working yet."""
        if number > self._number - len(self._begun) + 1:  # the first batch may be in work: no need to drop
            self._write(Drop(number, index).write())

    def _write(self, message: bytes) -> None:
        self._unsent.append(memoryview(message))
        self._send()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport. asyncio calls this once, before any other callback."""
        self._transport: Any = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the receive buffer. asyncio fills it and then calls `buffer_updated`."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Handle every message that is complete with these bytes. Called by asyncio."""
        # Copy the bytes: the transport fills the buffer again, while answers keep views of their frames.
        for frame in self._stream.feed(bytes(self._buffer[:nbytes])):
            if self.is_lost:
                return
            self._receive(frame)

    def pause_writing(self) -> None:
        """Stop writing: the socket buffer is full (backpressure). Called by asyncio."""
        self._paused = True

    def resume_writing(self) -> None:
        """Continue writing: the socket buffer has room again. Called by asyncio."""
        self._paused = False
        self._send()

    def connection_lost(self, _error: Exception | None) -> None:
        """Give up the runner and inform all callers that wait for it. Called once by asyncio.

        The callers come last: a lost batch goes back to the queue, and must not reach this runner again.
        """
        self.is_given_up = True
        self._unsent.clear()
        worked = self._rest()
        try:
            self._on_lost(self)
        finally:  # even if this fails, no caller may wait for ever
            self._answer_all()
        self._metrics.runner_busy_seconds.inc(worked)

    def _answer_all(self) -> None:
        """Report the death to all callers that wait for the process."""
        for told in self._loads.values():
            if not told.done():
                told.set_exception(Interrupted(f"runner {self.process.pid} died while it loaded the model"))
        suspects = _suspects(list(self._begun))
        while self._begun:  # last first: each goes back to the head of the queue
            batch = self._begun.pop()
            at_work = len(self._begun) < suspects
            try:
                batch.done(RunnerLost(f"runner {self.process.pid} died at its batch", at_work=at_work))
            except Exception:  # the other batches have callers too
                log.exception("a batch of a dead runner could not be put back")

    def close(self) -> None:
        """Close the connection."""
        self._transport.abort()

    def _send(self) -> None:
        """Write one piece. The next piece follows after other callbacks of the event loop."""
        if self._unsent and not self._paused:
            self._transport.write(self._unsent.popleft())
            if self._unsent and not self._paused:
                asyncio.get_running_loop().call_soon(self._send)

    def _watch(self) -> None:
        """Start the watchdog for the batch that the runner now works on."""
        self._busy_since = time.monotonic()
        self._watchdog = asyncio.get_running_loop().call_later(self._batch_timeout, self._hung)

    def _hung(self) -> None:
        """Kill a runner that has not answered a batch in time."""
        log.error(
            "runner %d has not answered for %g s (FOVEA_BATCH_TIMEOUT); it is killed",
            self.process.pid,
            self._batch_timeout,
        )
        self.give_up()

    def _rest(self) -> float:
        """Stop the watchdog; return the seconds for which the runner was at work."""
        if self._watchdog is None:
            return 0.0
        self._watchdog.cancel()
        self._watchdog = None
        return time.monotonic() - self._busy_since

    def _told(self, told: Told) -> None:
        """Pass the outcome of a load to its waiting caller."""
        loaded = self._loads.pop(told.slot)
        if loaded.done():  # the waiting caller has left
            return
        if isinstance(told.outcome, Loaded):
            loaded.set_result(told.outcome)
            return
        if told.outcome.trace:
            log.error("a model could not be loaded in runner %d\n%s", self.process.pid, told.outcome.trace)
        loaded.set_exception(told.outcome.error())

    def _receive(self, frame: Frame) -> None:
        """Handle one message: the outcome of a load, or the answer to the oldest batch.

        A runner that answers another batch is killed, because its answers cannot be trusted.
        """
        if told := Told.read(frame):
            self._told(told)
            return
        worked = self._rest()
        report = Report.read(frame)
        number = self._number - len(self._begun) + 1  # of the first batch without an answer
        if not self._begun or report.number != number:
            log.error(
                "runner %d answered batch %d where %d was due; it is killed",
                self.process.pid,
                report.number,
                number,
            )
            self.give_up()
            return
        # The number has been checked, so the answer cannot go to the wrong callers.
        self.answered = True
        done = self._begun.popleft().done
        if self._begun:
            self._watch()
        if isinstance(report, Failure):
            log.error("a batch failed in runner %d\n%s", self.process.pid, report.trace)
            done(ModelError(report.reason))
        else:
            done(report.answers)
        try:
            self._count(report, worked)
        except Exception:  # a metric is no reason to give up a working runner
            log.exception("a batch could not be counted")

    def _count(self, report: Report | Failure, worked: float) -> None:
        """Update the metrics of an answered batch. `worked` is in seconds."""
        self._metrics.runner_busy_seconds.inc(worked)
        if isinstance(report, Failure):
            return
        stages = self._metrics.stage_seconds
        for seconds in report.decode:
            stages["decode"].observe(seconds)
        if report.batch:
            stages["inference"].observe(report.inference)
            self._metrics.batch_images.observe(report.batch)


class Runners:
    """All runners. They are alike, except that the first has more threads for a call that runs alone."""

    def __init__(
        self,
        plan: Plan,
        models: Sequence[Load],
        metrics: Metrics,
        slots: Slots,
        *,
        batch_timeout: float,
        load_timeout: float,
        wait: float,
    ) -> None:
        """Start the runners of `plan` and wait until all have loaded `models`.

        Large images are in `slots`. A runner is killed and replaced when it has not answered a batch within
        `batch_timeout` seconds, or not loaded one more model within `load_timeout` seconds. While there is no
        runner, work waits for `wait` seconds and then fails.

        Raises `ModelError` if a runner cannot load the models.
        """
        self._plan = plan
        self._models = {load.slot: load for load in models}
        """Models by slot that each runner must have loaded before it gets work."""
        self._bodies = slots.descriptor
        self._metrics = metrics
        self._batch_timeout = batch_timeout
        self._load_timeout = load_timeout
        self._wait = wait
        self._links: dict[int, _Link] = {}
        self._arrival = asyncio.Event()
        """Event that is set whenever a runner becomes ready."""
        self._absent_since: float | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._replacements: set[asyncio.Task[None]] = set()
        self._closing = False
        # An empty file that all runners lock in turn (`service.inference.decode_memory`).
        self._lock = os.memfd_create("fovea")
        self._processes: list[Process] = []
        try:
            for index in range(plan.processes):
                self._processes.append(self._process(self._setup(index), 4 * _START))
            ready = [process.wait_ready() for process in self._processes]
        except ModelError:
            for process in self._processes:
                process.kill()
            raise
        self.ready = ready[0]

    async def load(self, load: Load) -> Loaded:
        """Load one more model in all runners, beside their batches.

        The runners load one after another; the others take more of the batches in the meantime. When a runner
        dies, the others go on, and its replacement loads the model too.

        Raises `ModelError` if a runner cannot load the model, and `Interrupted` if too many runners died or
        there is none.
        """
        deaths = 0
        try:
            while lacking := await self._next_without(load.slot):
                index, link = lacking
                try:
                    await self._load(link, load, index)
                except Interrupted as error:
                    deaths += 1
                    if deaths > _DEATHS:
                        raise
                    log.warning("%s; the other runners load it", error)
        except BaseException:
            self.unload(load.slot)
            raise
        self._models[load.slot] = load  # from here on new runners start with it
        return next(link.models[load.slot] for link in self._links.values() if load.slot in link.models)

    async def _next_without(self, slot: int) -> tuple[int, _Link] | None:
        """Return a runner that lacks a model; None when all have it.

        Raises `Interrupted` when there is no runner for `wait` seconds.
        """
        limit = time.monotonic() + self._wait
        while True:
            links = [(index, link) for index, link in self._links.items() if not link.is_lost]
            if links:
                return next((one for one in links if slot not in one[1].models), None)
            self._arrival.clear()
            try:
                async with asyncio.timeout(limit - time.monotonic()):
                    await self._arrival.wait()
            except TimeoutError:
                raise Interrupted(
                    f"for {self._wait:g} s there has been no runner that could load the model "
                    "(FOVEA_RUNNER_WAIT)"
                ) from None

    async def _load(self, link: _Link, load: Load, index: int) -> None:
        await link.load(_for_runner(load, index), timeout=self._load_timeout)

    def unload(self, slot: int) -> None:
        """Unload a model that will get no more batches."""
        self._models.pop(slot, None)
        for link in self._links.values():
            link.unload(slot)

    async def attach(self, batcher: Batcher, on_forfeit: Callable[[int, ModelError], None]) -> None:
        """Give the runners to `batcher` on the running event loop, and replace dead runners from now on.

        `on_forfeit` is called with the slot of a model that the last runners had and no new runner can load:
        the model must not be served any more. The callback must leave no item waiting for that model.
        """
        self._batcher = batcher
        self._on_forfeit = on_forfeit
        for index, process in enumerate(self._processes):
            await self._link(index, process, self._by_slot(self.ready, self._models))

    async def close(self) -> None:
        """End all runners."""
        self._closing = True
        for task in self._replacements:
            task.cancel()
        if self._expiry:
            self._expiry.cancel()
        at_work = {link.process for link in self._links.values()}
        for link in list(self._links.values()):
            link.close()
        ends = (one.end if one in at_work else one.kill for one in self._processes)
        await asyncio.gather(*(asyncio.to_thread(end) for end in ends))
        os.close(self._lock)

    @property
    def alive(self) -> int:
        """Number of runners that are ready or at work."""
        return len(self._links)

    @property
    def absence(self) -> float:
        """Seconds since there was no runner; 0 while there is one."""
        return 0.0 if self._absent_since is None else time.monotonic() - self._absent_since

    @staticmethod
    def _by_slot(ready: Ready, models: Mapping[int, Load]) -> dict[int, Loaded]:
        return dict(zip(models, ready.models, strict=True))

    async def _link(
        self, index: int, process: Process, models: Mapping[int, Loaded], *, forfeit: bool = False
    ) -> None:
        """Give work to a process with these `models`, after it has loaded models that were added meanwhile.

        Raises `ModelError` when the process cannot load one of them; the process is ended then. With
        `forfeit`, the model is removed instead, unless another runner exists.
        """

        def on_lost(link: _Link) -> None:
            self._lost(index, link)

        process.socket.setblocking(False)
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(
            lambda: _Link(process, self._metrics, self._batch_timeout, on_lost), sock=process.socket
        )
        link.models.update(models)
        try:
            # Check again after each load: models may be added or removed during the `await`.
            while late := next((one for slot, one in self._models.items() if slot not in link.models), None):
                try:
                    await self._load(link, late, index)
                except Interrupted:
                    raise
                except ModelError as error:
                    if not forfeit or self._links:
                        raise
                    self._forfeit(late, error)
        except ModelError:
            if link.is_lost:  # it died, and `_lost` is replacing it
                return
            link.is_replaced = False  # the caller tries again
            link.give_up()
            raise
        if self._closing:
            link.close()
        if link.is_lost:
            return
        # Models that were removed while this runner started.
        for slot in link.models.keys() - self._models.keys():
            link.unload(slot)
        self._links[index] = link
        self._absent_since = None
        self._arrival.set()
        self._batcher.add(link)
        self._metrics.runners.set(self.alive)

    def _forfeit(self, load: Load, error: ModelError) -> None:
        """Remove a model that no runner has and no new runner can load."""
        log.error("no runner has %s any more, and none can load it: %s", load.path, error)
        self._models.pop(load.slot, None)
        self._on_forfeit(load.slot, error)

    def _lost(self, index: int, link: _Link) -> None:
        """Remove a dead runner and start its replacement.

        The replacement and the expiry of waiting work come before the metrics, which may raise.
        """
        # First, so that the batcher cannot send another batch to the dead runner.
        self._batcher.remove(link)
        if self._links.get(index) is link:
            del self._links[index]
        if not self._closing and link.is_replaced:
            task = asyncio.get_running_loop().create_task(self._replace(index, link))
            self._replacements.add(task)
            task.add_done_callback(self._replacements.discard)
        if not self._closing and not self._links and self._absent_since is None:
            self._absent_since = time.monotonic()
            self._expire_in(self._wait)
        self._metrics.runners.set(self.alive)
        if not self._closing and link.is_replaced:
            self._metrics.runner_deaths.inc()

    def _expire_in(self, seconds: float) -> None:
        if self._expiry:
            self._expiry.cancel()
        self._expiry = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _expire(self) -> None:
        """Answer callers that have waited too long while there is no runner."""
        if self._links or self._closing:
            return
        now = time.monotonic()
        error = NotReady(
            f"all runners have died, and none was there for {self._wait:g} s (FOVEA_RUNNER_WAIT); others are "
            "being started",
            retry_after=max(1.0, self._wait),
        )
        oldest = self._batcher.expire(now - self._wait, error)
        self._expire_in(max(0.01, oldest + self._wait - now) if oldest else self._wait)

    async def _replace(self, index: int, lost: _Link) -> None:
        """Start another runner: at once if the last one had answered a batch, otherwise after a delay.

        Repeat until a runner has started or the service ends. Otherwise the place would stay empty for ever.
        """
        is_dead = False
        delay, failures = (0.0 if lost.answered else _BACK_OFF), 0
        while not self._closing:
            try:
                if not is_dead:
                    status = await asyncio.to_thread(lost.process.kill)
                    is_dead = True
                    log.error("runner %d died, exit status %s; it is replaced", lost.process.pid, status)
                await asyncio.sleep(delay)
                await self._start_another(index, failures)
                return
            except Exception as error:
                failures += 1
                delay = min(max(2 * delay, _BACK_OFF), _BACK_OFF_MAX)
                trace = not isinstance(error, ModelError)
                log.error("a runner cannot be replaced, next try in %g s: %s", delay, error, exc_info=trace)
                reason = "golden" if isinstance(error, GoldenError) else "other"
                with contextlib.suppress(Exception):  # a metric is not worth a runner
                    self._metrics.runner_start_failures.labels(reason).inc()

    async def _start_another(self, index: int, failures: int) -> None:
        """Start a runner with all models.

        If there is no other runner and the start has failed before, start without models and load one after
        another. One model that cannot be loaded must not keep the other models from answering.
        """
        models = dict(self._models)
        try:
            process, ready = await asyncio.to_thread(self._start, index, self._setup(index))
        except ModelError:
            if models != self._models:  # a model that was unloaded meanwhile may be the cause
                await self._start_another(index, failures)
                return
            if self._links or not failures or not models:
                raise
            process, ready = await asyncio.to_thread(self._start, index, Setup(self._plan, []))
            await self._link(index, process, {}, forfeit=True)
            return
        await self._link(index, process, self._by_slot(ready, models))

    def _setup(self, index: int) -> Setup:
        return Setup(self._plan, [_for_runner(load, index) for load in self._models.values()])

    def _process(self, setup: Setup, start: float = _START) -> Process:
        others = max(0, len(setup.models) - 1)
        timeout = start + self._load_timeout * (1 + _START_SHARE * others)
        return Process(setup, self._lock, self._bodies, timeout=timeout)

    def _start(self, index: int, setup: Setup) -> tuple[Process, Ready]:
        """Start a process and block until it is ready. Raises `ModelError`; the process is killed then."""
        process = self._processes[index] = self._process(setup)
        try:
            if self._closing:
                raise Interrupted("the service is ending")
            return process, process.wait_ready()
        except ModelError:
            process.kill()
            raise


def _for_runner(load: Load, index: int) -> Load:
    """Return the load for one runner. Only the first runner has threads for a call that runs alone."""
    return replace(load, plan=replace(load.plan, wide_threads=0)) if index else load

"""The runner processes, seen from the service: started, given batches, and replaced when they die."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, NamedTuple

from service import child
from service.batcher import FOREVER, Batcher, Done, Lane, RunnerLost
from service.errors import GoldenError, Interrupted, ModelError
from service.messages import (
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
from service.metrics import Metrics
from service.slots import Slots

log = logging.getLogger(__name__)

_BUFFER: Final = 64 << 10
"""Bytes that are received from a runner at once."""

_END: Final = 5.0
"""Seconds that a runner has to end by itself once its socket is closed."""

_BACK_OFF: Final = 1.0
"""Seconds before a runner that died without having answered anything is replaced; doubled each time."""

_BACK_OFF_MAX: Final = 30.0


class Process:
    """One runner process and its socket. It loads what `setup` says as soon as it is made."""

    def __init__(self, setup: Setup, lock: int, bodies: int) -> None:
        """`lock` and `bodies` are the descriptors of the files that all runners have in common.

        Raises `ModelError` when there are no files, memory or processes left for it.
        """
        try:
            self.socket, theirs = socket.socketpair()
            with theirs:
                self._process = child.start("runner", [theirs.fileno(), lock, bodies])
        except OSError as error:
            raise ModelError(f"a runner cannot be started: {error.strerror}") from None
        self.is_wide = any(load.plan.wide_threads > load.plan.threads for load in setup.models)
        self.pid = self._process.pid
        with contextlib.suppress(OSError):  # it is dead already: `wait_ready` says so
            self.socket.sendall(setup.write())

    def wait_ready(self) -> Ready:
        """Block until it has loaded its models. Raises `ModelError` when it has not."""
        try:
            frame = receive(self.socket)
        except OSError:
            frame = None
        if frame is None:
            raise ModelError(f"a runner died while it loaded the models, exit status {self._process.wait()}")
        ready = Ready.read(frame)
        if isinstance(ready, Failure):
            raise ready.error()
        return ready

    def end(self) -> int:
        """Close the socket and wait for the process; kill it when that takes too long."""
        self.socket.close()
        try:
            return self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def kill(self) -> int:
        """End it at once."""
        self.shoot()
        self.socket.close()
        return self._process.wait()

    def shoot(self) -> None:
        """Kill it, without waiting for its end."""
        self._process.kill()


class _Begun(NamedTuple):
    """A batch that a runner has."""

    done: Done
    lane: Lane[Any, Any]
    items: Sequence[Item]
    apart: bool


def _suspects(begun: Sequence[_Begun]) -> int:
    """With how many of its batches, the first ones, a runner may have been at work: see `runner._group`."""
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
    """A runner at work on the batches that it is sent over its socket, one after the other."""

    def __init__(
        self, process: Process, metrics: Metrics, batch_timeout: float, on_lost: Callable[[_Link], None]
    ) -> None:
        self.process = process
        self.is_wide = process.is_wide
        self.answered = False
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
        """The process has ended."""
        return bool(self._transport.is_closing())

    def load(self, load: Load, *, timeout: float) -> asyncio.Future[Loaded]:
        """Load one model more, beside the batches. Raises `ModelError` when it cannot, or dies meanwhile:
        after `timeout` seconds it is killed."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Loaded] = loop.create_future()
        self._loads[load.slot] = loaded
        alarm = loop.call_later(timeout, self.process.shoot)
        loaded.add_done_callback(lambda _: alarm.cancel())
        self._write(load.write())
        return loaded

    def unload(self, slot: int) -> None:
        """Let go of a model for which no batch will come."""
        self._write(Unload(slot).write())

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
        """Send a batch. See `service.batcher.Runner`."""
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
        if number > self._number - len(self._begun) + 1:  # it need not work on that batch yet
            self._write(Drop(number, index).write())

    def _write(self, message: bytes) -> None:
        self._unsent.append(memoryview(message))
        self._send()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        for frame in self._stream.feed(bytes(self._buffer[:nbytes])):
            if self.is_lost:
                return
            self._receive(frame)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._send()

    def connection_lost(self, _error: Exception | None) -> None:
        self._unsent.clear()
        self._rest()
        self._on_lost(self)
        for loaded in self._loads.values():
            if not loaded.done():
                loaded.set_exception(Interrupted(f"runner {self.process.pid} died while it loaded the model"))
        suspects = _suspects(list(self._begun))
        while self._begun:  # the last first: they go back to the head of the queue
            batch = self._begun.pop()
            at_work = len(self._begun) < suspects
            batch.done(RunnerLost(f"runner {self.process.pid} died at its batch", at_work=at_work))

    def close(self) -> None:
        """Leave it alone from now on."""
        self._transport.abort()

    def _send(self) -> None:
        """One piece; the next when the event loop has looked after others."""
        if self._unsent and not self._paused:
            self._transport.write(self._unsent.popleft())
            if self._unsent and not self._paused:
                asyncio.get_running_loop().call_soon(self._send)

    def _watch(self) -> None:
        self._busy_since = time.monotonic()
        self._watchdog = asyncio.get_running_loop().call_later(self._batch_timeout, self._hung)

    def _hung(self) -> None:
        log.error(
            "runner %d has not answered for %g s (FOVEA_BATCH_TIMEOUT); it is killed",
            self.process.pid,
            self._batch_timeout,
        )
        self.process.shoot()

    def _rest(self) -> None:
        if self._watchdog:
            self._watchdog.cancel()
            self._watchdog = None
            self._metrics.runner_busy_seconds.inc(time.monotonic() - self._busy_since)

    def _told(self, told: Told) -> None:
        loaded = self._loads.pop(told.slot)
        if loaded.done():  # nobody waits for it any more
            return
        if isinstance(told.outcome, Loaded):
            loaded.set_result(told.outcome)
            return
        if told.outcome.trace:
            log.error("a model could not be loaded in runner %d\n%s", self.process.pid, told.outcome.trace)
        loaded.set_exception(told.outcome.error())

    def _receive(self, frame: Frame) -> None:
        if told := Told.read(frame):
            self._told(told)
            return
        report = Report.read(frame)
        number = self._number - len(self._begun) + 1  # of the first that has no answer
        if not self._begun or report.number != number:
            log.error(
                "runner %d answered batch %d where %d was due; it is killed",
                self.process.pid,
                report.number,
                number,
            )
            self.process.shoot()
            self._transport.abort()
            return
        self._rest()
        self.answered = True
        done = self._begun.popleft().done
        if self._begun:
            self._watch()
        if isinstance(report, Failure):
            log.error("a batch failed in runner %d\n%s", self.process.pid, report.trace)
            done(ModelError(report.reason))
            return
        done(report.answers)
        stages = self._metrics.stage_seconds
        for seconds in report.decode:
            stages["decode"].observe(seconds)
        if report.batch:
            stages["inference"].observe(report.inference)
            self._metrics.batch_images.observe(report.batch)


class Runners:
    """All runners. They are alike, but for the first: it has the threads for what is alone."""

    def __init__(
        self,
        plan: Plan,
        models: Sequence[Load],
        metrics: Metrics,
        slots: Slots,
        *,
        batch_timeout: float,
        load_timeout: float,
    ) -> None:
        """Start as many as `plan` says and wait until all have loaded `models`. Raises `ModelError` if any
        has not.

        They find large images in `slots`. One that has not answered a batch after `batch_timeout` seconds, or
        has not loaded a model more after `load_timeout`, is killed and replaced.
        """
        self._plan = plan
        self._models = {load.slot: load for load in models}
        self._bodies = slots.descriptor
        self._metrics = metrics
        self._batch_timeout = batch_timeout
        self._load_timeout = load_timeout
        self._links: dict[int, _Link] = {}
        self._replacements: set[asyncio.Task[None]] = set()
        self._closing = False
        self._lock = os.memfd_create("fovea")
        self._processes: list[Process] = []
        try:
            for index in range(plan.processes):
                self._processes.append(Process(self._setup(index), self._lock, self._bodies))
            ready = [process.wait_ready() for process in self._processes]
        except ModelError:
            for process in self._processes:
                process.kill()
            raise
        self.ready = ready[0]

    async def load(self, load: Load) -> Loaded:
        """Load one model more in all of them, beside their batches. Raises `ModelError` if any cannot.

        One after the other: the others have more of the batches meanwhile.
        """
        self._models[load.slot] = load  # for those that are being started too
        loaded = None
        try:
            for index, link in list(self._links.items()):
                loaded = await self._load(link, load, index)
            if loaded is None:
                raise Interrupted("there is no runner that could load the model")
            return loaded
        except BaseException:
            self.unload(load.slot)
            raise

    def _load(self, link: _Link, load: Load, index: int) -> asyncio.Future[Loaded]:
        return link.load(_for_runner(load, index), timeout=self._load_timeout)

    def unload(self, slot: int) -> None:
        """Let go of a model for which no batch will come."""
        self._models.pop(slot, None)
        for link in self._links.values():
            link.unload(slot)

    async def attach(self, batcher: Batcher) -> None:
        """Give them to `batcher`, on the running event loop; and from then on replace those that die."""
        self._batcher = batcher
        for index, process in enumerate(self._processes):
            await self._link(index, process, self._models)

    async def close(self) -> None:
        """End them all."""
        self._closing = True
        for task in self._replacements:
            task.cancel()
        for link in list(self._links.values()):
            link.close()
        await asyncio.gather(*(asyncio.to_thread(process.end) for process in self._processes))
        os.close(self._lock)

    @property
    def alive(self) -> int:
        """How many are ready for work or at it."""
        return len(self._links)

    async def _link(self, index: int, process: Process, models: Collection[int]) -> None:
        """Give work to a process that has loaded these `models`, once it has those that came meanwhile."""

        def on_lost(link: _Link) -> None:
            self._lost(index, link)

        process.socket.setblocking(False)
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(
            lambda: _Link(process, self._metrics, self._batch_timeout, on_lost), sock=process.socket
        )
        loaded = set(models)
        try:
            while late := self._models.keys() - loaded:
                await asyncio.gather(*(self._load(link, self._models[slot], index) for slot in late))
                loaded |= late
        except ModelError as error:
            log.error("runner %d is of no use: %s", process.pid, error)
            process.shoot()  # another will take its place
            return
        if link.is_lost:
            return
        for slot in loaded - self._models.keys():
            link.unload(slot)
        self._links[index] = link
        self._metrics.runners.set(self.alive)
        self._batcher.add(link)

    def _lost(self, index: int, link: _Link) -> None:
        self._batcher.remove(link)
        if self._links.get(index) is link:
            del self._links[index]
        self._metrics.runners.set(self.alive)
        if self._closing:
            return
        self._metrics.runner_deaths.inc()
        task = asyncio.get_running_loop().create_task(self._replace(index, link))
        self._replacements.add(task)
        task.add_done_callback(self._replacements.discard)

    async def _replace(self, index: int, lost: _Link) -> None:
        """Start another; at once if the last one had done some work, and else after a while."""
        status = await asyncio.to_thread(lost.process.kill)
        log.error("runner %d died, exit status %d; it is replaced", lost.process.pid, status)
        delay = 0.0 if lost.answered else _BACK_OFF
        while True:
            await asyncio.sleep(delay)
            try:
                setup = self._setup(index)
                process = await asyncio.to_thread(self._start, index, setup)
                await self._link(index, process, [load.slot for load in setup.models])
                return
            except ModelError as error:
                delay = min(max(2 * delay, _BACK_OFF), _BACK_OFF_MAX)
                reason = "golden" if isinstance(error, GoldenError) else "other"
                self._metrics.runner_start_failures.labels(reason).inc()
                log.error("a runner cannot be replaced, next try in %g s: %s", delay, error)

    def _setup(self, index: int) -> Setup:
        return Setup(self._plan, [_for_runner(load, index) for load in self._models.values()])

    def _start(self, index: int, setup: Setup) -> Process:
        process = self._processes[index] = Process(setup, self._lock, self._bodies)
        try:
            process.wait_ready()
        except ModelError:
            process.kill()
            raise
        return process


def _for_runner(load: Load, index: int) -> Load:
    """The first alone has the threads for what is alone."""
    return replace(load, plan=replace(load.plan, wide_threads=0)) if index else load

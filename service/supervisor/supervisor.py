"""Several worker processes behind one port: connections spread evenly, the dead replaced.

The supervisor accepts every connection and passes it to the worker with the fewest. Sharing the listening
socket leaves that to chance: whichever worker wakes first takes all (seen: eight connections, one worker).
`SO_REUSEPORT` spreads by a hash of the addresses: of eight connections seldom four and four.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from fovea.service import signals
from fovea.service.artifact.repository import Found, Served
from fovea.service.errors import Internal, RequestError, StartError
from fovea.service.http.lifecycle import OVERDUE
from fovea.service.http.listener import Listener
from fovea.service.observability.multiprocess import MetricFiles, SharedMetrics
from fovea.service.observability.process_metrics import kill_children, reap_orphans
from fovea.service.rollout.refusals import Refusals
from fovea.service.rollout.startup import is_broken
from fovea.service.rollout.trial import change_limit
from fovea.service.rollout.watcher import Watch
from fovea.service.settings import Settings
from fovea.service.supervisor import channel
from fovea.service.supervisor.coordinator import Broadcast

log = logging.getLogger(__name__)

_STEADY: Final = 10.0
"""Seconds after which a worker's death has nothing to do with its start."""

_BACK_OFF: Final = (0.1, 10.0)
"""Seconds before a worker that died at its start is replaced: at first, doubled each time, and at most."""

_RETRY: Final = 1.0
"""Seconds until a connection that could be passed to nobody is tried again, if nothing happens before."""

_MISSED: Final = 2.0
"""Seconds without a message after which a worker gets no more connections."""

_HUNG: Final = 10.0
"""Seconds without a message after which a worker is killed."""

_FIRST_WORD: Final = 60.0
"""Seconds for the first message of a worker. Its modules take 0.3 s where nothing else runs."""

_PARTING: Final = 10.0
"""Seconds for a worker to end after it has closed its end of the channel, until it is killed."""

_POLL: Final = 0.01
"""Seconds between two looks whether a process has ended. No thread waits for it: one may not be to be had."""


@dataclass(eq=False)
class _Worker:
    """One worker process, and our end of the channel to it."""

    process: subprocess.Popen[bytes]
    end: socket.socket
    started: float = field(default_factory=time.monotonic)
    ready: dict[str, str] | None = None
    """What it has loaded, in words, once it has."""
    served: dict[str, str] | None = None
    """The same, once it may begin."""
    generation: int = 0
    """Of what it was told to serve at its start."""
    stopped: bool = False
    """It takes no more connections."""
    passed: deque[socket.socket] = field(default_factory=deque)
    """Connections on their way to it: if it dies before it takes them, another can have them."""
    received: int = 0
    """Connections that it has received, those included that it had no file descriptor for."""
    taken: int = 0
    closed: int = 0
    inbox: channel.Inbox = field(default_factory=channel.Inbox)

    heard: float = field(default_factory=time.monotonic)
    """When it was last heard of, on the monotonic clock, in seconds."""
    has_spoken: bool = False
    is_silent: bool = False
    """It has not been heard of for too long to get connections."""
    is_hung: bool = False
    """It was killed because it had not been heard of."""
    starved_until: float = 0.0
    """When it may have a file descriptor again, on the monotonic clock, in seconds."""

    def __post_init__(self) -> None:
        self.outbox = channel.Outbox(self.end)

    @property
    def open(self) -> int:
        """Connections that it has."""
        return self.taken - self.closed

    def tell(self, **message: Any) -> None:
        """Send a message, as soon as there is room for it. Raises `OSError`."""
        self.outbox.send(**message)

    def kill(self) -> None:
        """End it at once, and what it has started."""
        kill_children(self.process.pid)
        self.process.kill()

    @property
    def load(self) -> tuple[int, int]:
        """The least comes first: by connections now, then by connections ever."""
        return self.open + len(self.passed), self.received + len(self.passed)


class Supervisor:
    """Starts workers, hands them connections, replaces those that die, and stops them all in order."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        settings: Settings,
        *,
        listener: Listener,
        metrics: SharedMetrics,
        served: Served,
        refusals: Refusals,
        listening: Callable[[dict[str, str]], None],
    ) -> None:
        """`command` gets the numbers of the channel and of the metrics' files behind it, and what to serve as
        its input, `served` at first. `listening` is told what the workers serve."""
        self._command = command
        self._environment = environment
        self._settings = settings
        self._listener = listener
        self._metrics = metrics
        self._listening = listening
        patience = change_limit(settings.trial_seconds)
        self._broadcast = Broadcast(self._at_work, self._admit_all, timeout=patience)
        self._watch = Watch(
            settings.models,
            served,
            self._broadcast,
            named=settings.default_model,
            refusals=refusals,
            limits=settings.swap_flips < 1 or settings.swap_slowdown > 0,
            patience=2 * patience,
            is_broken=partial(is_broken, settings, refusals),
        )
        self._workers: set[_Worker] = set()
        self._waiting: list[socket.socket] = []
        self._early_deaths = 0
        self._stopping = False
        self._parting: set[_Worker] = set()
        """Those that have closed their end and whose processes have perhaps not ended."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until a signal ends it. Raises `StartError` if a worker cannot start at first."""
        self._loop = asyncio.get_running_loop()
        self._begun: asyncio.Future[None] = self._loop.create_future()
        self._over = asyncio.Event()
        signals.serve(self._signal, lambda: self._spawn(self._watch.reload()))
        try:
            self._metrics.processes.workers_expected.set(self._settings.workers)
            for _ in range(self._settings.workers):
                try:
                    self._start()
                except OSError as error:
                    raise StartError(f"cannot start a worker: {error.strerror}") from None
            self._looked = time.monotonic()
            self._look()
            await self._begun
            if not self._stopping:
                self._listener.start(self._pass)
                self._listening(next(one.served for one in self._workers if one.served))
                self._spawn(self._watch.run(self._settings.watch))
            await self._over.wait()
        finally:
            for task in self._tasks:
                task.cancel()
            self._kill()

    # --- workers ---

    def _start(self) -> None:
        """Start a worker. Raises `OSError` when the system has no room for it."""
        ours, theirs = channel.pair()
        files = None
        try:
            with theirs, os.fdopen(os.memfd_create("fovea-shelf"), "w+b") as shelf:
                files = MetricFiles.create()
                shelf.write(self._watch.served.to_json().encode())
                shelf.seek(0)
                descriptors = (theirs.fileno(), self._metrics.index, *files.descriptors)
                process = subprocess.Popen(  # noqa: S603 - our own command
                    [*self._command, *map(str, descriptors)],
                    env=self._environment,
                    stdin=shelf,
                    pass_fds=descriptors,
                )
        except BaseException:
            ours.close()
            if files:
                files.close()
            raise
        worker = _Worker(process, ours, generation=self._broadcast.generation)
        self._workers.add(worker)
        self._loop.add_reader(ours, self._read, worker)
        self._metrics.add(process.pid, files)

    def _read(self, worker: _Worker) -> None:
        while worker in self._workers:
            try:
                message, _ = channel.receive(worker.end)
            except BlockingIOError:
                return
            if not message:
                self._lost(worker)
                return
            self._hear(worker)
            try:
                whole = worker.inbox.whole(message)
                if whole == channel.NO_MORE:
                    self._let_go(worker)
                elif whole is not None:
                    self._told(worker, json.loads(whole))
            except Exception:  # whatever it is: nothing that this worker says can be relied on any more
                log.exception("worker %d is killed: its message %.200r is wrong", worker.process.pid, message)
                worker.kill()

    def _hear(self, worker: _Worker) -> None:
        worker.heard = time.monotonic()
        worker.has_spoken = True
        if worker.is_silent:
            worker.is_silent = False
            self._pass_waiting()
            self._count_workers()
            log.info("worker %d is heard of again", worker.process.pid)

    def _look(self) -> None:
        """See which workers have not been heard of: they get no more connections, and are killed at last."""
        self._loop.call_later(channel.BEAT, self._look)
        now = time.monotonic()
        late = max(0.0, now - self._looked - 2 * channel.BEAT)  # it was this process that did not run
        self._looked = now
        reap_orphans([one.process.pid for one in (*self._workers, *self._parting)])
        for worker in self._workers:
            worker.heard += late
            silent = now - worker.heard
            if silent > (_HUNG if worker.has_spoken else _FIRST_WORD) and not worker.is_hung:
                worker.is_hung = True
                worker.kill()
                log.error(
                    "worker %d has not been heard of for %.0f s, and is killed", worker.process.pid, silent
                )
            elif silent > _MISSED and worker.served and not worker.is_silent:
                worker.is_silent = True
                self._count_workers()
                log.warning(
                    "worker %d has not been heard of for %.0f s, and gets no more connections",
                    worker.process.pid,
                    silent,
                )

    def _told(self, worker: _Worker, message: dict[str, Any]) -> None:
        if "received" in message:
            self._received(worker, message["received"], message["closed"], message["missed"])
        elif "starting" in message:
            pass  # it is heard of: that is all
        elif "prepared" in message:
            self._broadcast.told(worker, message)
        elif "lost" in message:
            self._watch.lost(message["lost"], message["is_lost"])
        elif "lasting" in message:
            found = Found.from_plain(message["found"])
            self._watch.refuse(found, message["reason"], message["lasting"])
        elif "request" in message:
            self._spawn(self._manage(worker, **message))
        elif "ready" in message:
            worker.ready = message["ready"]
            self._admit(worker)
        elif not self._begun.done():
            self._begun.set_exception(StartError(message["failed"]))
        elif self._begun.exception() is None:
            log.error("a worker could not start: %s", message["failed"])
            self._watch.start_failed()

    def _received(self, worker: _Worker, received: int, closed: int, missed: Sequence[int]) -> None:
        """A worker says how many connections it has received and closed so far, and which of them it had no
        file descriptor for: those are passed on again."""
        again = []
        has_passed = worker.received < received
        while worker.received < received:
            connection = worker.passed.popleft()
            if worker.received in missed:
                again.append(connection)
            else:
                connection.close()
                worker.taken += 1
            worker.received += 1
        closed_now = closed - worker.closed
        worker.closed = closed
        if again:
            if not worker.starved_until:
                log.error("worker %d has no file descriptor left (ulimit -n)", worker.process.pid)
            worker.starved_until = time.monotonic() + _RETRY
        elif closed_now:
            worker.starved_until = 0.0
        if closed_now:
            self._listener.released(closed_now)
        elif has_passed:
            self._listener.has_room()
        for connection in again:
            self._pass(connection)
        if closed_now and not again:
            self._pass_waiting()

    def _at_work(self) -> list[_Worker]:
        return [one for one in self._workers if one.served and not one.stopped]

    def _attentive(self) -> list[_Worker]:
        """Return those that may get connections. The others still take part in changes to what is served."""
        return [one for one in self._at_work() if not one.is_silent]

    def _admit_all(self) -> None:
        for worker in list(self._workers):
            self._admit(worker)

    def _admit(self, worker: _Worker) -> None:
        """Let a worker that is ready begin, unless that would be in the midst of a change."""
        if worker.ready is None or worker.served or self._broadcast.is_changing:
            return
        if worker.generation != self._broadcast.generation:
            log.info("worker %d has loaded what is not served any more", worker.process.pid)
            worker.kill()
            return
        worker.served = worker.ready
        if not self._begun.done() and all(one.served for one in self._workers):
            self._begun.set_result(None)
        self._pass_waiting()
        self._count_workers()

    async def _manage(self, worker: _Worker, request: int, **what: Any) -> None:
        """Do what a worker's caller wants, and tell how it ended."""
        error = None
        try:
            if "load" in what:
                await self._watch.load(what["load"], what["version"])
            else:
                await self._watch.unload(what["unload"])
        except RequestError as refusal:
            error = refusal.to_dict()
        except Exception:  # whatever it is, somebody waits for an answer
            log.exception("a change could not be made")
            error = {"code": Internal.code, "message": "a change could not be made; the log says why"}
        with suppress(OSError):  # it has died meanwhile
            worker.tell(managed=request, error=error)

    def _lost(self, worker: _Worker) -> None:
        """A worker has closed its end: it has died. First what must happen: another takes its place."""
        self._workers.discard(worker)
        self._parting.add(worker)
        self._spawn(self._bury(worker))
        self._loop.remove_reader(worker.end)
        self._loop.remove_writer(worker.end)
        worker.end.close()
        for connection in worker.passed:
            self._pass(connection)
        if worker.open:
            self._listener.released(worker.open)
        with _logged("a change could not be told that a worker has died"):
            self._broadcast.lost(worker)
        self._count_workers()

    async def _bury(self, worker: _Worker) -> None:
        """Start another worker in place of one that has died, or end with the last; all else comes after."""
        try:
            code = await self._end_of(worker)
        finally:
            self._parting.discard(worker)
        reason = "hung" if worker.is_hung else "signal" if code < 0 else "exit"
        ended = {
            "hung": "was killed because it was not heard of",
            "signal": f"was ended by signal {-code}",
            "exit": f"ended with exit code {code}",
        }[reason]
        if not self._begun.done():
            self._begun.set_exception(StartError(f"a worker {ended} at its start"))
        if self._begun.exception():  # the service ends, and kills the others
            return
        if self._stopping:
            self._check_over()
        else:
            self._spawn(self._replace(worker))
            log.error("worker %d %s; another takes its place", worker.process.pid, ended)
        with _logged("the metrics of worker %d are lost", worker.process.pid):
            if not self._stopping:
                self._metrics.processes.worker_deaths[reason].inc()
            self._metrics.fold(worker.process.pid)

    async def _end_of(self, worker: _Worker) -> int:
        """Wait until its process has ended, and return its exit code; kill it when that takes too long."""
        limit = time.monotonic() + _PARTING
        while (code := worker.process.poll()) is None:
            if time.monotonic() > limit:
                log.error("worker %d does not end, and is killed", worker.process.pid)
                worker.kill()
                limit = time.monotonic() + _PARTING
            await asyncio.sleep(_POLL)
        return code

    async def _replace(self, worker: _Worker) -> None:
        """Start another in its place, as often as it takes."""
        delay = self._back_off(worker)
        while True:
            await asyncio.sleep(delay)
            if self._stopping:
                return
            try:
                self._start()
                return
            except OSError as error:
                first, longest = _BACK_OFF
                delay = min(max(2 * delay, first), longest)
                log.error("a worker cannot be started, next try in %g s: %s", delay, error.strerror)

    def _count_workers(self) -> None:
        self._metrics.processes.workers.set(len(self._attentive()))

    def _back_off(self, worker: _Worker) -> float:
        if worker.served and time.monotonic() - worker.started > _STEADY:
            self._early_deaths = 0
            return 0.0
        first, longest = _BACK_OFF
        self._early_deaths += 1
        return float(min(longest, first * 2 ** min(self._early_deaths - 1, 16)))

    # --- connections ---

    def _pass(self, connection: socket.socket) -> None:
        """Hand a connection to the worker with the fewest; keep it while there is none that takes it."""
        for worker in sorted(self._attentive(), key=lambda one: one.load):
            if not worker.outbox.is_empty:  # it is busy, and what waits comes first
                continue
            if worker.starved_until > time.monotonic():
                continue
            try:
                socket.send_fds(worker.end, [channel.CONNECTION], [connection.fileno()])
            except OSError:  # it is busy, or has just died
                continue
            worker.passed.append(connection)
            return
        self._waiting.append(connection)
        self._listener.hold()
        self._loop.call_later(_RETRY, self._pass_waiting)

    def _pass_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for connection in waiting:
            self._pass(connection)
        if waiting and not self._waiting:
            self._listener.release()

    # --- the end ---

    def _signal(self, number: int) -> None:
        if not self._begun.done():
            self._begun.set_result(None)
        if not self._stopping:
            self._stopping = True
            longest = self._settings.drain_grace + self._settings.drain_limit + OVERDUE
            self._loop.call_later(longest, self._kill)
        for worker in self._workers:
            if not worker.served:
                worker.kill()
                continue
            try:
                worker.tell(signal=number)
            except OSError:  # it has died, or hangs and will be killed
                log.warning("worker %d does not listen", worker.process.pid)
        self._check_over()

    def _let_go(self, worker: _Worker) -> None:
        """A worker has finished: it gets no more. With the last one the port is closed."""
        if not any(one.served and not one.stopped for one in self._workers if one is not worker):
            self._listener.close()
        worker.stopped = True
        with suppress(OSError):  # it has died
            worker.end.shutdown(socket.SHUT_WR)

    def _check_over(self) -> None:
        if not self._workers and not self._parting:
            self._over.set()

    def _kill(self) -> None:
        """End all workers that are still there, at once."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.process.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Log what a task has failed with: nobody else waits for it."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a task of the supervisor has failed", exc_info=error)


@contextmanager
def _logged(message: str, *values: object) -> Iterator[None]:
    """Log what is raised inside, and go on: it is less than what comes after it."""
    try:
        yield
    except Exception:
        log.exception(message, *values)

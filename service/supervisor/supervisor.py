"""Supervisor of several worker processes behind one port.

Connections are spread evenly, and dead workers are replaced. The supervisor accepts every connection and
passes it to the worker with the fewest connections. A shared listening socket would leave the choice to
chance: the worker that wakes first takes all connections (observed: eight connections, one worker).
`SO_REUSEPORT` uses a hash of the addresses, which seldom splits eight connections into four and four.
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
from fovea.service.artifact.repository import ModelVersion, ServingState
from fovea.service.errors import Internal, RequestError, StartError
from fovea.service.http.lifecycle import OVERDUE
from fovea.service.http.listener import Listener
from fovea.service.observability.multiprocess import MetricFiles, SharedMetrics
from fovea.service.observability.process_metrics import kill_descendants, reap_orphans
from fovea.service.rollout.refusals import Refusals
from fovea.service.rollout.startup import is_broken
from fovea.service.rollout.trial import compute_change_timeout
from fovea.service.rollout.watcher import Watcher
from fovea.service.settings import Settings
from fovea.service.supervisor import channel
from fovea.service.supervisor.coordinator import Broadcast

log = logging.getLogger(__name__)

_STEADY: Final = 10.0
"""Time in seconds after which the death of a worker is not related to its start."""

_BACK_OFF: Final = (0.1, 10.0)
"""Time in seconds before a worker that died at its start is replaced: the first delay, which doubles each
time, and the maximum."""

_RETRY: Final = 1.0
"""Time in seconds until a connection that no worker could take is passed again, if nothing happens before."""

_MISSED: Final = 2.0
"""Time in seconds without a message after which a worker gets no more connections."""

_HUNG: Final = 10.0
"""Time in seconds without a message after which a worker is killed."""

_FIRST_WORD: Final = 60.0
"""Time limit in seconds for the first message of a worker. Importing its modules takes 0.3 s on an idle
machine."""

_PARTING: Final = 10.0
"""Time in seconds after which a worker that has closed its end of the channel is killed."""

_POLL: Final = 0.01
"""Time in seconds between two checks whether a process has ended. No thread waits for the process, because
starting a thread may fail."""


@dataclass(eq=False)
class _Worker:
    """Worker process, and the supervisor's end of its channel."""

    process: subprocess.Popen[bytes]
    end: socket.socket
    started: float = field(default_factory=time.monotonic)
    ready: dict[str, str] | None = None
    """Description of the loaded models; None until the worker has loaded them."""
    served: dict[str, str] | None = None
    """Same as `ready`, once the worker is admitted."""
    generation: int = 0
    """Generation of the models that the worker had to load at its start."""
    stopped: bool = False
    """True when the worker takes no more connections."""
    passed: deque[socket.socket] = field(default_factory=deque)
    """Connections on their way to the worker. If the worker dies before it takes them, other workers get
    them."""
    received: int = 0
    """Number of connections received, including those for which the worker had no file descriptor."""
    taken: int = 0
    closed: int = 0
    inbox: channel.Inbox = field(default_factory=channel.Inbox)

    heard: float = field(default_factory=time.monotonic)
    """Time of the last message on the monotonic clock in seconds."""
    has_spoken: bool = False
    is_silent: bool = False
    """True when the worker has been silent for too long to get connections."""
    is_hung: bool = False
    """True when the worker was killed because it was silent."""
    starved_until: float = 0.0
    """Time from which the worker may have a free file descriptor, on the monotonic clock in seconds."""

    def __post_init__(self) -> None:
        self.outbox = channel.Outbox(self.end)

    @property
    def open(self) -> int:
        """Return the number of open connections of the worker."""
        return self.taken - self.closed

    def tell(self, **message: Any) -> None:
        """Send a message as soon as there is room for it. Raises `OSError`."""
        self.outbox.send(**message)

    def kill(self) -> None:
        """Kill the worker and its children at once."""
        kill_descendants(self.process.pid)
        self.process.kill()

    @property
    def load(self) -> tuple[int, int]:
        """Return the sort key for choosing a worker: current connections, then connections ever."""
        return self.open + len(self.passed), self.received + len(self.passed)


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
        served: ServingState,
        refusals: Refusals,
        listening: Callable[[dict[str, str]], None],
    ) -> None:
        """Set the workers' command and environment, and the shared resources.

        The file descriptors of the channel and of the metrics files are appended to `command`. Each worker
        reads the versions to serve from its standard input; the first workers read `served`. `listening` is
        called with the description of the served models.
        """
        self._command = command
        self._environment = environment
        self._settings = settings
        self._listener = listener
        self._metrics = metrics
        self._listening = listening
        patience = compute_change_timeout(settings.trial_seconds)
        self._broadcast = Broadcast(self._at_work, self._admit_all, timeout=patience)
        self._watch = Watcher(
            settings.models,
            served,
            self._broadcast,
            configured_default=settings.default_model,
            refusals=refusals,
            has_limits=settings.swap_flips < 1 or settings.swap_slowdown > 0,
            change_timeout=2 * patience,
            is_broken=partial(is_broken, settings, refusals),
        )
        self._workers: set[_Worker] = set()
        self._waiting: list[socket.socket] = []
        self._early_deaths = 0
        self._stopping = False
        self._parting: set[_Worker] = set()
        """Workers that have closed their end of the channel and whose processes may still run."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until a signal arrives. Raises `StartError` if a worker cannot start at first."""
        self._loop = asyncio.get_running_loop()
        self._begun: asyncio.Future[None] = self._loop.create_future()
        self._over = asyncio.Event()
        signals.serve(self._signal, lambda: self._spawn(self._watch.reload()))
        try:
            self._metrics.process_metrics.workers_expected.set(self._settings.workers)
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
                shelf.write(self._watch.state.to_json().encode())
                shelf.seek(0)
                descriptors = (theirs.fileno(), self._metrics.index, *files.descriptors)
                # The worker inherits these descriptors. `with` closes our copy of the worker's end after the
                # start: otherwise the death of the worker would not end the channel.
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
        """Handle all messages that have arrived from a worker."""
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
            except Exception:  # no message of this worker can be trusted any more
                log.exception("worker %d is killed: its message %.200r is wrong", worker.process.pid, message)
                worker.kill()

    def _hear(self, worker: _Worker) -> None:
        """Note that a worker has sent a message."""
        worker.heard = time.monotonic()
        worker.has_spoken = True
        if worker.is_silent:
            worker.is_silent = False
            self._pass_waiting()
            self._count_workers()
            log.info("worker %d is heard of again", worker.process.pid)

    def _look(self) -> None:
        """Check every `BEAT` seconds which workers are silent.

        A silent worker gets no more connections. A worker that stays silent is killed.
        """
        self._loop.call_later(channel.BEAT, self._look)
        now = time.monotonic()
        late = max(0.0, now - self._looked - 2 * channel.BEAT)  # this process itself did not run
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
        """Handle a message of a worker."""
        if "received" in message:
            self._received(worker, message["received"], message["closed"], message["missed"])
        elif "starting" in message:
            pass  # a heartbeat: `_hear` has noted it
        elif "prepared" in message:
            self._broadcast.told(worker, message)
        elif "lost" in message:
            self._watch.count_lost_model(message["lost"], message["is_lost"])
        elif "lasting" in message:
            found = ModelVersion.from_plain(message["found"])
            self._watch.refuse_version(found, message["reason"], message["lasting"])
        elif "request" in message:
            self._spawn(self._manage(worker, **message))
        elif "ready" in message:
            worker.ready = message["ready"]
            self._admit(worker)
        elif not self._begun.done():
            self._begun.set_exception(StartError(message["failed"]))
        elif self._begun.exception() is None:
            log.error("a worker could not start: %s", message["failed"])
            self._watch.handle_start_failure()

    def _received(self, worker: _Worker, received: int, closed: int, missed: Sequence[int]) -> None:
        """Update a worker's connections from its report.

        The report has the numbers of connections received and closed since the start. Connections in `missed`
        found no free file descriptor in the worker and are passed on again.
        """
        again = []
        has_passed = worker.received < received
        while worker.received < received:
            # The channel keeps messages in order, so the oldest passed connection is the next one received.
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
        """Return the workers that are admitted and not stopping."""
        return [one for one in self._workers if one.served and not one.stopped]

    def _attentive(self) -> list[_Worker]:
        """Return the workers that may get connections.

        Silent workers still take part in changes to the served models.
        """
        return [one for one in self._at_work() if not one.is_silent]

    def _admit_all(self) -> None:
        """Admit every worker that is ready."""
        for worker in list(self._workers):
            self._admit(worker)

    def _admit(self, worker: _Worker) -> None:
        """Admit a worker that is ready, unless a change is under way."""
        if worker.ready is None or worker.served or self._broadcast.is_changing:
            return
        # A different generation means that a change was committed while the worker was loading its models.
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
        """Make a change that a worker's caller requests, and send the outcome to the worker."""
        error = None
        try:
            if "load" in what:
                await self._watch.load(what["load"], what["version"])
            else:
                await self._watch.unload(what["unload"])
        except RequestError as refusal:
            error = refusal.to_dict()
        except Exception:  # a caller waits for an answer in any case
            log.exception("a change could not be made")
            error = {"code": Internal.code, "message": "a change could not be made; the log says why"}
        with suppress(OSError):  # the worker has died meanwhile
            worker.tell(managed=request, error=error)

    def _lost(self, worker: _Worker) -> None:
        """Handle the end of a worker's channel: the worker has died."""
        # The replacement is scheduled first, so that no error in the bookkeeping below can prevent it.
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
        """Replace a dead worker, or end with the last worker. Bookkeeping comes after that."""
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
        if self._begun.exception():  # `run` ends and kills the other workers
            return
        if self._stopping:
            self._check_over()
        else:
            self._spawn(self._replace(worker))
            log.error("worker %d %s; another takes its place", worker.process.pid, ended)
        with _logged("the metrics of worker %d are lost", worker.process.pid):
            if not self._stopping:
                self._metrics.process_metrics.worker_deaths[reason].inc()
            self._metrics.merge_dead_worker(worker.process.pid)

    async def _end_of(self, worker: _Worker) -> int:
        """Wait for the end of a worker's process and return its exit code.

        Kill the process if it takes too long.
        """
        limit = time.monotonic() + _PARTING
        while (code := worker.process.poll()) is None:
            if time.monotonic() > limit:
                log.error("worker %d does not end, and is killed", worker.process.pid)
                worker.kill()
                limit = time.monotonic() + _PARTING
            await asyncio.sleep(_POLL)
        return code

    async def _replace(self, worker: _Worker) -> None:
        """Start another worker, with as many attempts as needed."""
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
        """Update the metric of the workers that may get connections."""
        self._metrics.process_metrics.workers.set(len(self._attentive()))

    def _back_off(self, worker: _Worker) -> float:
        """Return the time in seconds before a worker is replaced."""
        if worker.served and time.monotonic() - worker.started > _STEADY:
            self._early_deaths = 0
            return 0.0
        first, longest = _BACK_OFF
        self._early_deaths += 1
        return float(min(longest, first * 2 ** min(self._early_deaths - 1, 16)))

    # --- connections ---

    def _pass(self, connection: socket.socket) -> None:
        """Pass a connection to the worker with the fewest connections.

        Keep it while no worker can take it.
        """
        for worker in sorted(self._attentive(), key=lambda one: one.load):
            if not worker.outbox.is_empty:  # it is busy, and earlier messages come first
                continue
            if worker.starved_until > time.monotonic():
                continue
            try:
                socket.send_fds(worker.end, [channel.CONNECTION], [connection.fileno()])
            except OSError:  # it is busy or has just died
                continue
            # Keep the connection open here until the worker reports it: another worker gets it if this one
            # dies.
            worker.passed.append(connection)
            return
        self._waiting.append(connection)
        self._listener.hold()
        self._loop.call_later(_RETRY, self._pass_waiting)

    def _pass_waiting(self) -> None:
        """Pass the connections that are waiting for a worker."""
        waiting, self._waiting = self._waiting, []
        for connection in waiting:
            self._pass(connection)
        if waiting and not self._waiting:
            self._listener.release()

    # --- the end ---

    def _signal(self, number: int) -> None:
        """Handle a signal: pass it to all workers and start the shutdown."""
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
        """Stop passing connections to a worker that stops.

        The last worker that stops also closes the port.
        """
        if not any(one.served and not one.stopped for one in self._workers if one is not worker):
            # Close the port before the stream ends: the last accepted connections can go to this worker.
            self._listener.close()
        worker.stopped = True
        with suppress(OSError):  # it has died
            worker.end.shutdown(socket.SHUT_WR)

    def _check_over(self) -> None:
        """End `run` when all processes have ended."""
        if not self._workers and not self._parting:
            self._over.set()

    def _kill(self) -> None:
        """Kill all remaining workers at once and wait for their end."""
        remaining = (*self._workers, *self._parting)
        for worker in remaining:
            worker.kill()
        for worker in remaining:
            worker.process.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task and keep a reference to it."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Log the exception of a failed task, because no other code waits for the task."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a task of the supervisor has failed", exc_info=error)


@contextmanager
def _logged(message: str, *values: object) -> Iterator[None]:
    """Log an exception that is raised inside, and continue, because the following code is more important."""
    try:
        yield
    except Exception:
        log.exception(message, *values)

"""The `make chaos` test: a service at half load under killed and stopped processes and misbehaving clients.

Runners, workers and explaining processes get SIGKILL and SIGSTOP. Versions are swapped, and a model is
unloaded and loaded. Clients leave while they send, wait or read, set deadlines, and send bad input, bombs and
the most expensive legal pictures. The service has 512 MB of memory for each worker. Then these properties
must hold:

* no answer is wrong: every client knows the right probabilities of its pictures, for each version;
* no answer is lost except in a killed process, and no answer comes after its limit;
* memory and open files return to their former values, and nothing is left behind;
* the service's counts equal the clients' counts, except for requests in a killed process.

All random choices come from one seed, which is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

from fovea.bench import explanations, gallery
from fovea.bench.caller import Answer, Broken, Connection, address_of, post
from fovea.bench.explanations import Ask, Leave, Question
from fovea.bench.gallery import SPELLINGS, Picture
from fovea.bench.groups import Group, limited
from fovea.bench.mixed import machine
from fovea.bench.processes import resident_bytes, running, settle, tree
from fovea.bench.swaps import Zoo
from fovea.bench.verdict import (
    AFTERMATH,
    RECOVERY,
    Counted,
    Fault,
    Faults,
    Record,
    Request,
    Rest,
    leaks,
    miscounts,
    trend,
)
from fovea.bench.workloads import CACHE, ROOT, BenchError

BATCH_TIMEOUT: Final = 10.0
"""FOVEA_BATCH_TIMEOUT, in seconds; a stopped runner is replaced during a run."""

TRIAL_SECONDS: Final = 5.0
"""FOVEA_TRIAL_SECONDS; a trial may take ten times as long, and so may the loading of a model."""

LIMIT: Final = BATCH_TIMEOUT + 10.0
"""Time limit for any answer without killed or stopped runners meanwhile, in seconds.

At half load an answer takes less than one second, but giants delay a runner, and the machine may be busy with
something else.
"""

GIANT_LIMIT: Final = 60.0
"""Time limit for an answer to a giant, in seconds; a giant may wait for other giants."""

EXPLAIN_LIMIT: Final = 90.0
"""Time limit for an explanation, in seconds; the service gives up a silent process after 60."""

CHANGE_LIMIT: Final = 2 * 10 * TRIAL_SECONDS + 10.0
"""Time limit for one load or unload, in seconds: a trial, and then all runners."""

GIVE_UP: Final = 20.0
"""Time after its limit at which a client gives up, in seconds."""

_TRIES: Final = 40
"""Number of tries for a change; a load takes some seconds, and a process is often killed meanwhile."""

CALLERS: Final = 16
"""Number of clients that send good pictures."""

PICTURES: Final = 240
"""Number of drawn pictures for all clients together."""

_ERA: Final = {1: 1.0, 2: 10.0}
"""Time for which an old version may still answer after a swap, in seconds, by number of workers.

Workers are informed one after the other, and a stopped worker is informed when it continues.
"""

_SAMPLE: Final = re.compile(r"^(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

_ROLES: Final = {
    "runner": b"fovea.service.runners.process ",
    "explainer": b"fovea.service.explain.process ",
    "worker": b"\0--worker\0",
}
"""Parts of command lines that identify the service's processes."""

_LAG: Final = 0.1
"""Delay of the test's own event loop from which it is taken into account, in seconds."""

_OUTAGE: Final = 60.0
"""Time for which no worker may answer after all were killed or stopped, in seconds.

A worker starts in three seconds on an idle machine, and its start may be interrupted by another kill.
"""

_FIRST_PART: Final = 0.25
"""Share of a leg after which the memory at rest is first read; by then, permanent allocations exist."""

_SCRAPE_SECONDS: Final = 2.0
_START_SECONDS: Final = 120.0
_QUIET_SECONDS: Final = 60.0
_END_SECONDS: Final = 40.0


Curve: TypeAlias = list[tuple[float, int]]
"""(time, memory in bytes) points."""


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    minutes: float
    workers: tuple[int, ...]
    load: float
    memory: int
    """Memory limit for each worker, in bytes; 0 for no limit."""
    seed: int
    settings: dict[str, str]
    gaps: dict[str, float]
    out: Path


@dataclass
class Result:
    """The results of one leg."""

    workers: int
    seconds: float = 0.0
    rate: float = 0.0
    """Planned requests per second of all good callers together."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Number of requests by kind and outcome."""
    longest: dict[str, float] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    excused: int = 0
    swaps: int = 0
    starved: int = 0
    """Number of changes that were refused for lack of memory."""
    timeline: list[tuple[float, str, float]] = field(default_factory=list)
    """(start in seconds since 1970, description, duration in seconds) of every fault."""
    rests: tuple[Rest, Rest] | None = None
    rise: str = ""
    peak: int | None = None
    memory: str = ""
    errors: dict[str, int] = field(default_factory=dict)
    """Number of error lines in the service's log, by message."""
    log: str = ""
    failed: list[str] = field(default_factory=list)


# --- the service's processes ---------------------------------------------------------------------


class Service:
    """The service as seen from outside."""

    def __init__(self, url: str, process: subprocess.Popen[str], group: Group | None) -> None:
        self.url = url
        self.pid = process.pid
        self.process = process
        self.group = group

    @property
    def is_alive(self) -> bool:
        """Flag for a first process that has not ended."""
        return self.process.poll() is None

    def pids(self, role: str) -> list[int]:
        """Return the service's processes of this role: `runner`, `worker` or `explainer`."""
        return [one for one in tree(self.pid) if one != self.pid and _ROLES[role] in _command(one)]

    def metrics(self, timeout: float = LIMIT) -> list[tuple[str, dict[str, str], float]]:
        """Return all samples as (name, labels, value).

        Raises `OSError`.
        """
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=timeout) as answer:  # noqa: S310 - ours
            text = answer.read().decode()
        return [
            (found["name"], dict(_LABEL.findall(found["labels"] or "")), float(found["value"]))
            for found in _SAMPLE.finditer(text)
        ]

    def gauge(self, name: str) -> float:
        """Return the sum of a metric's samples."""
        return sum(value for one, _, value in self.metrics() if one == name)

    def rest(self) -> Rest:
        """Return the current memory and open files."""
        files = 0
        for pid in tree(self.pid):
            with contextlib.suppress(OSError):
                files += len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return Rest(resident_bytes([self.pid]), self.main_bytes(), files)

    def main_bytes(self) -> int:
        """Return the resident memory of the first process, in bytes.

        Raises `OSError`.
        """
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # the process has just ended
        return b""


@contextmanager
def _held(service: Service, pid: int) -> Iterator[int | None]:
    """Yield a descriptor of one of the service's processes, or None if the process has ended.

    A process id alone could soon belong to another process (pidfd_open(2)).
    """
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        yield None
        return
    try:
        yield descriptor if pid in tree(service.pid) else None
    finally:
        os.close(descriptor)


def _signal(descriptor: int, number: signal.Signals) -> bool:
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    return True


def _has_ended(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


@contextmanager
def serve(root: Path, log: Path, group: Group | None, settings: dict[str, str]) -> Iterator[Service]:
    """Start the service on a free port.

    Raises `BenchError`.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    ours = {
        "FOVEA_MODELS": str(root),
        "FOVEA_PORT": "0",
        "FOVEA_DRAIN_GRACE": "0",
        "FOVEA_MANAGEMENT": "true",
        "FOVEA_WATCH": "0",
        "FOVEA_BATCH_TIMEOUT": str(BATCH_TIMEOUT),
        "FOVEA_TRIAL_SECONDS": str(TRIAL_SECONDS),
        "FOVEA_EXPLAIN_SECONDS": "2",
        "FOVEA_EXPLAIN_IDLE": "5",
        "FOVEA_LOG_FORMAT": "json",
    }
    command = [sys.executable, "-m", "fovea.service"]
    if group:
        command = group.command(command)
    with log.open("w") as file:
        pipes = {"stdout": subprocess.PIPE, "stderr": file}
        environment = {**inherited, **ours, **settings}
        with running(command, cwd=ROOT, env=environment, **pipes) as process:
            yield Service(_url(process, log), process, group)


def _url(process: subprocess.Popen[str], log: Path) -> str:
    alarm = threading.Timer(_START_SECONDS, process.kill)
    alarm.start()
    try:
        for line in process.stdout or ():
            if found := re.search(r"http://\S+", line):
                return found[0]
    finally:
        alarm.cancel()
    raise BenchError(f"the service did not start: {log.read_text()[-500:].strip()}")


class Odometer:
    """A record of the highest value of every counter, because old versions' series disappear."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self.failures = 0
        """Number of scrapes without an answer, which the service may have counted as clients that left."""

    def read(self, timeout: float) -> None:
        """Scrape the metrics.

        Raises `OSError`.
        """
        try:
            samples = self._service.metrics(timeout)
        except OSError:
            self.failures += 1
            raise
        for name, labels, value in samples:
            if name.endswith("_total"):
                key = name, tuple(sorted(labels.items()))
                self._values[key] = max(value, self._values.get(key, 0.0))

    def counted(self) -> Counted:
        """Return the service's counts so far."""
        requests: Counter[tuple[str, int]] = Counter()
        errors: Counter[str] = Counter()
        others: Counter[str] = Counter()
        for (name, pairs), value in self._values.items():
            labels = dict(pairs)
            if name == "fovea_requests_total":
                requests[labels["route"], int(labels["status"])] += int(value)
            elif name == "fovea_errors_total":
                errors[labels["reason"]] += int(value)
            else:
                others[name] += int(value)
        return Counted(requests, errors, others["fovea_images_total"], others["fovea_explanations_total"])


# --- served versions -----------------------------------------------------------------------------


class Served:
    """The versions of the model that may have answered at any time."""

    def __init__(self, version: str, era: float) -> None:
        """Start with one version; see `_ERA` for `era`."""
        self._eras = [_Era(version, 0.0)]
        self._era = era

    def begin(self, version: str) -> None:
        """Allow this version from now on, beside the earlier versions."""
        self._eras.append(_Era(version, time.monotonic()))

    def settle(self, version: str) -> None:
        """Allow only this version from now on."""
        for one in self._eras:
            if one.version != version:
                one.ended = min(one.ended, time.monotonic() + self._era)

    def between(self, start: float, end: float) -> frozenset[str]:
        """Return all versions that may have answered a request in this period."""
        return frozenset(one.version for one in self._eras if one.began <= end and one.ended >= start)


@dataclass
class _Era:
    """The period in which a version may have answered."""

    version: str
    began: float
    ended: float = float("inf")


# --- the clients ---------------------------------------------------------------------------------


class Clients:
    """All clients of one service, and all faults that are inflicted on it."""

    def __init__(
        self,
        service: Service,
        zoo: Zoo,
        pictures: Sequence[Picture],
        giants: Sequence[Picture],
        options: Options,
    ) -> None:
        self._service = service
        self._zoo = zoo
        self._pictures = pictures
        self._giants = giants
        self._options = options
        self._address = address_of(service.url)
        self._bombs = gallery.bombs(pictures[0].content)
        self._has_workers = bool(service.pids("worker"))
        self._runners = len(service.pids("runner"))
        self.record = Record()
        self.faults = Faults()
        self.served = Served("1", _ERA[2 if self._has_workers else 1])
        self.failed: list[str] = []
        self.swaps = 0
        self.rate = 0.0
        self._enough = asyncio.Event()
        self.starved = 0
        """Number of changes that were refused for lack of memory."""
        self.strays = 0
        """Number of probes without an answer."""
        self._stopped = False
        self._turn = 0
        self._lags: list[tuple[float, float]] = []

    def chance(self, name: str) -> random.Random:
        """Return the random generator of one actor."""
        return random.Random(f"{self._options.seed}/{self._has_workers}/{self._turn}/{name}")  # noqa: S311 - no secret

    # --- requests ---

    async def exchange(
        self, request: Request, content: bytes, read: Callable[[Answer, Request], str], held: list[Connection]
    ) -> Request:
        """Send a request and wait for its answer; count both; `held` keeps the connection for reuse."""
        sent = time.monotonic()
        request = replace(request, sent=sent)
        connection = held.pop() if held else None
        if connection:
            request = replace(request, idle=sent - connection.used)
        try:
            async with asyncio.timeout(request.limit + GIVE_UP):
                connection = connection or await Connection.open(self._address)
                await connection.send(content)
                answer = await connection.receive()
        except (Broken, TimeoutError) as error:
            if connection:
                connection.leave()
            reason = str(error) or f"no answer within {request.limit + GIVE_UP:.0f} s"
            return self._note(replace(request, ended=time.monotonic(), broken=reason))
        if connection.ends:
            connection.leave()
        else:
            held.append(connection)
        request = replace(request, ended=time.monotonic(), status=answer.status)
        if answer.status == 200:
            codes, said = _errors_inside(answer), read(answer, request)
            answered = 0 if said else request.images - len(codes)
            return self._note(replace(request, mistake=said, codes=codes, answered=answered))
        code, said = _code_of(answer)
        request = replace(request, text=answer.content[:300].decode(errors="replace").strip())
        return self._note(replace(request, codes=(code,), mistake=said))

    def _note(self, request: Request) -> Request:
        if not self._service.is_alive:  # a failure of its own; later requests add no information
            return request
        lag = sum(size for when, size in self._lags if request.sent <= when <= request.ended + size)
        self.record.add(request, lag)
        return request

    async def leave(self, request: Request, content: bytes, when: Leave, chance: random.Random) -> None:
        """Send a request, or a part of it, and leave."""
        request = replace(request, sent=time.monotonic(), left=True)
        try:
            connection = await Connection.open(self._address)
        except Broken:
            return  # it never became a request
        try:
            async with asyncio.timeout(request.limit):
                if when is Leave.SENDING:
                    start = content.index(b"\r\n\r\n") + 4
                    content = content[: start + int(chance.random() * (len(content) - start))]
                await connection.send(content)
                if when is Leave.READING:
                    await connection.begin()
                else:
                    await asyncio.sleep(chance.random() ** 3)
        except (Broken, TimeoutError):
            pass
        finally:
            connection.leave()
        self._note(replace(request, ended=time.monotonic()))

    # --- the actors ---

    async def run(self, seconds: float) -> None:
        """Run all actors for `seconds`, and return when every client has its answer."""
        self._turn += 1
        if self._stopped:
            return
        self._enough.clear()
        gaps = self._options.gaps
        actors: list[Coroutine[Any, Any, None]] = [self._heartbeat()]
        actors += [self._caller(number) for number in range(CALLERS)]
        actors += [self._leaver(number) for number in range(2)]
        actors += [self._bomber(), self._giant_caller()]
        actors += [self._probe()] if self._has_workers else []
        actors += [self._explained(number) for number in range(3)]
        actors += [self._swap(gaps["swap"]), self._unload(gaps["unload"])]
        for target in ("runner", "explainer", *(["worker"] if self._has_workers else [])):
            actors += [self._disturb(target, gaps[f"kill-{target}"], kills=True)]
            actors += [self._disturb(target, gaps[f"stop-{target}"], kills=False)]
        async with asyncio.TaskGroup() as group:
            for actor in actors:
                group.create_task(actor)
            await self._pause(seconds)
            self._enough.set()

    def stop(self) -> None:
        """Stop all actors early and permanently."""
        self._stopped = True
        self._enough.set()

    async def warm_up(self) -> None:
        """Measure the requests per second of the good callers without pauses; the load is a share of them."""
        for picture in self._giants:  # enough giants for every runner to allocate its permanent memory
            async with asyncio.TaskGroup() as group:
                for _ in range(2 * self._runners):
                    group.create_task(self._ask_giant(picture, []))
        await self._ask_explanation(self.chance("capacity"), Leave.NEVER)
        end = time.monotonic() + min(5.0, 10 * self._options.minutes)
        asked = [0] * CALLERS

        async def call(number: int) -> None:
            mine: list[Connection] = []
            dice = self.chance(f"capacity {number}")
            while time.monotonic() < end:
                await self._ask(dice, self._own(number), mine, calm=True)
                asked[number] += 1
            _close(mine)

        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(CALLERS):
                group.create_task(call(number))
        self.rate = self._options.load * sum(asked) / (time.monotonic() - started)

    async def _pause(self, seconds: float) -> bool:
        """Wait; return false if the run is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._enough.wait(), seconds)
        return not self._enough.is_set()

    async def _heartbeat(self) -> None:
        """Record delays of the test's own event loop, so that clients are not judged by them."""
        while not self._enough.is_set():
            before = time.monotonic()
            await asyncio.sleep(_LAG)
            if (lag := time.monotonic() - before - _LAG) > _LAG:
                self._lags.append((before, lag))

    def _own(self, number: int) -> Sequence[Picture]:
        """Return the pictures of one caller."""
        return self._pictures[number::CALLERS]

    async def _caller(self, number: int) -> None:
        """Send good pictures at the planned rate, one at a time."""
        chance, held = self.chance(f"caller {number}"), list[Connection]()
        due = time.monotonic()
        while await self._pause(due - time.monotonic()):
            await self._ask(chance, self._own(number), held)
            due = max(due + chance.expovariate(self.rate / CALLERS), time.monotonic() - 1.0)
        _close(held)

    async def _ask(
        self, chance: random.Random, own: Sequence[Picture], held: list[Connection], *, calm: bool = False
    ) -> None:
        request, content, read = self._classification(chance, own, calm=calm)
        await self.exchange(request, content, read, held)

    def _classification(
        self, chance: random.Random, own: Sequence[Picture], *, calm: bool
    ) -> tuple[Request, bytes, Callable[[Answer, Request], str]]:
        spelling = chance.choice(SPELLINGS)
        pictures = gallery.picks(chance, own, spelling.most)
        is_second = spelling.names_model and chance.random() < 0.3
        model = "second" if is_second else "swapped"
        body, headers = spelling.write(pictures, f"fovea{chance.getrandbits(64):x}")
        deadline = None
        if not calm and chance.random() < 0.15:
            deadline = 0.002 * 500 ** chance.random()
            headers = {**headers, "X-Deadline-Ms": f"{1000 * deadline:.3f}"}
        content = post(spelling.path.format(model=model), body, headers, spelling.method)
        request = Request(
            f"good, {spelling.name}" if deadline is None else "good, with a deadline",
            spelling.route,
            0.0,
            0.0,
            LIMIT if deadline is None else deadline,
            deadline=deadline,
            model="second" if is_second else "",
            images=len(pictures),
        )

        def read(answer: Answer, request: Request) -> str:
            served = frozenset({"1"}) if is_second else self.served.between(request.sent, request.ended)
            return gallery.mistake(spelling, pictures, answer.content, served)

        return request, content, read

    async def _leaver(self, number: int) -> None:
        chance = self.chance(f"leaver {number}")
        while await self._pause(chance.expovariate(2.0)):
            request, content, _ = self._classification(chance, self._own(number), calm=True)
            request = replace(request, kind="leaver", model="")
            await self.leave(request, content, chance.choice(list(Leave)[1:]), chance)

    async def _bomber(self) -> None:
        chance, held = self.chance("bomber"), list[Connection]()
        while await self._pause(chance.expovariate(1.5)):
            name, body, headers, status, code = chance.choice(self._bombs)
            allowed = frozenset({status, 503})
            request = Request(f"bad, {name}", "/v1/classify", 0.0, 0.0, LIMIT, allowed, images=0)
            content = post("/v1/classify", body, headers)
            answer = await self.exchange(request, content, lambda *_: "bad input was answered", held)
            if answer.status == status and answer.codes != (code,):
                self.failed.append(f"bad, {name}: the code is {answer.codes}, not {code}")
        _close(held)

    async def _giant_caller(self) -> None:
        chance, held = self.chance("giants"), list[Connection]()
        while await self._pause(chance.expovariate(1 / self._options.gaps["giant"])):
            await self._ask_giant(chance.choice(self._giants), held)
        _close(held)

    async def _ask_giant(self, picture: Picture, held: list[Connection]) -> None:
        """Send a giant, which may be refused, since limits exist for giants."""
        request = Request(f"giant, {picture.name}", SPELLINGS[0].route, 0.0, 0.0, GIANT_LIMIT,
                          frozenset({200, 413, 503}))  # fmt: skip
        headers = {"Content-Type": "application/octet-stream"}
        content = post(SPELLINGS[0].path, picture.content, headers)

        def read(answer: Answer, request: Request) -> str:
            served = self.served.between(request.sent, request.ended)
            return gallery.mistake(SPELLINGS[0], [picture], answer.content, served)

        await self.exchange(request, content, read, held)

    async def _explained(self, number: int) -> None:
        chance = self.chance(f"explained {number}")
        while await self._pause(chance.expovariate(0.7)):
            await self._ask_explanation(chance, chance.choices(list(Leave), [0.6, 0.2, 0.1, 0.1])[0])

    async def _ask_explanation(self, chance: random.Random, leave: Leave) -> None:
        deadline = 0.005 * 400 ** chance.random() if chance.random() < 0.3 else None
        question = Question(
            Ask.AUTO,
            (chance.randrange(256), chance.randrange(256), chance.randrange(256)),
            (chance.randint(8, 400), chance.randint(8, 400)),
            form=chance.choices(["json", "png", "lines"], [0.8, 0.1, 0.1])[0],
            samples=16 * chance.randint(1, 4),
            padding=round(100 * 10_000 ** chance.random()),
            deadline=deadline,
        )
        limit = EXPLAIN_LIMIT if deadline is None else deadline
        request = Request("explanation", "/v1/explain", 0.0, 0.0, limit, frozenset({200, 503}),
                          deadline=deadline, explains=True)  # fmt: skip
        content = question.request("")
        if leave is not Leave.NEVER:
            await self.leave(replace(request, kind="explanation, leaves"), content, leave, chance)
            return

        def read(answer: Answer, request: Request) -> str:
            if _errors_inside(answer):  # the code decides whether that is allowed
                return ""
            return explanations.mistake(question, answer, request.seconds, {})

        await self.exchange(request, content, read, [])

    # --- faults ---

    async def _disturb(self, target: str, gap: float, *, kills: bool) -> None:
        """Kill or stop one of the service's processes repeatedly, about every `gap` seconds."""
        chance = self.chance(f"{target} {kills}")
        while await self._pause(chance.uniform(0.5, 1.5) * gap):
            pids = self._service.pids(target)
            if not pids:
                continue
            with _held(self._service, chance.choice(pids)) as descriptor:
                if descriptor is None:
                    continue
                if kills:
                    now = time.monotonic()
                    self.faults.add(Fault(target, "killed", now, now + AFTERMATH))
                    _signal(descriptor, signal.SIGKILL)
                else:
                    await self._stop(descriptor, target, chance.uniform(0.3, 1.6 * BATCH_TIMEOUT))

    async def _probe(self) -> None:
        """Ask repeatedly whether any worker answers.

        After a kill, no worker may answer until another has started. Callers must wait for that long, but not
        longer than `_OUTAGE`.
        """
        outage: Fault | None = None
        while await self._pause(0.5):
            began = time.monotonic()
            if await self._is_live():
                if outage:
                    outage.ended = time.monotonic() + AFTERMATH
                outage = None
            elif outage is None:
                if not self.faults.during(began - RECOVERY, began, "worker"):
                    self.failed.append("nobody answers /health/live, and no worker was killed or stopped")
                outage = self.faults.add(Fault("worker", "outage", began - 0.5))
            elif began - outage.began > _OUTAGE:
                self.failed.append(f"nobody has answered /health/live for {_OUTAGE:g} s")
                return
        if outage:
            outage.ended = time.monotonic() + RECOVERY

    async def _is_live(self) -> bool:
        connection: Connection | None = None
        try:
            async with asyncio.timeout(1.0):
                connection = await Connection.open(self._address)
                await connection.send(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                return (await connection.receive()).status == 200
        except (Broken, TimeoutError):
            self.strays += 1
            return False
        finally:
            if connection:
                connection.leave()

    async def _stop(self, descriptor: int, target: str, seconds: float) -> None:
        """Stop a process, and continue it after `seconds` unless it was killed meanwhile."""
        fault = self.faults.add(Fault(target, "stopped", time.monotonic()))
        try:
            _signal(descriptor, signal.SIGSTOP)
            end = time.monotonic() + seconds
            while time.monotonic() < end and not _has_ended(descriptor) and not self._enough.is_set():
                await asyncio.sleep(0.05)
        finally:
            _signal(descriptor, signal.SIGCONT)
            fault.ended = time.monotonic() + AFTERMATH

    async def _swap(self, gap: float) -> None:
        chance = self.chance("swap")
        while await self._pause(chance.uniform(0.5, 1.5) * gap):
            version = self._zoo.publish_next()
            self.served.begin(version)
            if await self._change("swapped", "load"):
                self.swaps += 1
                self.served.settle(version)

    async def _unload(self, gap: float) -> None:
        chance = self.chance("unload")
        while await self._pause(chance.uniform(0.5, 1.5) * gap):
            fault = self.faults.add(Fault("second", "unloaded", time.monotonic()))
            await self._change("second", "unload")
            await self._pause(chance.uniform(0.1, 2.0))
            if await self._change("second", "load"):
                fault.ended = time.monotonic() + _ERA[2 if self._has_workers else 1]

    async def _change(self, model: str, what: str) -> bool:
        """Load or unload a model; try again if processes die meanwhile."""
        tries = 0
        while tries < _TRIES:
            began = time.monotonic()
            status, said = await self._manage(model, what)
            now = time.monotonic()
            if status == 200 or (status == 404 and what == "unload"):
                return True
            if not self._service.is_alive:
                return False
            if status == 409 and self._options.memory and "memory" in said:
                self.starved += 1  # a trial without room is postponed, and the answer says so
                if not await self._pause(2.0):
                    return False
                continue
            if not self.faults.during(began - AFTERMATH, now, "runner", "worker"):
                self.failed.append(f"{what} {model}: {status} {said}, and no process was killed meanwhile")
                return False
            tries += 1
            await asyncio.sleep(0.5)
        self.failed.append(f"{what} {model}: {said}, {_TRIES} times")
        return False

    async def _manage(self, model: str, what: str) -> tuple[int, str]:
        route = f"/v2/repository/models/{{name}}/{what}"
        request = Request(what, route, 0.0, 0.0, CHANGE_LIMIT, frozenset({200, 404, 409, 500, 503}), images=0)
        content = post(route.format(name=model), b"{}", {"Content-Type": "application/json"})
        held: list[Connection] = []

        def read(answer: Answer, _: Request) -> str:
            return "" if answer.content.startswith(b"[") else f"{answer.content[:100]!r}"

        request = await self.exchange(request, content, read, held)
        _close(held)
        return request.status, request.broken or request.text


def _close(held: list[Connection]) -> None:
    for connection in held:
        connection.leave()


def _code_of(answer: Answer) -> tuple[str, str]:
    """Return an error's code in any protocol, and a complaint about an answer without one."""
    try:
        content = json.loads(answer.content)
        inner = content.get("error")
        found = inner.get("code") if isinstance(inner, dict) else content.get("reason") or content.get("code")
    except (ValueError, AttributeError):
        found = None
    if isinstance(found, str):
        return found, ""
    return "", f"an error {answer.status} without a code: {answer.content[:200]!r}"


def _errors_inside(answer: Answer) -> tuple[str, ...]:
    """Return the codes of errors in an answer 200: of single images, or of the last started line."""
    with contextlib.suppress(ValueError):
        if answer.media_type.endswith("ndjson"):
            lines = [json.loads(line) for line in answer.content.splitlines()[-1:]]
            return tuple(line["error"]["code"] for line in lines if "error" in line)
        if answer.media_type.endswith("json") and isinstance(content := json.loads(answer.content), dict):
            results = content.get("results", ())
            return tuple(one["error"]["code"] for one in results if "error" in one)
    return ()


# --- one leg -------------------------------------------------------------------------------------


def leg(
    workers: int, seconds: float, pictures: Sequence[Picture], giants: Sequence[Picture], options: Options
) -> Result:
    """Disturb one service for `seconds`, and judge it."""
    result = Result(workers, seconds)
    folder = Path(tempfile.mkdtemp(prefix="fovea-chaos-"))
    log = folder / "service.log"
    result.log = str(log)
    settings = {"FOVEA_WORKERS": str(workers), **options.settings}
    memory = options.memory * workers
    with limited(memory) if memory else contextlib.nullcontext() as group:
        result.memory = _limit_in_words(group, memory)
        zoo = Zoo(folder, "swapped", "second")
        (zoo.root / "default").write_text("swapped\n")
        with serve(zoo.root, log, group, settings) as service:
            clients = Clients(service, zoo, pictures, giants, options)
            _disturb(service, clients, seconds, memory, result)
            left = tree(service.pid)[1:]
            _end(service, left, result)
        if group:
            result.peak = group.peak
            if group.kills:
                result.failed.append(f"memory: the kernel has killed {group.kills} processes")
    result.errors = _errors(log)
    return result


def _limit_in_words(group: Group | None, size: int) -> str:
    if not size:
        return "no memory limit"
    if group:
        return f"memory limit {size >> 20} MB, by a control group"
    return f"memory watched against {size >> 20} MB: no control group can be made here"


def _disturb(service: Service, clients: Clients, seconds: float, memory: int, result: Result) -> None:
    odometer = Odometer(service)
    odometer.read(LIMIT)
    before = odometer.counted()
    runners = service.gauge("fovea_runners")
    curves: tuple[Curve, Curve] = ([], [])
    highest: list[int] = []
    rests: list[Rest] = []

    async def work() -> None:
        enough = asyncio.Event()
        watching = asyncio.create_task(_watch(service, clients, odometer, curves, enough))
        try:
            await clients.warm_up()
            for part in (_FIRST_PART, 1 - _FIRST_PART):
                highest.append(max((size for _, size in curves[0]), default=0))
                for curve in curves:
                    curve.clear()
                await clients.run(part * seconds)
                result.failed += await asyncio.to_thread(_quiet, service, runners)
                rests.append(await asyncio.to_thread(_rest, service))
        except OSError:  # of a process that has ended
            if service.is_alive:
                raise
        finally:
            enough.set()
            await watching

    asyncio.run(work())
    record = clients.record
    result.rate = clients.rate
    result.swaps = clients.swaps
    result.starved = clients.starved
    now = time.monotonic()
    epoch = time.time() - now
    result.timeline = [
        (round(epoch + one.began, 3), f"{one.target} {one.what}", round(min(one.ended, now) - one.began, 3))
        for one in clients.faults
    ]
    result.kinds = {f"{kind}: {outcome}": number for (kind, outcome), number in sorted(record.kinds.items())}
    result.longest = record.longest
    result.faults = dict(clients.faults.counts)
    result.excused = record.excused
    result.rise = f"{trend(curves[0])}, of the first process {trend(curves[1])}"
    record.find_doubtful(clients.faults)
    result.failed += record.complaints(clients.faults) + clients.failed
    if service.is_alive:
        odometer.read(LIMIT)
        result.failed += miscounts(
            record, _since(odometer.counted(), before), strays=odometer.failures + clients.strays
        )
        result.rests = rests[0], rests[1]
        result.failed += leaks(*result.rests, *curves)
    if not service.group:
        result.peak = max(*highest, *(size for _, size in curves[0]), 0)
        if memory and result.peak > memory:
            result.failed.append(f"memory: {result.peak / 1e6:.0f} MB; at most {memory / 1e6:.0f} MB")


async def _watch(
    service: Service,
    clients: Clients,
    odometer: Odometer,
    curves: tuple[Curve, Curve],
    enough: asyncio.Event,
) -> None:
    """Read the memory of all processes and the counters every second; stop if the service has died."""
    while not enough.is_set():
        if not service.is_alive:
            clients.failed.append(f"the service has died: exit code {service.process.poll()}")
            clients.stop()
            return
        size = await asyncio.to_thread(resident_bytes, [service.pid])
        curves[0].append((time.monotonic(), size))
        with contextlib.suppress(OSError):  # the process has just ended
            curves[1].append((time.monotonic(), service.main_bytes()))
        with contextlib.suppress(OSError):  # the scrape reached a stopped or killed worker
            await asyncio.to_thread(odometer.read, _SCRAPE_SECONDS)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(enough.wait(), 1.0)


def _rest(service: Service) -> Rest:
    """Return the service at rest, without explaining processes."""
    end = time.monotonic() + _QUIET_SECONDS
    while service.pids("explainer") and time.monotonic() < end:
        time.sleep(0.1)
    settle([service.pid])
    return service.rest()


def _quiet(service: Service, runners: float) -> list[str]:
    """Wait until nothing is in flight and all runners are there; return the unmet conditions."""
    wanted = {
        "fovea_images_in_flight": 0.0,
        "fovea_queue_images": 0.0,
        "fovea_requests_in_flight": 1.0,  # the scrape itself
        "fovea_runners": runners,
    }
    end = time.monotonic() + _QUIET_SECONDS
    while True:
        try:
            values = {name: service.gauge(name) for name in wanted}
        except OSError as error:
            values = {"metrics": 0.0}
            if time.monotonic() > end:
                return [f"left behind: the metrics cannot be read: {error}"]
        if values == wanted or not service.is_alive:
            return []
        if time.monotonic() > end:
            return [f"left behind: {name} is {value:g}, not {wanted[name]:g}"
                    for name, value in values.items() if value != wanted[name]]  # fmt: skip
        time.sleep(0.2)


def _end(service: Service, pids: Sequence[int], result: Result) -> None:
    """End the service as an orchestrator does, and check that nothing is left of it."""
    if not service.is_alive:
        return
    with contextlib.ExitStack() as stack:
        held = {pid: stack.enter_context(_held(service, pid)) for pid in pids}
        started = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        try:
            code = service.process.wait(_END_SECONDS)
            if code:
                result.failed.append(f"the end: exit code {code} after {time.monotonic() - started:.1f} s")
        except subprocess.TimeoutExpired:
            result.failed.append(f"the end: it is still there {_END_SECONDS:g} s after SIGTERM")
            return
        end = time.monotonic() + AFTERMATH + BATCH_TIMEOUT
        alive = [(pid, one) for pid, one in held.items() if one is not None]
        while time.monotonic() < end and (alive := [pair for pair in alive if not _has_ended(pair[1])]):
            time.sleep(0.05)
        for pid, descriptor in alive:
            result.failed.append(f"the end: process {pid} has outlived the service: {_command(pid)[:120]!r}")
            _signal(descriptor, signal.SIGKILL)


def _since(after: Counted, before: Counted) -> Counted:
    """Return the counts between two readings."""
    requests = {key: number - before.requests.get(key, 0) for key, number in after.requests.items()}
    errors = {key: number - before.errors.get(key, 0) for key, number in after.errors.items()}
    return Counted(requests, errors, after.images - before.images, after.explanations - before.explanations)


def _errors(log: Path) -> dict[str, int]:
    """Count the service's log messages at level error, without numbers."""
    told: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            told[f"not JSON: {line[:100]}"] += 1
            continue
        if entry.get("level") in ("error", "critical"):
            told[re.sub(r"\d+", "N", str(entry.get("event", "")))[:110]] += 1
    return dict(told.most_common(12))


# --- the command ---------------------------------------------------------------------------------

GAPS: Final = {
    "kill-runner": 12.0,
    "stop-runner": 20.0,
    "kill-worker": 30.0,
    "stop-worker": 40.0,
    "kill-explainer": 10.0,
    "stop-explainer": 15.0,
    "swap": 10.0,
    "unload": 12.0,
    "giant": 4.0,
}
"""Average time between two events of each kind, in seconds."""


def main() -> int:
    """Run the test, print a table, and write JSON; return 1 if a property does not hold."""
    options = _arguments()
    print(f"seed {options.seed}, {options.minutes:g} minutes, workers {options.workers}", flush=True)
    try:
        pictures, giants = _known_pictures(options.seed)
        print(f"{len(pictures)} pictures and {len(giants)} giants, whose answers are known", flush=True)
        seconds = 60 * options.minutes / len(options.workers)
        results = []
        for workers in options.workers:
            results.append(leg(workers, seconds, pictures, giants, options))
            _show(results[-1])
    except BenchError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(), "seed": options.seed, "legs": [asdict(one) for one in results]}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{machine()}; {options.out} has all of it.")
    failed = any(one.failed for one in results)
    if failed:
        print(f"The same dice again: --seed {options.seed}")
    return int(failed)


def _arguments() -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m fovea.bench.chaos", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="of all legs together (default: 20)")
    parser.add_argument("--workers", type=_numbers, default=(1, 2), metavar="N,M",
                        help="a leg for each of these numbers of workers (default: 1,2)")  # fmt: skip
    parser.add_argument("--load", type=float, default=0.5, help="part of the capacity (default: 0.5)")
    parser.add_argument("--memory", type=int, default=512, metavar="MB",
                        help="memory limit for each worker; 0: none (default: 512)")  # fmt: skip
    parser.add_argument("--seed", type=int, help="of all that is random; chosen and printed without one")
    parser.add_argument("--set", type=_pair, action="append", default=[], metavar="NAME=VALUE",
                        help="a setting, or another environment variable, of the service")  # fmt: skip
    parser.add_argument("--gap", type=_pair, action="append", default=[], metavar="NAME=SECONDS",
                        help=f"seconds between two of: {', '.join(GAPS)}")  # fmt: skip
    parser.add_argument("--out", type=Path, default=CACHE / "chaos.json")
    given = parser.parse_args()
    gaps = {**GAPS, **{name: float(value) for name, value in given.gap}}
    if unknown := sorted(gaps.keys() - GAPS.keys()):
        parser.error(f"--gap: there is no {unknown[0]}; there are {', '.join(GAPS)}")
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    return Options(
        given.minutes, given.workers, given.load, given.memory << 20, seed, dict(given.set), gaps, given.out
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(one) for one in text.split(","))


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def _known_pictures(seed: int) -> tuple[list[Picture], list[Picture]]:
    """Draw the pictures, and learn their answers from an undisturbed service.

    Raises `BenchError`.
    """
    pictures, giants = gallery.draw(PICTURES, seed), gallery.giants()
    with tempfile.TemporaryDirectory(prefix="fovea-calm-") as folder:
        zoo = Zoo(Path(folder), "swapped")
        versions = ["1", zoo.publish_next()]
        (zoo.root / "swapped" / "config.toml").write_text(f"versions = {json.dumps(versions)}\n")
        with serve(zoo.root, Path(folder) / "log", None, {}) as service:
            gallery.ask_calmly(service.url, "swapped", versions, [*pictures, *giants])
    known = gallery.distinct(pictures)
    if len(known) < 4 * CALLERS:
        raise BenchError(f"only {len(known)} of {len(pictures)} pictures have answers of their own")
    return known, giants


def _not_shown(result: Result) -> list[str]:
    """Return the events that never happened; under a memory limit they may always be refused."""
    missing = {
        "no version was swapped": not result.swaps,
        "no explanation was answered": not result.kinds.get("explanation: 200"),
        "no giant was answered": not any(
            kind.startswith("giant") and kind.endswith(": 200") for kind in result.kinds
        ),
    }
    return [name for name, is_missing in missing.items() if is_missing]


def _show(result: Result) -> None:
    print(f"\n{result.workers} workers, {result.seconds:.0f} s, {result.rate:.0f} requests/s planned of good "
          f"callers, {result.memory}")  # fmt: skip
    print("\n| requests | times |\n|---|---|")
    for name, number in result.kinds.items():
        print(f"| {name} | {number} |")
    print("\n| kind | longest, s |\n|---|---|")
    for name, seconds in sorted(result.longest.items()):
        print(f"| {name} | {seconds:.2f} |")
    faults = ", ".join(f"{number} x {name}" for name, number in sorted(result.faults.items()))
    print(
        f"\n{faults}; {result.swaps} swaps, {result.starved} changes "
        f"put off for want of memory. {result.excused} requests needed an excuse."
    )
    if result.rests:
        before, after = result.rests
        for when, rest in (("before", before), ("after", after)):
            print(f"At rest {when}: {rest.resident_bytes / 1e6:.0f} MB, the first process "
                  f"{rest.main_bytes / 1e6:.0f} MB, {rest.open_files} open files.")  # fmt: skip
        print(f"Under load the trend is {result.rise}; peak {(result.peak or 0) / 1e6:.0f} MB.")
    if result.errors:
        print("\nErrors in the service's log:")
        for said, number in result.errors.items():
            print(f"  {number} x {said}")
    for name in _not_shown(result):
        print(f"\nNOT SHOWN: {name} in this leg; give the service more memory (--memory) or more time")
    print("\n" + ("\n".join(f"FAILED {one}" for one in result.failed) or "All properties hold."))
    if result.failed:
        print(f"The service's log is {result.log}")


if __name__ == "__main__":
    sys.exit(main())

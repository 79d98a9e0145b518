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

from fovea.bench import gallery, questions
from fovea.bench.caller import BrokenConnection, Connection, Response, build_request, parse_address
from fovea.bench.gallery import REQUEST_FORMATS, Picture
from fovea.bench.groups import ControlGroup, create_limited_group
from fovea.bench.mixed import describe_machine
from fovea.bench.processes import (
    find_process_tree,
    measure_resident_bytes,
    read_command_line,
    start_process,
    wait_until_idle,
)
from fovea.bench.questions import LeaveMoment, Question, QuestionKind
from fovea.bench.swaps import BenchRepository
from fovea.bench.verdict import (
    NOTICE_SECONDS,
    RECOVERY_SECONDS,
    ClientRequest,
    Fault,
    FaultLog,
    IdleState,
    RequestLog,
    ServiceCounts,
    find_leaks,
    find_miscounts,
    fit_trend,
)
from fovea.bench.workloads import CACHE, ROOT, BenchError

BATCH_TIMEOUT: Final = 10.0
"""FOVEA_BATCH_TIMEOUT, in seconds; a stopped runner is replaced during a run."""

TRIAL_SECONDS: Final = 5.0
"""FOVEA_TRIAL_SECONDS; a trial may take ten times as long, and so may the loading of a model."""

ANSWER_LIMIT: Final = BATCH_TIMEOUT + 10.0
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

GIVE_UP_SECONDS: Final = 20.0
"""Time after its limit at which a client gives up, in seconds."""

_MAX_TRIES: Final = 40
"""Number of tries for a change; a load takes some seconds, and a process is often killed meanwhile."""

CALLER_COUNT: Final = 16
"""Number of clients that send good pictures."""

PICTURE_COUNT: Final = 240
"""Number of drawn pictures for all clients together."""

_OVERLAP_SECONDS: Final = {1: 1.0, 2: 10.0}
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

_LAG_SECONDS: Final = 0.1
"""Delay of the test's own event loop from which it is taken into account, in seconds."""

_MAX_OUTAGE: Final = 60.0
"""Time for which no worker may answer after all were killed or stopped, in seconds.

A worker starts in three seconds on an idle machine, and its start may be interrupted by another kill.
"""

_FIRST_PART: Final = 0.25
"""Share of a leg after which the memory at rest is first read; by then, permanent allocations exist."""

_SCRAPE_SECONDS: Final = 2.0
_START_SECONDS: Final = 120.0
_QUIET_SECONDS: Final = 60.0
_END_SECONDS: Final = 40.0


MemoryCurve: TypeAlias = list[tuple[float, int]]
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
class LegResult:
    """The results of one leg."""

    workers: int
    seconds: float = 0.0
    rate: float = 0.0
    """Planned requests per second of all good callers together."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Number of requests by kind and outcome."""
    longest: dict[str, float] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    excused_requests: int = 0
    swaps: int = 0
    memory_refusals: int = 0
    """Number of changes that were refused for lack of memory."""
    timeline: list[tuple[float, str, float]] = field(default_factory=list)
    """(start in seconds since 1970, description, duration in seconds) of every fault."""
    idle_states: tuple[IdleState, IdleState] | None = None
    rise: str = ""
    peak: int | None = None
    memory: str = ""
    errors: dict[str, int] = field(default_factory=dict)
    """Number of error lines in the service's log, by message."""
    log: str = ""
    failures: list[str] = field(default_factory=list)


# --- the service's processes ---------------------------------------------------------------------


class Service:
    """The service as seen from outside."""

    def __init__(self, url: str, process: subprocess.Popen[str], group: ControlGroup | None) -> None:
        self.url = url
        self.pid = process.pid
        self.process = process
        self.group = group

    @property
    def is_alive(self) -> bool:
        """Flag for a first process that has not ended."""
        return self.process.poll() is None

    def find_pids(self, role: str) -> list[int]:
        """Return the service's processes of this role: `runner`, `worker` or `explainer`."""
        return [
            one
            for one in find_process_tree(self.pid)
            if one != self.pid and _ROLES[role] in read_command_line(one)
        ]

    def scrape_metrics(self, timeout: float = ANSWER_LIMIT) -> list[tuple[str, dict[str, str], float]]:
        """Return all samples as (name, labels, value).

        Raises `OSError`.
        """
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=timeout) as response:  # noqa: S310 - ours
            text = response.read().decode()
        return [
            (
                sample_match["name"],
                dict(_LABEL.findall(sample_match["labels"] or "")),
                float(sample_match["value"]),
            )
            for sample_match in _SAMPLE.finditer(text)
        ]

    def read_gauge(self, name: str) -> float:
        """Return the sum of a metric's samples."""
        return sum(value for one, _, value in self.scrape_metrics() if one == name)

    def measure_idle_state(self) -> IdleState:
        """Return the current memory and open files."""
        files = 0
        for pid in find_process_tree(self.pid):
            with contextlib.suppress(OSError):
                files += len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return IdleState(measure_resident_bytes([self.pid]), self.measure_main_bytes(), files)

    def measure_main_bytes(self) -> int:
        """Return the resident memory of the first process, in bytes.

        Raises `OSError`.
        """
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _open_process(service: Service, pid: int) -> Iterator[int | None]:
    """Yield a descriptor of one of the service's processes, or None if the process has ended.

    A process id alone could soon belong to another process (pidfd_open(2)).
    """
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        yield None
        return
    try:
        yield descriptor if pid in find_process_tree(service.pid) else None
    finally:
        os.close(descriptor)


def _send_signal(descriptor: int, number: signal.Signals) -> bool:
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    return True


def _has_ended(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


@contextmanager
def start_service(
    root: Path, log: Path, group: ControlGroup | None, settings: dict[str, str]
) -> Iterator[Service]:
    """Start the service on a free port.

    Raises `BenchError`.
    """
    base_environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    base_settings = {
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
        command = group.wrap_command(command)
    with log.open("w") as file:
        pipes = {"stdout": subprocess.PIPE, "stderr": file}
        environment = {**base_environment, **base_settings, **settings}
        with start_process(command, cwd=ROOT, env=environment, **pipes) as process:
            yield Service(_read_url(process, log), process, group)


def _read_url(process: subprocess.Popen[str], log: Path) -> str:
    kill_timer = threading.Timer(_START_SECONDS, process.kill)
    kill_timer.start()
    try:
        for line in process.stdout or ():
            if address_match := re.search(r"http://\S+", line):
                return address_match[0]
    finally:
        kill_timer.cancel()
    raise BenchError(f"the service did not start: {log.read_text()[-500:].strip()}")


class CounterRecorder:
    """A record of the highest value of every counter, because old versions' series disappear."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self.scrape_failures = 0
        """Number of scrapes without an answer, which the service may have counted as clients that left."""

    def scrape(self, timeout: float) -> None:
        """Scrape the metrics.

        Raises `OSError`.
        """
        try:
            samples = self._service.scrape_metrics(timeout)
        except OSError:
            self.scrape_failures += 1
            raise
        for name, labels, value in samples:
            if name.endswith("_total"):
                key = name, tuple(sorted(labels.items()))
                self._values[key] = max(value, self._values.get(key, 0.0))

    def get_counts(self) -> ServiceCounts:
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
        return ServiceCounts(
            requests, errors, others["fovea_images_total"], others["fovea_explanations_total"]
        )


# --- served versions -----------------------------------------------------------------------------


class ServedVersions:
    """The versions of the model that may have answered at any time."""

    def __init__(self, version: str, overlap_seconds: float) -> None:
        """Start with one version; see `_OVERLAP_SECONDS` for `overlap_seconds`."""
        self._periods = [_VersionPeriod(version, 0.0)]
        self._overlap_seconds = overlap_seconds

    def add_version(self, version: str) -> None:
        """Allow this version from now on, beside the earlier versions."""
        self._periods.append(_VersionPeriod(version, time.monotonic()))

    def keep_only(self, version: str) -> None:
        """Allow only this version from now on."""
        for one in self._periods:
            if one.version != version:
                one.ended_at = min(one.ended_at, time.monotonic() + self._overlap_seconds)

    def versions_between(self, start: float, end: float) -> frozenset[str]:
        """Return all versions that may have answered a request in this period."""
        return frozenset(
            one.version for one in self._periods if one.began_at <= end and one.ended_at >= start
        )


@dataclass
class _VersionPeriod:
    """The period in which a version may have answered."""

    version: str
    began_at: float
    ended_at: float = float("inf")


# --- the clients ---------------------------------------------------------------------------------


class ChaosClients:
    """All clients of one service, and all faults that are inflicted on it."""

    def __init__(
        self,
        service: Service,
        repository: BenchRepository,
        pictures: Sequence[Picture],
        giants: Sequence[Picture],
        options: Options,
    ) -> None:
        self._service = service
        self._repository = repository
        self._pictures = pictures
        self._giants = giants
        self._options = options
        self._address = parse_address(service.url)
        self._bombs = gallery.build_bombs(pictures[0].content)
        self._has_workers = bool(service.find_pids("worker"))
        self._runners = len(service.find_pids("runner"))
        self.request_log = RequestLog()
        self.faults = FaultLog()
        self.versions = ServedVersions("1", _OVERLAP_SECONDS[2 if self._has_workers else 1])
        self.failures: list[str] = []
        self.swaps = 0
        self.rate = 0.0
        self._stop_event = asyncio.Event()
        self.memory_refusals = 0
        """Number of changes that were refused for lack of memory."""
        self.stray_count = 0
        """Number of probes without an answer."""
        self._is_stopped = False
        self._run_count = 0
        self._lags: list[tuple[float, float]] = []

    def make_generator(self, name: str) -> random.Random:
        """Return the random generator of one actor."""
        return random.Random(f"{self._options.seed}/{self._has_workers}/{self._run_count}/{name}")  # noqa: S311 - no secret

    # --- requests ---

    async def send_request(
        self,
        request: ClientRequest,
        content: bytes,
        check_response: Callable[[Response, ClientRequest], str],
        connections: list[Connection],
    ) -> ClientRequest:
        """Send a request, wait for its answer, and count both.

        `connections` keeps the connection for the next request.
        """
        sent_at = time.monotonic()
        request = replace(request, sent_at=sent_at)
        connection = connections.pop() if connections else None
        if connection:
            request = replace(request, idle_seconds=sent_at - connection.last_used_at)
        try:
            async with asyncio.timeout(request.limit + GIVE_UP_SECONDS):
                connection = connection or await Connection.open(self._address)
                await connection.send(content)
                response = await connection.receive()
        except (BrokenConnection, TimeoutError) as error:
            if connection:
                connection.abort()
            reason = str(error) or f"no answer within {request.limit + GIVE_UP_SECONDS:.0f} s"
            return self._record_request(replace(request, ended_at=time.monotonic(), failure_reason=reason))
        if connection.is_closing:
            connection.abort()
        else:
            connections.append(connection)
        request = replace(request, ended_at=time.monotonic(), status=response.status)
        if response.status == 200:
            codes, mistake = _find_error_codes(response), check_response(response, request)
            answer_count = 0 if mistake else request.images - len(codes)
            return self._record_request(
                replace(request, mistake=mistake, codes=codes, answer_count=answer_count)
            )
        code, mistake = _parse_error_code(response)
        request = replace(request, text=response.content[:300].decode(errors="replace").strip())
        return self._record_request(replace(request, codes=(code,), mistake=mistake))

    def _record_request(self, request: ClientRequest) -> ClientRequest:
        if not self._service.is_alive:  # a failure of its own; later requests add no information
            return request
        lag = sum(
            size for lag_start, size in self._lags if request.sent_at <= lag_start <= request.ended_at + size
        )
        self.request_log.add(request, lag)
        return request

    async def send_and_leave(
        self, request: ClientRequest, content: bytes, moment: LeaveMoment, generator: random.Random
    ) -> None:
        """Send a request, or a part of it, and leave."""
        request = replace(request, sent_at=time.monotonic(), has_left=True)
        try:
            connection = await Connection.open(self._address)
        except BrokenConnection:
            return  # it never became a request
        try:
            async with asyncio.timeout(request.limit):
                if moment is LeaveMoment.SENDING:
                    start = content.index(b"\r\n\r\n") + 4
                    content = content[: start + int(generator.random() * (len(content) - start))]
                await connection.send(content)
                if moment is LeaveMoment.READING:
                    await connection.read_start()
                else:
                    await asyncio.sleep(generator.random() ** 3)
        except (BrokenConnection, TimeoutError):
            pass
        finally:
            connection.abort()
        self._record_request(replace(request, ended_at=time.monotonic()))

    # --- the actors ---

    async def run(self, seconds: float) -> None:
        """Run all actors for `seconds`, and return when every client has its answer."""
        self._run_count += 1
        if self._is_stopped:
            return
        self._stop_event.clear()
        gaps = self._options.gaps
        actors: list[Coroutine[Any, Any, None]] = [self._measure_lag()]
        actors += [self._run_caller(number) for number in range(CALLER_COUNT)]
        actors += [self._run_leaver(number) for number in range(2)]
        actors += [self._run_bomber(), self._run_giant_caller()]
        actors += [self._probe_workers()] if self._has_workers else []
        actors += [self._run_explanation_client(number) for number in range(3)]
        actors += [self._swap_versions(gaps["swap"]), self._unload_and_load(gaps["unload"])]
        for target in ("runner", "explainer", *(["worker"] if self._has_workers else [])):
            actors += [self._inject_faults(target, gaps[f"kill-{target}"], is_kill=True)]
            actors += [self._inject_faults(target, gaps[f"stop-{target}"], is_kill=False)]
        async with asyncio.TaskGroup() as group:
            for actor in actors:
                group.create_task(actor)
            await self._pause(seconds)
            self._stop_event.set()

    def stop(self) -> None:
        """Stop all actors early and permanently."""
        self._is_stopped = True
        self._stop_event.set()

    async def measure_capacity(self) -> None:
        """Measure the requests per second of the good callers without pauses; the load is a share of them."""
        for picture in self._giants:  # enough giants for every runner to allocate its permanent memory
            async with asyncio.TaskGroup() as group:
                for _ in range(2 * self._runners):
                    group.create_task(self._send_giant(picture, []))
        await self._request_explanation(self.make_generator("capacity"), LeaveMoment.NEVER)
        end = time.monotonic() + min(5.0, 10 * self._options.minutes)
        request_counts = [0] * CALLER_COUNT

        async def run_caller(number: int) -> None:
            connections: list[Connection] = []
            generator = self.make_generator(f"capacity {number}")
            while time.monotonic() < end:
                await self._send_good_request(
                    generator, self._own_pictures(number), connections, no_deadline=True
                )
                request_counts[number] += 1
            _close_connections(connections)

        started_at = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(CALLER_COUNT):
                group.create_task(run_caller(number))
        self.rate = self._options.load * sum(request_counts) / (time.monotonic() - started_at)

    async def _pause(self, seconds: float) -> bool:
        """Wait; return false if the run is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop_event.wait(), seconds)
        return not self._stop_event.is_set()

    async def _measure_lag(self) -> None:
        """Record delays of the test's own event loop, so that clients are not judged by them."""
        while not self._stop_event.is_set():
            started_at = time.monotonic()
            await asyncio.sleep(_LAG_SECONDS)
            if (lag := time.monotonic() - started_at - _LAG_SECONDS) > _LAG_SECONDS:
                self._lags.append((started_at, lag))

    def _own_pictures(self, number: int) -> Sequence[Picture]:
        """Return the pictures of one caller."""
        return self._pictures[number::CALLER_COUNT]

    async def _run_caller(self, number: int) -> None:
        """Send good pictures at the planned rate, one at a time."""
        generator, connections = self.make_generator(f"caller {number}"), list[Connection]()
        due = time.monotonic()
        while await self._pause(due - time.monotonic()):
            await self._send_good_request(generator, self._own_pictures(number), connections)
            due = max(due + generator.expovariate(self.rate / CALLER_COUNT), time.monotonic() - 1.0)
        _close_connections(connections)

    async def _send_good_request(
        self,
        generator: random.Random,
        pictures: Sequence[Picture],
        connections: list[Connection],
        *,
        no_deadline: bool = False,
    ) -> None:
        request, content, check_response = self._build_classification(
            generator, pictures, no_deadline=no_deadline
        )
        await self.send_request(request, content, check_response, connections)

    def _build_classification(
        self, generator: random.Random, own_pictures: Sequence[Picture], *, no_deadline: bool
    ) -> tuple[ClientRequest, bytes, Callable[[Response, ClientRequest], str]]:
        request_format = generator.choice(REQUEST_FORMATS)
        pictures = gallery.pick_pictures(generator, own_pictures, request_format.max_pictures)
        is_second = request_format.has_model_name and generator.random() < 0.3
        model = "second" if is_second else "swapped"
        body, headers = request_format.build_body(pictures, f"fovea{generator.getrandbits(64):x}")
        deadline = None
        if not no_deadline and generator.random() < 0.15:
            deadline = 0.002 * 500 ** generator.random()
            headers = {**headers, "X-Deadline-Ms": f"{1000 * deadline:.3f}"}
        content = build_request(request_format.path.format(model=model), body, headers, request_format.method)
        request = ClientRequest(
            f"good, {request_format.name}" if deadline is None else "good, with a deadline",
            request_format.route,
            0.0,
            0.0,
            ANSWER_LIMIT if deadline is None else deadline,
            deadline=deadline,
            model="second" if is_second else "",
            images=len(pictures),
        )

        def check_response(response: Response, request: ClientRequest) -> str:
            versions = (
                frozenset({"1"})
                if is_second
                else self.versions.versions_between(request.sent_at, request.ended_at)
            )
            return gallery.find_mistake(request_format, pictures, response.content, versions)

        return request, content, check_response

    async def _run_leaver(self, number: int) -> None:
        generator = self.make_generator(f"leaver {number}")
        while await self._pause(generator.expovariate(2.0)):
            request, content, _ = self._build_classification(
                generator, self._own_pictures(number), no_deadline=True
            )
            request = replace(request, kind="leaver", model="")
            await self.send_and_leave(request, content, generator.choice(list(LeaveMoment)[1:]), generator)

    async def _run_bomber(self) -> None:
        generator, connections = self.make_generator("bomber"), list[Connection]()
        while await self._pause(generator.expovariate(1.5)):
            name, body, headers, status, code = generator.choice(self._bombs)
            allowed = frozenset({status, 503})
            request = ClientRequest(f"bad, {name}", "/v1/classify", 0.0, 0.0, ANSWER_LIMIT, allowed, images=0)
            content = build_request("/v1/classify", body, headers)
            result = await self.send_request(
                request, content, lambda *_: "bad input was answered", connections
            )
            if result.status == status and result.codes != (code,):
                self.failures.append(f"bad, {name}: the code is {result.codes}, not {code}")
        _close_connections(connections)

    async def _run_giant_caller(self) -> None:
        generator, connections = self.make_generator("giants"), list[Connection]()
        while await self._pause(generator.expovariate(1 / self._options.gaps["giant"])):
            await self._send_giant(generator.choice(self._giants), connections)
        _close_connections(connections)

    async def _send_giant(self, picture: Picture, connections: list[Connection]) -> None:
        """Send a giant, which may be refused, since limits exist for giants."""
        request = ClientRequest(f"giant, {picture.name}", REQUEST_FORMATS[0].route, 0.0, 0.0, GIANT_LIMIT,
                          frozenset({200, 413, 503}))  # fmt: skip
        headers = {"Content-Type": "application/octet-stream"}
        content = build_request(REQUEST_FORMATS[0].path, picture.content, headers)

        def check_response(response: Response, request: ClientRequest) -> str:
            versions = self.versions.versions_between(request.sent_at, request.ended_at)
            return gallery.find_mistake(REQUEST_FORMATS[0], [picture], response.content, versions)

        await self.send_request(request, content, check_response, connections)

    async def _run_explanation_client(self, number: int) -> None:
        generator = self.make_generator(f"explained {number}")
        while await self._pause(generator.expovariate(0.7)):
            await self._request_explanation(
                generator, generator.choices(list(LeaveMoment), [0.6, 0.2, 0.1, 0.1])[0]
            )

    async def _request_explanation(self, generator: random.Random, moment: LeaveMoment) -> None:
        deadline = 0.005 * 400 ** generator.random() if generator.random() < 0.3 else None
        question = Question(
            QuestionKind.AUTO,
            (generator.randrange(256), generator.randrange(256), generator.randrange(256)),
            (generator.randint(8, 400), generator.randint(8, 400)),
            response_format=generator.choices(["json", "png", "lines"], [0.8, 0.1, 0.1])[0],
            samples=16 * generator.randint(1, 4),
            padding=round(100 * 10_000 ** generator.random()),
            deadline=deadline,
        )
        limit = EXPLAIN_LIMIT if deadline is None else deadline
        request = ClientRequest("explanation", "/v1/explain", 0.0, 0.0, limit, frozenset({200, 503}),
                          deadline=deadline, is_explanation=True)  # fmt: skip
        content = question.build_request("")
        if moment is not LeaveMoment.NEVER:
            await self.send_and_leave(
                replace(request, kind="explanation, leaves"), content, moment, generator
            )
            return

        def check_response(response: Response, request: ClientRequest) -> str:
            if _find_error_codes(response):  # the code decides whether that is allowed
                return ""
            return questions.find_mistake(question, response, request.seconds, {})

        await self.send_request(request, content, check_response, [])

    # --- faults ---

    async def _inject_faults(self, target: str, gap: float, *, is_kill: bool) -> None:
        """Kill or stop one of the service's processes repeatedly, about every `gap` seconds."""
        generator = self.make_generator(f"{target} {is_kill}")
        while await self._pause(generator.uniform(0.5, 1.5) * gap):
            pids = self._service.find_pids(target)
            if not pids:
                continue
            with _open_process(self._service, generator.choice(pids)) as descriptor:
                if descriptor is None:
                    continue
                if is_kill:
                    now = time.monotonic()
                    self.faults.add(Fault(target, "killed", now, now + NOTICE_SECONDS))
                    _send_signal(descriptor, signal.SIGKILL)
                else:
                    await self._stop_process(descriptor, target, generator.uniform(0.3, 1.6 * BATCH_TIMEOUT))

    async def _probe_workers(self) -> None:
        """Ask repeatedly whether any worker answers.

        After a kill, no worker may answer until another has started. Callers must wait for that long, but not
        longer than `_MAX_OUTAGE`.
        """
        outage: Fault | None = None
        while await self._pause(0.5):
            began_at = time.monotonic()
            if await self._is_live():
                if outage:
                    outage.ended_at = time.monotonic() + NOTICE_SECONDS
                outage = None
            elif outage is None:
                if not self.faults.find_overlapping(began_at - RECOVERY_SECONDS, began_at, "worker"):
                    self.failures.append("nobody answers /health/live, and no worker was killed or stopped")
                outage = self.faults.add(Fault("worker", "outage", began_at - 0.5))
            elif began_at - outage.began_at > _MAX_OUTAGE:
                self.failures.append(f"nobody has answered /health/live for {_MAX_OUTAGE:g} s")
                return
        if outage:
            outage.ended_at = time.monotonic() + RECOVERY_SECONDS

    async def _is_live(self) -> bool:
        connection: Connection | None = None
        try:
            async with asyncio.timeout(1.0):
                connection = await Connection.open(self._address)
                await connection.send(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                return (await connection.receive()).status == 200
        except (BrokenConnection, TimeoutError):
            self.stray_count += 1
            return False
        finally:
            if connection:
                connection.abort()

    async def _stop_process(self, descriptor: int, target: str, seconds: float) -> None:
        """Stop a process, and continue it after `seconds` unless it was killed meanwhile."""
        fault = self.faults.add(Fault(target, "stopped", time.monotonic()))
        try:
            _send_signal(descriptor, signal.SIGSTOP)
            end = time.monotonic() + seconds
            while time.monotonic() < end and not _has_ended(descriptor) and not self._stop_event.is_set():
                await asyncio.sleep(0.05)
        finally:
            _send_signal(descriptor, signal.SIGCONT)
            fault.ended_at = time.monotonic() + NOTICE_SECONDS

    async def _swap_versions(self, gap: float) -> None:
        generator = self.make_generator("swap")
        while await self._pause(generator.uniform(0.5, 1.5) * gap):
            version = self._repository.publish_next_version()
            self.versions.add_version(version)
            if await self._change_model("swapped", "load"):
                self.swaps += 1
                self.versions.keep_only(version)

    async def _unload_and_load(self, gap: float) -> None:
        generator = self.make_generator("unload")
        while await self._pause(generator.uniform(0.5, 1.5) * gap):
            fault = self.faults.add(Fault("second", "unloaded", time.monotonic()))
            await self._change_model("second", "unload")
            await self._pause(generator.uniform(0.1, 2.0))
            if await self._change_model("second", "load"):
                fault.ended_at = time.monotonic() + _OVERLAP_SECONDS[2 if self._has_workers else 1]

    async def _change_model(self, model: str, action: str) -> bool:
        """Load or unload a model; try again if processes die meanwhile."""
        tries = 0
        while tries < _MAX_TRIES:
            began_at = time.monotonic()
            status, text = await self._request_change(model, action)
            now = time.monotonic()
            if status == 200 or (status == 404 and action == "unload"):
                return True
            if not self._service.is_alive:
                return False
            if status == 409 and self._options.memory and "memory" in text:
                self.memory_refusals += 1  # a trial without room is postponed, and the answer says so
                if not await self._pause(2.0):
                    return False
                continue
            if not self.faults.find_overlapping(began_at - NOTICE_SECONDS, now, "runner", "worker"):
                self.failures.append(
                    f"{action} {model}: {status} {text}, and no process was killed meanwhile"
                )
                return False
            tries += 1
            await asyncio.sleep(0.5)
        self.failures.append(f"{action} {model}: {text}, {_MAX_TRIES} times")
        return False

    async def _request_change(self, model: str, action: str) -> tuple[int, str]:
        route = f"/v2/repository/models/{{name}}/{action}"
        request = ClientRequest(
            action, route, 0.0, 0.0, CHANGE_LIMIT, frozenset({200, 404, 409, 500, 503}), images=0
        )
        content = build_request(route.format(name=model), b"{}", {"Content-Type": "application/json"})
        connections: list[Connection] = []

        def check_response(response: Response, _: ClientRequest) -> str:
            return "" if response.content.startswith(b"[") else f"{response.content[:100]!r}"

        request = await self.send_request(request, content, check_response, connections)
        _close_connections(connections)
        return request.status, request.failure_reason or request.text


def _close_connections(connections: list[Connection]) -> None:
    for connection in connections:
        connection.abort()


def _parse_error_code(response: Response) -> tuple[str, str]:
    """Return an error's code in any protocol, and a complaint about an answer without one."""
    try:
        content = json.loads(response.content)
        inner = content.get("error")
        code = inner.get("code") if isinstance(inner, dict) else content.get("reason") or content.get("code")
    except (ValueError, AttributeError):
        code = None
    if isinstance(code, str):
        return code, ""
    return "", f"an error {response.status} without a code: {response.content[:200]!r}"


def _find_error_codes(response: Response) -> tuple[str, ...]:
    """Return the codes of errors in an answer 200: of single images, or of the last started line."""
    with contextlib.suppress(ValueError):
        if response.media_type.endswith("ndjson"):
            lines = [json.loads(line) for line in response.content.splitlines()[-1:]]
            return tuple(line["error"]["code"] for line in lines if "error" in line)
        if response.media_type.endswith("json") and isinstance(content := json.loads(response.content), dict):
            results = content.get("results", ())
            return tuple(one["error"]["code"] for one in results if "error" in one)
    return ()


# --- one leg -------------------------------------------------------------------------------------


def run_leg(
    workers: int, seconds: float, pictures: Sequence[Picture], giants: Sequence[Picture], options: Options
) -> LegResult:
    """Disturb one service for `seconds`, and judge it."""
    result = LegResult(workers, seconds)
    folder = Path(tempfile.mkdtemp(prefix="fovea-chaos-"))
    log = folder / "service.log"
    result.log = str(log)
    settings = {"FOVEA_WORKERS": str(workers), **options.settings}
    memory = options.memory * workers
    with create_limited_group(memory) if memory else contextlib.nullcontext() as group:
        result.memory = _describe_limit(group, memory)
        repository = BenchRepository(folder, "swapped", "second")
        (repository.root / "default").write_text("swapped\n")
        with start_service(repository.root, log, group, settings) as service:
            clients = ChaosClients(service, repository, pictures, giants, options)
            _disturb_service(service, clients, seconds, memory, result)
            remaining_pids = find_process_tree(service.pid)[1:]
            _end_service(service, remaining_pids, result)
        if group:
            result.peak = group.peak_bytes
            if group.kill_count:
                result.failures.append(f"memory: the kernel has killed {group.kill_count} processes")
    result.errors = _count_log_errors(log)
    return result


def _describe_limit(group: ControlGroup | None, size: int) -> str:
    if not size:
        return "no memory limit"
    if group:
        return f"memory limit {size >> 20} MB, by a control group"
    return f"memory watched against {size >> 20} MB: no control group can be made here"


def _disturb_service(
    service: Service, clients: ChaosClients, seconds: float, memory: int, result: LegResult
) -> None:
    counter_recorder = CounterRecorder(service)
    counter_recorder.scrape(ANSWER_LIMIT)
    counts_before = counter_recorder.get_counts()
    runners = service.read_gauge("fovea_runners")
    curves: tuple[MemoryCurve, MemoryCurve] = ([], [])
    peaks: list[int] = []
    idle_states: list[IdleState] = []

    async def run_parts() -> None:
        stop_event = asyncio.Event()
        watch_task = asyncio.create_task(
            _watch_service(service, clients, counter_recorder, curves, stop_event)
        )
        try:
            await clients.measure_capacity()
            for part in (_FIRST_PART, 1 - _FIRST_PART):
                peaks.append(max((size for _, size in curves[0]), default=0))
                for curve in curves:
                    curve.clear()
                await clients.run(part * seconds)
                result.failures += await asyncio.to_thread(_wait_until_quiet, service, runners)
                idle_states.append(await asyncio.to_thread(_measure_idle_state, service))
        except OSError:  # of a process that has ended
            if service.is_alive:
                raise
        finally:
            stop_event.set()
            await watch_task

    asyncio.run(run_parts())
    request_log = clients.request_log
    result.rate = clients.rate
    result.swaps = clients.swaps
    result.memory_refusals = clients.memory_refusals
    now = time.monotonic()
    epoch = time.time() - now
    result.timeline = [
        (
            round(epoch + one.began_at, 3),
            f"{one.target} {one.kind}",
            round(min(one.ended_at, now) - one.began_at, 3),
        )
        for one in clients.faults
    ]
    result.kinds = {
        f"{kind}: {outcome}": number for (kind, outcome), number in sorted(request_log.kinds.items())
    }
    result.longest = request_log.longest_seconds
    result.faults = dict(clients.faults.counts)
    result.excused_requests = request_log.excused_count
    result.rise = f"{fit_trend(curves[0])}, of the first process {fit_trend(curves[1])}"
    request_log.count_doubtful(clients.faults)
    result.failures += request_log.find_complaints(clients.faults) + clients.failures
    if service.is_alive:
        counter_recorder.scrape(ANSWER_LIMIT)
        result.failures += find_miscounts(
            request_log,
            _subtract_counts(counter_recorder.get_counts(), counts_before),
            stray_count=counter_recorder.scrape_failures + clients.stray_count,
        )
        result.idle_states = idle_states[0], idle_states[1]
        result.failures += find_leaks(*result.idle_states, *curves)
    if not service.group:
        result.peak = max(*peaks, *(size for _, size in curves[0]), 0)
        if memory and result.peak > memory:
            result.failures.append(f"memory: {result.peak / 1e6:.0f} MB; at most {memory / 1e6:.0f} MB")


async def _watch_service(
    service: Service,
    clients: ChaosClients,
    counter_recorder: CounterRecorder,
    curves: tuple[MemoryCurve, MemoryCurve],
    stop_event: asyncio.Event,
) -> None:
    """Read the memory of all processes and the counters every second; stop if the service has died."""
    while not stop_event.is_set():
        if not service.is_alive:
            clients.failures.append(f"the service has died: exit code {service.process.poll()}")
            clients.stop()
            return
        size = await asyncio.to_thread(measure_resident_bytes, [service.pid])
        curves[0].append((time.monotonic(), size))
        with contextlib.suppress(OSError):  # the process has just ended
            curves[1].append((time.monotonic(), service.measure_main_bytes()))
        with contextlib.suppress(OSError):  # the scrape reached a stopped or killed worker
            await asyncio.to_thread(counter_recorder.scrape, _SCRAPE_SECONDS)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop_event.wait(), 1.0)


def _measure_idle_state(service: Service) -> IdleState:
    """Return the service at rest, without explaining processes."""
    end = time.monotonic() + _QUIET_SECONDS
    while service.find_pids("explainer") and time.monotonic() < end:
        time.sleep(0.1)
    wait_until_idle([service.pid])
    return service.measure_idle_state()


def _wait_until_quiet(service: Service, runners: float) -> list[str]:
    """Wait until nothing is in flight and all runners are there; return the unmet conditions."""
    expected_values = {
        "fovea_images_in_flight": 0.0,
        "fovea_queue_images": 0.0,
        "fovea_requests_in_flight": 1.0,  # the scrape itself
        "fovea_runners": runners,
    }
    end = time.monotonic() + _QUIET_SECONDS
    while True:
        try:
            values = {name: service.read_gauge(name) for name in expected_values}
        except OSError as error:
            values = {"metrics": 0.0}
            if time.monotonic() > end:
                return [f"left behind: the metrics cannot be read: {error}"]
        if values == expected_values or not service.is_alive:
            return []
        if time.monotonic() > end:
            return [f"left behind: {name} is {value:g}, not {expected_values[name]:g}"
                    for name, value in values.items() if value != expected_values[name]]  # fmt: skip
        time.sleep(0.2)


def _end_service(service: Service, pids: Sequence[int], result: LegResult) -> None:
    """End the service as an orchestrator does, and check that nothing is left of it."""
    if not service.is_alive:
        return
    with contextlib.ExitStack() as stack:
        descriptors = {pid: stack.enter_context(_open_process(service, pid)) for pid in pids}
        started_at = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        try:
            code = service.process.wait(_END_SECONDS)
            if code:
                result.failures.append(
                    f"the end: exit code {code} after {time.monotonic() - started_at:.1f} s"
                )
        except subprocess.TimeoutExpired:
            result.failures.append(f"the end: it is still there {_END_SECONDS:g} s after SIGTERM")
            return
        end = time.monotonic() + NOTICE_SECONDS + BATCH_TIMEOUT
        alive = [(pid, one) for pid, one in descriptors.items() if one is not None]
        while time.monotonic() < end and (alive := [pair for pair in alive if not _has_ended(pair[1])]):
            time.sleep(0.05)
        for pid, descriptor in alive:
            result.failures.append(
                f"the end: process {pid} has outlived the service: {read_command_line(pid)[:120]!r}"
            )
            _send_signal(descriptor, signal.SIGKILL)


def _subtract_counts(counts_after: ServiceCounts, counts_before: ServiceCounts) -> ServiceCounts:
    """Return the counts between two readings."""
    requests = {
        key: number - counts_before.requests.get(key, 0) for key, number in counts_after.requests.items()
    }
    errors = {key: number - counts_before.errors.get(key, 0) for key, number in counts_after.errors.items()}
    return ServiceCounts(
        requests,
        errors,
        counts_after.images - counts_before.images,
        counts_after.explanations - counts_before.explanations,
    )


def _count_log_errors(log: Path) -> dict[str, int]:
    """Count the service's log messages at level error, without numbers."""
    messages: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            messages[f"not JSON: {line[:100]}"] += 1
            continue
        if entry.get("level") in ("error", "critical"):
            messages[re.sub(r"\d+", "N", str(entry.get("event", "")))[:110]] += 1
    return dict(messages.most_common(12))


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
    options = _parse_arguments()
    print(f"seed {options.seed}, {options.minutes:g} minutes, workers {options.workers}", flush=True)
    try:
        pictures, giants = _draw_known_pictures(options.seed)
        print(f"{len(pictures)} pictures and {len(giants)} giants, whose answers are known", flush=True)
        seconds = 60 * options.minutes / len(options.workers)
        results = []
        for workers in options.workers:
            results.append(run_leg(workers, seconds, pictures, giants, options))
            _show_result(results[-1])
    except BenchError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": describe_machine(), "seed": options.seed, "legs": [asdict(one) for one in results]}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{describe_machine()}; {options.out} has all of it.")
    has_failed = any(one.failures for one in results)
    if has_failed:
        print(f"The same dice again: --seed {options.seed}")
    return int(has_failed)


def _parse_arguments() -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m fovea.bench.chaos", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="of all legs together (default: 20)")
    parser.add_argument("--workers", type=_parse_numbers, default=(1, 2), metavar="N,M",
                        help="a leg for each of these numbers of workers (default: 1,2)")  # fmt: skip
    parser.add_argument("--load", type=float, default=0.5, help="part of the capacity (default: 0.5)")
    parser.add_argument("--memory", type=int, default=512, metavar="MB",
                        help="memory limit for each worker; 0: none (default: 512)")  # fmt: skip
    parser.add_argument("--seed", type=int, help="of all that is random; chosen and printed without one")
    parser.add_argument("--set", type=_parse_pair, action="append", default=[], metavar="NAME=VALUE",
                        help="a setting, or another environment variable, of the service")  # fmt: skip
    parser.add_argument("--gap", type=_parse_pair, action="append", default=[], metavar="NAME=SECONDS",
                        help=f"seconds between two of: {', '.join(GAPS)}")  # fmt: skip
    parser.add_argument("--out", type=Path, default=CACHE / "chaos.json")
    arguments = parser.parse_args()
    gaps = {**GAPS, **{name: float(value) for name, value in arguments.gap}}
    if unknown := sorted(gaps.keys() - GAPS.keys()):
        parser.error(f"--gap: there is no {unknown[0]}; there are {', '.join(GAPS)}")
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    return Options(
        arguments.minutes,
        arguments.workers,
        arguments.load,
        arguments.memory << 20,
        seed,
        dict(arguments.set),
        gaps,
        arguments.out,
    )


def _parse_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(one) for one in text.split(","))


def _parse_pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def _draw_known_pictures(seed: int) -> tuple[list[Picture], list[Picture]]:
    """Draw the pictures, and learn their answers from an undisturbed service.

    Raises `BenchError`.
    """
    pictures, giants = gallery.draw_pictures(PICTURE_COUNT, seed), gallery.draw_giants()
    with tempfile.TemporaryDirectory(prefix="fovea-calm-") as folder:
        repository = BenchRepository(Path(folder), "swapped")
        versions = ["1", repository.publish_next_version()]
        (repository.root / "swapped" / "config.toml").write_text(f"versions = {json.dumps(versions)}\n")
        with start_service(repository.root, Path(folder) / "log", None, {}) as service:
            gallery.learn_answers(service.url, "swapped", versions, [*pictures, *giants])
    distinct_pictures = gallery.filter_distinct(pictures)
    if len(distinct_pictures) < 4 * CALLER_COUNT:
        raise BenchError(
            f"only {len(distinct_pictures)} of {len(pictures)} pictures have answers of their own"
        )
    return distinct_pictures, giants


def _find_missing_events(result: LegResult) -> list[str]:
    """Return the events that never happened; under a memory limit they may always be refused."""
    missing = {
        "no version was swapped": not result.swaps,
        "no explanation was answered": not result.kinds.get("explanation: 200"),
        "no giant was answered": not any(
            kind.startswith("giant") and kind.endswith(": 200") for kind in result.kinds
        ),
    }
    return [name for name, is_missing in missing.items() if is_missing]


def _show_result(result: LegResult) -> None:
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
        f"\n{faults}; {result.swaps} swaps, {result.memory_refusals} changes "
        f"put off for want of memory. {result.excused_requests} requests needed an excuse."
    )
    if result.idle_states:
        state_before, state_after = result.idle_states
        for when, rest in (("before", state_before), ("after", state_after)):
            print(f"At rest {when}: {rest.resident_bytes / 1e6:.0f} MB, the first process "
                  f"{rest.main_bytes / 1e6:.0f} MB, {rest.open_files} open files.")  # fmt: skip
        print(f"Under load the trend is {result.rise}; peak {(result.peak or 0) / 1e6:.0f} MB.")
    if result.errors:
        print("\nErrors in the service's log:")
        for message, number in result.errors.items():
            print(f"  {number} x {message}")
    for name in _find_missing_events(result):
        print(f"\nNOT SHOWN: {name} in this leg; give the service more memory (--memory) or more time")
    print("\n" + ("\n".join(f"FAILED {one}" for one in result.failures) or "All properties hold."))
    if result.failures:
        print(f"The service's log is {result.log}")


if __name__ == "__main__":
    sys.exit(main())

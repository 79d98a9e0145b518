"""One leg of `make chaos`: a service that is disturbed for some minutes, and the judgement of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

from fovea.bench.chaos.clients import ChaosClients
from fovea.bench.chaos.faults import NOTICE_SECONDS
from fovea.bench.chaos.injector import FaultInjector
from fovea.bench.chaos.leaks import IdleState, find_leaks, fit_trend
from fovea.bench.chaos.options import Options
from fovea.bench.chaos.service import (
    ANSWER_LIMIT,
    BATCH_TIMEOUT,
    CounterRecorder,
    Service,
    has_ended,
    open_process,
    send_signal,
    start_service,
)
from fovea.bench.chaos.state import ChaosState
from fovea.bench.chaos.verdict import ServiceCounts, find_miscounts
from fovea.bench.gallery import Picture
from fovea.bench.groups import ControlGroup, create_limited_group
from fovea.bench.processes import (
    find_process_tree,
    measure_resident_bytes,
    read_command_line,
    wait_until_idle,
)
from fovea.bench.swaps import BenchRepository

_FIRST_PART: Final = 0.25
"""Share of a leg after which the memory at rest is first read; by then, permanent allocations exist."""

_SCRAPE_SECONDS: Final = 2.0
_QUIET_SECONDS: Final = 60.0
_END_SECONDS: Final = 40.0


MemoryCurve: TypeAlias = list[tuple[float, int]]
"""(time, memory in bytes) points."""


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
            state = ChaosState(service, options.seed)
            injector = FaultInjector(state, repository, has_memory_limit=bool(memory))
            clients = ChaosClients(state, injector, pictures, giants, options)
            _disturb_service(state, clients, seconds, memory, result)
            remaining_pids = find_process_tree(service.pid)[1:]
            _end_service(service, remaining_pids, result)
        if group:
            result.peak = group.peak_bytes
            if group.kill_count:
                result.failures.append(
                    f"memory: the kernel killed {group.kill_count} processes for lack of memory"
                )
    result.errors = _count_log_errors(log)
    return result


def _describe_limit(group: ControlGroup | None, size: int) -> str:
    if not size:
        return "no memory limit"
    if group:
        return f"memory limit {size >> 20} MB, by a control group"
    return f"memory compared with {size >> 20} MB, without a limit: this machine allows no control group"


def _disturb_service(
    state: ChaosState, clients: ChaosClients, seconds: float, memory: int, result: LegResult
) -> None:
    service = state.service
    counter_recorder = CounterRecorder(service)
    counter_recorder.scrape(ANSWER_LIMIT)
    counts_before = counter_recorder.get_counts()
    runners = service.read_gauge("fovea_runners")
    curves: tuple[MemoryCurve, MemoryCurve] = ([], [])
    peaks: list[int] = []
    idle_states: list[IdleState] = []

    async def run_parts() -> None:
        stop_event = asyncio.Event()
        # The watcher runs beside the clients on this event loop, and reads /proc and the metrics in threads.
        # It calls `state.stop` if the service dies, which ends the clients.
        watch_task = asyncio.create_task(_watch_service(state, counter_recorder, curves, stop_event))
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
    # All faults are known only now, and some complaints can be excused.
    state.request_log.count_doubtful(state.faults)
    result.rate = clients.rate
    _describe_course(state, curves, result)
    result.failures += state.request_log.find_complaints(state.faults) + state.failures
    if service.is_alive:
        counter_recorder.scrape(ANSWER_LIMIT)
        result.failures += find_miscounts(
            state.request_log,
            _subtract_counts(counter_recorder.get_counts(), counts_before),
            stray_count=counter_recorder.scrape_failures + state.stray_count,
        )
        result.idle_states = idle_states[0], idle_states[1]
        result.failures += find_leaks(*result.idle_states, *curves)
    if not service.group:
        result.peak = max(*peaks, *(size for _, size in curves[0]), 0)
        if memory and result.peak > memory:
            result.failures.append(
                f"memory: {result.peak / 1e6:.0f} MB at the peak; at most {memory / 1e6:.0f} MB"
            )


def _describe_course(state: ChaosState, curves: tuple[MemoryCurve, MemoryCurve], result: LegResult) -> None:
    """Fill in what happened, without a judgement."""
    request_log = state.request_log
    result.swaps = state.swaps
    result.memory_refusals = state.memory_refusals
    now = time.monotonic()
    epoch = time.time() - now
    result.timeline = [
        (
            round(epoch + one.began_at, 3),
            f"{one.target} {one.kind}",
            round(min(one.ended_at, now) - one.began_at, 3),
        )
        for one in state.faults
    ]
    result.kinds = {
        f"{kind}: {outcome}": number for (kind, outcome), number in sorted(request_log.kinds.items())
    }
    result.longest = request_log.longest_seconds
    result.faults = dict(state.faults.counts)
    result.excused_requests = request_log.excused_count
    result.rise = f"{fit_trend(curves[0])}, of the first process {fit_trend(curves[1])}"


async def _watch_service(
    state: ChaosState,
    counter_recorder: CounterRecorder,
    curves: tuple[MemoryCurve, MemoryCurve],
    stop_event: asyncio.Event,
) -> None:
    """Read the memory of all processes and the counters every second; stop if the service has died."""
    service = state.service
    while not stop_event.is_set():
        if not service.is_alive:
            state.failures.append(f"the service has died: exit code {service.process.poll()}")
            state.stop()
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
        descriptors = {pid: stack.enter_context(open_process(service, pid)) for pid in pids}
        started_at = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        try:
            code = service.process.wait(_END_SECONDS)
            if code:
                result.failures.append(
                    f"the end: exit code {code} after {time.monotonic() - started_at:.1f} s"
                )
        except subprocess.TimeoutExpired:
            result.failures.append(f"the end: the service still runs {_END_SECONDS:g} s after SIGTERM")
            return
        end = time.monotonic() + NOTICE_SECONDS + BATCH_TIMEOUT
        alive = [(pid, one) for pid, one in descriptors.items() if one is not None]
        while time.monotonic() < end and (alive := [pair for pair in alive if not has_ended(pair[1])]):
            time.sleep(0.05)
        for pid, descriptor in alive:
            result.failures.append(
                f"the end: process {pid} has outlived the service: {read_command_line(pid)[:120]!r}"
            )
            send_signal(descriptor, signal.SIGKILL)


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

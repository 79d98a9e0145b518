"""Single measurements: one contestant, one workload and one load for some seconds."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

from fovea.bench.contestants import BareLoop, Server
from fovea.bench.load import compute_percentile, run_open_loop
from fovea.bench.probe import probe_service
from fovea.bench.processes import CpuStopwatch, measure_own_cpu_seconds, measure_resident_bytes
from fovea.bench.workloads import BenchError, Workload

LOAD_SHARES: Final = (0.5, 0.9, 3.0)
"""Offered load in open loop, as shares of a server's capacity."""

QUEUE_IMAGES: Final = 256
"""Default length of Fovea's queue, in images.

An answer is in time if it takes at most the time for such a queue at the server's capacity plus
`DEADLINE_MARGIN`. No server can therefore win by letting thousands of requests wait.
"""

DEADLINE_MARGIN: Final = 1.0
"""Margin in seconds, about the time that a person waits without wondering."""

REFUSAL_STATUSES: Final = (429, 503)

_GRACE_SECONDS: Final = 5.0
"""Time to wait for answers after the last request, in seconds."""


@dataclass(frozen=True)
class ClosedLoopCell:
    """A closed-loop measurement with one request at a time per connection, in seconds."""

    workload: str
    name: str
    round: int
    connections: int
    seconds: float
    rate: float
    """Images per second."""
    p50: float
    p99: float
    cpu_seconds: float
    """Processor time of the contestant, without the client's."""
    resident_bytes: int
    others: float
    """Number of processors that were busy with something else."""
    refusals: int
    """Number of answers with status 400 and above."""
    errors: int
    """Number of failed connections and requests without an answer."""
    configuration: str = ""
    """Configuration of a peer."""
    main_cpu_seconds: float = 0.0
    """Processor time of the server's first process alone, which is Fovea's front."""


@dataclass(frozen=True)
class FrontCell:
    """Processor time for each request of Fovea's front process and of `bench.minimal_server`, in seconds."""

    workload: str
    name: str
    round: int
    connections: int
    rate: float
    """Requests per second that Fovea answered in closed loop."""
    fovea: float
    minimal: float
    """Time of the minimal server at the same rate in open loop, where single requests wake it."""
    minimal_at_its_limit: float
    """Time of the minimal server with as many connections in closed loop, where one wake-up serves many."""

    @property
    def ratio(self) -> float:
        """Time of Fovea's front process over that of the minimal server at the same rate."""
        return self.fovea / self.minimal


@dataclass(frozen=True)
class ProbeCell:
    """Times of `/health/live` while `connections` connections send images, in seconds."""

    workload: str
    name: str
    round: int
    connections: int
    probes: int
    p50: float
    p99: float


@dataclass(frozen=True)
class RestCell:
    """The service with the default model and no load."""

    start_seconds: list[float]
    """Time from the start of the process to the first answer, for each of several starts."""
    proportional_bytes: list[int]
    """Proportional set sizes of all processes after the first answer."""


@dataclass(frozen=True)
class OpenLoopCell:
    """An open-loop measurement; latencies count from the planned time, in seconds."""

    workload: str
    name: str
    round: int
    share: float
    """Offered share of `capacity`."""
    capacity: float
    """Images per second in closed loop, measured just before and just after."""
    deadline: float
    in_time: float
    """Answers 200 per second within the deadline."""
    p50: float
    p99: float
    refusal_p50: float
    refusal_p99: float
    statuses: dict[int, int]
    errors: dict[str, int]
    retry_after: tuple[int, int] | None
    late_requests: int
    """Number of requests that the client itself sent late."""
    queued_requests: int
    """Number of requests that waited because all client connections were busy."""
    cpu_seconds: float
    client_cpu_seconds: float
    resident_bytes: int
    others: float
    """Number of processors that were busy with something else."""


DISTURBANCE_LIMIT: Final = 0.15
"""Number of processors busy with something else from which a measurement is repeated."""

MAX_TRIES: Final = 2
"""Number of times that a disturbed measurement is tried."""

CellT = TypeVar("CellT", ClosedLoopCell, OpenLoopCell)


def measure_undisturbed(measure: Callable[[], CellT], tries: int = MAX_TRIES) -> CellT:
    """Return the first undisturbed measurement of a few, or the least disturbed one."""
    cells: list[CellT] = []
    while len(cells) < tries:
        cells.append(measure())
        if cells[-1].others < DISTURBANCE_LIMIT:
            break
    return min(cells, key=lambda cell: cell.others)


def measure_loop(
    loop: BareLoop, workload: Workload, round_number: int, connections: int, seconds: float
) -> ClosedLoopCell:
    """Measure the bare loop; `connections` only names the server cells for comparison."""
    pids = [process.pid for process in loop.processes]
    stopwatch = CpuStopwatch(pids)
    latencies, rate = loop.run(seconds)
    used_seconds, others = stopwatch.read()
    return ClosedLoopCell(
        workload=workload.name,
        name=loop.name,
        round=round_number,
        connections=connections,
        seconds=seconds,
        rate=rate,
        p50=latencies.p50,
        p99=latencies.p99,
        cpu_seconds=used_seconds,
        resident_bytes=measure_resident_bytes(pids),
        others=others,
        refusals=0,
        errors=0,
    )


def measure_closed(
    server: Server, workload: Workload, round_number: int, connections: int, seconds: float, images: Path
) -> ClosedLoopCell:
    """Measure a server with wrk, which posts the images of a list.

    Raises `BenchError` on failure.
    """
    pids = [server.process.pid]
    with server.take_turn():
        stopwatch = CpuStopwatch(pids)
        main_before = measure_own_cpu_seconds(server.process.pid)
        report = run_wrk(server.url, connections, seconds, images)
        main_cpu_seconds = measure_own_cpu_seconds(server.process.pid) - main_before
        used_seconds, others = stopwatch.read()
        resident = measure_resident_bytes(pids)
    return ClosedLoopCell(
        workload=workload.name,
        name=server.name,
        round=round_number,
        connections=connections,
        seconds=report["seconds"],
        rate=(report["requests"] - report["refused"]) / report["seconds"],
        p50=report["p50"],
        p99=report["p99"],
        cpu_seconds=used_seconds,
        resident_bytes=resident,
        others=others,
        refusals=int(report["refused"]),
        errors=int(report["errors"]),
        configuration=server.configuration,
        main_cpu_seconds=main_cpu_seconds,
    )


def measure_front(
    cell: ClosedLoopCell, minimal: Server, seconds: float, bodies: Sequence[bytes], images: Path
) -> FrontCell:
    """Compare the front process in a measurement of Fovea with the minimal server at the same rate."""
    pid = minimal.process.pid
    with minimal.take_turn():
        before = measure_own_cpu_seconds(pid)
        result = run_open_loop(
            minimal.url,
            bodies,
            rate=cell.rate,
            seconds=seconds,
            grace_seconds=_GRACE_SECONDS,
            seed=cell.round,
        )
        between = measure_own_cpu_seconds(pid)
        report = run_wrk(minimal.url, cell.connections, 1, images)
        after = measure_own_cpu_seconds(pid)
    return FrontCell(
        workload=cell.workload,
        name=cell.name,
        round=cell.round,
        connections=cell.connections,
        rate=cell.rate,
        fovea=cell.main_cpu_seconds / (cell.rate * cell.seconds + cell.refusals),
        minimal=(between - before) / len(result.planned_times),
        minimal_at_its_limit=(after - between) / report["requests"],
    )


def measure_probes(
    server: Server, workload: Workload, round_number: int, connections: int, seconds: float, images: Path
) -> ProbeCell:
    """Ask for `/health/live` again and again while wrk posts images."""
    address = urlsplit(server.url)
    with server.take_turn(), probe_service(address.hostname or "", address.port or 0) as waits:
        run_wrk(server.url, connections, seconds, images)
    waits.sort()
    return ProbeCell(
        workload=workload.name,
        name=server.name,
        round=round_number,
        connections=connections,
        probes=len(waits),
        p50=compute_percentile(waits, 50),
        p99=compute_percentile(waits, 99),
    )


def measure_open(
    server: Server, workload: Workload, round_number: int, connections: int, seconds: float, images: Path
) -> list[OpenLoopCell]:
    """Measure a server at each of `LOAD_SHARES` of its capacity, which is measured with `connections`."""

    bodies = [path.read_bytes() for path in workload.images]

    def measure_capacity() -> float:
        duration = max(2, seconds / 2)
        return measure_undisturbed(
            lambda: measure_closed(server, workload, round_number, connections, duration, images)
        ).rate

    def measure_share(share: float, capacity: float) -> OpenLoopCell:
        return measure_undisturbed(
            lambda: _measure_open_share(server, workload, round_number, share, capacity, seconds, bodies)
        )

    capacity_before = measure_capacity()
    cells = [measure_share(share, capacity_before) for share in LOAD_SHARES[:-1]]
    return [*cells, measure_share(LOAD_SHARES[-1], (capacity_before + measure_capacity()) / 2)]


def _measure_open_share(
    server: Server,
    workload: Workload,
    round_number: int,
    share: float,
    capacity: float,
    seconds: float,
    bodies: Sequence[bytes],
) -> OpenLoopCell:
    pids = [server.process.pid]
    with server.take_turn():
        stopwatch = CpuStopwatch(pids)
        result = run_open_loop(
            server.url,
            bodies,
            rate=share * capacity,
            seconds=seconds,
            grace_seconds=_GRACE_SECONDS,
            content_type="image/jpeg",
            seed=round_number,
        )
        used_seconds, others = stopwatch.read()
        resident = measure_resident_bytes(pids)
    deadline = QUEUE_IMAGES / capacity + DEADLINE_MARGIN
    refusal = next((status for status in REFUSAL_STATUSES if status in result.statuses), REFUSAL_STATUSES[0])
    return OpenLoopCell(
        workload=workload.name,
        name=server.name,
        round=round_number,
        share=share,
        capacity=capacity,
        deadline=deadline,
        in_time=result.answer_rate(max_latency=deadline),
        p50=result.percentile(50),
        p99=result.percentile(99),
        refusal_p50=result.percentile(50, refusal),
        refusal_p99=result.percentile(99, refusal),
        statuses=result.statuses,
        errors=result.errors,
        retry_after=result.retry_after,
        late_requests=result.late_requests,
        queued_requests=result.queued_requests,
        cpu_seconds=used_seconds,
        client_cpu_seconds=result.cpu_seconds,
        resident_bytes=resident,
        others=others,
    )


def run_wrk(url: str, connections: int, seconds: float, images: Path, key: str = "") -> dict[str, float]:
    """Run wrk for whole seconds and return the report of `wrk.lua`; `key` is the API key to send.

    Raises `BenchError`.
    """
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout=30s",
               f"-s{Path(__file__).with_name('wrk.lua')}", url, "--", str(images)]  # fmt: skip
    try:
        environment = {**os.environ, "FOVEA_KEY": key}
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BenchError("the benchmark needs wrk: apt-get install wrk") from None
    lines = [line for line in process.stdout.splitlines() if line.startswith("JSON ")]
    if not lines:
        raise BenchError(f"wrk failed: {process.stderr or process.stdout}")
    report: dict[str, float] = json.loads(lines[-1].removeprefix("JSON "))
    return report


def warm_up_server(server: Server, images: Path) -> None:
    """Expose a server to load once, so that no measurement includes a first time."""
    with server.take_turn():
        run_wrk(server.url, 8, 1, images)

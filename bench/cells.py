"""Single measurements: one contestant, one workload and one load for some seconds."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from fovea.bench.contestants import Loop, Server
from fovea.bench.load import offer
from fovea.bench.processes import Stopwatch, resident_bytes, settle
from fovea.bench.workloads import BenchError, Workload

SHARES: Final = (0.5, 0.9, 3.0)
"""Offered load in open loop, as shares of a server's capacity."""

QUEUE_IMAGES: Final = 256
"""Default length of Fovea's queue, in images.

An answer is in time if it takes at most the time for such a queue at the server's capacity plus
`DEADLINE_MARGIN`. No server can therefore win by letting thousands of requests wait.
"""

DEADLINE_MARGIN: Final = 1.0
"""Margin in seconds, about the time that a person waits without wondering."""

REFUSED: Final = (429, 503)

_PATIENCE: Final = 5.0
"""Time to wait for answers after the last request, in seconds."""


@dataclass(frozen=True)
class Closed:
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
    refused: int
    """Number of answers with status 400 and above."""
    errors: int
    """Number of failed connections and requests without an answer."""


@dataclass(frozen=True)
class Open:
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
    late: int
    """Number of requests that the client itself sent late."""
    held: int
    """Number of requests that waited because all client connections were busy."""
    cpu_seconds: float
    client_cpu_seconds: float
    resident_bytes: int
    others: float
    """Number of processors that were busy with something else."""


DISTURBED: Final = 0.15
"""Number of processors busy with something else from which a measurement is repeated."""

_TRIES: Final = 3

Cell = TypeVar("Cell", Closed, Open)


def undisturbed(measure: Callable[[], Cell]) -> Cell:
    """Return the first undisturbed measurement of a few, or the least disturbed one."""
    tried: list[Cell] = []
    while len(tried) < _TRIES:
        tried.append(measure())
        if tried[-1].others < DISTURBED:
            break
    return min(tried, key=lambda cell: cell.others)


def measure_loop(loop: Loop, workload: Workload, turn: int, connections: int, seconds: float) -> Closed:
    """Measure the bare loop; `connections` only names the server cells for comparison."""
    pids = [process.pid for process in loop.processes]
    watch = Stopwatch(pids)
    latencies, rate = loop.work(seconds)
    used, others = watch.read()
    return Closed(
        workload=workload.name,
        name=loop.name,
        round=turn,
        connections=connections,
        seconds=seconds,
        rate=rate,
        p50=latencies.p50,
        p99=latencies.p99,
        cpu_seconds=used,
        resident_bytes=resident_bytes(pids),
        others=others,
        refused=0,
        errors=0,
    )


def measure_closed(
    server: Server, workload: Workload, turn: int, connections: int, seconds: float, images: Path
) -> Closed:
    """Measure a server with `wrk`, which posts the images of a list.

    Raises `BenchError` on failure.
    """
    pids = [server.process.pid]
    watch = Stopwatch(pids)
    done = wrk(server.url, connections, seconds, images)
    used, others = watch.read()
    resident = resident_bytes(pids)
    settle(pids)
    return Closed(
        workload=workload.name,
        name=server.name,
        round=turn,
        connections=connections,
        seconds=done["seconds"],
        rate=(done["requests"] - done["refused"]) / done["seconds"],
        p50=done["p50"],
        p99=done["p99"],
        cpu_seconds=used,
        resident_bytes=resident,
        others=others,
        refused=int(done["refused"]),
        errors=int(done["errors"]),
    )


def measure_open(
    server: Server, workload: Workload, turn: int, connections: int, seconds: float, images: Path
) -> list[Open]:
    """Measure a server at each of `SHARES` of its capacity, which is measured with `connections`."""

    bodies = [path.read_bytes() for path in workload.images]

    def capacity() -> float:
        brief = max(2, seconds / 2)
        return undisturbed(lambda: measure_closed(server, workload, turn, connections, brief, images)).rate

    def offered(share: float, capacity: float) -> Open:
        return undisturbed(lambda: _offer(server, workload, turn, share, capacity, seconds, bodies))

    before = capacity()
    cells = [offered(share, before) for share in SHARES[:-1]]
    return [*cells, offered(SHARES[-1], (before + capacity()) / 2)]


def _offer(
    server: Server,
    workload: Workload,
    turn: int,
    share: float,
    capacity: float,
    seconds: float,
    bodies: Sequence[bytes],
) -> Open:
    pids = [server.process.pid]
    watch = Stopwatch(pids)
    result = offer(
        server.url,
        bodies,
        rate=share * capacity,
        seconds=seconds,
        patience=_PATIENCE,
        content_type="image/jpeg",
        seed=turn,
    )
    used, others = watch.read()
    resident = resident_bytes(pids)
    settle(pids)
    deadline = QUEUE_IMAGES / capacity + DEADLINE_MARGIN
    refusal = next((status for status in REFUSED if status in result.statuses), REFUSED[0])
    return Open(
        workload=workload.name,
        name=server.name,
        round=turn,
        share=share,
        capacity=capacity,
        deadline=deadline,
        in_time=result.answered(within=deadline),
        p50=result.percentile(50),
        p99=result.percentile(99),
        refusal_p50=result.percentile(50, refusal),
        refusal_p99=result.percentile(99, refusal),
        statuses=result.statuses,
        errors=result.errors,
        retry_after=result.retry_after,
        late=result.late,
        held=result.held,
        cpu_seconds=used,
        client_cpu_seconds=result.cpu_seconds,
        resident_bytes=resident,
        others=others,
    )


def wrk(url: str, connections: int, seconds: float, images: Path) -> dict[str, float]:
    """Run `wrk` for whole seconds and return the report of `wrk.lua`.

    Raises `BenchError`.
    """
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout=30s",
               f"-s{Path(__file__).with_name('wrk.lua')}", url, "--", str(images)]  # fmt: skip
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BenchError("the benchmark needs wrk: apt-get install wrk") from None
    lines = [line for line in ended.stdout.splitlines() if line.startswith("JSON ")]
    if not lines:
        raise BenchError(f"wrk failed: {ended.stderr or ended.stdout}")
    done: dict[str, float] = json.loads(lines[-1].removeprefix("JSON "))
    return done


def warm_up(server: Server, images: Path) -> None:
    """Expose a server to every kind of load once, so that no round includes a first time."""
    wrk(server.url, 8, 1, images)
    settle([server.process.pid])
    time.sleep(0.1)

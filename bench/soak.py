"""The `make soak` test: memory must stay flat over 300,000 mixed requests, and an idle service must be idle.

After every tenth of the requests the load pauses, and the memory at rest is measured: the sum of the
proportional set sizes of the service and its runners. The final value may be at most 5 % above the value
after the first tenth.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from fovea.bench import kinds
from fovea.bench.contestants import Fovea, fovea
from fovea.bench.crowd import Kind, Ledger, counted, schedule, send, surprises
from fovea.bench.mixed import CONNECTIONS, SETTINGS, machine
from fovea.bench.processes import cpu_seconds, resident_bytes, settle
from fovea.bench.workloads import CACHE, WORKLOADS, BenchError

GROWTH: Final = 0.05
"""Maximum growth, as a share of the memory after the first tenth."""

IDLE: Final = 0.005
"""Maximum use when idle, as a share of one processor."""

PARTS: Final = 10
IDLE_SECONDS: Final = 20.0
_SAMPLE_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Rest:
    """The service between two parts of the load."""

    requests: int
    """Number of requests so far."""
    seconds: float
    """Time since the start."""
    resident_bytes: int


@dataclass(frozen=True)
class Soak:
    """The results of a soak: memory in bytes, times in seconds."""

    machine: str
    rests: list[Rest]
    curve: list[tuple[float, int]]
    """(time since the start, memory) over the whole run."""
    sent: dict[str, int]
    surprises: list[str]
    idle: float
    """Number of processors that the idle service and its runners use."""

    @property
    def growth(self) -> float:
        """Growth of the memory at rest, from the first tenth of the requests to the last, as a share."""
        return self.rests[-1].resident_bytes / self.rests[1].resident_bytes - 1

    @property
    def failed(self) -> list[str]:
        """Sentences about everything that is wrong."""
        told = list(self.surprises)
        if self.growth > GROWTH:
            told.append(f"the memory grew by {self.growth:.1%}; at most {GROWTH:.0%}")
        if self.idle > IDLE:
            told.append(f"idle, it uses {self.idle:.2%} of a processor; at most {IDLE:.1%}")
        return told


def main() -> int:
    """Run the soak, print a table, write JSON and a picture; return 1 if a claim fails."""
    given = _arguments()
    try:
        measured = soak(Fovea(settings={**SETTINGS, **dict(given.set)}), given.requests, given.idle)
    except BenchError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    _show(measured)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    document = {**asdict(measured), "growth": measured.growth, "failed": measured.failed}
    given.out.write_text(json.dumps(document, indent=1) + "\n")
    if given.picture:
        from fovea.bench.picture import draw_memory

        draw_memory(measured, given.out.with_suffix(".svg"))
    return 1 if measured.failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=300_000)
    parser.add_argument("--idle", type=float, default=IDLE_SECONDS, help="seconds to watch it idle")
    parser.add_argument("--set", type=_setting, action="append", default=[], metavar="NAME=VALUE",
                        help="a setting, or another environment variable, of the service")  # fmt: skip
    parser.add_argument("--picture", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=CACHE / "soak.json")
    return parser.parse_args()


def _setting(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def soak(version: Fovea, requests: int, idle_seconds: float) -> Soak:
    """Start the service, send all requests, and watch the service.

    Raises `BenchError` if the service does not start.
    """
    workload = WORKLOADS["thumbnails"]
    load = kinds.mixed([path.read_bytes() for path in workload.images])
    sent: Counter[str] = Counter()
    told: list[str] = []
    with fovea(version, version.name, workload, "fast") as server, _Curve(server.process.pid) as curve:
        pids = [server.process.pid]
        rests = [_rest(pids, 0, curve)]
        for part in range(PARTS):
            planned = schedule(load, requests * (part + 1) // PARTS - rests[-1].requests, seed=part)
            told += _part(server.url, planned, sent)
            rests.append(_rest(pids, sum(sent.values()), curve))
            _print(rests[-1])
        settle(pids)
        before, started = cpu_seconds(pids), time.monotonic()
        curve.stop()  # reading /proc takes processor time too
        time.sleep(idle_seconds)
        idle = (cpu_seconds(pids) - before) / (time.monotonic() - started)
    return Soak(machine(), rests, curve.points, dict(sent), told, idle)


def _part(url: str, planned: list[Kind], sent: Counter[str]) -> list[str]:
    earlier = Ledger.read(url)
    outcome = send(url, planned, connections=CONNECTIONS)
    sent.update(outcome.sent)
    return surprises(outcome, planned, counted(url, earlier, planned))


def _rest(pids: list[int], requests: int, curve: _Curve) -> Rest:
    settle(pids)
    return Rest(requests, curve.seconds, resident_bytes(pids))


class _Curve:
    """A thread that reads the memory of a tree every second."""

    def __init__(self, pid: int) -> None:
        self._pids = [pid]
        self._started = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self.points: list[tuple[float, int]] = []

    def __enter__(self) -> _Curve:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def _read(self) -> None:
        while not self._end.wait(_SAMPLE_SECONDS):
            self.points.append((self.seconds, resident_bytes(self._pids)))


def _print(rest: Rest) -> None:
    print(
        f"  {rest.requests:>7} requests  {rest.seconds:6.0f} s  {rest.resident_bytes / 1e6:7.1f} MB",
        flush=True,
    )


def _show(measured: Soak) -> None:
    print("\n| requests | seconds | memory at rest, MB | over the first tenth |\n|---|---|---|---|")
    for rest in measured.rests:
        ratio = rest.resident_bytes / measured.rests[1].resident_bytes
        print(f"| {rest.requests} | {rest.seconds:.0f} | {rest.resident_bytes / 1e6:.1f} | {ratio:.3f} |")
    highest = max((memory for _, memory in measured.curve), default=0)
    print(f"\nThe memory at rest grew by {measured.growth:.1%}; at most {GROWTH:.0%}."
          f" Under load it was at most {highest / 1e6:.0f} MB.")  # fmt: skip
    print(f"Idle, it uses {measured.idle:.2%} of a processor; at most {IDLE:.1%}.")
    print(f"{measured.machine}.")
    print("\n".join(measured.surprises) or "Every request was answered and counted as it should be.")


if __name__ == "__main__":
    sys.exit(main())

"""The `make overload` benchmark: the throughput with far more callers than places.

Callers ask in closed loop: first as many as fill the service, then 512 and 2,000, alternating. A refused
caller asks again after the service's delay (`Retry-After`); `impatient` callers ask again at once. Meanwhile
one connection asks for `/health/live`. Finally 50 callers ask for a model's contract beside the callers that
fill the service.

The load runs in this process on the same processors. Therefore the throughput is also given per second of the
service's own processor time, which excludes all other processes.
"""

from __future__ import annotations

import argparse
import heapq
import math
import os
import re
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fovea.bench.command import picture
from fovea.bench.load import Callers, Connection, run
from fovea.bench.mixed import machine
from fovea.bench.probe import probing
from fovea.bench.processes import Stopwatch, running
from fovea.bench.workloads import ROOT, BenchError

CAPACITY: Final = 64
"""Number of callers that fill the service; it is smaller than the number of places."""

CROWDS: Final = ((512, True, 0.7), (2000, True, 0.5), (512, False, 0.7), (2000, False, 0.5))
"""(callers, whether they wait as told, minimum share of the throughput)."""

READERS: Final = 50
"""Number of callers that ask for the contract."""
READERS_SHARE: Final = 0.5
"""Minimum share of the throughput beside these callers."""

_CONTRACT: Final = "/v1/models/cifar10/contract"

_PATIENCE: Final = 1.0
"""Time to wait for answers at the end, in seconds; queued requests are not counted."""

_LIVE_SECONDS: Final = 1.0

_RETRY_AFTER: Final = re.compile(rb"\r\nretry-after: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Server:
    """The measured service."""

    host: str
    port: int
    pid: int


@dataclass(frozen=True)
class Leg:
    """The measurement of one load."""

    name: str
    rate: float
    """Images per second."""
    per_cpu_second: float
    """Images per second of the service's processor time."""
    refused: int
    failed: int
    slowest_probe: float
    """Longest answer time of `/health/live`, in seconds."""
    others: float
    """Number of processors that were busy with something else."""


class _Patient(Callers):
    """Callers that ask again after the delay that the service states."""

    def __init__(self, url: str, bodies: Sequence[bytes], callers: int, seconds: float) -> None:
        super().__init__(url, bodies, callers, seconds, "application/octet-stream")
        self._later: list[float] = []
        """Times at which refused callers ask again, in seconds from the start."""
        self._delay = 0

    def _loop(self, limit: float) -> None:
        clock = time.monotonic
        self._start = clock()
        for request in range(len(self.planned)):
            self._assign(request)
        while self._open_requests and (now := clock() - self._start) < limit:
            while self._later and self._later[0] <= now:
                heapq.heappop(self._later)
                self._open_requests -= 1
                self._assign(self._plan(now))
            wait = min(limit, self._later[0] if self._later else limit) - (clock() - self._start)
            self._poll(max(0.0, wait))

    def _finish(self, connection: Connection) -> None:
        told = _RETRY_AFTER.search(connection.answer) if connection.answer[9:12] == b"503" else None
        self._delay = int(told[1]) if told else 0
        super()._finish(connection)
        self._delay = 0

    def _over(self) -> None:
        due = time.monotonic() - self._start + self._delay
        if not self._delay:
            super()._over()
        elif due < self._seconds:
            heapq.heappush(self._later, due)  # the request counts as open until then
        else:
            self._open_requests -= 1


def main() -> int:
    """Measure as the command line asks, and print tables; return 1 if a share is missed."""
    arguments = _arguments()
    images = [picture(seed) for seed in range(16)]
    rounds: list[dict[str, Leg]] = []
    try:
        with _service() as server:
            _crowd(server, images, CAPACITY, True, 2.0)
            for turn in range(arguments.rounds):
                rounds.append(_round(server, images, arguments.seconds))
                for leg in rounds[-1].values():
                    print(f"  round {turn + 1}  {leg.name:<28}{leg.rate:8.1f} images/s", flush=True)
    except BenchError as error:
        print(f"overload: {error}", file=sys.stderr)
        return 2
    return _show(rounds)


@contextmanager
def _service() -> Iterator[Server]:
    """Serve the model of the repository's zoo with the default settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    environment |= {"FOVEA_PORT": "0", "FOVEA_MODELS": str(ROOT / "zoo"), "FOVEA_DEFAULT_MODEL": "cifar10"}
    command = [sys.executable, "-m", "fovea.service"]
    with running(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        if process.stdout is None or not (greeting := process.stdout.readline()):
            raise BenchError("the service has not started")
        host, port = greeting.split("http://")[1].strip().split(":")
        yield Server(host, int(port), process.pid)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.overload", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load")
    return parser.parse_args()


def _round(server: Server, images: list[bytes], seconds: float) -> dict[str, Leg]:
    legs = [_crowd(server, images, CAPACITY, True, seconds)]
    legs += [_crowd(server, images, callers, patient, seconds) for callers, patient, _ in CROWDS]
    legs.append(_crowd(server, images, CAPACITY, True, seconds, readers=READERS))
    return {leg.name: leg for leg in legs}


def _name(callers: int, patient: bool, readers: int = 0) -> str:
    if readers:
        return f"{callers}, and {readers} for contracts"
    return f"{callers} callers" if patient else f"{callers} impatient callers"


def _crowd(
    server: Server, images: list[bytes], callers: int, patient: bool, seconds: float, *, readers: int = 0
) -> Leg:
    kind = _Patient if patient else _Impatient
    client = kind(f"http://{server.host}:{server.port}/v1/classify", images, callers, seconds)
    over = threading.Event()
    threads = [threading.Thread(target=_read_contracts, args=(server, over)) for _ in range(bool(readers))]
    watch = Stopwatch([server.pid])
    for thread in threads:
        thread.start()
    with probing(server.host, server.port) as waits:
        result = run(client, seconds, _PATIENCE)
    over.set()
    for thread in threads:
        thread.join()
    used, others = watch.read()
    good = int((result.status == 200).sum())
    return Leg(
        name=_name(callers, patient, readers),
        rate=result.answered(within=math.inf),
        per_cpu_second=good / used,
        refused=result.statuses.get(503, 0),
        failed=sum(number for status, number in result.statuses.items() if status not in (200, 503)),
        slowest_probe=max(waits),
        others=others,
    )


class _Impatient(Callers):
    """Callers that ask again at once."""

    def __init__(self, url: str, bodies: Sequence[bytes], callers: int, seconds: float) -> None:
        super().__init__(url, bodies, callers, seconds, "application/octet-stream")


def _read_contracts(server: Server, over: threading.Event) -> None:
    """Ask for a contract repeatedly without pause, on `READERS` connections, until `over`."""
    asking = f"GET {_CONTRACT} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with urllib.request.urlopen(f"http://{server.host}:{server.port}{_CONTRACT}") as reply:
        length = len(reply.read())
    received: dict[int, int] = {}
    with ExitStack() as stack:
        epoll = stack.enter_context(select.epoll())
        sockets = {}
        for _ in range(READERS):
            opened = stack.enter_context(socket.create_connection((server.host, server.port)))
            opened.sendall(asking)
            sockets[opened.fileno()] = opened
            epoll.register(opened.fileno(), select.EPOLLIN)
        while not over.is_set():
            for number, _ in epoll.poll(0.1):
                received[number] = received.get(number, 0) + len(sockets[number].recv(1 << 18))
                if received[number] > length:  # the rest is the head, which is shorter than a contract
                    received[number] = 0
                    sockets[number].sendall(asking)


def _show(rounds: list[dict[str, Leg]]) -> int:
    wanted = {_name(callers, patient): share for callers, patient, share in CROWDS}
    wanted[_name(CAPACITY, True, READERS)] = READERS_SHARE
    capacity = _name(CAPACITY, True)
    missed = []
    print(
        "\n| load | images/s | share | images per CPU s | share | refused/round | /health/live, s | others |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in rounds[0]:
        legs = [one[name] for one in rounds]
        rates = [one[name].rate / one[capacity].rate for one in rounds]
        costs = [one[name].per_cpu_second / one[capacity].per_cpu_second for one in rounds]
        share, by_cpu = statistics.median(rates), statistics.median(costs)
        slowest = max(leg.slowest_probe for leg in legs)
        print(
            f"| {name} | {statistics.median(leg.rate for leg in legs):.0f} | {share:.0%} |"
            f" {statistics.median(leg.per_cpu_second for leg in legs):.0f} | {by_cpu:.0%} |"
            f" {statistics.median(leg.refused for leg in legs):.0f} | {slowest:.2f} |"
            f" {max(leg.others for leg in legs):.2f} |"
        )
        if max(share, by_cpu) < wanted.get(name, 0.0):
            missed.append(f"{name}: {share:.0%} ({by_cpu:.0%} by processor time), wanted {wanted[name]:.0%}")
        if slowest > _LIVE_SECONDS:
            missed.append(f"{name}: /health/live took {slowest:.2f} s; at most {_LIVE_SECONDS:g} s")
        if failed := sum(leg.failed for leg in legs):
            missed.append(f"{name}: {failed} answers were neither 200 nor 503")
    print(f"\n{_processor()}; {machine()}.")
    print("\n".join(missed) or "Every share is reached.")
    return 1 if missed else 0


def _processor() -> str:
    """Return the processor's name (proc(5))."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else os.uname().machine


if __name__ == "__main__":
    sys.exit(main())

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
from typing import Final

from fovea.bench.command import draw_jpeg
from fovea.bench.load import ClientConnection, ClosedLoopClient, run_client
from fovea.bench.machine import describe_processor
from fovea.bench.mixed import describe_machine
from fovea.bench.probe import probe_service
from fovea.bench.processes import CpuStopwatch, start_process
from fovea.bench.workloads import ROOT, BenchError

CAPACITY_CALLERS: Final = 64
"""Number of callers that fill the service; it is smaller than the number of places."""

LOADS: Final = ((512, True, 0.7), (2000, True, 0.5), (512, False, 0.7), (2000, False, 0.5))
"""(callers, whether they wait for `Retry-After`, minimum share of the throughput)."""

READER_COUNT: Final = 50
"""Number of callers that ask for the contract."""
MIN_READERS_SHARE: Final = 0.5
"""Minimum share of the throughput beside these callers."""

_CONTRACT_PATH: Final = "/v1/models/cifar10/contract"

_GRACE_SECONDS: Final = 1.0
"""Time to wait for answers at the end, in seconds; queued requests are not counted."""

_MAX_LIVE_SECONDS: Final = 1.0

_RETRY_AFTER: Final = re.compile(rb"\r\nretry-after: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class ServiceProcess:
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
    refusals: int
    failures: int
    slowest_probe: float
    """Longest answer time of `/health/live`, in seconds."""
    others: float
    """Number of processors that were busy with something else."""


class _PatientClient(ClosedLoopClient):
    """Callers that ask again after the delay that the service states."""

    def __init__(self, url: str, bodies: Sequence[bytes], callers: int, seconds: float) -> None:
        super().__init__(url, bodies, callers, seconds, "application/octet-stream")
        self._retry_times: list[float] = []
        """Times at which refused callers ask again, in seconds from the start."""
        self._retry_delay = 0

    def _run_loop(self, limit: float) -> None:
        clock = time.monotonic
        self._started_at = clock()
        for request in range(len(self.planned_times)):
            self._assign_request(request)
        while self._open_requests and (now := clock() - self._started_at) < limit:
            while self._retry_times and self._retry_times[0] <= now:
                heapq.heappop(self._retry_times)
                self._open_requests -= 1
                self._assign_request(self._plan_request(now))
            wait = min(limit, self._retry_times[0] if self._retry_times else limit) - (
                clock() - self._started_at
            )
            self._poll_connections(max(0.0, wait))

    def _finish_request(self, connection: ClientConnection) -> None:
        retry_match = (
            _RETRY_AFTER.search(connection.response) if connection.response[9:12] == b"503" else None
        )
        # `_end_request`, which the base class calls, reads the delay to plan the next request of the caller
        self._retry_delay = int(retry_match[1]) if retry_match else 0
        super()._finish_request(connection)
        self._retry_delay = 0

    def _end_request(self) -> None:
        due = time.monotonic() - self._started_at + self._retry_delay
        if not self._retry_delay:
            super()._end_request()
        elif due < self._seconds:
            heapq.heappush(self._retry_times, due)  # the request counts as open until then
        else:
            self._open_requests -= 1


def main() -> int:
    """Measure as the command line asks, and print tables; return 1 if a share is missed."""
    options = _parse_arguments()
    images = [draw_jpeg(seed) for seed in range(16)]
    rounds: list[dict[str, Leg]] = []
    try:
        with _start_service() as server:
            _measure_load(server, images, CAPACITY_CALLERS, True, 2.0)
            for round_number in range(options.rounds):
                rounds.append(_measure_round(server, images, options.seconds))
                for leg in rounds[-1].values():
                    print(f"  round {round_number + 1}  {leg.name:<28}{leg.rate:8.1f} images/s", flush=True)
    except BenchError as error:
        print(f"overload: {error}", file=sys.stderr)
        return 2
    return _show_rounds(rounds)


@contextmanager
def _start_service() -> Iterator[ServiceProcess]:
    """Serve the model of the repository's zoo with the default settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    environment |= {"FOVEA_PORT": "0", "FOVEA_MODELS": str(ROOT / "zoo"), "FOVEA_DEFAULT_MODEL": "cifar10"}
    command = [sys.executable, "-m", "fovea.service"]
    with start_process(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        if process.stdout is None or not (greeting := process.stdout.readline()):
            raise BenchError("the service did not start; `fovea serve` shows why")
        host, port = greeting.split("http://")[1].strip().split(":")
        yield ServiceProcess(host, int(port), process.pid)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.overload", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: 3)")
    parser.add_argument("--seconds", type=float, default=15.0, help="duration of each load (default: 15)")
    return parser.parse_args()


def _measure_round(server: ServiceProcess, images: list[bytes], seconds: float) -> dict[str, Leg]:
    legs = [_measure_load(server, images, CAPACITY_CALLERS, True, seconds)]
    legs += [_measure_load(server, images, callers, is_patient, seconds) for callers, is_patient, _ in LOADS]
    legs.append(_measure_load(server, images, CAPACITY_CALLERS, True, seconds, readers=READER_COUNT))
    return {leg.name: leg for leg in legs}


def _format_load_name(callers: int, is_patient: bool, readers: int = 0) -> str:
    if readers:
        return f"{callers}, and {readers} for contracts"
    return f"{callers} callers" if is_patient else f"{callers} impatient callers"


def _measure_load(
    server: ServiceProcess,
    images: list[bytes],
    callers: int,
    is_patient: bool,
    seconds: float,
    *,
    readers: int = 0,
) -> Leg:
    client_class = _PatientClient if is_patient else _ImpatientClient
    client = client_class(f"http://{server.host}:{server.port}/v1/classify", images, callers, seconds)
    stop_event = threading.Event()
    threads = [
        threading.Thread(target=_read_contracts, args=(server, stop_event)) for _ in range(bool(readers))
    ]
    stopwatch = CpuStopwatch([server.pid])
    for thread in threads:
        thread.start()
    with probe_service(server.host, server.port) as waits:
        result = run_client(client, seconds, _GRACE_SECONDS)
    stop_event.set()
    for thread in threads:
        thread.join()
    used_seconds, others = stopwatch.read()
    good_count = int((result.status == 200).sum())
    return Leg(
        name=_format_load_name(callers, is_patient, readers),
        rate=result.answer_rate(max_latency=math.inf),
        per_cpu_second=good_count / used_seconds,
        refusals=result.statuses.get(503, 0),
        failures=sum(number for status, number in result.statuses.items() if status not in (200, 503)),
        slowest_probe=max(waits),
        others=others,
    )


class _ImpatientClient(ClosedLoopClient):
    """Callers that ask again at once."""

    def __init__(self, url: str, bodies: Sequence[bytes], callers: int, seconds: float) -> None:
        super().__init__(url, bodies, callers, seconds, "application/octet-stream")


def _read_contracts(server: ServiceProcess, stop_event: threading.Event) -> None:
    """Ask for a contract repeatedly without pause, on `READER_COUNT` connections, until `stop_event`."""
    request = f"GET {_CONTRACT_PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with urllib.request.urlopen(f"http://{server.host}:{server.port}{_CONTRACT_PATH}") as reply:
        length = len(reply.read())
    received_bytes: dict[int, int] = {}
    with ExitStack() as stack:
        epoll = stack.enter_context(select.epoll())
        sockets = {}
        for _ in range(READER_COUNT):
            client_socket = stack.enter_context(socket.create_connection((server.host, server.port)))
            client_socket.sendall(request)
            sockets[client_socket.fileno()] = client_socket
            epoll.register(client_socket.fileno(), select.EPOLLIN)
        while not stop_event.is_set():
            for number, _ in epoll.poll(0.1):
                received_bytes[number] = received_bytes.get(number, 0) + len(sockets[number].recv(1 << 18))
                if received_bytes[number] > length:  # the rest is the head, which is shorter than a contract
                    received_bytes[number] = 0
                    sockets[number].sendall(request)


def _show_rounds(rounds: list[dict[str, Leg]]) -> int:
    min_shares = {_format_load_name(callers, patient): share for callers, patient, share in LOADS}
    min_shares[_format_load_name(CAPACITY_CALLERS, True, READER_COUNT)] = MIN_READERS_SHARE
    capacity = _format_load_name(CAPACITY_CALLERS, True)
    problems = []
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
            f" {statistics.median(leg.refusals for leg in legs):.0f} | {slowest:.2f} |"
            f" {max(leg.others for leg in legs):.2f} |"
        )
        if max(share, by_cpu) < min_shares.get(name, 0.0):
            problems.append(
                f"{name}: {share:.0%} of the throughput ({by_cpu:.0%} by processor time); "
                f"at least {min_shares[name]:.0%}"
            )
        if slowest > _MAX_LIVE_SECONDS:
            problems.append(f"{name}: /health/live took {slowest:.2f} s; at most {_MAX_LIVE_SECONDS:g} s")
        if failure_count := sum(leg.failures for leg in legs):
            problems.append(f"{name}: {failure_count} answers were neither 200 nor 503")
    print(f"\n{describe_processor()}; {describe_machine()}.")
    print("\n".join(problems) or "Every share is reached.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

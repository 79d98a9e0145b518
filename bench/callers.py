"""The `make bench-callers` benchmark: one caller floods the service, and another asks now and then.

The flood sends from one address in closed loop, on more connections than there are places, and asks again at
once after a refusal. The other caller sends from another address, at fixed times. Its latency counts from the
planned time. Several services run on the same processors, one for each set of limits; one of them has work at
a time, and they take turns. Everything stays on the loopback interface.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from fovea.bench.command import draw_jpeg
from fovea.bench.load import compute_percentile, run_closed_loop
from fovea.bench.machine import describe_processor
from fovea.bench.mixed import describe_machine
from fovea.bench.processes import start_process
from fovea.bench.workloads import ROOT, BenchError

FLOOD_CALLERS: Final = 400
"""Connections of the flood: more than the 256 places of the default queue."""

REQUESTS_PER_SECOND: Final = 25.0
"""Rate of the other caller, in images per second."""

LIMITS: Final = {
    "no limits": {},
    "rate and places": {"FOVEA_CALLER_RATE": "300", "FOVEA_CALLER_IMAGES": "32"},
    "shares": {"FOVEA_CALLER_SHARES": "true"},
    "all": {
        "FOVEA_CALLER_RATE": "300",
        "FOVEA_CALLER_IMAGES": "32",
        "FOVEA_CALLER_SHARES": "true",
    },
}
"""Settings of each service."""

MIN_SUCCESS: Final = 0.999
"""Minimum share of the other caller's requests that must be answered if there are shares."""

_OTHER_ADDRESS: Final = "127.0.0.2"
"""Address of the other caller. The whole network 127.0.0.0/8 belongs to the loopback interface."""

_CONNECTIONS: Final = 16
"""Number of connections of the other caller."""

_ANSWER_TIMEOUT: Final = 10.0
"""Time limit for one answer to the other caller, in seconds."""

_FLOOD_LEAD: Final = 1.5
"""Time in seconds from the start of the flood to the other caller's first request, for importing and for
filling the queue."""


class ServiceAddress(NamedTuple):
    """The address of a measured service."""

    host: str
    port: int


@dataclass(frozen=True)
class Leg:
    """The answers to the other caller and to the flood, beside each other or alone."""

    latencies: Sequence[float]
    """Times from the planned time to the answer, in seconds, of the requests with an answer 200."""
    request_count: int
    flood_rate: float
    """Answers 200 to the flood per second."""
    flood_refusals: float
    """Refusals of the flood per second."""

    @property
    def success_rate(self) -> float:
        """Share of the other caller's requests with an answer 200."""
        return len(self.latencies) / self.request_count


def main() -> int:
    """Measure as the command line asks, and print a table; return 1 if a caller is starved beside shares."""
    options = _parse_arguments()
    if options.flood:
        return _send_flood(options.flood, options.seconds)
    legs: dict[str, list[Leg]] = {}
    try:
        with ExitStack() as stack:
            services = {
                name: stack.enter_context(_start_service(settings)) for name, settings in LIMITS.items()
            }
            for address in services.values():
                _send_requests(address, 2.0)  # warm-up
            for number in range(options.rounds):
                names = list(services)[number % len(services) :] + list(services)[: number % len(services)]
                for name in ("alone", *names):
                    address = services["no limits" if name == "alone" else name]
                    leg = _measure_leg(address, options.seconds, has_flood=name != "alone")
                    legs.setdefault(name, []).append(leg)
                    print(f"  round {number + 1}  {_describe(name, [leg])}", flush=True)
    except BenchError as error:
        print(f"bench-callers: {error}", file=sys.stderr)
        return 2
    return _show_legs(legs)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.callers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: 3)")
    parser.add_argument("--seconds", type=float, default=6.0, help="duration of each leg (default: 6)")
    parser.add_argument("--flood", metavar="URL", help=argparse.SUPPRESS)  # the process of the flood
    return parser.parse_args()


@contextmanager
def _start_service(settings: dict[str, str]) -> Iterator[ServiceAddress]:
    """Serve the model of the repository's zoo with these settings, and the defaults for all others."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    environment |= {"FOVEA_PORT": "0", "FOVEA_MODELS": str(ROOT / "zoo"), "FOVEA_DEFAULT_MODEL": "cifar10"}
    with start_process(
        [sys.executable, "-m", "fovea.service"],
        cwd=ROOT,
        env=environment | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        if process.stdout is None or not (greeting := process.stdout.readline()):
            raise BenchError("the service did not start; `fovea serve` shows why")
        host, port = greeting.split("http://")[1].strip().split(":")
        yield ServiceAddress(host, int(port))


def _measure_leg(address: ServiceAddress, seconds: float, *, has_flood: bool) -> Leg:
    """Measure the other caller for `seconds`, beside the flood or alone."""
    if not has_flood:
        latencies, count = _send_requests(address, seconds)
        return Leg(latencies, count, 0.0, 0.0)
    url = f"http://{address.host}:{address.port}/v1/classify"
    flood_seconds = seconds + _FLOOD_LEAD + 0.5
    command = [sys.executable, "-m", "fovea.bench.callers", "--flood", url, "--seconds", str(flood_seconds)]
    with start_process(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        time.sleep(_FLOOD_LEAD)
        latencies, count = _send_requests(address, seconds)
        if process.stdout is None or not (line := process.stdout.readline()):
            raise BenchError("the flood has ended early")
        statuses = json.loads(line)
    refusals = statuses.get("429", 0) + statuses.get("503", 0)
    return Leg(latencies, count, statuses.get("200", 0) / flood_seconds, refusals / flood_seconds)


def _send_flood(url: str, seconds: float) -> int:
    """Flood a service, and print the number of answers by status."""
    images = [draw_jpeg(seed) for seed in range(16)]
    result = run_closed_loop(url, images, callers=FLOOD_CALLERS, seconds=seconds, grace_seconds=1.0)
    print(json.dumps(result.statuses), flush=True)
    return 0


def _send_requests(address: ServiceAddress, seconds: float) -> tuple[list[float], int]:
    """Send images at fixed times, and return the latencies of the successful requests, and their number.

    Each connection sends every `_CONNECTIONS`th request, so that a slow answer does not delay the next.
    """
    count = max(1, int(seconds * REQUESTS_PER_SECOND))
    started_at = time.monotonic()
    planned_times = [started_at + number / REQUESTS_PER_SECOND for number in range(count)]
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        parts = [planned_times[first::_CONNECTIONS] for first in range(_CONNECTIONS)]
        latencies = pool.map(partial(_send_in_turn, address), parts)
        return [one for part in latencies for one in part], count


def _send_in_turn(address: ServiceAddress, planned_times: Sequence[float]) -> list[float]:
    """Send images on one connection, and return the latencies of the successful requests."""
    image, latencies = draw_jpeg(99), []
    connection = _connect(address)
    for planned_at in planned_times:
        time.sleep(max(0.0, planned_at - time.monotonic()))
        try:
            connection.request("POST", "/v1/classify", image)
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):  # such as a timeout
            connection.close()
            connection = _connect(address)
            continue
        if response.status == 200:
            latencies.append(time.monotonic() - planned_at)
    connection.close()
    return latencies


def _connect(address: ServiceAddress) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(*address, timeout=_ANSWER_TIMEOUT, source_address=(_OTHER_ADDRESS, 0))


def _percentile(legs: Sequence[Leg], percent: float) -> float:
    """Return a percentile of the latencies of all legs, in milliseconds."""
    return 1000 * compute_percentile(sorted(one for leg in legs for one in leg.latencies), percent)


def _success_rate(legs: Sequence[Leg]) -> float:
    return sum(len(leg.latencies) for leg in legs) / sum(leg.request_count for leg in legs)


def _describe(name: str, legs: Sequence[Leg]) -> str:
    median, slowest = _percentile(legs, 50), _percentile(legs, 99)
    return (
        f"| {name} | {_success_rate(legs):.1%} | {_format(median)} | {_format(slowest)} |"
        f" {statistics.median(leg.flood_rate for leg in legs):.0f} |"
        f" {statistics.median(leg.flood_refusals for leg in legs):.0f} |"
    )


def _format(milliseconds: float) -> str:
    return "" if math.isnan(milliseconds) else f"{milliseconds:.1f}"


def _show_legs(legs: dict[str, list[Leg]]) -> int:
    print("\n| limits | answered | median, ms | p99, ms | flood: images/s | flood: refusals/s |")
    print("|---|---|---|---|---|---|")
    for name, measured in legs.items():
        print(_describe(name, measured))
    problems = [
        f"{name}: {_success_rate(legs[name]):.1%} of the other caller's requests were answered; at least "
        f"{MIN_SUCCESS:.1%}"
        for name in ("shares", "all")
        if _success_rate(legs[name]) < MIN_SUCCESS
    ]
    print(f"\n{describe_processor()}; {describe_machine()}.")
    print("\n".join(problems) or "The other caller is not starved.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""The `make mixed` benchmark: the cost of bad input for clients with good images at full load.

The same good images are sent in closed loop alone and among 14 % of bad requests, alternating. The good
throughput may fall by the bad requests' share, as if each took as much work as a good request. No good
request may fail, and the service must count every bad request by its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import onnxruntime

from fovea.bench import kinds
from fovea.bench.contestants import FoveaVersion, Server, start_fovea
from fovea.bench.crowd import (
    CounterSnapshot,
    CrowdResult,
    RequestKind,
    find_differences,
    schedule_requests,
    send_requests,
    wait_for_counts,
)
from fovea.bench.processes import CpuStopwatch
from fovea.bench.workloads import CACHE, WORKLOADS, BenchError

SETTINGS: Final = {"FOVEA_BODY_TIMEOUT": "3", "FOVEA_HEADER_TIMEOUT": "3"}
"""Settings with shorter timeouts than the defaults, so that a round ends soon after its last slow client."""

CONNECTIONS: Final = 32


@dataclass(frozen=True)
class Leg:
    """The measurement of one load."""

    round: int
    name: str
    good_rate: float
    """Good images per second."""
    cpu_seconds: float
    """Processor time of the service per good image, in seconds."""
    others: float
    """Number of processors that were busy with something else."""
    request_counts: dict[str, int]
    answer_counts: dict[str, int]
    service_counts: dict[str, int]
    differences: list[str]


def main() -> int:
    """Measure as the command line asks, print tables, write JSON; return 1 if a claim fails."""
    options = _parse_arguments()
    workload = WORKLOADS["thumbnails"]
    try:
        images = [path.read_bytes() for path in workload.images]
        with start_fovea(FoveaVersion(settings=SETTINGS), "fovea", workload, "fast") as server:
            legs = _measure_legs(server, images, options)
    except BenchError as error:
        print(f"mixed: {error}", file=sys.stderr)
        return 2
    share = sum(kind.share for kind in kinds.make_bad_kinds(images))
    fall = 1 - statistics.median(_compute_ratios(legs))
    failures = [f"round {leg.round + 1}, {leg.name}: {one}" for leg in legs for one in leg.differences]
    if fall > share:
        failures.append(f"the throughput of good requests fell by {fall:.1%}; at most {share:.1%}")
    _show_legs(legs, share, fall, failures)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": describe_machine(),
        "share": share,
        "fall": fall,
        "failed": failures,
        "legs": [asdict(leg) for leg in legs],
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failures else 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.mixed", description=__doc__)
    parser.add_argument(
        "--requests", type=int, default=6000, help="requests of each load in each round (default: 6000)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument("--out", type=Path, default=CACHE / "mixed.json")
    return parser.parse_args()


def _measure_legs(server: Server, images: list[bytes], options: argparse.Namespace) -> list[Leg]:
    good_load = [kinds.make_good_kind(images)]
    loads = {
        "good requests only": good_load,
        "with bad requests": [*good_load, *kinds.make_bad_kinds(images)],
    }
    send_requests(
        server.url, schedule_requests(good_load, options.requests // 4, seed=0), connections=CONNECTIONS
    )
    legs = []
    for round_number in range(options.rounds):
        for name, load in loads.items():
            legs.append(
                _measure_leg(
                    server, name, schedule_requests(load, options.requests, seed=round_number), round_number
                )
            )
            print(
                f"  round {round_number + 1}  {name:<20}{legs[-1].good_rate:8.1f} good images/s", flush=True
            )
    return legs


def _measure_leg(server: Server, name: str, schedule: list[RequestKind], round_number: int) -> Leg:
    counts_before = CounterSnapshot.scrape(server.url)
    stopwatch = CpuStopwatch([server.process.pid])
    result = send_requests(server.url, schedule, connections=CONNECTIONS)
    used_seconds, others = stopwatch.read()
    counts = wait_for_counts(server.url, counts_before, schedule)
    good = result.statuses["good", 200]
    return Leg(
        round=round_number,
        name=name,
        good_rate=good / result.seconds,
        cpu_seconds=used_seconds / good,
        others=others,
        request_counts=dict(result.request_counts),
        answer_counts=_format_statuses(result),
        service_counts={f"{name} {label}": number for (name, label), number in counts.items()},
        differences=find_differences(result, schedule, counts),
    )


def _format_statuses(result: CrowdResult) -> dict[str, int]:
    return {f"{name}: {status}": number for (name, status), number in result.statuses.items()}


def describe_machine() -> str:
    """Return a description of the machine and the versions."""
    processors = len(os.sched_getaffinity(0))
    return (
        f"{platform.machine()}, {processors} processors, Python {platform.python_version()}, "
        f"ONNX Runtime {onnxruntime.__version__}, {' '.join(platform.libc_ver())}"
    )


def _compute_ratios(legs: list[Leg]) -> list[float]:
    """Return the good throughput among bad requests over the good throughput alone, by round."""
    return [among.good_rate / alone.good_rate for alone, among in zip(legs[::2], legs[1::2], strict=True)]


def _show_legs(legs: list[Leg], share: float, fall: float, failures: list[str]) -> None:
    print(
        "\n| round | good requests only, images/s | with bad requests | ratio | others, processors |\n"
        "|---|---|---|---|---|"
    )
    for baseline, among, ratio in zip(legs[::2], legs[1::2], _compute_ratios(legs), strict=True):
        print(f"| {baseline.round + 1} | {baseline.good_rate:.0f} | {among.good_rate:.0f} | {ratio:.3f} |"
              f" {max(baseline.others, among.others):.2f} |")  # fmt: skip
    for title, counters in (
        ("sent", [leg.request_counts for leg in legs]),
        ("answered, by kind and status", [leg.answer_counts for leg in legs]),
        ("counted by the service", [leg.service_counts for leg in legs]),
    ):
        print(f"\n| {title} | times |\n|---|---|")
        for name in sorted({name for counter in counters for name in counter}):
            print(f"| {name} | {sum(counter.get(name, 0) for counter in counters)} |")
    cost = statistics.median(leg.cpu_seconds for leg in legs[::2])
    cpu_share = 1 - cost / statistics.median(leg.cpu_seconds for leg in legs[1::2])
    print(
        f"\nThe throughput of good requests fell by {fall:.1%}; "
        f"at most {share:.1%}, the share of bad requests."
    )
    print(f"The bad requests took {cpu_share:.1%} of the service's processor time.")
    print(f"{describe_machine()}.")
    print("\n".join(failures) or "Every request was answered and counted correctly.")


if __name__ == "__main__":
    sys.exit(main())

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
from fovea.bench.contestants import Fovea, Server, fovea
from fovea.bench.crowd import Kind, Ledger, Outcome, counted, schedule, send, surprises
from fovea.bench.processes import Stopwatch
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
    sent: dict[str, int]
    answered: dict[str, int]
    counted: dict[str, int]
    surprises: list[str]


def main() -> int:
    """Measure as the command line asks, print tables, write JSON; return 1 if a claim fails."""
    given = _arguments()
    workload = WORKLOADS["thumbnails"]
    try:
        images = [path.read_bytes() for path in workload.images]
        with fovea(Fovea(settings=SETTINGS), "fovea", workload, "fast") as server:
            legs = _measure(server, images, given)
    except BenchError as error:
        print(f"mixed: {error}", file=sys.stderr)
        return 2
    share = sum(kind.share for kind in kinds.bad(images))
    fall = 1 - statistics.median(_ratios(legs))
    failed = [f"round {leg.round + 1}, {leg.name}: {one}" for leg in legs for one in leg.surprises]
    if fall > share:
        failed.append(f"the good ones' throughput fell by {fall:.1%}; at most {share:.1%}")
    _show(legs, share, fall, failed)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": machine(),
        "share": share,
        "fall": fall,
        "failed": failed,
        "legs": [asdict(leg) for leg in legs],
    }
    given.out.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.mixed", description=__doc__)
    parser.add_argument("--requests", type=int, default=6000, help="of each load in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=CACHE / "mixed.json")
    return parser.parse_args()


def _measure(server: Server, images: list[bytes], given: argparse.Namespace) -> list[Leg]:
    alone = [kinds.good(images)]
    loads = {"alone": alone, "among bad ones": [*alone, *kinds.bad(images)]}
    send(server.url, schedule(alone, given.requests // 4, seed=0), connections=CONNECTIONS)
    legs = []
    for turn in range(given.rounds):
        for name, load in loads.items():
            legs.append(_leg(server, name, schedule(load, given.requests, seed=turn), turn))
            print(f"  round {turn + 1}  {name:<15}{legs[-1].good_rate:8.1f} good images/s", flush=True)
    return legs


def _leg(server: Server, name: str, planned: list[Kind], turn: int) -> Leg:
    earlier = Ledger.read(server.url)
    watch = Stopwatch([server.process.pid])
    outcome = send(server.url, planned, connections=CONNECTIONS)
    used, others = watch.read()
    found = counted(server.url, earlier, planned)
    good = outcome.statuses["good", 200]
    return Leg(
        round=turn,
        name=name,
        good_rate=good / outcome.seconds,
        cpu_seconds=used / good,
        others=others,
        sent=dict(outcome.sent),
        answered=_named(outcome),
        counted={f"{name} {label}": number for (name, label), number in found.items()},
        surprises=surprises(outcome, planned, found),
    )


def _named(outcome: Outcome) -> dict[str, int]:
    return {f"{name}: {status}": number for (name, status), number in outcome.statuses.items()}


def machine() -> str:
    """Return a description of the machine and the versions."""
    processors = len(os.sched_getaffinity(0))
    return (
        f"{platform.machine()}, {processors} processors, Python {platform.python_version()}, "
        f"ONNX Runtime {onnxruntime.__version__}, {' '.join(platform.libc_ver())}"
    )


def _ratios(legs: list[Leg]) -> list[float]:
    """Return the good throughput among bad requests over the good throughput alone, by round."""
    return [among.good_rate / alone.good_rate for alone, among in zip(legs[::2], legs[1::2], strict=True)]


def _show(legs: list[Leg], share: float, fall: float, failed: list[str]) -> None:
    print("\n| round | alone, images/s | among bad ones | ratio | busy otherwise |\n|---|---|---|---|---|")
    for alone, among, ratio in zip(legs[::2], legs[1::2], _ratios(legs), strict=True):
        print(f"| {alone.round + 1} | {alone.good_rate:.0f} | {among.good_rate:.0f} | {ratio:.3f} |"
              f" {max(alone.others, among.others):.2f} |")  # fmt: skip
    for title, tallies in (
        ("sent", [leg.sent for leg in legs]),
        ("answered, by kind and status", [leg.answered for leg in legs]),
        ("counted by the service", [leg.counted for leg in legs]),
    ):
        print(f"\n| {title} | times |\n|---|---|")
        for name in sorted({name for tally in tallies for name in tally}):
            print(f"| {name} | {sum(tally.get(name, 0) for tally in tallies)} |")
    cost = statistics.median(leg.cpu_seconds for leg in legs[::2])
    work = 1 - cost / statistics.median(leg.cpu_seconds for leg in legs[1::2])
    print(f"\nThe good ones' throughput fell by {fall:.1%}; at most {share:.1%}, the others' share.")
    print(f"The bad ones took {work:.1%} of the service's processor time.")
    print(f"{machine()}.")
    print("\n".join(failed) or "Every request was answered and counted as it should be.")


if __name__ == "__main__":
    sys.exit(main())

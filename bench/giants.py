"""The `make giants` benchmark: the cost of legal 49 MP images for clients with thumbnails at full load.

The thumbnails are sent in closed loop alone, and beside one, two and four callers who repeatedly send a WebP
of 49 MP and two kilobytes. The thumbnails must keep at least half of their throughput.
"""

from __future__ import annotations

import argparse
import http.client
import statistics
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import urlsplit

from PIL import Image

from fovea.bench import kinds
from fovea.bench.contestants import Fovea, fovea
from fovea.bench.crowd import schedule, send
from fovea.bench.mixed import machine
from fovea.bench.workloads import WORKLOADS, BenchError

CONNECTIONS: Final = 16
"""Number of callers who send thumbnails."""

CALLERS: Final = (0, 1, 2, 4)
"""Number of callers who send giants, in each leg of a round."""

LEAST: Final = 0.5
"""Minimum share of their throughput that the thumbnails must keep."""

_SIDE: Final = 7000


def main() -> int:
    """Measure as the command line asks and print a table; return 1 if thumbnails lose over half."""
    options = _arguments()
    workload = WORKLOADS["thumbnails"]
    giant = kinds.encoded(Image.new("RGB", (_SIDE, _SIDE)), "WEBP", lossless=1, method=0)
    rates: dict[int, list[float]] = {callers: [] for callers in CALLERS}
    answered = dict.fromkeys(CALLERS, 0)
    try:
        images = [path.read_bytes() for path in workload.images]
        load = [kinds.good(images)]
        with fovea(Fovea(), "fovea", workload, "fast") as server:
            send(server.url, schedule(load, options.requests // 4, seed=0), connections=CONNECTIONS)
            for turn in range(options.rounds):
                for callers in CALLERS:
                    with _giants(server.url, giant, callers) as answers:
                        outcome = send(
                            server.url, schedule(load, options.requests, seed=turn), connections=CONNECTIONS
                        )
                    rates[callers].append(outcome.statuses["good", 200] / outcome.seconds)
                    answered[callers] += len(answers)
    except BenchError as error:
        print(f"giants: {error}", file=sys.stderr)
        return 2
    ratios = {
        callers: statistics.median(b / a for a, b in zip(rates[0], rates[callers], strict=True))
        for callers in CALLERS
    }
    print(
        "| callers with giants | thumbnails/s, median | of those alone | giants answered |\n|---|---|---|---|"
    )
    for callers in CALLERS:
        median = statistics.median(rates[callers])
        print(f"| {callers} | {median:.0f} | {ratios[callers]:.2f} | {answered[callers]} |")
    print(f"{machine()}.")
    worst = min(ratios.values())
    if worst < LEAST:
        print(f"The thumbnails kept {worst:.2f} of their throughput; at least {LEAST} is promised.")
        return 1
    return 0


@contextmanager
def _giants(url: str, giant: bytes, callers: int) -> Iterator[list[int]]:
    """Run callers who send giants; yield the list of the statuses of their answers."""
    over = threading.Event()
    answers: list[int] = []

    def call() -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
        while not over.is_set():
            connection.request("POST", "/v1/classify", giant)
            response = connection.getresponse()
            response.read()
            answers.append(response.status)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.giants", description=__doc__)
    parser.add_argument("--requests", type=int, default=4000, help="thumbnails of each leg")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

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
from fovea.bench.contestants import FoveaVersion, start_fovea
from fovea.bench.crowd import schedule_requests, send_requests
from fovea.bench.mixed import describe_machine
from fovea.bench.workloads import WORKLOADS, BenchError

CONNECTIONS: Final = 16
"""Number of callers who send thumbnails."""

CALLER_COUNTS: Final = (0, 1, 2, 4)
"""Number of callers who send giants, in each leg of a round."""

MIN_SHARE: Final = 0.5
"""Minimum share of their throughput that the thumbnails must keep."""

_SIDE: Final = 7000


def main() -> int:
    """Measure as the command line asks and print a table; return 1 if thumbnails lose over half."""
    options = _parse_arguments()
    workload = WORKLOADS["thumbnails"]
    giant = kinds.encode_picture(Image.new("RGB", (_SIDE, _SIDE)), "WEBP", lossless=1, method=0)
    rates: dict[int, list[float]] = {callers: [] for callers in CALLER_COUNTS}
    answer_counts = dict.fromkeys(CALLER_COUNTS, 0)
    try:
        images = [path.read_bytes() for path in workload.images]
        load = [kinds.make_good_kind(images)]
        with start_fovea(FoveaVersion(), "fovea", workload, "fast") as server:
            send_requests(
                server.url, schedule_requests(load, options.requests // 4, seed=0), connections=CONNECTIONS
            )
            for round_number in range(options.rounds):
                for callers in CALLER_COUNTS:
                    with _run_giant_callers(server.url, giant, callers) as statuses:
                        result = send_requests(
                            server.url,
                            schedule_requests(load, options.requests, seed=round_number),
                            connections=CONNECTIONS,
                        )
                    rates[callers].append(result.statuses["good", 200] / result.seconds)
                    answer_counts[callers] += len(statuses)
    except BenchError as error:
        print(f"giants: {error}", file=sys.stderr)
        return 2
    ratios = {
        callers: statistics.median(b / a for a, b in zip(rates[0], rates[callers], strict=True))
        for callers in CALLER_COUNTS
    }
    print(
        "| callers with giants | thumbnails/s, median | ratio to no giants | giants answered |\n"
        "|---|---|---|---|"
    )
    for callers in CALLER_COUNTS:
        median = statistics.median(rates[callers])
        print(f"| {callers} | {median:.0f} | {ratios[callers]:.2f} | {answer_counts[callers]} |")
    print(f"{describe_machine()}.")
    worst = min(ratios.values())
    if worst < MIN_SHARE:
        print(f"The thumbnails kept {worst:.2f} of their throughput; at least {MIN_SHARE} is required.")
        return 1
    return 0


@contextmanager
def _run_giant_callers(url: str, giant: bytes, callers: int) -> Iterator[list[int]]:
    """Run callers who send giants; yield the list of the statuses of their answers."""
    stop_event = threading.Event()
    statuses: list[int] = []

    def send_giants() -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
        while not stop_event.is_set():
            connection.request("POST", "/v1/classify", giant)
            response = connection.getresponse()
            response.read()
            statuses.append(response.status)

    threads = [threading.Thread(target=send_giants) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stop_event.set()
        for thread in threads:
            thread.join()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.giants", description=__doc__)
    parser.add_argument("--requests", type=int, default=4000, help="thumbnails in each leg (default: 4000)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: 3)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

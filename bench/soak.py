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
from dataclasses import asdict
from pathlib import Path
from typing import Final

from fovea.bench import kinds
from fovea.bench.contestants import FoveaVersion, start_fovea
from fovea.bench.crowd import (
    CounterSnapshot,
    RequestKind,
    find_differences,
    schedule_requests,
    send_requests,
    wait_for_counts,
)
from fovea.bench.mixed import CONNECTIONS, SETTINGS, describe_machine
from fovea.bench.processes import measure_cpu_seconds, measure_resident_bytes, wait_until_idle
from fovea.bench.soak_result import MAX_GROWTH, MAX_IDLE_CPU, IdleSample, SoakResult
from fovea.bench.workloads import CACHE, WORKLOADS, BenchError

PART_COUNT: Final = 10
IDLE_SECONDS: Final = 20.0
_SAMPLE_SECONDS: Final = 1.0


def main() -> int:
    """Run the soak, print a table, write JSON and a picture; return 1 if a claim fails."""
    options = _parse_arguments()
    try:
        result = run_soak(
            FoveaVersion(settings={**SETTINGS, **dict(options.set)}), options.requests, options.idle
        )
    except BenchError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    _show_result(result)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = {**asdict(result), "growth": result.growth, "failed": result.failures}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    if options.picture:
        # imported late: matplotlib is needed for the picture only
        from fovea.bench.picture import draw_memory

        draw_memory(result, options.out.with_suffix(".svg"))
    return 1 if result.failures else 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=300_000, help="number of requests (default: 300,000)")
    parser.add_argument(
        "--idle", type=float, default=IDLE_SECONDS, help="seconds to measure the idle service (default: 20)"
    )
    parser.add_argument("--set", type=_parse_setting, action="append", default=[], metavar="NAME=VALUE",
                        help="a setting or another environment variable of the service")  # fmt: skip
    parser.add_argument("--picture", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=CACHE / "soak.json")
    return parser.parse_args()


def _parse_setting(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def run_soak(version: FoveaVersion, requests: int, idle_seconds: float) -> SoakResult:
    """Start the service, send all requests, and watch the service.

    Raises `BenchError` if the service does not start.
    """
    workload = WORKLOADS["thumbnails"]
    load = kinds.make_mixed_kinds([path.read_bytes() for path in workload.images])
    request_counts: Counter[str] = Counter()
    differences: list[str] = []
    with (
        start_fovea(version, version.name, workload, "fast") as server,
        _MemoryRecorder(server.process.pid) as curve,
    ):
        pids = [server.process.pid]
        idle_samples = [_measure_idle(pids, 0, curve)]
        for part in range(PART_COUNT):
            schedule = schedule_requests(
                load, requests * (part + 1) // PART_COUNT - idle_samples[-1].requests, seed=part
            )
            differences += _run_part(server.url, schedule, request_counts)
            idle_samples.append(_measure_idle(pids, sum(request_counts.values()), curve))
            _print_sample(idle_samples[-1])
        wait_until_idle(pids)
        cpu_before, started_at = measure_cpu_seconds(pids), time.monotonic()
        curve.stop()  # reading /proc takes processor time too
        time.sleep(idle_seconds)
        idle_cpu = (measure_cpu_seconds(pids) - cpu_before) / (time.monotonic() - started_at)
    return SoakResult(
        describe_machine(), idle_samples, curve.points, dict(request_counts), differences, idle_cpu
    )


def _run_part(url: str, schedule: list[RequestKind], request_counts: Counter[str]) -> list[str]:
    counts_before = CounterSnapshot.scrape(url)
    result = send_requests(url, schedule, connections=CONNECTIONS)
    request_counts.update(result.request_counts)
    return find_differences(result, schedule, wait_for_counts(url, counts_before, schedule))


def _measure_idle(pids: list[int], requests: int, curve: _MemoryRecorder) -> IdleSample:
    wait_until_idle(pids)
    return IdleSample(requests, curve.elapsed_seconds, measure_resident_bytes(pids))


class _MemoryRecorder:
    """A thread that reads the memory of a tree every second.

    The thread only appends to `points`. The main thread reads the points after `stop` has joined the thread.
    """

    def __init__(self, pid: int) -> None:
        self._pids = [pid]
        self._started_at = time.monotonic()
        self._stop_event = threading.Event()
        self._thread = threading.Thread(target=self._record_memory)
        self.points: list[tuple[float, int]] = []

    def __enter__(self) -> _MemoryRecorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop_event.set()
        self._thread.join()

    @property
    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._started_at

    def _record_memory(self) -> None:
        while not self._stop_event.wait(_SAMPLE_SECONDS):
            self.points.append((self.elapsed_seconds, measure_resident_bytes(self._pids)))


def _print_sample(sample: IdleSample) -> None:
    print(
        f"  {sample.requests:>7} requests  {sample.seconds:6.0f} s  {sample.resident_bytes / 1e6:7.1f} MB",
        flush=True,
    )


def _show_result(result: SoakResult) -> None:
    print("\n| requests | seconds | memory at rest, MB | ratio to the first tenth |\n|---|---|---|---|")
    for sample in result.idle_samples:
        ratio = sample.resident_bytes / result.idle_samples[1].resident_bytes
        print(
            f"| {sample.requests} | {sample.seconds:.0f} | {sample.resident_bytes / 1e6:.1f} | {ratio:.3f} |"
        )
    highest = max((memory for _, memory in result.curve), default=0)
    print(f"\nThe memory at rest grew by {result.growth:.1%}; at most {MAX_GROWTH:.0%}."
          f" Under load it was at most {highest / 1e6:.0f} MB.")  # fmt: skip
    print(f"The idle service uses {result.idle_cpu:.2%} of a processor; at most {MAX_IDLE_CPU:.1%}.")
    print(f"{result.machine}.")
    print("\n".join(result.differences) or "Every request was answered and counted correctly.")


if __name__ == "__main__":
    sys.exit(main())

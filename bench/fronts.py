"""The `make fronts` benchmark: how many runner processors one service process can keep busy.

The service runs with runners that sleep instead of computing, so that two processors are enough to stand for
64. The service process has a processor of its own; the load and the runners share the other one. The table
shows the processor time of the service process for one image, the images per second that it could pass on
if it were always busy, and the images per second that so many runners need.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from fovea.bench.cells import run_wrk
from fovea.bench.mixed import describe_machine
from fovea.bench.oip import start_service
from fovea.bench.processes import find_process_tree, measure_own_cpu_seconds
from fovea.bench.workloads import ROOT, draw_picture
from fovea.service.runners.batch_messages import BatchReport, Item
from fovea.service.runners.predictor import Predictor

_SECONDS_VARIABLE: Final = "FRONTS_SECONDS_PER_IMAGE"

_SITE_CODE: Final = """
import sys
if any("runners" in argument and "process" in argument for argument in sys.orig_argv):
    from fovea.bench.fronts import install_sleep
    install_sleep()
"""
"""Content of `sitecustomize.py`, which Python runs at the start of every process."""


class Load(NamedTuple):
    """Runners of one kind, and the images that they need."""

    title: str
    runners: int
    seconds_per_image: float
    size: tuple[int, int]
    settings: dict[str, str]

    @property
    def needed_rate(self) -> float:
        """Images per second that keep all runners busy."""
        return self.runners / self.seconds_per_image


_LOADS: Final = [
    *(Load(f"thumbnails of 2.5 ms, {count} runners", count, 0.0025, (32, 32), {}) for count in (8, 16, 64)),
    *(Load(f"photographs of 20 ms, {count} runners", count, 0.02, (500, 375), {}) for count in (8, 16, 64)),
    Load("a GPU of 10,000 thumbnails/s", 1, 0.0001, (32, 32), {"FOVEA_BATCH_MAX": "32"}),
]


def install_sleep() -> None:
    """Make this runner sleep for each image instead of decoding it. The first image is really answered."""
    seconds = float(os.environ[_SECONDS_VARIABLE])
    predict_batch = Predictor.predict_batch
    first_reports: list[BatchReport] = []

    def sleep_instead(
        self: Predictor,
        images: Sequence[Item],
        *,
        exclusive: bool = False,
        deadlines: Sequence[float | None] = (),
    ) -> BatchReport:
        if not first_reports:
            first_reports.append(predict_batch(self, images[:1], exclusive=exclusive))
        time.sleep(seconds * len(images))
        first, count = first_reports[0], len(images)
        return first._replace(
            answers=[*first.answers] * count,
            decode_seconds=[*first.decode_seconds] * count,
            batch_size=count,
        )

    Predictor.predict_batch = sleep_instead  # type: ignore[method-assign]


def main() -> int:
    """Measure every load and print a table."""
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.fronts", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="time for each row (default: 10)")
    seconds = parser.parse_args().seconds
    processors = sorted(os.sched_getaffinity(0))
    print("| load | service process, µs/image | it can pass on, /s | needed, /s | processes |")
    print("|---|---|---|---|---|")
    for load in _LOADS:
        cpu_seconds = _measure(load, seconds, processors[0], processors[-1])
        possible_rate = 1 / cpu_seconds
        print(
            f"| {load.title} | {1e6 * cpu_seconds:.0f} | {possible_rate:,.0f} | {load.needed_rate:,.0f} | "
            f"{load.needed_rate / possible_rate:.1f} |",
            flush=True,
        )
    print(f"\n{describe_machine()}.")
    return 0


def _measure(load: Load, seconds: float, service_processor: int, other_processor: int) -> float:
    """Return the processor time of the service process for one image, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(_SITE_CODE)
        draw_picture(load.size, 0).save(Path(folder) / "image.jpg", quality=90)
        images = Path(folder) / "images"
        images.write_text(f"{folder}/image.jpg\n")
        settings = {
            "PYTHONPATH": f"{folder}:{ROOT}",
            _SECONDS_VARIABLE: str(load.seconds_per_image),
            "FOVEA_RUNNERS": str(load.runners),
            "FOVEA_DEFAULT_MODEL": "cifar10",
            **load.settings,
        }
        os.sched_setaffinity(0, {other_processor})  # inherited by everything that is started from here on
        with start_service(ROOT / "zoo", **settings) as (host, port):
            service = find_process_tree(os.getpid())[1]  # the only child and its own children
            os.sched_setaffinity(service, {service_processor})
            url = f"http://{host}:{port}/v1/classify"
            connections = min(512, 4 * load.runners if load.runners > 1 else 128)
            run_wrk(url, connections, 2, images)
            before = measure_own_cpu_seconds(service)
            report = run_wrk(url, connections, seconds, images)
            return (measure_own_cpu_seconds(service) - before) / report["requests"]


if __name__ == "__main__":
    sys.exit(main())

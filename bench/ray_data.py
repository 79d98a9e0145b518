"""Compare the ways to classify many photographs on this machine: `make bench-ray`, 3 minutes.

The local engine and the Ray engine of `fovea classify --out` and a service over HTTP classify the same
photographs one after the other, on the same processors. Each rate is that between the first quarter of the
photographs and 85 % of them, when every part is busy. `start` is the time to the first answer: it is the
price of a run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from fovea import BatchClassifier, Client
from fovea.bench.bulk import make_images
from fovea.bench.mixed import describe_machine
from fovea.bench.oip import start_service
from fovea.bench.workloads import ROOT, WORKLOADS, BenchError
from fovea.bulk.engine import Engine
from fovea.bulk.inputs import list_entries
from fovea.bulk.local_engine import LocalEngine
from fovea.bulk.ray_engine import RayEngine
from fovea.service.settings import load_settings

_STEADY: Final = 0.25, 0.85
"""Shares of the photographs between which the rate is measured."""

_CALLERS: Final = 4
"""Number of threads that send requests: two for each processor of a small machine keep it busy."""

_REQUEST_IMAGES: Final = 8
"""Number of photographs in a request."""

_MODEL: Final = ROOT / "zoo"


class Timing(NamedTuple):
    """Measured times of a contestant."""

    start: float
    """Time to the first answer, in seconds."""
    rate: float
    """Photographs per second when every part is busy."""
    seconds: float
    """Time of the whole run, with its start and its end."""


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m fovea.bench.ray_data", description=__doc__)
    parser.add_argument("--images", type=int, default=2_000, help="photographs (default: 2,000)")
    count = parser.parse_args().images
    contestants: dict[str, Callable[[Path], Iterator[int]]] = {
        "`fovea classify --out`, local engine": _run_local,
        "`fovea classify --out --engine ray`": _run_ray,
        "`ds.map_batches(fovea.BatchClassifier)`": _run_batches,
        f"a service, {_CALLERS} callers with {_REQUEST_IMAGES} photographs each": _run_http,
    }
    try:
        folder = make_images(WORKLOADS["photographs"], count)
        print("| way | photographs/s | start, s | whole run, s |\n|---|---|---|---|")
        for name, run in contestants.items():
            timing = measure(run(folder), count)
            print(f"| {name} | {timing.rate:.1f} | {timing.start:.1f} | {timing.seconds:.1f} |", flush=True)
    except BenchError as error:
        print(f"bench-ray: {error}", file=sys.stderr)
        return 2
    print(f"\n{count:,} photographs. {describe_machine()}.")
    return 0


def measure(answers: Iterator[int], count: int) -> Timing:
    """Time a contestant, which yields how many photographs it has just answered."""
    began_at = time.monotonic()
    times: list[tuple[float, int]] = []
    done = 0
    for number in answers:
        done += number
        times.append((time.monotonic() - began_at, done))
    seconds = time.monotonic() - began_at
    if done != count:
        raise BenchError(f"{done} of {count} photographs were answered")
    first, last = (next(point for point in times if point[1] >= share * count) for share in _STEADY)
    return Timing(times[0][0], (last[1] - first[1]) / (last[0] - first[0]), seconds)


def _run_local(folder: Path) -> Iterator[int]:
    settings = load_settings(models=_MODEL)
    return _run_engine(LocalEngine.load(settings, None, top_k=5, coverage=None), folder)


def _run_ray(folder: Path) -> Iterator[int]:
    settings = load_settings(models=_MODEL)
    return _run_engine(RayEngine.load(settings, None, top_k=5, coverage=None, address="local"), folder)


def _run_engine(engine: Engine, folder: Path) -> Iterator[int]:
    entries = list_entries([str(folder)])
    chunks = iter(lambda: list(islice(entries, engine.chunk_size)), [])
    for chunk in engine.classify(chunks):
        yield len(chunk.rows)


def _run_batches(folder: Path) -> Iterator[int]:
    import ray

    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="error",
             object_store_memory=1 << 30)  # fmt: skip
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        paths = [{"path": str(path)} for path in _list_files(folder)]
        answers = ray.data.from_items(paths, override_num_blocks=len(paths) // 16).map_batches(
            BatchClassifier(_MODEL), batch_size=16
        )
        for batch in answers.iter_batches(batch_size=None, prefetch_batches=0):
            yield len(batch["label"])
    finally:
        ray.shutdown()


def _run_http(folder: Path) -> Iterator[int]:
    files = _list_files(folder)
    requests = [files[start : start + _REQUEST_IMAGES] for start in range(0, len(files), _REQUEST_IMAGES)]
    with (
        start_service(_MODEL) as (host, port),
        Client(f"http://{host}:{port}") as client,
        ThreadPoolExecutor(_CALLERS) as pool,
    ):

        def classify(paths: Sequence[Path]) -> int:
            return len(client.classify(paths))

        yield from pool.map(classify, requests)


def _list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())

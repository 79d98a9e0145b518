"""The figures of docs/benchmarks.md on the service at rest, and on a scrape at full load: `make figures`.

The script creates a fresh environment with only the runtime dependencies in a temporary folder. It starts the
service from there with the default model several times.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fovea.bench.cells import run_wrk
from fovea.bench.processes import measure_resident_bytes

ROOT: Final = Path(__file__).resolve().parents[1]
SAMPLE: Final = ROOT / "samples" / "ship.jpg"
START_COUNT: Final = 5
REQUEST_COUNT: Final = 200
LOAD_SECONDS: Final = 10
MB: Final = 1e6


def main() -> None:
    """Measure and print a Markdown table."""
    with tempfile.TemporaryDirectory() as folder:
        python, seconds = _install_service(Path(folder))
        installed_bytes = sum(path.lstat().st_size for path in Path(folder).rglob("*") if path.is_file())
        starts, idle_bytes, used_bytes = zip(
            *(measure_start(python) for _ in range(START_COUNT)), strict=True
        )
        single_worker, several_workers = (_measure_scrapes(python, workers) for workers in (1, 3))
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}\n")
    print("| | |\n|---|---|")
    print(f"| Cold start to the first answer, median of {START_COUNT} | {statistics.median(starts):.2f} s |")
    print(f"| Memory of the service and its runners at rest | {statistics.median(idle_bytes) / MB:.0f} MB |")
    print(f"| Memory after {REQUEST_COUNT} images | {statistics.median(used_bytes) / MB:.0f} MB |")
    print(f"| Installed, runtime dependencies alone | {installed_bytes / MB:.0f} MB |")
    print(f"| Making that environment | {seconds:.0f} s |")
    for workers, scrapes in (("one worker", single_worker), ("three", several_workers)):
        median, worst = 1000 * statistics.median(scrapes), 1000 * max(scrapes)
        print(f"| Scrape under full load, {workers}, median and worst | {median:.0f}, {worst:.0f} ms |")


def _install_service(folder: Path) -> tuple[Path, float]:
    """Create the environment; return its interpreter and the duration in seconds."""
    started_at = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--editable", ROOT], check=True)
    return python, time.monotonic() - started_at


def measure_start(python: Path) -> tuple[float, int, int]:
    """Return the seconds to the first answer, and the resident bytes after it and after many answers."""
    started_at = time.monotonic()
    with _start_service(python) as (process, url):
        _classify_sample(url)
        seconds = time.monotonic() - started_at
        idle_bytes = measure_resident_bytes([process.pid])
        for _ in range(REQUEST_COUNT):
            _classify_sample(url)
        return seconds, idle_bytes, measure_resident_bytes([process.pid])


def _measure_scrapes(python: Path, workers: int) -> list[float]:
    """Return the duration of each of many scrapes, in seconds, under load from 32 callers."""
    durations = []
    with (
        _start_service(python, FOVEA_WORKERS=str(workers)) as (_, url),
        tempfile.NamedTemporaryFile("w") as images,
    ):
        images.write(f"{SAMPLE}\n")
        images.flush()
        with ThreadPoolExecutor() as pool:
            load = pool.submit(run_wrk, f"{url}/v1/classify", 32, LOAD_SECONDS, Path(images.name))
            time.sleep(1)
            while not load.done():
                started_at = time.monotonic()
                with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:  # noqa: S310 - loopback
                    response.read()
                durations.append(time.monotonic() - started_at)
                time.sleep(0.1)
            load.result()
    return durations[:-1]  # the last scrape may have had the service to itself


@contextmanager
def _start_service(python: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [python, "-m", "fovea.service"],
        cwd=ROOT,
        env={**os.environ, "FOVEA_PORT": "0", "FOVEA_DRAIN_GRACE": "0", **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        greeting = process.stdout.readline() if process.stdout else ""
        yield process, greeting.split(" at ")[-1].strip()
    finally:
        process.terminate()
        process.wait(timeout=30)


def _classify_sample(url: str) -> None:
    request = urllib.request.Request(f"{url}/v1/classify", SAMPLE.read_bytes(), method="POST")  # noqa: S310
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310 - loopback
        response.read()


if __name__ == "__main__":
    main()

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

from fovea.bench.cells import wrk
from fovea.bench.processes import resident_bytes

ROOT: Final = Path(__file__).resolve().parents[1]
SAMPLE: Final = ROOT / "samples" / "ship.jpg"
STARTS: Final = 5
REQUESTS: Final = 200
LOAD_SECONDS: Final = 10
MB: Final = 1e6


def main() -> None:
    """Measure and print a Markdown table."""
    with tempfile.TemporaryDirectory() as folder:
        python, seconds = _install(Path(folder))
        installed = sum(path.lstat().st_size for path in Path(folder).rglob("*") if path.is_file())
        starts, idle, used = zip(*(_start(python) for _ in range(STARTS)), strict=True)
        alone, shared = (_scrapes(python, workers) for workers in (1, 3))
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}\n")
    print("| | |\n|---|---|")
    print(f"| Cold start to the first answer, median of {STARTS} | {statistics.median(starts):.2f} s |")
    print(f"| Memory of the service and its runners at rest | {statistics.median(idle) / MB:.0f} MB |")
    print(f"| Memory after {REQUESTS} images | {statistics.median(used) / MB:.0f} MB |")
    print(f"| Installed, runtime dependencies alone | {installed / MB:.0f} MB |")
    print(f"| Making that environment | {seconds:.0f} s |")
    for workers, scrapes in (("one worker", alone), ("three", shared)):
        median, worst = 1000 * statistics.median(scrapes), 1000 * max(scrapes)
        print(f"| Scrape under full load, {workers}, median and worst | {median:.0f}, {worst:.0f} ms |")


def _install(folder: Path) -> tuple[Path, float]:
    """Create the environment; return its interpreter and the duration in seconds."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--editable", ROOT], check=True)
    return python, time.monotonic() - started


def _start(python: Path) -> tuple[float, int, int]:
    """Return the seconds to the first answer, and the resident bytes after it and after many answers."""
    started = time.monotonic()
    with _service(python) as (process, url):
        _classify(url)
        seconds = time.monotonic() - started
        idle = resident_bytes([process.pid])
        for _ in range(REQUESTS):
            _classify(url)
        return seconds, idle, resident_bytes([process.pid])


def _scrapes(python: Path, workers: int) -> list[float]:
    """Return the duration of each of many scrapes, in seconds, under load from 32 callers."""
    taken = []
    with _service(python, FOVEA_WORKERS=str(workers)) as (_, url), tempfile.NamedTemporaryFile("w") as images:
        images.write(f"{SAMPLE}\n")
        images.flush()
        with ThreadPoolExecutor() as pool:
            load = pool.submit(wrk, f"{url}/v1/classify", 32, LOAD_SECONDS, Path(images.name))
            time.sleep(1)
            while not load.done():
                started = time.monotonic()
                with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:  # noqa: S310 - loopback
                    answer.read()
                taken.append(time.monotonic() - started)
                time.sleep(0.1)
            load.result()
    return taken[:-1]  # the last scrape may have had the service to itself


@contextmanager
def _service(python: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
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


def _classify(url: str) -> None:
    request = urllib.request.Request(f"{url}/v1/classify", SAMPLE.read_bytes(), method="POST")  # noqa: S310
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - loopback
        answer.read()


if __name__ == "__main__":
    main()

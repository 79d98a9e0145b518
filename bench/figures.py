"""The figures of the README that describe the service at rest: `make figures`.

A fresh environment with the runtime dependencies alone is made in a temporary folder, and the service
is started from it with the default model, several times over.
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
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.processes import resident_bytes

ROOT: Final = Path(__file__).parents[1]
SAMPLE: Final = ROOT / "samples" / "ship.jpg"
STARTS: Final = 5
REQUESTS: Final = 200
MB: Final = 1e6


def main() -> None:
    """Measure and print, as a Markdown table."""
    with tempfile.TemporaryDirectory() as folder:
        python, seconds = _install(Path(folder))
        installed = sum(path.lstat().st_size for path in Path(folder).rglob("*") if path.is_file())
        starts, idle, used = zip(*(_start(python) for _ in range(STARTS)), strict=True)
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}\n")
    print("| | |\n|---|---|")
    print(f"| Cold start to the first answer, median of {STARTS} | {statistics.median(starts):.2f} s |")
    print(f"| Memory of the service and its runners at rest | {statistics.median(idle) / MB:.0f} MB |")
    print(f"| Memory after {REQUESTS} images | {statistics.median(used) / MB:.0f} MB |")
    print(f"| Installed, runtime dependencies alone | {installed / MB:.0f} MB |")
    print(f"| Making that environment | {seconds:.0f} s |")


def _install(folder: Path) -> tuple[Path, float]:
    """Make the environment; return its interpreter and the seconds that it took."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--editable", ROOT], check=True)
    return python, time.monotonic() - started


def _start(python: Path) -> tuple[float, int, int]:
    """Seconds from nothing to the first answer; resident bytes after it, and after many more."""
    started = time.monotonic()
    with _service(python) as (process, url):
        _classify(url)
        seconds = time.monotonic() - started
        idle = resident_bytes([process.pid])
        for _ in range(REQUESTS):
            _classify(url)
        return seconds, idle, resident_bytes([process.pid])


@contextmanager
def _service(python: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [python, "-m", "service"],
        cwd=ROOT,
        env={**os.environ, "FOVEA_PORT": "0", "FOVEA_LOG_LEVEL": "warning", "FOVEA_DRAIN_GRACE": "0"},
        stdout=subprocess.PIPE,
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

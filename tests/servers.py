"""A real server in a process of its own, on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import IO

import httpx

ROOT = Path(__file__).parents[1]
SAMPLE = re.compile(r"^(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$", re.MULTILINE)


def run_service(**settings: str) -> subprocess.CompletedProcess[str]:
    """Run the service to its end: for starts that must fail."""
    return subprocess.run(
        [sys.executable, "-m", "service"],
        env=_environment(settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _environment(settings: dict[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    return {**inherited, "FOVEA_PORT": "0", **settings}


class Server(AbstractContextManager["Server"]):
    """Started and listening inside the `with`; ended by SIGTERM after it."""

    def __init__(self, **settings: str) -> None:
        self._settings = settings

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service"],
            env=_environment(self._settings),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.greeting = _greeting(self.process)
        self.url = re.findall(r"http://\S+", self.greeting)[0]
        self.client = httpx.Client(base_url=self.url, timeout=60)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.log = self.process.communicate(timeout=30)[1]
        finally:
            self.process.kill()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of this name that have these labels."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        return sum(
            float(sample["value"])
            for sample in SAMPLE.finditer(self.client.get("/metrics").text)
            if sample["name"] == name and wanted <= set((sample["labels"] or "").split(","))
        )


def _greeting(process: subprocess.Popen[str]) -> str:
    """The three lines that the service prints once it listens."""
    lines = [_pipe(process.stdout).readline() for _ in range(3)]
    if not lines[-1]:
        raise RuntimeError(f"the service did not start: {_pipe(process.stderr).read()}")
    return "".join(lines)


def _pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RuntimeError("the process has no pipe")
    return stream

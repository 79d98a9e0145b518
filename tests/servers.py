"""A real server in its own process, on a free port."""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx

from fovea.service.artifact.repository import find_versions

ROOT = Path(__file__).parents[1]
DEFAULT_MODEL = find_versions(ROOT / "zoo", "cifar10")[0].path
"""The model that a service without settings serves: int8."""

TEACHING_MODEL = find_versions(ROOT / "zoo", "tiny_vgg")[0].path
"""The small model that the page teaches with."""

FLOAT_MODEL = ROOT / "zoo" / "cifar10" / "3" / "model.onnx"
"""The float version of the default model, for tests of float arithmetic and of large weights."""

METRIC_SAMPLE = re.compile(r"^(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$", re.MULTILINE)


def run_service(**settings: str) -> subprocess.CompletedProcess[str]:
    """Run the service until it ends; for starts that must fail."""
    return subprocess.run(
        [sys.executable, "-m", "fovea.service"],
        env=_service_environment(settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _service_environment(settings: dict[str, str]) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    return {**environment, "FOVEA_PORT": "0", "FOVEA_DRAIN_GRACE": "0", **settings}


class Server(AbstractContextManager["Server"]):
    """A service that listens inside the `with` block, and gets SIGTERM afterwards."""

    def __init__(
        self,
        popen: Mapping[str, Any] | None = None,
        client_tls: ssl.SSLContext | None = None,
        /,
        **settings: str,
    ) -> None:
        """Create a server; the arguments `popen` for `subprocess.Popen` replace the usual ones.

        `client_tls` is how `client` speaks TLS, if the service does.
        """
        self._client_tls = client_tls
        self._popen_arguments = popen or {}
        self._settings = settings

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(
            **{
                "args": [sys.executable, "-m", "fovea.service"],
                "env": _service_environment(self._settings),
                "cwd": ROOT,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                **self._popen_arguments,
            }
        )
        self.greeting = _read_greeting(self.process)
        self.url = re.findall(r"https?://\S+", self.greeting)[0]
        self.client = httpx.Client(base_url=self.url, timeout=60, verify=self._client_tls or True)
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
            self.log = self.process.communicate(timeout=60)[1]
        finally:
            self.process.kill()

    def wait_for_metric(self, value: float, name: str, **labels: str) -> None:
        """Wait until a metric has this value."""
        wait_until(lambda: self.read_metric(name, **labels) == value)

    @property
    def runner_pids(self) -> set[int]:
        """Return the process ids of the service's runners."""
        return self.child_pids("runners.process")

    def child_pids(self, module: str) -> set[int]:
        """Return the ids of the child processes that run this module of the service."""
        return {pid for pid in list_children(self.process.pid) if is_running_module(pid, module)}

    def read_metric(self, name: str, **labels: str) -> float:
        """Return the sum of all samples with this name and these labels."""
        return sum_samples(self.client.get("/metrics").text, name, **labels)


def sum_samples(metrics: str, name: str, **labels: str) -> float:
    """Return the sum of all samples with this name and these labels in the text of `/metrics`."""
    label_pairs = {f'{key}="{value}"' for key, value in labels.items()}
    return sum(
        float(sample["value"])
        for sample in METRIC_SAMPLE.finditer(metrics)
        if sample["name"] == name and label_pairs <= set((sample["labels"] or "").split(","))
    )


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds.

    Raises `TimeoutError` after two minutes.
    """
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not hold within 120 s")
        time.sleep(0.005)  # leaves the processor to the awaited process


def is_running(pid: int) -> bool:
    """Return whether the process exists and any of its threads has not ended."""
    process = Path(f"/proc/{pid}")
    try:
        state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
        return state not in "ZX" or len(list((process / "task").iterdir())) > 1
    except OSError:
        return False


def list_children(pid: int) -> set[int]:
    """Return the ids of the processes that a process has started."""
    children: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has just ended
            children.update(map(int, path.read_text().split()))
    return children


def read_open_files(pid: int) -> dict[Path, str]:
    """Return the names of the files that a process has open, by their paths in `/proc`."""
    names: dict[Path, str] = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it has just been closed
            names[path] = str(path.readlink())
    return names


def is_running_module(pid: int, module: str) -> bool:
    """Return whether a process was started for this module of the service."""
    try:
        return f"fovea.service.{module} ".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # the process has just ended
        return False


def _read_greeting(process: subprocess.Popen[str]) -> str:
    """Return the three lines that the service prints when it listens."""
    lines = [_require_pipe(process.stdout).readline() for _ in range(3)]
    if not lines[-1]:
        raise RuntimeError(f"the service did not start: {_require_pipe(process.stderr).read()}")
    return "".join(lines)


def _require_pipe(stream: IO[str] | None) -> IO[str]:
    if stream is None:
        raise RuntimeError("the process has no pipe")
    return stream

"""The disturbed service as seen from outside: its processes, its metrics and its memory."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fovea.bench.chaos.leaks import IdleState
from fovea.bench.chaos.verdict import ServiceCounts
from fovea.bench.groups import ControlGroup
from fovea.bench.processes import find_process_tree, measure_resident_bytes, read_command_line, start_process
from fovea.bench.workloads import ROOT, BenchError

BATCH_TIMEOUT: Final = 10.0
"""FOVEA_BATCH_TIMEOUT, in seconds; a stopped runner is replaced during a run."""

TRIAL_SECONDS: Final = 5.0
"""FOVEA_TRIAL_SECONDS; a trial may take ten times as long, and so may the loading of a model."""

ANSWER_LIMIT: Final = BATCH_TIMEOUT + 10.0
"""Time limit for any answer without killed or stopped runners meanwhile, in seconds.

At half load an answer takes less than one second, but giants delay a runner, and the machine may be busy with
something else.
"""

_SAMPLE: Final = re.compile(r"^(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

_ROLES: Final = {
    "runner": b"fovea.service.runners.process ",
    "explainer": b"fovea.service.explain.process ",
    "worker": b"\0--worker\0",
}
"""Parts of command lines that identify the service's processes."""

_START_SECONDS: Final = 120.0


class Service:
    """The service as seen from outside."""

    def __init__(self, url: str, process: subprocess.Popen[str], group: ControlGroup | None) -> None:
        self.url = url
        self.pid = process.pid
        self.process = process
        self.group = group

    @property
    def is_alive(self) -> bool:
        """Flag for a first process that has not ended."""
        return self.process.poll() is None

    def find_pids(self, role: str) -> list[int]:
        """Return the service's processes of this role: `runner`, `worker` or `explainer`."""
        return [
            one
            for one in find_process_tree(self.pid)
            if one != self.pid and _ROLES[role] in read_command_line(one)
        ]

    def scrape_metrics(self, timeout: float = ANSWER_LIMIT) -> list[tuple[str, dict[str, str], float]]:
        """Return all samples as (name, labels, value).

        Raises `OSError`.
        """
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=timeout) as response:  # noqa: S310 - ours
            text = response.read().decode()
        return [
            (
                sample_match["name"],
                dict(_LABEL.findall(sample_match["labels"] or "")),
                float(sample_match["value"]),
            )
            for sample_match in _SAMPLE.finditer(text)
        ]

    def read_gauge(self, name: str) -> float:
        """Return the sum of a metric's samples."""
        return sum(value for one, _, value in self.scrape_metrics() if one == name)

    def measure_idle_state(self) -> IdleState:
        """Return the current memory and open files."""
        files = 0
        for pid in find_process_tree(self.pid):
            with contextlib.suppress(OSError):
                files += len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return IdleState(measure_resident_bytes([self.pid]), self.measure_main_bytes(), files)

    def measure_main_bytes(self) -> int:
        """Return the resident memory of the first process, in bytes.

        Raises `OSError`.
        """
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def open_process(service: Service, pid: int) -> Iterator[int | None]:
    """Yield a descriptor of one of the service's processes, or None if the process has ended.

    A process id alone could soon belong to another process (pidfd_open(2)).
    """
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        yield None
        return
    try:
        yield descriptor if pid in find_process_tree(service.pid) else None
    finally:
        os.close(descriptor)


def send_signal(descriptor: int, number: signal.Signals) -> bool:
    """Send a signal to a process; return false if the process has ended."""
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    return True


def has_ended(descriptor: int) -> bool:
    """Return whether a process has ended (its descriptor is readable then, pidfd_open(2))."""
    return bool(select.select([descriptor], [], [], 0)[0])


@contextmanager
def start_service(
    root: Path, log: Path, group: ControlGroup | None, settings: dict[str, str]
) -> Iterator[Service]:
    """Start the service on a free port.

    Raises `BenchError`.
    """
    base_environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    base_settings = {
        "FOVEA_MODELS": str(root),
        "FOVEA_PORT": "0",
        "FOVEA_DRAIN_GRACE": "0",
        "FOVEA_MANAGEMENT": "true",
        "FOVEA_WATCH": "0",
        "FOVEA_BATCH_TIMEOUT": str(BATCH_TIMEOUT),
        "FOVEA_TRIAL_SECONDS": str(TRIAL_SECONDS),
        "FOVEA_EXPLAIN_SECONDS": "2",
        "FOVEA_EXPLAIN_IDLE": "5",
        "FOVEA_LOG_FORMAT": "json",
    }
    command = [sys.executable, "-m", "fovea.service"]
    if group:
        command = group.wrap_command(command)
    with log.open("w") as file:
        pipes = {"stdout": subprocess.PIPE, "stderr": file}
        environment = {**base_environment, **base_settings, **settings}
        with start_process(command, cwd=ROOT, env=environment, **pipes) as process:
            yield Service(_read_url(process, log), process, group)


def _read_url(process: subprocess.Popen[str], log: Path) -> str:
    kill_timer = threading.Timer(_START_SECONDS, process.kill)
    kill_timer.start()
    try:
        for line in process.stdout or ():
            if address_match := re.search(r"http://\S+", line):
                return address_match[0]
    finally:
        kill_timer.cancel()
    raise BenchError(f"the service did not start: {log.read_text()[-500:].strip()}")


class CounterRecorder:
    """A record of the highest value of every counter, because old versions' series disappear."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self.scrape_failures = 0
        """Number of scrapes without an answer, which the service may have counted as clients that left."""

    def scrape(self, timeout: float) -> None:
        """Scrape the metrics.

        Raises `OSError`.
        """
        try:
            samples = self._service.scrape_metrics(timeout)
        except OSError:
            self.scrape_failures += 1
            raise
        for name, labels, value in samples:
            if name.endswith("_total"):
                key = name, tuple(sorted(labels.items()))
                self._values[key] = max(value, self._values.get(key, 0.0))

    def get_counts(self) -> ServiceCounts:
        """Return the service's counts so far."""
        requests: Counter[tuple[str, int]] = Counter()
        errors: Counter[str] = Counter()
        others: Counter[str] = Counter()
        for (name, pairs), value in self._values.items():
            labels = dict(pairs)
            if name == "fovea_requests_total":
                requests[labels["route"], int(labels["status"])] += int(value)
            elif name == "fovea_errors_total":
                errors[labels["reason"]] += int(value)
            else:
                others[name] += int(value)
        return ServiceCounts(
            requests, errors, others["fovea_images_total"], others["fovea_explanations_total"]
        )

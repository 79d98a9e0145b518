"""Measured processes: processor time and memory with all descendants (proc(5))."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")

_STOP_SECONDS: Final = 15.0

_IDLE_SHARE: Final = 0.05
"""Share of one processor below which a process tree counts as idle."""


_ANSWER_SECONDS: Final = 0.02
"""Time in which a child answers its parent's last question, such as uvicorn's `ping`, in seconds."""


@contextmanager
def start_process(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a process in its own group; end the whole group afterwards."""
    process = subprocess.Popen(command, text=True, start_new_session=True, **options)
    try:
        yield process
    finally:
        _stop_process(process)


def _stop_process(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        resume_tree(process.pid)  # a stopped process does not see SIGTERM
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()


def find_process_tree(pid: int) -> list[int]:
    """Return the ids of a process and all its living descendants."""
    pids = [pid]
    for parent in pids:
        with suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
    return pids


def pause_tree(pid: int) -> None:
    """Stop a process and its descendants, parents first: a parent that runs would miss its children."""
    for number, one in enumerate(find_process_tree(pid)):
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGSTOP)
        if number == 0:
            time.sleep(_ANSWER_SECONDS)


def resume_tree(pid: int) -> None:
    """Let a process and its descendants go on, parents last."""
    for one in reversed(find_process_tree(pid)):
        if one == pid:
            time.sleep(_ANSWER_SECONDS)
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGCONT)


def read_command_line(pid: int) -> bytes:
    """Return the arguments of a process, each with a zero byte behind it; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # the process has just ended
        return b""


def measure_cpu_seconds(pids: list[int]) -> float:
    """Return the processor time of these trees so far, including ended children, in seconds."""
    ticks = 0
    for pid in (one for root in pids for one in find_process_tree(root)):
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / _TICKS


def measure_own_cpu_seconds(pid: int) -> float:
    """Return the user and system time of a process so far without its children, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / _TICKS


class CpuStopwatch:
    """A stopwatch for the processor time of some trees and of everything else but this process."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._started_at = time.monotonic()
        self._first_times = self._read_times()

    def read(self) -> tuple[float, float]:
        """Return the seconds that the trees used, and the number of processors kept busy by others."""
        measured, client, machine = (
            now - first for now, first in zip(self._read_times(), self._first_times, strict=True)
        )
        others = (machine - measured - client) / (time.monotonic() - self._started_at)
        return measured, max(0.0, others)

    def _read_times(self) -> tuple[float, float, float]:
        return measure_cpu_seconds(self._pids), sum(os.times()[:4]), _read_machine_seconds()


def _read_machine_seconds() -> float:
    """Return the time that all processors were busy, or taken by the host, in seconds."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = map(int, fields[:8])
    return (user + nice + system + interrupts + soft_interrupts + stolen) / _TICKS


def measure_resident_bytes(pids: list[int]) -> int:
    """Return the memory of these trees: proportional set sizes, which count shared memory once."""
    total = 0
    for pid in (one for root in pids for one in find_process_tree(root)):
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
    return total


def wait_until_idle(pids: list[int], *, limit: float = 30.0) -> None:
    """Wait, at most `limit` seconds, until these trees are idle."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        seconds_before = measure_cpu_seconds(pids)
        time.sleep(0.2)
        if measure_cpu_seconds(pids) - seconds_before <= 0.2 * _IDLE_SHARE:
            return

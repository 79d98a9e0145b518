"""Metrics from the operating system: all processes of the service together, and the container."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fovea.service.resources.cgroup import Cgroup

_PROC: Final = Path("/proc")


def kill_descendants(pid: int) -> None:
    """Kill all descendants of a process. A stopped process does not end by itself."""
    # List all before the first dies: the children of a dead process belong to another parent.
    for child in list(_walk_process_tree(pid))[1:]:
        with suppress(OSError):  # the process has just ended
            os.kill(child, signal.SIGKILL)


def reap_orphans(awaited_pids: Collection[int]) -> None:
    """Reap ended processes that no code in this process waits for, if this process has the id 1.

    Only process 1 inherits orphans: a killed worker leaves its runners behind. The event loop of the
    supervisor calls this at each heartbeat. `awaited_pids` are the ids of processes that other code in this
    process waits for, which needs their exit codes.
    """
    while os.getpid() == 1:
        try:
            # WNOWAIT only looks: a process in `awaited_pids` must stay waitable for other code.
            exit_info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if exit_info is None or exit_info.si_pid in awaited_pids:
            return
        os.waitpid(exit_info.si_pid, os.WNOHANG)


class ProcessTreeCollector(Collector):
    """A collector of sums over a process and its descendants, including the CPU time of dead descendants."""

    def __init__(self, root_pid: int) -> None:
        self._root_pid = root_pid
        self._tick_seconds = 1 / os.sysconf("SC_CLK_TCK")
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        boot = next(line for line in (_PROC / "stat").read_text().splitlines() if line.startswith("btime"))
        self._start_time = int(boot.split()[1]) + int(_read_stat_fields(root_pid)[19]) * self._tick_seconds

    def collect(self) -> Iterator[Metric]:
        ticks = virtual = resident = files = 0
        for pid in _walk_process_tree(self._root_pid):
            try:
                fields = _read_stat_fields(pid)
                files += len(os.listdir(_PROC / str(pid) / "fd"))  # noqa: PTH208 - only the names
            except OSError:  # the process has just ended
                continue
            ticks += sum(map(int, fields[11:15]))
            virtual += int(fields[20])
            resident += int(fields[21]) * self._page_bytes
        yield CounterMetricFamily(
            "process_cpu_seconds", "CPU time of all processes.", ticks * self._tick_seconds
        )
        for name, text, value in (
            (
                "process_resident_memory_bytes",
                "Resident memory of all processes. Shared memory counts once per process.",
                resident,
            ),
            ("process_virtual_memory_bytes", "Virtual memory of all processes.", virtual),
            ("process_open_fds", "Open files of all processes.", files),
            ("process_start_time_seconds", "Start of the service, in seconds since 1970.", self._start_time),
        ):
            yield GaugeMetricFamily(name, text, value)


class ContainerCollector(Collector):
    """A collector of the container's control group values, if there is a control group."""

    def __init__(self, cgroup: Cgroup) -> None:
        self._cgroup = cgroup

    def collect(self) -> Iterator[Metric]:
        throttled_seconds = self._cgroup.throttled_seconds()
        if throttled_seconds is not None:
            text = "Time during which the CPU quota was used up and all processes had to wait."
            yield CounterMetricFamily("fovea_container_throttled_seconds", text, throttled_seconds)
        for name, text, size in (
            (
                "fovea_container_memory_bytes",
                "Memory in use, including the file cache.",
                self._cgroup.memory_bytes(),
            ),
            (
                "fovea_container_memory_working_set_bytes",
                "Memory in use, without file cache that can be freed at once.",
                self._cgroup.memory_working_set_bytes(),
            ),
            (
                "fovea_container_memory_limit_bytes",
                "Memory limit of the container.",
                self._cgroup.memory_limit_bytes(),
            ),
        ):
            if size is not None:
                yield GaugeMetricFamily(name, text, size)


def _read_stat_fields(pid: int) -> list[str]:
    """Return the fields of proc_pid_stat(5) from the third field on.

    Indices 11 to 14 are utime, stime, cutime and cstime in ticks. Index 19 is the start time in ticks, 20 the
    virtual size in bytes and 21 the resident size in pages.
    """
    return (_PROC / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()


def _walk_process_tree(root_pid: int) -> Iterator[int]:
    yield root_pid
    for children in (_PROC / str(root_pid) / "task").glob("*/children"):
        try:
            pids = children.read_text().split()
        except OSError:  # the process has just ended
            continue
        for pid in pids:
            yield from _walk_process_tree(int(pid))

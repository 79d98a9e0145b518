"""A control group with a memory limit for measured processes: cgroups(7), versions 1 and 2."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/sys/fs/cgroup")

_END_TIMEOUT: Final = 10.0
"""Time within which killed processes must have left the group, in seconds."""


@dataclass(frozen=True)
class ControlGroup:
    """A control group."""

    folder: Path
    is_unified: bool
    """Flag for version 2."""

    def wrap_command(self, command: list[str]) -> list[str]:
        """Return a command that enters the group before it becomes `command`."""
        script = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        return ["/bin/sh", "-c", script, str(self.folder), *command]

    def set_limit(self, size: int) -> None:
        """Limit the memory to `size` bytes.

        Raises `OSError`.
        """
        name = "memory.max" if self.is_unified else "memory.limit_in_bytes"
        (self.folder / name).write_text(str(size))

    @property
    def kill_count(self) -> int:
        """Number of processes that the kernel killed for lack of memory."""
        name = "memory.events" if self.is_unified else "memory.oom_control"
        lines = (self.folder / name).read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory use in bytes, with the file cache; None if the kernel does not report it."""
        name = "memory.peak" if self.is_unified else "memory.max_usage_in_bytes"
        with suppress(OSError):
            return int((self.folder / name).read_text())
        return None

    @property
    def pids(self) -> list[int]:
        """Processes in the group."""
        return [int(line) for line in (self.folder / "cgroup.procs").read_text().split()]

    def remove(self) -> None:
        """Kill the processes in the group and remove the group."""
        end = time.monotonic() + _END_TIMEOUT
        while time.monotonic() < end:
            for pid in self.pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(OSError):  # some processes have not left yet
                self.folder.rmdir()
                return
            time.sleep(0.05)


@contextmanager
def create_limited_group(size: int) -> Iterator[ControlGroup | None]:
    """Yield a group with `size` bytes of memory; None if this machine does not allow one."""
    group = _create_group(size)
    try:
        yield group
    finally:
        if group:
            group.remove()


def _create_group(size: int) -> ControlGroup | None:
    for parent, is_unified in _find_parents():
        group = ControlGroup(parent / f"fovea-{os.getpid()}", is_unified)
        try:
            group.folder.mkdir()
        except OSError:
            continue
        try:
            group.set_limit(size)
            return group
        except OSError:  # the controller is not available
            group.folder.rmdir()
    return None


def _find_parents() -> Iterator[tuple[Path, bool]]:
    """Yield this process's group in each hierarchy with a memory controller, and the root group."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                root, is_unified = _ROOT / "memory", False
            elif not controllers and (_ROOT / "cgroup.controllers").exists():
                root, is_unified = _ROOT, True
            else:
                continue
            yield root / path.lstrip("/"), is_unified
            yield root, is_unified

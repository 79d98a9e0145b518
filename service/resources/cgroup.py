"""Limits and usage of the container, from control groups version 1 and 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

_CGROUP_ROOT: Final = Path("/sys/fs/cgroup")
_MEMBERSHIP_FILE: Final = Path("/proc/self/cgroup")

T = TypeVar("T")

_UNLIMITED_BYTES: Final = 1 << 60
"""Threshold above which a memory limit means "unlimited", in bytes.

Version 1 has no value for "unlimited": it reports the largest number of whole pages.
"""


class Cgroup:
    """The control group of this process. A value that the system does not provide is None."""

    def __init__(self, root: Path = _CGROUP_ROOT, membership_file: Path = _MEMBERSHIP_FILE) -> None:
        """Set the mount point `root`, and the `membership_file` that names the groups of this process.

        cgroups(7) describes both.
        """
        self._root = root
        self._membership_file = membership_file

    def cpu_quota(self) -> float | None:
        """Return the CPU quota in processors: the smallest quota of this group and all its ancestors."""
        return min((quota for quota in self._read_each("cpu", _read_quota_v1, _read_quota_v2)), default=None)

    def throttled_seconds(self) -> float | None:
        """Return the total time in seconds that processes were throttled because the quota was used up."""
        return next(self._read_each("cpu", _read_throttled_v1, _read_throttled_v2), None)

    def memory_bytes(self) -> int | None:
        """Return the memory in use in bytes, including the file cache."""
        names = ("memory.usage_in_bytes", "memory.current")
        return next(self._read_each("memory", *(_create_reader(name) for name in names)), None)

    def memory_working_set_bytes(self) -> int | None:
        """Return the memory in use in bytes, without the file cache that can be reclaimed at once.

        The kernel kills processes when this value reaches the limit.
        """
        return next(self._read_each("memory", _read_working_set_v1, _read_working_set_v2), None)

    def memory_limit_bytes(self) -> int | None:
        """Return the memory limit in bytes: the smallest limit of this group and all its ancestors."""
        names = ("memory.limit_in_bytes", "memory.max")
        limits = self._read_each("memory", *(_create_reader(name) for name in names))
        return min((limit for limit in limits if limit < _UNLIMITED_BYTES), default=None)

    def oom_kill_count(self) -> int | None:
        """Return how many processes of this group the kernel has killed because memory was short."""
        return next(self._read_each("memory", _read_oom_kills_v1, _read_oom_kills_v2), None)

    def _read_each(self, controller: str, v1: Callable[[Path], T], v2: Callable[[Path], T]) -> Iterator[T]:
        """Yield the value of the group and of each ancestor that the container can read."""
        for folder, read in self._iterate_folders(controller, v1, v2):
            try:
                yield read(folder)
            except (OSError, ValueError, KeyError):
                continue

    def _iterate_folders(
        self, controller: str, v1: Callable[[Path], T], v2: Callable[[Path], T]
    ) -> Iterator[tuple[Path, Callable[[Path], T]]]:
        try:
            lines = self._membership_file.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root, read = (self._root / controller, v1) if controllers else (self._root, v2)
            folder = root / path.lstrip("/")
            for one in (folder, *folder.parents):
                if one.is_relative_to(root):
                    yield one, read


def _create_reader(name: str) -> Callable[[Path], int]:
    return lambda folder: int((folder / name).read_text())


def _read_working_set_v1(folder: Path) -> int:
    usage = int((folder / "memory.usage_in_bytes").read_text())
    return max(0, usage - int(_read_statistics(folder, "memory")["total_inactive_file"]))


def _read_working_set_v2(folder: Path) -> int:
    usage = int((folder / "memory.current").read_text())
    return max(0, usage - int(_read_statistics(folder, "memory")["inactive_file"]))


def _read_oom_kills_v1(folder: Path) -> int:
    return int(_read_pairs(folder / "memory.oom_control")["oom_kill"])


def _read_oom_kills_v2(folder: Path) -> int:
    return int(_read_pairs(folder / "memory.events")["oom_kill"])


def _read_quota_v1(folder: Path) -> float:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    if quota <= 0:
        raise ValueError("no quota is set")
    return quota / int((folder / "cpu.cfs_period_us").read_text())


def _read_quota_v2(folder: Path) -> float:
    quota, period = (folder / "cpu.max").read_text().split()
    return int(quota) / int(period)


def _read_throttled_v1(folder: Path) -> float:
    return int(_read_statistics(folder, "cpu")["throttled_time"]) / 1e9


def _read_throttled_v2(folder: Path) -> float:
    return int(_read_statistics(folder, "cpu")["throttled_usec"]) / 1e6


def _read_statistics(folder: Path, controller: str) -> dict[str, str]:
    return _read_pairs(folder / f"{controller}.stat")


def _read_pairs(file: Path) -> dict[str, str]:
    return dict(line.split() for line in file.read_text().splitlines())

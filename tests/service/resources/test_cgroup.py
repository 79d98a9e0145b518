"""Control groups of versions 1 and 2. The tests write their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from fovea.service.resources.cgroup import Cgroup


def make_cgroup(root: Path, lines: str, files: dict[str, str]) -> Cgroup:
    """Write files of control groups, and a file like /proc/self/cgroup, under `root`."""
    root.mkdir(exist_ok=True)
    (root / "self").write_text(lines)
    for name, content in files.items():
        path = root / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return Cgroup(root / "fs", root / "self")


V1 = "4:cpu,cpuacct:/x\n3:memory:/y\n"
V1_QUOTA, V1_PERIOD = "cpu/x/cpu.cfs_quota_us", "cpu/x/cpu.cfs_period_us"
NESTED = {"cpu.max": "max 100000", "a/cpu.max": "25000 100000", "a/b/cpu.max": "90000 100000"}


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", NESTED, 0.25),
        ("0::/outside\n", {"cpu.max": "40000 100000"}, 0.4),
        (V1, {V1_QUOTA: "30000", V1_PERIOD: "100000"}, 0.3),
        (V1, {V1_QUOTA: "-1", V1_PERIOD: "100000"}, None),
        ("2:memory:/x\n", {"memory/x/cpu.cfs_quota_us": "1"}, None),
        ("0::/\n", {"cpu.max": "rubbish"}, None),
        ("", {"cpu.max": "50000 100000\n"}, None),
    ],
)
def test_cpu_quota_is_the_lowest_of_all_levels(
    tmp_path: Path, lines: str, files: dict[str, str], expected: float | None
) -> None:
    assert make_cgroup(tmp_path, lines, files).cpu_quota() == expected


def test_version_2_reports_throttling_and_memory(tmp_path: Path) -> None:
    cgroup = make_cgroup(
        tmp_path,
        "0::/a/b\n",
        {
            "a/b/cpu.stat": "usage_usec 9\nnr_throttled 2\nthrottled_usec 1500000\n",
            "a/b/memory.current": "1000\n",
            "a/b/memory.stat": "anon 5\ninactive_file 300\n",
            "a/b/memory.max": "max\n",
            "a/memory.max": "5000\n",
            "memory.max": "9000\n",
            "a/b/memory.events": "low 0\noom 4\noom_kill 3\n",
        },
    )
    assert (cgroup.throttled_seconds(), cgroup.memory_bytes(), cgroup.memory_limit_bytes()) == (
        1.5,
        1000,
        5000,
    )
    assert cgroup.memory_working_set_bytes() == 700
    assert cgroup.oom_kill_count() == 3


def test_version_1_reports_throttling_and_memory(tmp_path: Path) -> None:
    cgroup = make_cgroup(
        tmp_path,
        V1,
        {
            "cpu/x/cpu.stat": "nr_periods 7\nnr_throttled 2\nthrottled_time 2500000000\n",
            "memory/y/memory.usage_in_bytes": "1000\n",
            "memory/y/memory.stat": "inactive_file 5\ntotal_inactive_file 400\n",
            "memory/y/memory.limit_in_bytes": "5000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/y/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        },
    )
    assert (cgroup.throttled_seconds(), cgroup.memory_bytes(), cgroup.memory_limit_bytes()) == (
        2.5,
        1000,
        5000,
    )
    assert cgroup.memory_working_set_bytes() == 600
    assert cgroup.oom_kill_count() == 2


def test_missing_values_are_none(tmp_path: Path) -> None:
    for cgroup in (
        make_cgroup(tmp_path / "empty", "0::/\n", {"cpu.stat": "usage_usec 9\n"}),
        make_cgroup(tmp_path / "free", V1, {"memory/y/memory.limit_in_bytes": "9223372036854771712"}),
        Cgroup(tmp_path, tmp_path / "none"),
    ):
        assert (cgroup.cpu_quota(), cgroup.throttled_seconds()) == (None, None)
        assert (cgroup.memory_bytes(), cgroup.memory_limit_bytes()) == (None, None)
        assert cgroup.oom_kill_count() is None

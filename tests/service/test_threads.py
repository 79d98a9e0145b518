"""How many processors there are, and how they are shared out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.settings import Settings
from service.threads import available_cpus, plan


def cgroup(root: Path, lines: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A cgroup file system and a /proc/self/cgroup under `root`."""
    (root / "self").write_text(lines)
    for name, content in files.items():
        path = root / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root / "fs", root / "self"


AFFINITY = len(os.sched_getaffinity(0))


V1 = "4:cpu,cpuacct:/x\n"
V1_QUOTA, V1_PERIOD = "cpu/x/cpu.cfs_quota_us", "cpu/x/cpu.cfs_period_us"
NESTED = {"cpu.max": "max 100000", "a/cpu.max": "25000 100000", "a/b/cpu.max": "90000 100000"}


@pytest.mark.parametrize(
    ("lines", "files", "wanted"),
    [
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, AFFINITY),
        ("0::/a/b\n", NESTED, 0.25),
        ("0::/outside\n", {"cpu.max": "40000 100000"}, 0.4),
        (V1, {V1_QUOTA: "30000", V1_PERIOD: "100000"}, 0.3),
        (V1, {V1_QUOTA: "-1", V1_PERIOD: "100000"}, AFFINITY),
        ("2:memory:/x\n", {"memory/x/limit": "1"}, AFFINITY),
        ("0::/\n", {"cpu.max": "rubbish"}, AFFINITY),
        ("0::/\n", {"cpu.max": "1000000000 100000"}, AFFINITY),
    ],
)
def test_the_quota_counts_where_it_is_less_than_the_affinity(
    tmp_path: Path, lines: str, files: dict[str, str], wanted: float
) -> None:
    assert available_cpus(*cgroup(tmp_path, lines, files)) == wanted


def test_a_machine_without_cgroups_has_its_affinity(tmp_path: Path) -> None:
    assert available_cpus(tmp_path, tmp_path / "none") == AFFINITY


def test_the_affinity_counts() -> None:
    everything = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(everything)})
        assert available_cpus() <= 1
    finally:
        os.sched_setaffinity(0, everything)


@pytest.mark.parametrize("cpus", [0.25, 1, 1.5, 2, 64])
def test_runners_fill_the_processors_and_no_more(tmp_path: Path, cpus: float) -> None:
    chosen = plan(Settings(models=tmp_path), cpus)
    assert chosen.runners * chosen.runner_threads == max(1, -(-cpus // 1))
    assert chosen.decode_threads >= 1


def test_settings_come_before_the_rule(tmp_path: Path) -> None:
    settings = Settings(models=tmp_path, runners=3, runner_threads=2, decode_threads=5)
    chosen = plan(settings, 8)
    assert (chosen.runners, chosen.runner_threads, chosen.decode_threads) == (3, 2, 5)
    assert plan(Settings(models=tmp_path, runner_threads=4), 8).runners == 2

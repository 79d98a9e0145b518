"""The number of usable processors, and their division among runners and threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fovea.service.resources.threads import available_cpus, plan_threads
from fovea.service.settings import Settings
from tests.service.resources.test_cgroup import make_cgroup

AFFINITY = len(os.sched_getaffinity(0))


def test_the_quota_counts_where_it_is_less_than_the_affinity(tmp_path: Path) -> None:
    assert available_cpus(make_cgroup(tmp_path / "less", "0::/\n", {"cpu.max": "50000 100000\n"})) == 0.5
    assert (
        available_cpus(make_cgroup(tmp_path / "more", "0::/\n", {"cpu.max": "1000000000 100000"})) == AFFINITY
    )
    assert available_cpus(make_cgroup(tmp_path / "none", "", {})) == AFFINITY


def test_the_affinity_counts() -> None:
    everything = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(everything)})
        assert available_cpus() <= 1
    finally:
        os.sched_setaffinity(0, everything)


@pytest.mark.parametrize("cpus", [0.25, 1, 1.5, 2, 64])
def test_runners_fill_the_processors_and_no_more(tmp_path: Path, cpus: float) -> None:
    chosen = plan_threads(Settings(models=tmp_path), cpus)
    assert chosen.runners * chosen.runner_threads == max(1, -(-cpus // 1))
    assert chosen.decode_threads >= 1


def test_settings_come_before_the_rule(tmp_path: Path) -> None:
    settings = Settings(models=tmp_path, runners=3, runner_threads=2, decode_threads=5)
    chosen = plan_threads(settings, 8)
    assert (chosen.runners, chosen.runner_threads, chosen.decode_threads) == (3, 2, 5)
    assert plan_threads(Settings(models=tmp_path, runner_threads=4), 8).runners == 2

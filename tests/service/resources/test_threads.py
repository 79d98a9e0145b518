"""The number of usable processors, and their division among runners and threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fovea.service.resources.threads import available_cpus, plan_threads
from fovea.service.settings import Settings
from tests.service.resources.test_cgroup import make_cgroup

AFFINITY = len(os.sched_getaffinity(0))


def test_available_cpus_is_the_lower_of_quota_and_affinity(tmp_path: Path) -> None:
    assert available_cpus(make_cgroup(tmp_path / "less", "0::/\n", {"cpu.max": "50000 100000\n"})) == 0.5
    assert (
        available_cpus(make_cgroup(tmp_path / "more", "0::/\n", {"cpu.max": "1000000000 100000"})) == AFFINITY
    )
    assert available_cpus(make_cgroup(tmp_path / "none", "", {})) == AFFINITY


def test_available_cpus_respects_the_affinity() -> None:
    all_cpus = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(all_cpus)})
        assert available_cpus() <= 1
    finally:
        os.sched_setaffinity(0, all_cpus)


@pytest.mark.parametrize("cpus", [0.25, 1, 1.5, 2, 64])
def test_runner_threads_equal_the_available_cpus(tmp_path: Path, cpus: float) -> None:
    plan = plan_threads(Settings(models=tmp_path), cpus)
    assert plan.runners * plan.runner_threads == max(1, -(-cpus // 1))
    assert plan.decode_threads >= 1


def test_explicit_settings_override_the_thread_plan(tmp_path: Path) -> None:
    settings = Settings(models=tmp_path, runners=3, runner_threads=2, decode_threads=5)
    plan = plan_threads(settings, 8)
    assert (plan.runners, plan.runner_threads, plan.decode_threads) == (3, 2, 5)
    assert plan_threads(Settings(models=tmp_path, runner_threads=4), 8).runners == 2

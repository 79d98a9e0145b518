"""Limits that follow the container's memory. The tests write the files of the control groups."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from fovea.service.resources.cgroup import Cgroup
from fovea.service.runners import memory_plan
from fovea.service.runners.load_messages import LoadCommand, ProcessPlan
from fovea.service.settings import Settings

MB = 1 << 20


def make_cgroup(folder: Path, limit: int | None) -> Cgroup:
    """Return a control group of version 2 with this memory limit, or without a limit."""
    (folder / "group").mkdir(exist_ok=True)
    (folder / "self").write_text("0::/\n")
    (folder / "group" / "memory.max").write_text("max\n" if limit is None else f"{limit}\n")
    return Cgroup(folder / "group", folder / "self")


def fit_settings(folder: Path, limit: int | None, **values: Any) -> Settings:
    settings = Settings(**{"models": folder, **values})
    return memory_plan.fit_to_memory(settings, make_cgroup(folder, limit))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of two models; their latest versions have 8 and 20 MB."""
    for name, version, size in (("a", "2", 8 * MB), ("a", "1", 90 * MB), ("b", "1", 20 * MB)):
        path = tmp_path / name / version / "model.onnx"
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            file.truncate(size)
    return tmp_path


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PILLOW_BLOCKS_MAX", raising=False)


def test_settings_are_unchanged_without_a_limit(repository: Path) -> None:
    assert fit_settings(repository, None) == Settings(models=repository)


def test_large_limit_changes_only_explain_idle(repository: Path) -> None:
    settings = fit_settings(repository, 16 << 30)
    assert settings == Settings(models=repository).model_copy(update={"explain_idle": settings.explain_idle})


@pytest.mark.parametrize("limit", [300, 400, 512, 1000, 2000])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("grpc_port", [None, 8001])
def test_bodies_and_decoding_fit_within_the_limit(
    repository: Path, limit: int, workers: int, grpc_port: int | None
) -> None:
    """With gRPC, messages that arrive and replies that nobody reads take as much as bodies over HTTP."""
    model_path = repository / "a" / "2" / "model.onnx"
    settings = fit_settings(
        repository, limit * MB, runners=1, workers=workers, models=model_path, grpc_port=grpc_port
    )
    idle_mb = workers * (62 + (16 if grpc_port else 0) + 40 + 26 + 24) + (40 if workers > 1 else 0)
    spare_mb = workers * (26 + 2 * 24 + 16)
    available_mb = limit * 0.9 - idle_mb
    if available_mb - spare_mb >= 48:
        available_mb -= spare_mb
    bodies, decode = workers * settings.bodies_bytes * (3 if grpc_port else 1), settings.decode_bytes
    assert bodies + decode <= max(48, available_mb) * MB
    assert settings.body_bytes <= settings.bodies_bytes
    assert settings.json_bytes <= settings.bodies_bytes
    assert settings.connections >= 64


def test_runner_count_is_reduced_to_fit_the_limit(repository: Path) -> None:
    """Each runner takes 26 MB, and three times the 28 MB of the models."""
    settings = fit_settings(repository, None)
    assert settings.runners == 0  # 0 means one for each processor
    assert fit_settings(repository, 300 * MB).runners == 1
    assert fit_settings(repository, 300 * MB, runners=2).runners == 2  # the explicit setting is kept


def test_explicit_settings_are_kept(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_BODY_BYTES", str(40 * MB))
    settings = fit_settings(repository, 512 * MB, decode_bytes=900 * MB, connections=4000)
    assert settings.decode_bytes == 900 * MB
    assert settings.connections == 4000
    assert settings.body_bytes == 40 * MB
    assert settings.bodies_bytes >= settings.body_bytes


def test_too_small_limit_is_logged(repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit_settings(repository, 200 * MB, runners=2)
    assert "the container's memory limit of 200 MB is too small for 2 runners" in caplog.text


def test_missing_memory_for_trials_and_explanations_is_logged(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit_settings(repository, 620 * MB, workers=2, runners=1)
    assert "leaves no memory to try new versions or to explain with 2 runners" in caplog.text
    (missing_mb,) = map(int, re.findall(r"give the container (\d+) MB more", caplog.text))
    caplog.clear()
    fit_settings(repository, (620 + missing_mb + 1) * MB, workers=2, runners=1)
    assert "leaves no memory" not in caplog.text


def test_only_models_loaded_at_once_count(repository: Path) -> None:
    one_loaded, both_loaded = (
        fit_settings(repository, 700 * MB, runners=2, models_loaded=models_loaded) for models_loaded in (1, 0)
    )
    assert one_loaded.decode_bytes > both_loaded.decode_bytes


def test_spare_memory_is_used_before_decode_memory() -> None:
    free_bytes = [100]

    def reserve(size: int) -> bool:
        if size > free_bytes[0]:
            return False
        free_bytes[0] -= size
        return True

    def release(size: int) -> None:
        free_bytes[0] += size

    spare = memory_plan.SpareMemory(50, decode_bytes=1, reserve=reserve, release=release)
    release_first, release_second = spare.reserve(40), spare.reserve(40)
    assert free_bytes == [70]
    assert spare.reserve(71) is None
    assert release_first is not None
    assert release_second is not None
    release_first()
    assert spare.reserve(45) is not None
    assert free_bytes == [65]
    release_second()
    assert free_bytes == [95]


def test_trial_claims_memory_held_by_explanations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "_CHECK_SECONDS", 60.0)
    spare = memory_plan.SpareMemory(50, decode_bytes=1, reserve=lambda size: False, release=lambda size: None)
    release = spare.reserve(50)
    assert release is not None
    claim_states: list[bool] = []

    async def run_claim() -> None:
        spare.add_claim_callback(lambda: claim_states.append(spare.is_claimed))
        trial = asyncio.create_task(spare.claim(50))
        await asyncio.sleep(0)
        assert claim_states == [True]
        assert not trial.done()
        release()
        assert await trial is not None
        assert not spare.is_claimed
        assert spare.reserve(1) is None

    asyncio.run(run_claim())


def test_claim_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "_CLAIM_SECONDS", 0.0)
    monkeypatch.setattr(memory_plan, "_CHECK_SECONDS", 0.0)
    spare = memory_plan.SpareMemory(10, decode_bytes=1, reserve=lambda size: False, release=lambda size: None)
    assert asyncio.run(spare.claim(11)) is None
    assert not spare.is_claimed


def test_process_estimate_includes_its_models(repository: Path) -> None:
    plan = ProcessPlan("cpu", 0, 1, 0, 1, 1, 1, 1)
    loads = [
        LoadCommand(0, "", str(repository / name / "1" / "model.onnx"), (), plan)
        for name in ("b", "b", "missing")
    ]
    assert memory_plan.estimate_process_bytes(loads) == (26 + 3 * 40) * MB

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
def folder(tmp_path: Path) -> Path:
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


def test_without_a_limit_nothing_changes(folder: Path) -> None:
    assert fit_settings(folder, None) == Settings(models=folder)


def test_with_room_for_all_nothing_changes_but_how_long_an_explainer_stays(folder: Path) -> None:
    roomy = fit_settings(folder, 16 << 30)
    assert roomy == Settings(models=folder).model_copy(update={"explain_idle": roomy.explain_idle})


@pytest.mark.parametrize("limit", [300, 400, 512, 1000, 2000])
@pytest.mark.parametrize("workers", [1, 2])
def test_all_that_callers_can_make_it_take_fits(folder: Path, limit: int, workers: int) -> None:
    one = folder / "a" / "2" / "model.onnx"
    settings = fit_settings(folder, limit * MB, runners=1, workers=workers, models=one)
    at_rest = workers * (70 + 58 + 24) + (40 if workers > 1 else 0)
    spare = workers * (58 + 2 * 24 + 16)
    left = limit * 0.9 - at_rest
    if left - spare >= 48:
        left -= spare
    bodies, decode = workers * settings.bodies_bytes, settings.decode_bytes
    assert bodies + decode <= max(48, left) * MB
    assert settings.body_bytes <= settings.bodies_bytes
    assert settings.json_bytes <= settings.bodies_bytes
    assert settings.connections >= 64


def test_runners_are_left_out_where_there_is_no_memory_for_them(folder: Path) -> None:
    """Each runner takes 58 MB, and three times the 28 MB of the models."""
    planned = fit_settings(folder, None)
    assert planned.runners == 0  # one for each processor
    assert fit_settings(folder, 300 * MB).runners == 1
    assert fit_settings(folder, 300 * MB, runners=2).runners == 2  # it was asked for


def test_what_was_set_by_hand_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_BODY_BYTES", str(40 * MB))
    settings = fit_settings(folder, 512 * MB, decode_bytes=900 * MB, connections=4000)
    assert settings.decode_bytes == 900 * MB
    assert settings.connections == 4000
    assert settings.body_bytes == 40 * MB
    assert settings.bodies_bytes >= settings.body_bytes


def test_too_little_for_what_it_takes_at_rest_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit_settings(folder, 200 * MB, runners=2)
    assert "the container's memory limit of 200 MB is too small for 2 runners" in caplog.text


def test_no_memory_for_trials_and_explanations_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit_settings(folder, 620 * MB, workers=2, runners=1)
    assert "leaves no memory to try new versions or to explain with 2 runners" in caplog.text
    (missing,) = map(int, re.findall(r"give the container (\d+) MB more", caplog.text))
    caplog.clear()
    fit_settings(folder, (620 + missing + 1) * MB, workers=2, runners=1)
    assert "leaves no memory" not in caplog.text


def test_models_that_are_not_loaded_at_once_do_not_count(folder: Path) -> None:
    one, both = (fit_settings(folder, 700 * MB, runners=2, models_loaded=most) for most in (1, 0))
    assert one.decode_bytes > both.decode_bytes


def test_what_is_set_aside_is_taken_first_and_then_what_decoding_has_free() -> None:
    free = [100]

    def reserve(size: int) -> bool:
        if size > free[0]:
            return False
        free[0] -= size
        return True

    def give_back(size: int) -> None:
        free[0] += size

    spare = memory_plan.SpareMemory(50, decode_bytes=1, reserve=reserve, release=give_back)
    first, second = spare.reserve(40), spare.reserve(40)
    assert free == [70]
    assert spare.reserve(71) is None
    assert first is not None
    assert second is not None
    first()
    assert spare.reserve(45) is not None
    assert free == [65]
    second()
    assert free == [95]


def _has_no_memory(size: int) -> bool:
    return False


def _refuse_release(size: int) -> None:
    raise AssertionError(size)


def test_a_trial_claims_what_explanations_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "_CHECK_SECONDS", 60.0)
    spare = memory_plan.SpareMemory(50, decode_bytes=1, reserve=lambda size: False, release=lambda size: None)
    give_back = spare.reserve(50)
    assert give_back is not None
    asked: list[bool] = []

    async def claim() -> None:
        spare.add_claim_callback(lambda: asked.append(spare.is_claimed))
        trial = asyncio.create_task(spare.claim(50))
        await asyncio.sleep(0)
        assert asked == [True]
        assert not trial.done()
        give_back()
        assert await trial is not None
        assert not spare.is_claimed
        assert spare.reserve(1) is None

    asyncio.run(claim())


def test_a_claim_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "_CLAIM_SECONDS", 0.0)
    monkeypatch.setattr(memory_plan, "_CHECK_SECONDS", 0.0)
    spare = memory_plan.SpareMemory(10, decode_bytes=1, reserve=lambda size: False, release=lambda size: None)
    assert asyncio.run(spare.claim(11)) is None
    assert not spare.is_claimed


def test_a_process_more_is_reckoned_with_its_model(folder: Path) -> None:
    plan = ProcessPlan("cpu", 0, 1, 0, 1, 1, 1, 1)
    loads = [
        LoadCommand(0, "", str(folder / name / "1" / "model.onnx"), (), plan)
        for name in ("b", "b", "missing")
    ]
    assert memory_plan.estimate_process_bytes(loads) == (58 + 3 * 40) * MB

"""The judge of the state machine: every check gets an answer that it must find, and excuses."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from fovea.bench.chaos.faults import Fault, FaultLog
from tests.service.model_machine.builds import Build, FileKind, ModelFiles
from tests.service.model_machine.judgement import FOLLOW, Judge, Mode, ModelHistory, Operation

OLD = {"old a": 0.75, "old b": 0.25}
NEW = {"new a": 0.75, "new b": 0.25}


class Case:
    """A model whose version 2 has replaced version 1, and a judge of requests that were sent afterwards."""

    def __init__(self, folder: Path) -> None:
        self.files = ModelFiles(folder)
        self.history = ModelHistory()
        self.faults = FaultLog()
        self.judge = Judge(self.files, {"ants": self.history}, self.faults, loads_on_demand=False)
        for version, probabilities in (("1", OLD), ("2", NEW)):
            build = Build("ants", version, FileKind.GOOD, probabilities, published_at=time.monotonic())
            self.files.builds.append(build)
            self.history.allow(build)
        self.history.keep_only(build)

    def judge_answer(
        self,
        status: int,
        content: dict[str, Any],
        action: str = "classify",
        seconds: float = 0.1,
        **named: Any,
    ) -> str:
        """Return the complaint about an answer that was received just now."""
        now = time.monotonic()
        return self.judge.find_complaint(
            Operation(
                action, "ants", began_at=now, ended_at=now + seconds, status=status, content=content, **named
            )
        )


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def render_answer(version: str, probabilities: dict[str, float]) -> dict[str, Any]:
    predictions = [{"label": label, "probability": value} for label, value in probabilities.items()]
    return {"model": {"name": "ants", "version": version}, "predictions": predictions}


def render_error(code: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": "no"}}


def test_only_the_answer_of_the_served_version_is_right(case: Case) -> None:
    assert not case.judge_answer(200, render_answer("2", NEW))
    assert "only ants/2" in case.judge_answer(200, render_answer("1", OLD))
    assert "under the name" in case.judge_answer(200, render_answer("1", NEW))
    assert "the labels of no version" in case.judge_answer(200, render_answer("2", {"other": 1.0}))
    wrong_answer = render_answer("2", {"new a": 0.25, "new b": 0.75})
    assert "wrong probabilities" in case.judge_answer(200, wrong_answer)
    results = [render_answer("2", NEW), render_error("deadline_exceeded")]
    assert "an image got" in case.judge_answer(200, {**render_answer("2", NEW), "results": results})


def test_no_error_and_no_delay_is_right_without_a_reason(case: Case) -> None:
    for status, code in (
        (404, "model_not_found"),
        (503, "not_ready"),
        (504, "deadline_exceeded"),
        (500, "internal"),
    ):
        for action in ("classify", "explain"):
            assert str(status) in case.judge_answer(status, render_error(code), action)
    assert "lost" in case.judge_answer(0, {})
    assert "late" in case.judge_answer(200, render_answer("2", NEW), seconds=60.0)
    assert "409" in case.judge_answer(409, {"error": "no", "code": "swap_refused"}, "load")


def test_errors_are_right_with_a_reason(case: Case) -> None:
    assert not case.judge_answer(504, render_error("deadline_exceeded"), seconds=0.2, deadline=0.1)
    assert not case.judge_answer(404, render_error("model_not_found"), version="1")
    now = time.monotonic()
    case.faults.add(Fault("explainer", "killed", now, now + 1))
    assert not case.judge_answer(503, render_error("not_ready"), "explain")
    assert "503" in case.judge_answer(503, render_error("not_ready"))
    assert "500" in case.judge_answer(500, render_error("internal"), "explain")
    for _ in range(2):
        case.faults.add(Fault("runner", "killed", now, now + 1))
    assert not case.judge_answer(503, render_error("not_ready"))
    assert not case.judge_answer(500, render_error("internal"))
    case.history.allow(None)
    assert not case.judge_answer(404, render_error("model_not_found"))
    case.files.builds[1].removed_at = time.monotonic()
    assert not case.judge_answer(409, {"error": "no", "code": "swap_refused"}, "load")


@pytest.mark.parametrize(
    ("times", "modes"),
    [
        (((1, 2), (3, 4)), {Mode(is_unloaded=True)}),
        (((3, 4), (1, 2)), {Mode(version="1")}),
        (((1, 3), (2, 4)), {Mode(version="1"), Mode(is_unloaded=True)}),
    ],
)
def test_the_last_of_two_changes_counts(times: tuple[tuple[float, float], ...], modes: set[Mode]) -> None:
    history = ModelHistory()
    for action, version, (start, end) in (("load", "1", times[0]), ("unload", None, times[1])):
        history.changes.append(Operation(action, "ants", version, began_at=start, ended_at=end, status=200))
    history.conclude_changes([])
    assert history.modes == modes
    history.changes.append(Operation("load", "ants", "1", began_at=5, ended_at=6, status=409))
    history.conclude_changes([])
    assert history.modes == modes


def test_requested_version_that_was_removed_meanwhile_may_be_forgotten() -> None:
    history = ModelHistory()
    history.changes.append(Operation("load", "ants", "1", began_at=1, ended_at=3, status=200))
    history.conclude_changes([Build("ants", "1", FileKind.GOOD, published_at=0, removed_at=2)])
    assert history.modes == {Mode(version="1"), FOLLOW}


def test_only_outcome_stays_possible_even_if_it_is_new() -> None:
    history = ModelHistory()
    build = Build("ants", "1", FileKind.GOOD, published_at=0)
    history.allow(build)
    history.keep_only(None)
    assert history.list_possible() == [None]

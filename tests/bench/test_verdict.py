"""The verdict of `make chaos` finds what is wrong: every check is shown a case that it must find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from fovea.bench.chaos import verdict
from fovea.bench.chaos.faults import NOTICE_SECONDS, RECOVERY_SECONDS, Fault, FaultLog
from fovea.bench.chaos.leaks import IdleState, find_leaks, fit_trend
from fovea.bench.chaos.verdict import (
    RESTART_SECONDS,
    SLACK_SECONDS,
    ClientRequest,
    RequestLog,
    ServiceCounts,
    find_complaint,
    find_miscounts,
)

ROUTE = "/v1/classify"
GOOD = ClientRequest("good", ROUTE, 100.0, 101.0, 10.0, status=200, answer_count=1)
LOST = replace(GOOD, status=0, failure_reason="the connection ended", answer_count=0)
KILLED = Fault("worker", "killed", 100.5, 100.5 + NOTICE_SECONDS)
STOPPED = Fault("worker", "stopped", 100.5, 108.5)
RUNNER = Fault("runner", "killed", 100.5, 100.5 + NOTICE_SECONDS)
AGAIN = Fault("runner", "stopped", 100.7, 100.7 + NOTICE_SECONDS)
EXPLAINER = Fault("explainer", "killed", 100.5, 100.5 + NOTICE_SECONDS)
UNLOADED = Fault("second", "unloaded", 100.5, 103.0)
BEFORE = Fault("worker", "killed", 90.0, 92.0)


def make_failure(status: int, **other: Any) -> ClientRequest:
    return replace(GOOD, status=status, answer_count=0, codes=("code",), **other)


# --- single requests -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "faults"),
    [
        (GOOD, []),
        (replace(LOST, has_left=True), []),
        (LOST, [KILLED]),
        (replace(LOST, idle_seconds=9.0), [BEFORE]),
        (replace(GOOD, ended_at=100.0 + 10.0 + SLACK_SECONDS + 8.0, limit=10.0), [STOPPED]),
        (replace(GOOD, ended_at=100.0 + 10.0 + SLACK_SECONDS + RESTART_SECONDS), [RUNNER]),
        (make_failure(413, allowed_statuses=frozenset({200, 413})), []),
        (make_failure(504, deadline=0.9), []),
        (make_failure(503), [RUNNER]),
        (
            make_failure(503),
            [replace(RUNNER, began_at=100.5 - RECOVERY_SECONDS, ended_at=102.5 - RECOVERY_SECONDS)],
        ),
        (make_failure(503, is_explanation=True), []),
        (make_failure(404, model="second"), [UNLOADED]),
        (make_failure(500, is_explanation=True), [EXPLAINER]),
        (make_failure(500), [RUNNER, AGAIN]),
        (make_failure(500), [KILLED]),
        (make_failure(408), [STOPPED]),
        (replace(GOOD, codes=("internal",)), [RUNNER, AGAIN]),
        (replace(GOOD, codes=("deadline_exceeded",), deadline=0.5, is_explanation=True), []),
    ],
)
def test_what_may_be_is_no_complaint(request_: ClientRequest, faults: list[Fault]) -> None:
    assert find_complaint(request_, FaultLog(faults)) == ""


@pytest.mark.parametrize(
    ("request_", "faults", "what"),
    [
        (replace(GOOD, mistake="it is a frog"), [KILLED, RUNNER, AGAIN], "wrong: it is a frog"),
        (LOST, [], "lost: the connection ended"),
        (replace(LOST, idle_seconds=7.0), [BEFORE], "lost: the connection ended"),
        (LOST, [BEFORE, RUNNER, EXPLAINER], "lost: the connection ended"),
        (replace(GOOD, ended_at=113.5), [], "late: 200 after 13.5 s; at most 10.0 s"),
        (replace(GOOD, ended_at=113.5), [replace(RUNNER, began_at=50.0, ended_at=52.0)], "late: 200"),
        (replace(GOOD, ended_at=123.5), [RUNNER, EXPLAINER], "late: 200 after 23.5 s; at most 10.0 s"),
        (replace(GOOD, ended_at=122.0), [STOPPED], "late: 200 after 22.0 s; at most 10.0 s"),
        (make_failure(504, ended_at=114.0, limit=0.5, deadline=0.5), [], "late: 504"),
        (make_failure(504), [], "failed: 504"),
        (make_failure(504, deadline=1.5), [], "wrong: 504 0.500 s before the deadline"),
        (make_failure(503), [], "refused: 503"),
        (make_failure(503), [replace(RUNNER, began_at=50.0, ended_at=52.0)], "refused: 503"),
        (make_failure(404), [UNLOADED], "failed: 404"),
        (make_failure(404, model="second"), [], "failed: 404"),
        (make_failure(500), [RUNNER], "failed: 500"),
        (make_failure(500), [EXPLAINER], "failed: 500"),
        (make_failure(500, is_explanation=True), [RUNNER, AGAIN], "failed: 500"),
        (make_failure(408), [RUNNER], "failed: 408"),
        (make_failure(422), [KILLED], "failed: 422"),
        (replace(GOOD, codes=("internal",)), [RUNNER], "failed: 200 that contains errors"),
        (replace(GOOD, allowed_statuses=frozenset({422})), [], "failed: 200"),
    ],
)
def test_what_must_not_be_is_a_complaint(request_: ClientRequest, faults: list[Fault], what: str) -> None:
    assert find_complaint(request_, FaultLog(faults)).startswith(what)


def test_what_held_the_client_up_is_not_held_against_the_service() -> None:
    late = replace(GOOD, ended_at=114.0)
    assert find_complaint(late, FaultLog(), 1.5) == ""
    assert find_complaint(late, FaultLog(), 0.5).startswith("late")


# --- all of them ---------------------------------------------------------------------------------


def test_complaints_come_by_kind_once_all_faults_are_known() -> None:
    record = RequestLog()
    for request in (GOOD, LOST, LOST, replace(GOOD, kind="giant", mistake="it is a frog")):
        record.add(request)
    assert record.find_complaints(FaultLog()) == [
        "2 x good, lost: the connection ended; the first 0.0 s after the first suspicious request",
        "1 x giant, wrong: it is a frog; the first 0.0 s after the first suspicious request",
    ]
    assert len(record.find_complaints(FaultLog([KILLED]))) == 1
    assert record.excused_count == 3


def test_more_that_need_an_excuse_than_are_kept_is_a_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestLog, "MAX_REQUESTS", 2)
    record = RequestLog()
    for _ in range(3):
        record.add(LOST)
    assert record.find_complaints(FaultLog([KILLED])) == [
        "1 suspicious requests were not judged; at most 2 are kept"
    ]


def test_many_kinds_of_complaints_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "_MAX_SENTENCES", 1)
    record = RequestLog()
    record.add(LOST)
    record.add(replace(LOST, kind="other"))
    assert record.find_complaints(FaultLog())[-1] == "and 1 more kinds"


# --- what the service counted --------------------------------------------------------------------


def make_record() -> RequestLog:
    """Ten right answers, one that is late, one leaver, and one explanation."""
    record = RequestLog()
    for _ in range(10):
        record.add(GOOD)
    record.add(make_failure(504, deadline=0.5))
    record.add(replace(LOST, has_left=True, failure_reason=""))
    record.add(replace(GOOD, route="/v1/explain", is_explanation=True))
    return record


def make_counts(
    requests: Mapping[tuple[str, int], int] | None = None,
    errors: Mapping[str, int] | None = None,
    images: int = 10,
    explanations: int = 1,
) -> ServiceCounts:
    expected_requests = {(ROUTE, 200): 10, (ROUTE, 504): 1, (ROUTE, 0): 1, ("/v1/explain", 200): 1}
    expected_errors = {"code": 1, "client_left": 1}
    return ServiceCounts(
        {**expected_requests, **(requests or {})},
        {**expected_errors, **(errors or {})},
        images,
        explanations,
    )


def test_equal_counts_are_equal() -> None:
    assert find_miscounts(make_record(), make_counts()) == []


def test_who_left_may_have_been_answered() -> None:
    assert (
        find_miscounts(make_record(), make_counts({(ROUTE, 200): 11, (ROUTE, 0): 0}, {"client_left": 0}, 11))
        == []
    )


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (make_counts({(ROUTE, 200): 9}, images=10), "/v1/classify: requests: 11 counted"),
        (make_counts({(ROUTE, 200): 11}), "/v1/classify: requests: 13 counted"),
        (make_counts({(ROUTE, 200): 9, (ROUTE, 504): 2}), "status 200: 9 counted"),
        (make_counts({(ROUTE, 504): 0, (ROUTE, 0): 2}), "status 504: 0 counted"),
        (make_counts({(ROUTE, 500): 2}), "status 500: 2 counted"),
        (make_counts(errors={"code": 0}), "errors code: 0 counted"),
        (make_counts(errors={"internal": 2}), "errors internal: 2 counted"),
        (make_counts(images=9), "images: 9 counted"),
        (make_counts(images=13), "images: 13 counted"),
        (make_counts(explanations=0), "explanations: 0 counted"),
        (make_counts(explanations=2), "explanations: 2 counted"),
    ],
)
def test_a_difference_is_found(given: ServiceCounts, what: str) -> None:
    assert any(what in said for said in find_miscounts(make_record(), given))


def test_what_was_in_a_killed_worker_may_be_missing() -> None:
    record = make_record()
    record.add(LOST)
    record.add(replace(LOST, has_left=True))
    fewer = make_counts({(ROUTE, 0): 0}, {"client_left": 0})
    assert len(find_miscounts(record, fewer)) == 1  # of two leavers nothing is known yet
    record.count_doubtful(FaultLog([KILLED]))
    assert find_miscounts(record, fewer) == []


def test_strays_may_have_met_errors() -> None:
    given = make_counts(errors={"client_left": 3})
    assert len(find_miscounts(make_record(), given)) == 1
    assert find_miscounts(make_record(), given, stray_count=2) == []


# --- memory --------------------------------------------------------------------------------------

MB = 1_000_000
REST = IdleState(300 * MB, 100 * MB, 30)


def make_memory_curve(rise: float, noise: int = 40, seconds: int = 600) -> list[tuple[float, int]]:
    """A sample a second: saw teeth, as processes come and go, on a line that rises."""
    return [
        (1000.0 + second, round(300 * MB * (1 + rise * second / seconds)) + noise * MB * (second % 37) // 37)
        for second in range(seconds)
    ]


@pytest.mark.parametrize("rise", [0.0, 0.02, -0.3])
def test_a_flat_memory_is_flat(rise: float) -> None:
    assert find_leaks(REST, REST, make_memory_curve(rise)) == []


def test_a_memory_that_rises_is_found() -> None:
    assert fit_trend(make_memory_curve(0.2, noise=0)).rise == pytest.approx(
        0.2 * 0.75 * 11 / 12 / 1.125, rel=0.02
    )
    (said,) = find_leaks(REST, REST, make_memory_curve(0.2))
    assert said.startswith("memory: the trend rises by +1")
    (said,) = find_leaks(REST, REST, make_memory_curve(0.0), make_memory_curve(0.2, noise=0))
    assert said.startswith("memory of the first process: the trend rises by +1")


def test_a_short_time_has_no_trend() -> None:
    assert find_leaks(REST, REST, make_memory_curve(0.5, seconds=200)) == []
    assert find_leaks(REST, REST, []) == []


def test_memory_at_rest_says_nothing_before_the_service_is_warm() -> None:
    grown = replace(REST, resident_bytes=900 * MB, open_files=40)
    (said,) = find_leaks(REST, grown, make_memory_curve(0.0, seconds=30))
    assert said.startswith("open files at rest")


@pytest.mark.parametrize(
    ("after", "what"),
    [
        (replace(REST, resident_bytes=360 * MB), "memory at rest: 300 MB before and 360 MB after"),
        (replace(REST, main_bytes=160 * MB), "memory of the first process at rest: 100 MB before and 160 MB"),
        (replace(REST, open_files=40), "open files at rest: 30 before and 40 after"),
    ],
)
def test_what_has_grown_at_rest_is_found(after: IdleState, what: str) -> None:
    (said,) = find_leaks(REST, after, make_memory_curve(0.0))
    assert said.startswith(what)

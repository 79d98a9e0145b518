"""The verdict of `make chaos`: every check gets a case that it must find."""

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
GOOD_REQUEST = ClientRequest("good", ROUTE, 100.0, 101.0, 10.0, status=200, answer_count=1)
LOST_REQUEST = replace(GOOD_REQUEST, status=0, failure_reason="the connection ended", answer_count=0)
KILLED_WORKER = Fault("worker", "killed", 100.5, 100.5 + NOTICE_SECONDS)
STOPPED_WORKER = Fault("worker", "stopped", 100.5, 108.5)
KILLED_RUNNER = Fault("runner", "killed", 100.5, 100.5 + NOTICE_SECONDS)
STOPPED_RUNNER = Fault("runner", "stopped", 100.7, 100.7 + NOTICE_SECONDS)
KILLED_EXPLAINER = Fault("explainer", "killed", 100.5, 100.5 + NOTICE_SECONDS)
UNLOADED_MODEL = Fault("second", "unloaded", 100.5, 103.0)
EARLIER_FAULT = Fault("worker", "killed", 90.0, 92.0)


def make_failure(status: int, **other: Any) -> ClientRequest:
    return replace(GOOD_REQUEST, status=status, answer_count=0, codes=("code",), **other)


# --- single requests -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "faults"),
    [
        (GOOD_REQUEST, []),
        (replace(LOST_REQUEST, has_left=True), []),
        (LOST_REQUEST, [KILLED_WORKER]),
        (replace(LOST_REQUEST, idle_seconds=9.0), [EARLIER_FAULT]),
        (replace(GOOD_REQUEST, ended_at=100.0 + 10.0 + SLACK_SECONDS + 8.0, limit=10.0), [STOPPED_WORKER]),
        (replace(GOOD_REQUEST, ended_at=100.0 + 10.0 + SLACK_SECONDS + RESTART_SECONDS), [KILLED_RUNNER]),
        (make_failure(413, allowed_statuses=frozenset({200, 413})), []),
        (make_failure(504, deadline=0.9), []),
        (make_failure(503), [KILLED_RUNNER]),
        (
            make_failure(503),
            [replace(KILLED_RUNNER, began_at=100.5 - RECOVERY_SECONDS, ended_at=102.5 - RECOVERY_SECONDS)],
        ),
        (make_failure(503, is_explanation=True), []),
        (make_failure(404, model="second"), [UNLOADED_MODEL]),
        (replace(GOOD_REQUEST, codes=("not_ready",), is_explanation=True), [KILLED_EXPLAINER]),
        (make_failure(500), [KILLED_RUNNER, STOPPED_RUNNER]),
        (make_failure(500), [KILLED_WORKER]),
        (make_failure(408), [STOPPED_WORKER]),
        (replace(GOOD_REQUEST, codes=("internal",)), [KILLED_RUNNER, STOPPED_RUNNER]),
        (replace(GOOD_REQUEST, codes=("deadline_exceeded",), deadline=0.5, is_explanation=True), []),
    ],
)
def test_good_or_excused_requests_give_no_complaint(request_: ClientRequest, faults: list[Fault]) -> None:
    assert find_complaint(request_, FaultLog(faults)) == ""


@pytest.mark.parametrize(
    ("request_", "faults", "message"),
    [
        (
            replace(GOOD_REQUEST, mistake="it is a frog"),
            [KILLED_WORKER, KILLED_RUNNER, STOPPED_RUNNER],
            "wrong: it is a frog",
        ),
        (LOST_REQUEST, [], "lost: the connection ended"),
        (replace(LOST_REQUEST, idle_seconds=7.0), [EARLIER_FAULT], "lost: the connection ended"),
        (LOST_REQUEST, [EARLIER_FAULT, KILLED_RUNNER, KILLED_EXPLAINER], "lost: the connection ended"),
        (replace(GOOD_REQUEST, ended_at=113.5), [], "late: 200 after 13.5 s; at most 10.0 s"),
        (
            replace(GOOD_REQUEST, ended_at=113.5),
            [replace(KILLED_RUNNER, began_at=50.0, ended_at=52.0)],
            "late: 200",
        ),
        (
            replace(GOOD_REQUEST, ended_at=123.5),
            [KILLED_RUNNER, KILLED_EXPLAINER],
            "late: 200 after 23.5 s; at most 10.0 s",
        ),
        (replace(GOOD_REQUEST, ended_at=122.0), [STOPPED_WORKER], "late: 200 after 22.0 s; at most 10.0 s"),
        (make_failure(504, ended_at=114.0, limit=0.5, deadline=0.5), [], "late: 504"),
        (make_failure(504), [], "failed: 504"),
        (make_failure(504, deadline=1.5), [], "wrong: 504 0.500 s before the deadline"),
        (make_failure(503), [], "refused: 503"),
        (make_failure(503), [replace(KILLED_RUNNER, began_at=50.0, ended_at=52.0)], "refused: 503"),
        (make_failure(404), [UNLOADED_MODEL], "failed: 404"),
        (make_failure(404, model="second"), [], "failed: 404"),
        (make_failure(500), [KILLED_RUNNER], "failed: 500"),
        (make_failure(500), [KILLED_EXPLAINER], "failed: 500"),
        (make_failure(500, is_explanation=True), [KILLED_RUNNER, STOPPED_RUNNER], "failed: 500"),
        (make_failure(500, is_explanation=True), [KILLED_EXPLAINER], "failed: 500"),
        (replace(GOOD_REQUEST, codes=("not_ready",), is_explanation=True), [], "failed: 200"),
        (replace(GOOD_REQUEST, codes=("not_ready",)), [KILLED_EXPLAINER], "failed: 200"),
        (make_failure(408), [KILLED_RUNNER], "failed: 408"),
        (make_failure(422), [KILLED_WORKER], "failed: 422"),
        (replace(GOOD_REQUEST, codes=("internal",)), [KILLED_RUNNER], "failed: 200 that contains errors"),
        (replace(GOOD_REQUEST, allowed_statuses=frozenset({422})), [], "failed: 200"),
    ],
)
def test_unexcused_requests_give_a_complaint(
    request_: ClientRequest, faults: list[Fault], message: str
) -> None:
    assert find_complaint(request_, FaultLog(faults)).startswith(message)


def test_client_delay_is_not_counted_as_lateness() -> None:
    late_request = replace(GOOD_REQUEST, ended_at=114.0)
    assert find_complaint(late_request, FaultLog(), 1.5) == ""
    assert find_complaint(late_request, FaultLog(), 0.5).startswith("late")


# --- request log ---------------------------------------------------------------------------------


def test_complaints_are_grouped_by_kind() -> None:
    log = RequestLog()
    for request in (
        GOOD_REQUEST,
        LOST_REQUEST,
        LOST_REQUEST,
        replace(GOOD_REQUEST, kind="giant", mistake="it is a frog"),
    ):
        log.add(request)
    assert log.find_complaints(FaultLog()) == [
        "2 x good, lost: the connection ended; the first 0.0 s after the first suspicious request",
        "1 x giant, wrong: it is a frog; the first 0.0 s after the first suspicious request",
    ]
    assert len(log.find_complaints(FaultLog([KILLED_WORKER]))) == 1
    assert log.excused_count == 3


def test_too_many_suspicious_requests_are_a_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestLog, "MAX_REQUESTS", 2)
    log = RequestLog()
    for _ in range(3):
        log.add(LOST_REQUEST)
    assert log.find_complaints(FaultLog([KILLED_WORKER])) == [
        "1 suspicious requests were not judged; at most 2 are kept"
    ]


def test_list_of_complaints_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "_MAX_SENTENCES", 1)
    log = RequestLog()
    log.add(LOST_REQUEST)
    log.add(replace(LOST_REQUEST, kind="other"))
    assert log.find_complaints(FaultLog())[-1] == "and 1 more kinds"


# --- counters of the service ---------------------------------------------------------------------


def make_request_log() -> RequestLog:
    """Log ten right answers, a late one, a leaver and an explanation."""
    log = RequestLog()
    for _ in range(10):
        log.add(GOOD_REQUEST)
    log.add(make_failure(504, deadline=0.5))
    log.add(replace(LOST_REQUEST, has_left=True, failure_reason=""))
    log.add(replace(GOOD_REQUEST, route="/v1/explain", is_explanation=True))
    return log


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


def test_equal_counts_give_no_miscounts() -> None:
    assert find_miscounts(make_request_log(), make_counts()) == []


def test_client_that_left_may_have_been_answered() -> None:
    assert (
        find_miscounts(
            make_request_log(), make_counts({(ROUTE, 200): 11, (ROUTE, 0): 0}, {"client_left": 0}, 11)
        )
        == []
    )


@pytest.mark.parametrize(
    ("counts", "message"),
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
def test_count_differences_are_found(counts: ServiceCounts, message: str) -> None:
    assert any(message in miscount for miscount in find_miscounts(make_request_log(), counts))


def test_requests_in_a_killed_worker_may_be_uncounted() -> None:
    log = make_request_log()
    log.add(LOST_REQUEST)
    log.add(replace(LOST_REQUEST, has_left=True))
    counts = make_counts({(ROUTE, 0): 0}, {"client_left": 0})
    assert len(find_miscounts(log, counts)) == 1  # the fates of the two leavers are not known yet
    log.count_doubtful(FaultLog([KILLED_WORKER]))
    assert find_miscounts(log, counts) == []


def test_stray_requests_may_have_caused_errors() -> None:
    counts = make_counts(errors={"client_left": 3})
    assert len(find_miscounts(make_request_log(), counts)) == 1
    assert find_miscounts(make_request_log(), counts, stray_count=2) == []


# --- memory --------------------------------------------------------------------------------------

MB = 1_000_000
IDLE = IdleState(300 * MB, 100 * MB, 30)


def make_memory_curve(rise: float, noise: int = 40, seconds: int = 600) -> list[tuple[float, int]]:
    """Return a sample for each second: saw teeth, as processes come and go, on a rising line."""
    return [
        (1000.0 + second, round(300 * MB * (1 + rise * second / seconds)) + noise * MB * (second % 37) // 37)
        for second in range(seconds)
    ]


@pytest.mark.parametrize("rise", [0.0, 0.02, -0.3])
def test_flat_memory_is_no_leak(rise: float) -> None:
    assert find_leaks(IDLE, IDLE, make_memory_curve(rise)) == []


def test_rising_memory_is_found() -> None:
    assert fit_trend(make_memory_curve(0.2, noise=0)).rise == pytest.approx(
        0.2 * 0.75 * 11 / 12 / 1.125, rel=0.02
    )
    (leak,) = find_leaks(IDLE, IDLE, make_memory_curve(0.2))
    assert leak.startswith("memory: the trend rises by +1")
    (leak,) = find_leaks(IDLE, IDLE, make_memory_curve(0.0), make_memory_curve(0.2, noise=0))
    assert leak.startswith("memory of the first process: the trend rises by +1")


def test_short_run_has_no_memory_trend() -> None:
    assert find_leaks(IDLE, IDLE, make_memory_curve(0.5, seconds=200)) == []
    assert find_leaks(IDLE, IDLE, []) == []


def test_memory_at_rest_is_ignored_before_warm_up() -> None:
    idle_state = replace(IDLE, resident_bytes=900 * MB, open_files=40)
    (leak,) = find_leaks(IDLE, idle_state, make_memory_curve(0.0, seconds=30))
    assert leak.startswith("open files at rest")


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (replace(IDLE, resident_bytes=360 * MB), "memory at rest: 300 MB before and 360 MB after"),
        (replace(IDLE, main_bytes=160 * MB), "memory of the first process at rest: 100 MB before and 160 MB"),
        (replace(IDLE, open_files=40), "open files at rest: 30 before and 40 after"),
    ],
)
def test_growth_at_rest_is_found(after: IdleState, message: str) -> None:
    (leak,) = find_leaks(IDLE, after, make_memory_curve(0.0))
    assert leak.startswith(message)

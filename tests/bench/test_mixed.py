"""Clients of every behaviour against a real server: their answers and the server's counters."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fovea.bench import kinds
from fovea.bench.crowd import (
    ClientBehaviour,
    CounterSnapshot,
    RequestKind,
    build_request,
    find_differences,
    schedule_requests,
    send_requests,
    wait_for_counts,
)
from fovea.bench.processes import find_process_tree, measure_cpu_seconds, wait_until_idle
from fovea.bench.soak_result import IdleSample, SoakResult
from tests.pictures import encode_image, make_jpeg
from tests.servers import Server

IMAGES = [make_jpeg(40, 30, seed) for seed in range(20)]


@pytest.fixture(scope="module")
def impatient_server(small_zoo: Path) -> Iterator[Server]:
    settings = {"FOVEA_BODY_TIMEOUT": "1", "FOVEA_HEADER_TIMEOUT": "1"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
        yield server


def slow_down_leaving_kind(kind: RequestKind) -> RequestKind:
    """Leaving clients send a slow request: a quick answer may come before a busy server sees them leave."""
    if kind.behaviour is not ClientBehaviour.LEAVES:
        return kind
    return replace(kind, requests=[build_request(encode_image(Image.new("RGB", (3000, 3000)), "PNG"))])


@pytest.mark.long
@pytest.mark.parametrize("connections", [1, 16])
def test_every_request_is_answered_and_counted(impatient_server: Server, connections: int) -> None:
    mixed_kinds = [slow_down_leaving_kind(kind) for kind in kinds.make_mixed_kinds(IMAGES)]
    schedule = [*schedule_requests(mixed_kinds, 400, seed=connections), *mixed_kinds]
    earlier_counts = CounterSnapshot.scrape(impatient_server.url)
    outcome = send_requests(impatient_server.url, schedule, connections=connections)
    assert (
        find_differences(outcome, schedule, wait_for_counts(impatient_server.url, earlier_counts, schedule))
        == []
    )
    assert outcome.request_counts.total() == len(schedule)
    assert outcome.request_counts.keys() == {kind.name for kind in mixed_kinds}


def test_unexpected_outcomes_are_reported(impatient_server: Server) -> None:
    schedule = [replace(kinds.make_good_kind(IMAGES), status=422, error_counts={"bad_image": 1})]
    earlier_counts = CounterSnapshot.scrape(impatient_server.url)
    outcome = send_requests(impatient_server.url, schedule, connections=1)
    increase = CounterSnapshot.scrape(impatient_server.url).increase_since(earlier_counts)
    assert find_differences(outcome, schedule, increase) == [
        "good: 1 x status 200, not 422",
        "errors bad_image: 0 counted, 1 sent",
        "requests 200: 1 counted, 0 sent",
        "requests 422: 0 counted, 1 sent",
    ]


@pytest.mark.long
def test_schedule_keeps_the_shares() -> None:
    schedule = schedule_requests(kinds.make_mixed_kinds(IMAGES), 10_000, seed=0)
    names = [kind.name for kind in schedule]
    assert len(names) == 10_000
    for kind in kinds.make_mixed_kinds(IMAGES)[1:]:
        assert names.count(kind.name) == round(10_000 * kind.share)
    assert sum(kind.share for kind in kinds.make_bad_kinds(IMAGES)) == pytest.approx(0.14)


@pytest.mark.long
def test_idle_server_uses_almost_no_cpu(impatient_server: Server) -> None:
    """0.5 % of a processor is the goal; a polling loop or a spinning thread takes far more than 3 %."""
    pids = [impatient_server.process.pid]
    assert len(find_process_tree(pids[0])) > 1  # the runners too
    wait_until_idle(pids)
    cpu_before, started_at = measure_cpu_seconds(pids), time.monotonic()
    time.sleep(3)
    assert (measure_cpu_seconds(pids) - cpu_before) / (time.monotonic() - started_at) < 0.03


@pytest.mark.parametrize(
    ("last_memory", "idle_cpu", "failure_count"),
    [(104, 0.001, 0), (106, 0.001, 1), (104, 0.006, 1), (106, 0.006, 2)],
)
def test_soak_fails_on_growing_memory_or_idle_cpu(
    last_memory: int, idle_cpu: float, failure_count: int
) -> None:
    samples = [
        IdleSample(turn, float(turn), memory) for turn, memory in enumerate((50, 100, 120, last_memory))
    ]
    result = SoakResult("here", samples, [(0.0, 50)], {}, [], idle_cpu)
    assert result.growth == pytest.approx(last_memory / 100 - 1)
    assert len(result.failures) == failure_count


def test_soak_picture_is_small(tmp_path: Path) -> None:
    from fovea.bench.picture import draw_memory

    samples = [IdleSample(turn, 60.0 * turn, 100_000_000) for turn in range(11)]
    result = SoakResult(
        "here", samples, [(float(second), 10**8 + second) for second in range(600)], {}, [], 0
    )
    draw_memory(result, tmp_path / "soak.svg")
    assert 1_000 < (tmp_path / "soak.svg").stat().st_size < 60_000

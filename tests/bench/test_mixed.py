"""Clients of every manner against a real server: what is answered, and what is counted."""

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
def impatient(small_zoo: Path) -> Iterator[Server]:
    settings = {"FOVEA_BODY_TIMEOUT": "1", "FOVEA_HEADER_TIMEOUT": "1"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running:
        yield running


def slow_if_leaving(kind: RequestKind) -> RequestKind:
    """Who leaves has asked for what takes long: a quick answer may come before a busy server sees them go."""
    if kind.behaviour is not ClientBehaviour.LEAVES:
        return kind
    return replace(kind, requests=[build_request(encode_image(Image.new("RGB", (3000, 3000)), "PNG"))])


@pytest.mark.long
@pytest.mark.parametrize("connections", [1, 16])
def test_every_request_is_answered_and_counted_by_its_reason(impatient: Server, connections: int) -> None:
    load = [slow_if_leaving(kind) for kind in kinds.make_mixed_kinds(IMAGES)]
    planned = [*schedule_requests(load, 400, seed=connections), *load]
    earlier = CounterSnapshot.scrape(impatient.url)
    outcome = send_requests(impatient.url, planned, connections=connections)
    assert find_differences(outcome, planned, wait_for_counts(impatient.url, earlier, planned)) == []
    assert outcome.request_counts.total() == len(planned)
    assert outcome.request_counts.keys() == {kind.name for kind in load}


def test_what_fares_otherwise_is_told(impatient: Server) -> None:
    planned = [replace(kinds.make_good_kind(IMAGES), status=422, error_counts={"bad_image": 1})]
    earlier = CounterSnapshot.scrape(impatient.url)
    outcome = send_requests(impatient.url, planned, connections=1)
    found = CounterSnapshot.scrape(impatient.url).increase_since(earlier)
    assert find_differences(outcome, planned, found) == [
        "good: 1 x status 200, not 422",
        "errors bad_image: 0 counted, 1 sent",
        "requests 200: 1 counted, 0 sent",
        "requests 422: 0 counted, 1 sent",
    ]


@pytest.mark.long
def test_a_schedule_keeps_the_shares() -> None:
    planned = schedule_requests(kinds.make_mixed_kinds(IMAGES), 10_000, seed=0)
    names = [kind.name for kind in planned]
    assert len(names) == 10_000
    for kind in kinds.make_mixed_kinds(IMAGES)[1:]:
        assert names.count(kind.name) == round(10_000 * kind.share)
    assert sum(kind.share for kind in kinds.make_bad_kinds(IMAGES)) == pytest.approx(0.14)


@pytest.mark.long
def test_who_has_nothing_to_do_does_nothing(impatient: Server) -> None:
    """0.5 % of a processor is the goal; a polling loop or a spinning thread takes far more than 3 %."""
    pids = [impatient.process.pid]
    assert len(find_process_tree(pids[0])) > 1  # the runners too
    wait_until_idle(pids)
    before, started = measure_cpu_seconds(pids), time.monotonic()
    time.sleep(3)
    assert (measure_cpu_seconds(pids) - before) / (time.monotonic() - started) < 0.03


@pytest.mark.parametrize(
    ("last", "idle", "told"), [(104, 0.001, 0), (106, 0.001, 1), (104, 0.006, 1), (106, 0.006, 2)]
)
def test_a_soak_fails_when_memory_grows_or_idling_costs(last: int, idle: float, told: int) -> None:
    rests = [IdleSample(turn, float(turn), memory) for turn, memory in enumerate((50, 100, 120, last))]
    measured = SoakResult("here", rests, [(0.0, 50)], {}, [], idle)
    assert measured.growth == pytest.approx(last / 100 - 1)
    assert len(measured.failures) == told


def test_a_soak_is_drawn_small(tmp_path: Path) -> None:
    from fovea.bench.picture import draw_memory

    rests = [IdleSample(turn, 60.0 * turn, 100_000_000) for turn in range(11)]
    measured = SoakResult(
        "here", rests, [(float(second), 10**8 + second) for second in range(600)], {}, [], 0
    )
    draw_memory(measured, tmp_path / "soak.svg")
    assert 1_000 < (tmp_path / "soak.svg").stat().st_size < 60_000

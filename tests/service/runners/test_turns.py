"""Callers take turns in a lane: one with many items does not delay one with few."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from fovea.service.observability.metrics import Metrics
from fovea.service.runners.batcher import Batcher
from fovea.service.runners.lane import INFINITY, Job, Lane


def make_lane() -> Lane[str, str]:
    return Lane(model_id=0, batch_max=1, split_evenly=False)


def add_jobs(lane: Lane[str, str], caller: str | None, count: int, *, size: int = 1) -> list[Job]:
    """Add jobs of a caller, whose items are its name with numbers."""
    jobs = []
    for number in range(count):
        item = f"{caller}{number}"
        job = Job(item, lane, lambda *_: None, INFINITY, 0.0, 1.0, size=size, caller=caller)
        lane.add_job(job)
        jobs.append(job)
    return jobs


def pop_items(lane: Lane[str, str], count: int = 1000) -> list[str]:
    items: list[str] = []
    while lane.jobs and len(items) < count:
        items += [job.item for job in lane.pop_batch(1.0, 0.0)]
    return items


def test_items_without_callers_wait_in_the_order_of_their_arrival() -> None:
    lane = make_lane()
    for letter in "cab":
        lane.add_job(Job(letter, lane, lambda *_: None, INFINITY, 0.0, 1.0))
    assert pop_items(lane) == ["c", "a", "b"]
    assert not lane.next_turns


def test_one_caller_alone_keeps_its_order() -> None:
    lane = make_lane()
    add_jobs(lane, "a", 20)
    assert pop_items(lane) == [f"a{number}" for number in range(20)]


def test_item_of_another_caller_passes_the_queue_of_a_flood() -> None:
    lane = make_lane()
    add_jobs(lane, "a", 200)
    assert pop_items(lane, 50)[-1] == "a49"
    add_jobs(lane, "b", 3)
    assert pop_items(lane, 7) == ["b0", "a50", "b1", "a51", "b2", "a52", "a53"]


def test_item_with_many_images_takes_as_many_turns() -> None:
    lane = make_lane()
    add_jobs(lane, "a", 4, size=3)
    add_jobs(lane, "b", 6)
    assert pop_items(lane) == ["a0", "b0", "b1", "b2", "a1", "b3", "b4", "b5", "a2", "a3"]


def test_idle_caller_saves_up_no_turns() -> None:
    lane = make_lane()
    add_jobs(lane, "b", 1)
    add_jobs(lane, "a", 100)
    pop_items(lane, 90)
    add_jobs(lane, "b", 20)
    assert Counter(item[0] for item in pop_items(lane, 20)) == {"a": 10, "b": 10}


def test_turn_of_a_cancelled_item_is_given_back() -> None:
    lane = make_lane()
    flood = add_jobs(lane, "a", 50)
    for job in add_jobs(lane, "b", 40):
        lane.remove_job(job)
    for job in flood[:5]:
        lane.remove_job(job)
        lane.remove_job(job)  # has left the queue already
    add_jobs(lane, "b", 1)
    assert "b0" in pop_items(lane, 2)


def test_turns_of_past_callers_are_forgotten() -> None:
    lane = make_lane()
    waiting = add_jobs(lane, "flood", 10)
    for number in range(10_000):
        (job,) = add_jobs(lane, f"caller {number}", 1)
        lane.jobs.remove(job)  # a runner has it
        assert len(lane.next_turns) < 100
    assert lane.next_turns["flood"] == 10
    assert list(lane.jobs) == waiting


@pytest.mark.parametrize("seed", range(5))
def test_busy_callers_get_equal_shares(seed: int) -> None:
    chance, lane = np.random.default_rng(seed), make_lane()
    counts: Counter[str] = Counter()
    for _ in range(3000):
        for caller, rate in (("a", 20), ("b", 2), ("c", 1)):
            if len([job for job in lane.jobs if job.caller == caller]) < 30:
                add_jobs(lane, caller, int(chance.integers(rate + 1)))
        counts.update(item[0] for item in pop_items(lane, 1))
    # `c` and `b` offer half an item and one item a turn, and `a` has the rest. Nobody gets less than a third
    # unless it offers less.
    assert min(counts.values()) > 900


def test_batcher_passes_the_caller_on() -> None:
    async def run() -> None:
        batcher, lane = Batcher(Metrics(CollectorRegistry())), make_lane()
        for caller in "aaab":
            batcher.submit(caller, lane, caller=caller)
        assert [job.item for job in lane.jobs] == ["a", "b", "a", "a"]
        assert batcher.count_callers(0) == {"a": 3, "b": 1}

    asyncio.run(run())

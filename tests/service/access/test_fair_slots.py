"""Slots for which callers have turns."""

from __future__ import annotations

import asyncio

import pytest

from fovea.service.access.fair_slots import FairSlots
from fovea.service.errors import Overloaded


async def start(slots: FairSlots, *callers: str) -> list[asyncio.Task[None]]:
    """Let a call of each of these callers ask for a slot, in this order."""
    tasks = [asyncio.create_task(slots.take(caller)) for caller in callers]
    await asyncio.sleep(0)
    return tasks


def test_callers_have_turns() -> None:
    async def run() -> None:
        slots = FairSlots(1, 100, "calls wait")
        await slots.take("greedy")
        tasks = await start(slots, "greedy", "greedy", "greedy", "polite", "third", "polite")
        names = ["greedy 1", "greedy 2", "greedy 3", "polite 1", "third 1", "polite 2"]
        order = []
        for _ in tasks:
            slots.give()
            await asyncio.sleep(0)
            order += [
                name for name, task in zip(names, tasks, strict=True) if task.done() and name not in order
            ]
        assert order == ["greedy 1", "polite 1", "third 1", "greedy 2", "polite 2", "greedy 3"]
        assert slots.waiting_count == 0

    asyncio.run(run())


def test_call_that_leaves_takes_no_slot() -> None:
    async def run() -> None:
        slots = FairSlots(1, 100, "calls wait")
        await slots.take("one")
        leaving, waiting, late = await start(slots, "one", "two", "three")
        leaving.cancel()
        await asyncio.sleep(0)
        assert (slots.waiting_count, list(slots.queues)) == (2, ["two", "three"])
        slots.give()
        waiting.cancel()  # at the same moment: its slot goes to the next call
        await asyncio.wait([late], timeout=5)
        assert late.done()
        slots.give()
        await asyncio.wait_for(slots.take("four"), 5)

    asyncio.run(run())


def test_one_caller_fills_half_of_the_places_and_leaves_room_for_others() -> None:
    waits = []

    async def run() -> None:
        slots = FairSlots(1, 4, "calls wait", on_wait=lambda: waits.append(1))
        await slots.take("greedy")
        tasks = await start(slots, "greedy", "greedy", "greedy", "polite")
        assert [task.done() for task in tasks] == [False, False, True, False]
        with pytest.raises(Overloaded, match="too many calls wait"):
            await tasks[2]
        for task in tasks:
            task.cancel()

    asyncio.run(run())
    assert len(waits) == 3

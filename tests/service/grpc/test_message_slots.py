"""The limit on messages that are being received."""

from __future__ import annotations

import asyncio

import pytest

from fovea.service.access.caller import Caller
from fovea.service.errors import BodyTimeout, Overloaded
from fovea.service.grpc.message_slots import MessageSlots


async def hold(slots: MessageSlots, event: asyncio.Event, caller: str = "one") -> None:
    async with slots.hold(Caller(caller, "")):
        await event.wait()


def start(slots: MessageSlots, caller: str, event: asyncio.Event | None = None) -> asyncio.Task[None]:
    return asyncio.create_task(hold(slots, event or asyncio.Event(), caller))


def test_further_messages_wait_and_come_in_order() -> None:
    async def run() -> None:
        slots, events = MessageSlots(2, max_waiting=4, timeout=60), [asyncio.Event() for _ in range(4)]
        tasks = [asyncio.create_task(hold(slots, event)) for event in events]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="too many calls"):
            await hold(slots, asyncio.Event())
        events[3].set()
        events[0].set()
        await tasks[0]
        events[2].set()
        await tasks[2]
        await tasks[3]
        events[1].set()
        await tasks[1]

    asyncio.run(run())


def test_slow_message_ends_for_a_call_that_waits() -> None:
    async def run() -> None:
        slots, ready = MessageSlots(1, max_waiting=8, timeout=60, patience=0.05), asyncio.Event()
        ready.set()
        slow = asyncio.create_task(hold(slots, asyncio.Event()))
        await asyncio.sleep(0)
        await asyncio.gather(*(hold(slots, ready) for _ in range(3)))
        with pytest.raises(Overloaded, match="took more than"):
            await slow
        alone = asyncio.create_task(hold(slots, asyncio.Event()))
        await asyncio.sleep(0.2)
        assert not alone.done()  # nobody waits for its slot
        alone.cancel()

    asyncio.run(run())


def test_message_has_a_time_limit_and_leaves_its_slot() -> None:
    async def run() -> None:
        slots, ready = MessageSlots(1, max_waiting=0, timeout=0.02), asyncio.Event()
        ready.set()
        with pytest.raises(BodyTimeout, match="FOVEA_BODY_TIMEOUT"):
            await hold(slots, asyncio.Event())
        cancelled = asyncio.create_task(hold(slots, asyncio.Event()))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await hold(slots, ready)

    asyncio.run(run())


def test_callers_wait_in_turn() -> None:
    async def run() -> None:
        slots, event, order = MessageSlots(1, max_waiting=100, timeout=60), asyncio.Event(), []

        async def record(caller: str) -> None:
            async with slots.hold(Caller(caller, "")):
                order.append(caller)

        first = start(slots, "many", event)
        await asyncio.sleep(0)
        tasks = [asyncio.create_task(record(caller)) for caller in ["many"] * 40 + ["few"] * 2]
        await asyncio.sleep(0)
        tasks[0].cancel()  # it leaves the queue, and its caller keeps its turn
        event.set()
        await asyncio.gather(first, *tasks[1:])
        assert order[:4] == ["many", "few"] * 2 and len(order) == 41

    asyncio.run(run())


def test_there_is_room_for_calls_of_another_caller() -> None:
    async def run() -> None:
        slots = MessageSlots(1, max_waiting=8, timeout=60)
        tasks = [start(slots, "many") for _ in range(20)]
        await asyncio.sleep(0)
        assert sum(task.done() for task in tasks) == 15  # the slot, and half of the places
        tasks += [start(slots, "few") for _ in range(2)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in tasks[-2:])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def test_slow_message_of_a_caller_with_few_is_not_cut_off_for_a_caller_with_many() -> None:
    async def run() -> None:
        slots = MessageSlots(4, max_waiting=100, timeout=60, patience=0.02)
        phone = start(slots, "phone")
        await asyncio.sleep(0)
        flood = [start(slots, "flood") for _ in range(40)]
        while not all(task.done() for task in flood[:20]):
            await asyncio.sleep(0.01)
        assert not phone.done()
        others = [start(slots, f"other {number}") for number in range(4)]  # more callers than slots
        with pytest.raises(Overloaded, match="took more than"):
            await phone
        for task in [*flood, *others]:
            task.cancel()
        await asyncio.gather(*flood, *others, return_exceptions=True)

    asyncio.run(run())


def test_slot_that_comes_with_a_cancellation_is_given_on() -> None:
    async def run() -> None:
        slots, ready = MessageSlots(1, max_waiting=8, timeout=60), asyncio.Event()
        ready.set()
        async with slots.hold(Caller("one", "")):
            second, third = start(slots, "two"), start(slots, "three", ready)
            await asyncio.sleep(0)
        second.cancel()  # the slot is on the way to it
        async with asyncio.timeout(30):
            await third
            await hold(slots, ready)

    asyncio.run(run())

"""The limit on messages that are being received."""

from __future__ import annotations

import asyncio

import pytest

from fovea.service.errors import BodyTimeout, Overloaded
from fovea.service.grpc import message_slots
from fovea.service.grpc.message_slots import MessageSlots


async def hold(slots: MessageSlots, event: asyncio.Event) -> None:
    async with slots.hold():
        await event.wait()


def test_further_messages_wait_and_come_in_order() -> None:
    async def run() -> None:
        slots, events = MessageSlots(2, max_waiting=2, timeout=60), [asyncio.Event() for _ in range(4)]
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


def test_slow_message_ends_for_a_call_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_slots, "_PATIENCE", 0.05)

    async def run() -> None:
        slots, ready = MessageSlots(1, max_waiting=8, timeout=60), asyncio.Event()
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

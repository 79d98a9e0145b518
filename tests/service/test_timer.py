"""One limit that moves: what is called, and not before its time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from service.timer import Timer


def test_the_last_word_counts_and_has_its_time() -> None:
    async def rings() -> tuple[str, float]:
        called = asyncio.get_running_loop().create_future()
        timer, started = Timer(asyncio.get_running_loop()), time.monotonic()
        timer.arm(0.05, lambda: called.set_result("first"))
        timer.arm(0.2, lambda: called.set_result("second"))
        word: str = await called
        assert not timer.armed
        return word, time.monotonic() - started

    word, seconds = asyncio.run(rings())
    assert word == "second"
    assert seconds >= 0.2


def test_a_sooner_limit_does_not_wait_for_the_later() -> None:
    async def rings() -> None:
        called = asyncio.Event()
        timer = Timer(asyncio.get_running_loop())
        timer.arm(1000, called.clear)
        timer.arm(0.01, called.set)
        async with asyncio.timeout(60):
            await called.wait()

    asyncio.run(rings())


@pytest.mark.parametrize("end", [Timer.disarm, Timer.close])
def test_what_is_ended_calls_nothing_until_it_is_armed_again(end: Callable[[Timer], None]) -> None:
    async def rings() -> None:
        called = asyncio.Event()
        timer = Timer(asyncio.get_running_loop())
        timer.arm(0.01, called.set)
        assert timer.armed
        end(timer)
        assert not timer.armed
        await asyncio.sleep(0.1)
        assert not called.is_set()
        timer.arm(0.01, called.set)
        await called.wait()

    asyncio.run(rings())

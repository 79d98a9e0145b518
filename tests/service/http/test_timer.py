"""A timer whose limit moves: it calls the last callback, and never early."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from fovea.service.http.timer import RateLimiter, Timer


def test_the_last_word_counts_and_has_its_time() -> None:
    async def rings() -> tuple[str, float]:
        called = asyncio.get_running_loop().create_future()
        timer, started = Timer(asyncio.get_running_loop()), time.monotonic()
        timer.arm(0.05, lambda: called.set_result("first"))
        timer.arm(0.2, lambda: called.set_result("second"))
        word: str = await called
        assert not timer.is_armed
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
        assert timer.is_armed
        end(timer)
        assert not timer.is_armed
        await asyncio.sleep(0.1)
        assert not called.is_set()
        timer.arm(0.01, called.set)
        await called.wait()

    asyncio.run(rings())


def test_what_comes_too_fast_is_spread_out() -> None:
    pace = RateLimiter(100, burst=10, max_wait=1.0)
    waits = [pace.next_delay(1000.0) for _ in range(200)]
    assert waits[:10] == [0.0] * 10
    assert waits[10:] == sorted(waits[10:])
    assert waits[19] == pytest.approx(0.1)
    assert waits[-1] == pytest.approx(1.0)
    assert pace.next_delay(1002.0) == 0.0
    assert [pace.next_delay(1003.0) for _ in range(9)] == [0.0] * 9


def test_a_limit_says_how_much_is_left() -> None:
    async def measure_remaining() -> tuple[float, float]:
        timer = Timer(asyncio.get_running_loop())
        timer.arm(100, lambda: None)
        before = timer.remaining
        timer.close()
        return before, timer.remaining

    before, after = asyncio.run(measure_remaining())
    assert 99 < before <= 100
    assert after == 0

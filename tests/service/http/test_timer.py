"""A timer whose limit moves: it calls the last callback, and never early."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from fovea.service.http.rate_limiter import RateLimiter
from fovea.service.timer import Timer


def test_last_armed_callback_is_called_after_its_own_delay() -> None:
    async def run_timer() -> tuple[str, float]:
        future = asyncio.get_running_loop().create_future()
        timer, started = Timer(asyncio.get_running_loop()), time.monotonic()
        timer.arm(0.05, lambda: future.set_result("first"))
        timer.arm(0.2, lambda: future.set_result("second"))
        result: str = await future
        assert not timer.is_armed
        return result, time.monotonic() - started

    result, seconds = asyncio.run(run_timer())
    assert result == "second"
    assert seconds >= 0.2


def test_earlier_limit_does_not_wait_for_a_later_one() -> None:
    async def run_timer() -> None:
        event = asyncio.Event()
        timer = Timer(asyncio.get_running_loop())
        timer.arm(1000, event.clear)
        timer.arm(0.01, event.set)
        async with asyncio.timeout(60):
            await event.wait()

    asyncio.run(run_timer())


@pytest.mark.parametrize("end", [Timer.disarm, Timer.close])
def test_disarmed_timer_calls_nothing_until_it_is_armed_again(end: Callable[[Timer], None]) -> None:
    async def run_timer() -> None:
        event = asyncio.Event()
        timer = Timer(asyncio.get_running_loop())
        timer.arm(0.01, event.set)
        assert timer.is_armed
        end(timer)
        assert not timer.is_armed
        await asyncio.sleep(0.1)
        assert not event.is_set()
        timer.arm(0.01, event.set)
        await event.wait()

    asyncio.run(run_timer())


def test_rate_limiter_spreads_out_a_burst() -> None:
    limiter = RateLimiter(100, burst=10, max_wait=1.0)
    waits = [limiter.next_delay(1000.0) for _ in range(200)]
    assert waits[:10] == [0.0] * 10
    assert waits[10:] == sorted(waits[10:])
    assert waits[19] == pytest.approx(0.1)
    assert waits[-1] == pytest.approx(1.0)
    assert limiter.next_delay(1002.0) == 0.0
    assert [limiter.next_delay(1003.0) for _ in range(9)] == [0.0] * 9


def test_timer_reports_its_remaining_seconds() -> None:
    async def measure_remaining() -> tuple[float, float]:
        timer = Timer(asyncio.get_running_loop())
        timer.arm(100, lambda: None)
        before = timer.remaining
        timer.close()
        return before, timer.remaining

    before, after = asyncio.run(measure_remaining())
    assert 99 < before <= 100
    assert after == 0

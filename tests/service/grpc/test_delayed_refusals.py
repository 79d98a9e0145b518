"""The delay of refusals, and the number of refusals that wait."""

from __future__ import annotations

import asyncio

from fovea.service.errors import BadRequest, Overloaded
from fovea.service.grpc.delayed_refusals import DelayedRefusals


def test_refusals_wait_until_too_many_wait() -> None:
    async def run() -> None:
        refusals, error = DelayedRefusals(), Overloaded("full", retry_after=1.0)
        delays = [refusals.find_delay(error) for _ in range(400)]
        assert delays[0] == 0 and 0 < delays[-1] <= 4
        assert refusals.find_delay(BadRequest("wrong")) == 0
        tasks = [asyncio.create_task(refusals.wait(60)) for _ in range(1024)]
        await asyncio.sleep(0)
        assert refusals.find_delay(error) == 0
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        assert refusals.find_delay(error) > 0
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())

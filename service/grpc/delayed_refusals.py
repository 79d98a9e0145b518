"""Refusals that are sent later, so that callers that ask again at once take less of the event loop."""

from __future__ import annotations

import asyncio
from typing import Final

from fovea.service.errors import RequestError
from fovea.service.http.rate_limiter import create_refusal_limiter, find_refusal_delay

_MAX_WAITING: Final = 1024
"""Maximum number of refusals that wait. Each holds the memory of its call, and one connection may have 128
calls. More callers that ask again at once take all of the event loop with or without a delay."""


class DelayedRefusals:
    """The refusals of all calls that wait. Call every method on the event loop."""

    def __init__(self) -> None:
        self._limiter = create_refusal_limiter()
        self._waiting = 0

    def find_delay(self, error: RequestError) -> float:
        """Return the delay of an error in seconds."""
        delay = find_refusal_delay(error, self._limiter, asyncio.get_running_loop().time())
        return delay if self._waiting < _MAX_WAITING else 0.0

    async def wait(self, delay: float) -> None:
        """Wait for `delay` seconds."""
        if not delay:
            return
        self._waiting += 1
        try:
            await asyncio.sleep(delay)
        finally:
            self._waiting -= 1

"""The limit on messages that are being received at the same time.

gRPC receives a whole message before anybody sees its size. A call that nobody reads takes no more memory than
its flow control window (64 KB). So only as many messages are read at once as may have the largest size
together, and the other calls wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from fovea.service.errors import BodyTimeout, Overloaded

_PATIENCE: Final = 1.0
"""Time in seconds that every client has for its message. After this time a client must make room for a call
that waits."""


@dataclass(eq=False)
class _Reception:
    """One message that is being received."""

    limit: asyncio.Timeout
    started_at: float
    """Time on the clock of the event loop, in seconds."""
    is_cut_off: bool = False


class MessageSlots:
    """Slots for messages that are being received. Call every method on the event loop."""

    def __init__(self, count: int, max_waiting: int, timeout: float) -> None:
        """Allow `count` messages at once, and let `max_waiting` calls wait.

        `timeout` is the time limit for a message in seconds (FOVEA_BODY_TIMEOUT).
        """
        self._free = asyncio.Semaphore(count)
        self._max_waiting = max_waiting
        self._waiting = 0
        self._timeout = timeout
        self._timer: asyncio.TimerHandle | None = None
        self._receptions: dict[_Reception, None] = {}
        """Messages that are being received, longest first."""

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Hold a slot, and limit the time of the block.

        Raises `Overloaded` if too many calls wait or the block was ended for a call that waits, and
        `BodyTimeout` if the block takes too long.
        """
        await self._wait_for_slot()
        reception = _Reception(asyncio.timeout(self._timeout), asyncio.get_running_loop().time())
        try:
            async with reception.limit:
                self._receptions[reception] = None
                yield
        except TimeoutError:
            if reception.is_cut_off:
                raise Overloaded(
                    f"the message took more than {_PATIENCE:g} s to arrive while other calls waited",
                    retry_after=_PATIENCE,
                ) from None
            raise BodyTimeout(self._timeout) from None
        finally:
            self._receptions.pop(reception, None)
            self._free.release()

    async def _wait_for_slot(self) -> None:
        if self._free.locked():
            if self._waiting >= self._max_waiting:
                raise Overloaded("too many calls wait for their messages to be received", retry_after=1.0)
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_PATIENCE, self._make_room)
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1

    def _make_room(self) -> None:
        """End the slowest receptions, one for each call that waits.

        Otherwise slow clients could hold all slots. Called once a second as long as calls wait.
        """
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_PATIENCE, self._make_room) if self._waiting else None
        for reception in list(self._receptions)[: self._waiting]:
            if not reception.is_cut_off and loop.time() - reception.started_at >= _PATIENCE:
                reception.is_cut_off = True
                reception.limit.reschedule(loop.time())

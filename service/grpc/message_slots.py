"""The limit on messages that are being received at the same time.

gRPC receives a whole message before anybody sees its size. A call that nobody reads takes no more memory than
its flow control window (64 KB). So only as many messages are read at once as may have the largest size
together, and the other calls wait. Callers have turns, so that one caller cannot keep the slots from others.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from fovea.service.access.caller import Caller, name_caller
from fovea.service.access.fair_slots import FairSlots
from fovea.service.errors import BodyTimeout, Overloaded

_PATIENCE: Final = 1.0
"""Time in seconds that every client has for its message. After this time a client must make room for a call
that waits."""


@dataclass(eq=False)
class _Reception:
    """One message that is being received."""

    caller: Caller
    limit: asyncio.Timeout
    started_at: float
    """Time on the clock of the event loop, in seconds."""
    is_cut_off: bool = False


class MessageSlots:
    """Slots for messages that are being received. Call every method on the event loop."""

    def __init__(self, count: int, max_waiting: int, timeout: float, patience: float = _PATIENCE) -> None:
        """Allow `count` messages at once, and let `max_waiting` calls wait.

        `timeout` is the time limit for a message in seconds (FOVEA_BODY_TIMEOUT), and `patience` the time
        that a client has while other calls wait.
        """
        self._count = count
        self._slots = FairSlots(
            count, max_waiting, "calls wait for their messages to be received", on_wait=self._start_timer
        )
        self._timeout = timeout
        self._patience = patience
        self._timer: asyncio.TimerHandle | None = None
        self._receptions: dict[_Reception, None] = {}
        """Messages that are being received, longest first."""

    @asynccontextmanager
    async def hold(self, caller: Caller) -> AsyncIterator[None]:
        """Hold a slot for a call of `caller`, and limit the time of the block.

        Raises `Overloaded` if too many calls wait or the block was ended for a call that waits, and
        `BodyTimeout` if the block takes too long.
        """
        await self._slots.take(name_caller(caller))
        now = asyncio.get_running_loop().time()
        reception = _Reception(caller, asyncio.timeout(self._timeout), now)
        try:
            async with reception.limit:
                self._receptions[reception] = None
                yield
        except TimeoutError:
            if reception.is_cut_off:
                raise Overloaded(
                    f"the message took more than {self._patience:g} s to arrive while other calls waited",
                    retry_after=self._patience,
                ) from None
            raise BodyTimeout(self._timeout) from None
        finally:
            self._receptions.pop(reception, None)
            self._slots.give()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._patience, self._make_room)

    def _make_room(self) -> None:
        """End the slowest receptions, one for each call that waits.

        Otherwise slow clients could hold all slots. A caller makes room for its own calls. It makes room for
        other callers while it has more than its share of the slots. Called again and again as long as calls
        wait.
        """
        loop = asyncio.get_running_loop()
        self._timer = None
        if self._slots.waiting_count:
            self._start_timer()
        receptions = {one: name_caller(one.caller) for one in self._receptions if not one.is_cut_off}
        counts = Counter(receptions.values())
        share = self._count // max(1, len(counts.keys() | self._slots.queues.keys()))
        for name, queue in self._slots.queues.items():
            for _ in queue:
                reception = next(
                    (
                        one
                        for one, other in receptions.items()
                        if loop.time() - one.started_at >= self._patience
                        and (other == name or counts[other] > share)
                    ),
                    None,
                )
                if reception is None:
                    break
                counts[receptions.pop(reception)] -= 1
                reception.is_cut_off = True
                reception.limit.reschedule(loop.time())

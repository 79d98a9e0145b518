"""The limit on messages that are being received at the same time.

gRPC receives a whole message before anybody sees its size. A call that nobody reads takes no more memory than
its flow control window (64 KB). So only as many messages are read at once as may have the largest size
together, and the other calls wait. Callers have turns, so that one caller cannot keep the slots from others.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from fovea.service.access.caller import Caller, name_caller
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
        self._free = count
        self._max_waiting = max_waiting
        self._timeout = timeout
        self._patience = patience
        self._waiting = 0
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}
        """Calls that wait, by caller. The first call of the first caller is the next."""
        self._timer: asyncio.TimerHandle | None = None
        self._receptions: dict[_Reception, None] = {}
        """Messages that are being received, longest first."""

    @asynccontextmanager
    async def hold(self, caller: Caller) -> AsyncIterator[None]:
        """Hold a slot for a call of `caller`, and limit the time of the block.

        Raises `Overloaded` if too many calls wait or the block was ended for a call that waits, and
        `BodyTimeout` if the block takes too long.
        """
        await self._take_slot(caller)
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
            self._give_slot()

    async def _take_slot(self, caller: Caller) -> None:
        """Take a slot, or wait for one. Raises `Overloaded`."""
        if self._free:
            self._free -= 1
            return
        name = name_caller(caller)
        self._check_place(name)
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._timer = loop.call_later(self._patience, self._make_room)
        future = loop.create_future()
        self._queues.setdefault(name, deque()).append(future)
        self._waiting += 1
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():  # the slot came at the same moment
                self._give_slot()
            elif future in (queue := self._queues.get(name, deque())):
                queue.remove(future)
                self._waiting -= 1
                if not queue:
                    del self._queues[name]
            raise

    def _check_place(self, name: str) -> None:
        """Raise `Overloaded` if a caller has its share of the places for calls that wait.

        Half of the places are for any caller. After that there is always room for one more caller.
        """
        queue = self._queues.get(name)
        share = self._max_waiting // (len(self._queues) + (queue is None) + 1)
        total, own = self._waiting + 1, len(queue or ()) + 1
        if total > self._max_waiting or (2 * total > self._max_waiting and own > max(1, share)):
            raise Overloaded("too many calls wait for their messages to be received", retry_after=1.0)

    def _give_slot(self) -> None:
        """Give a slot to the next call, and move its caller behind the others."""
        while self._queues:
            name = next(iter(self._queues))
            queue = self._queues.pop(name)
            future = queue.popleft()
            self._waiting -= 1
            if queue:
                self._queues[name] = queue
            if not future.done():  # otherwise its call is cancelled, and does not know this yet
                future.set_result(None)
                return
        self._free += 1

    def _make_room(self) -> None:
        """End the slowest receptions, one for each call that waits.

        Otherwise slow clients could hold all slots. A caller makes room for its own calls. It makes room for
        other callers while it has more than its share of the slots. Called again and again as long as calls
        wait.
        """
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._patience, self._make_room) if self._waiting else None
        receptions = {one: name_caller(one.caller) for one in self._receptions if not one.is_cut_off}
        counts = Counter(receptions.values())
        share = self._count // max(1, len(counts.keys() | self._queues.keys()))
        for name, queue in self._queues.items():
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

"""Slots for which callers have turns, so that one caller cannot keep them from others."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from fovea.service.access.caller import exceeds_share
from fovea.service.errors import Overloaded

_Queue: TypeAlias = deque[asyncio.Future[None]]


class FairSlots:
    """Slots of a limited number. Call every method on the event loop."""

    def __init__(
        self, count: int, max_waiting: int, noun: str, *, on_wait: Callable[[], None] = lambda: None
    ) -> None:
        """Allow `count` slots at once, and let `max_waiting` calls wait for one.

        `noun` names what waits in the message of `Overloaded`. `on_wait` is called before a call waits.
        """
        self._free = count
        self._max_waiting = max_waiting
        self._noun = noun
        self._on_wait = on_wait
        self._queues: dict[str, _Queue] = {}
        """Calls that wait, by caller. The first call of the first caller is the next."""
        self.waiting_count = 0
        """Number of calls that wait."""

    @property
    def queues(self) -> Mapping[str, Sequence[object]]:
        """Calls that wait, by caller."""
        return self._queues

    async def take(self, caller: str) -> None:
        """Take a slot, or wait for one. Raises `Overloaded`."""
        if self._free:
            self._free -= 1
            return
        self._check_place(caller)
        self._on_wait()
        future = asyncio.get_running_loop().create_future()
        self._queues.setdefault(caller, deque()).append(future)
        self.waiting_count += 1
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():  # the slot came at the same moment
                self.give()
            elif future in (queue := self._queues.get(caller, deque())):
                queue.remove(future)
                self.waiting_count -= 1
                if not queue:
                    del self._queues[caller]
            raise

    def give(self) -> None:
        """Give a slot to the next call, and move its caller behind the others."""
        while self._queues:
            caller = next(iter(self._queues))
            queue = self._queues.pop(caller)
            future = queue.popleft()
            self.waiting_count -= 1
            if queue:
                self._queues[caller] = queue
            if not future.done():  # otherwise its call is cancelled, and does not know this yet
                future.set_result(None)
                return
        self._free += 1

    def _check_place(self, caller: str) -> None:
        """Raise `Overloaded` if a caller has its share of the places for calls that wait."""
        queue = self._queues.get(caller)
        total = self.waiting_count + 1
        if total > self._max_waiting or exceeds_share(
            own=len(queue or ()) + 1,
            total=total,
            callers=len(self._queues) + (queue is None),
            limit=self._max_waiting,
        ):
            raise Overloaded(f"too many {self._noun}", retry_after=1.0)

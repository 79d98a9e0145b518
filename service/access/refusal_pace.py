"""The pace of refusals: a caller that retries at once gets its refusals later and later."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from fovea.service.access.caller import Caller, name_caller
from fovea.service.access.caller_table import CallerTable, Slots

_RATE: Final = 20
"""Refusals per second of one caller that are sent at once, after a burst of as many. Each takes 0.15 ms of
the event loop, and callers that retry at once would take all of it."""

_MAX_DELAY: Final = 4.0
"""Maximum delay of a refusal in seconds."""


class RefusalPace:
    """The delays of refusals by caller. Call every method on the event loop."""

    def __init__(self, table: CallerTable, clock: Callable[[], float] = time.monotonic) -> None:
        """Count the refusals in `table`."""
        self._table = table
        self._clock = clock

    def count_refusal(self, caller: Caller) -> float:
        """Count a refusal, and return the delay in seconds after which it is sent."""
        return self.count_in_slots(self._table.find_slots(name_caller(caller).encode()))

    def count_in_slots(self, slots: Slots) -> float:
        """Do the same for the caller with these slots of the table."""
        now, interval = self._clock(), 1 / _RATE
        start = max(self._table.read_refusal_time(slots), now - _RATE * interval)
        time_used = min(start + interval, now + _MAX_DELAY)
        self._table.advance_refusal_time(slots, time_used)
        return max(0.0, time_used - now)

"""Timers for connections.

`Timer` is a time limit that is armed and disarmed many times a second and rarely reached. `Pace` spreads out
refusals.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Timer:
    """A timer that calls one function after some time, unless it is disarmed before.

    The timer has a single asyncio handle. The handle is moved when it fires, not when the limit changes, so
    that arming and disarming cost next to nothing.
    """

    __slots__ = ("_due", "_handle", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None
        self._due: tuple[float, Callable[[], None]] | None = None

    @property
    def armed(self) -> bool:
        """Return whether a call is pending."""
        return self._due is not None

    @property
    def left(self) -> float:
        """Return the time in seconds until the call; 0 if the timer is not armed."""
        return max(0.0, self._due[0] - self._loop.time()) if self._due else 0.0

    def arm(self, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` after `seconds`. This replaces a pending call."""
        due = self._loop.time() + seconds
        if self._handle is None or self._handle.when() > due:
            self.close()
            self._handle = self._loop.call_at(due, self._ring)
        self._due = due, act

    def disarm(self) -> None:
        """Cancel the pending call."""
        self._due = None

    def close(self) -> None:
        """Cancel the pending call and release the asyncio handle with its references."""
        self._due = None
        if self._handle:
            self._handle.cancel()
            self._handle = None

    def _ring(self) -> None:
        """Call the function if its time has come, or move the handle."""
        self._handle = None
        if self._due is None:
            return
        due, act = self._due
        if due > self._loop.time():
            self._handle = self._loop.call_at(due, self._ring)
        else:
            self._due = None
            # Disarm before the call: the function may arm the timer again.
            act()


class Pace:
    """Rate limit that delays events: a burst passes at once, then events pass at a steady rate.

    An event is delayed for at most the longest wait.
    """

    def __init__(self, rate: float, *, burst: int, longest: float) -> None:
        """Set the rate in events per second, the burst in events, and the longest wait in seconds."""
        self._gap = 1 / rate
        self._burst = burst * self._gap
        self._longest = longest
        self._next = 0.0

    def wait(self, now: float) -> float:
        """Return the delay in seconds of the next event at time `now`."""
        self._next = min(max(self._next, now - self._burst) + self._gap, now + self._longest)
        return max(0.0, self._next - now)

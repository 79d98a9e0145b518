"""Timers for connections.

`Timer` is a time limit that is mostly not reached: armed and disarmed many times a second, at next to no
cost. `Pace` spreads out refusals.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Timer:
    """Calls one function after some time, unless disarmed before.

    asyncio is told of it rarely: its one handle is moved when it rings, not when the limit moves.
    """

    __slots__ = ("_due", "_handle", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None
        self._due: tuple[float, Callable[[], None]] | None = None

    @property
    def armed(self) -> bool:
        """Whether a function is to be called."""
        return self._due is not None

    @property
    def left(self) -> float:
        """Seconds until the function is called, while it is armed."""
        return max(0.0, self._due[0] - self._loop.time()) if self._due else 0.0

    def arm(self, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` after so many seconds, in place of whatever was to be called."""
        due = self._loop.time() + seconds
        if self._handle is None or self._handle.when() > due:
            self.close()
            self._handle = self._loop.call_at(due, self._ring)
        self._due = due, act

    def disarm(self) -> None:
        """Call nothing."""
        self._due = None

    def close(self) -> None:
        """Call nothing, and let go of what the function holds."""
        self._due = None
        if self._handle:
            self._handle.cancel()
            self._handle = None

    def _ring(self) -> None:
        self._handle = None
        if self._due is None:
            return
        due, act = self._due
        if due > self._loop.time():
            self._handle = self._loop.call_at(due, self._ring)
        else:
            self._due = None
            act()


class Pace:
    """Spreads out what comes too fast: after a burst at a steady rate, or after the longest wait."""

    def __init__(self, rate: float, *, burst: int, longest: float) -> None:
        """`rate` is per second; `longest` is in seconds."""
        self._gap = 1 / rate
        self._burst = burst * self._gap
        self._longest = longest
        self._next = 0.0

    def wait(self, now: float) -> float:
        """Return how many seconds the next one has to wait, at the time `now`."""
        self._next = min(max(self._next, now - self._burst) + self._gap, now + self._longest)
        return max(0.0, self._next - now)

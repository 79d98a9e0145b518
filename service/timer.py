"""A time limit that is armed and disarmed many times a second and rarely reached."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Timer:
    """A timer that calls one function after some time, unless it is disarmed before.

    The timer has a single asyncio handle. The handle is moved when it fires, not when the limit changes, so
    that arming and disarming cost next to nothing.
    """

    __slots__ = ("_handle", "_loop", "_paused_call", "_pending_call")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None
        self._pending_call: tuple[float, Callable[[], None]] | None = None
        self._paused_call: tuple[float, Callable[[], None]] | None = None
        """Remaining time in seconds and function of a call that is paused."""

    @property
    def is_armed(self) -> bool:
        """True if a call is pending."""
        return self._pending_call is not None

    @property
    def remaining(self) -> float:
        """Time in seconds until the call; 0 if the timer is not armed."""
        return max(0.0, self._pending_call[0] - self._loop.time()) if self._pending_call else 0.0

    def arm(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call `callback` on the event loop after `seconds`. This replaces a pending call."""
        due_time = self._loop.time() + seconds
        if self._handle is None or self._handle.when() > due_time:
            self.close()
            self._handle = self._loop.call_at(due_time, self._fire)
        self._pending_call = due_time, callback

    def pause(self) -> None:
        """Stop the time of the pending call until `resume`."""
        if self._pending_call:
            self._paused_call = self.remaining, self._pending_call[1]
            self._pending_call = None

    def resume(self) -> None:
        """Arm the timer again with the time that was left at `pause`, unless it was disarmed meanwhile."""
        if self._paused_call:
            self.arm(*self._paused_call)
            self._paused_call = None

    def disarm(self) -> None:
        """Cancel the pending or paused call."""
        self._pending_call = self._paused_call = None

    def close(self) -> None:
        """Cancel the call and release the asyncio handle with its references."""
        self._pending_call = self._paused_call = None
        if self._handle:
            self._handle.cancel()
            self._handle = None

    def _fire(self) -> None:
        """Call the function if its time has come, or move the handle."""
        self._handle = None
        if self._pending_call is None:
            return
        due_time, callback = self._pending_call
        if due_time > self._loop.time():
            self._handle = self._loop.call_at(due_time, self._fire)
        else:
            # Disarm before the call: the function may arm the timer again.
            self._pending_call = None
            callback()

"""A rate limit that spreads out refusals."""

from __future__ import annotations


class RateLimiter:
    """Rate limit that delays events: a burst passes at once, then events pass at a steady rate.

    An event is delayed for at most the longest wait.
    """

    def __init__(self, rate: float, *, burst: int, max_wait: float) -> None:
        """Set the rate in events per second, the burst in events, and the longest wait in seconds."""
        self._interval = 1 / rate
        self._burst = burst * self._interval
        self._max_wait = max_wait
        self._next_time = 0.0

    def next_delay(self, now: float) -> float:
        """Return the delay in seconds of the next event at time `now`."""
        self._next_time = min(max(self._next_time, now - self._burst) + self._interval, now + self._max_wait)
        return max(0.0, self._next_time - now)

"""A rate limit that spreads out refusals."""

from __future__ import annotations

from typing import Final

from fovea.service.errors import Overloaded, PacedRefusal, RequestError

_REFUSAL_RATE: Final = 200
"""Refusals per second for lack of capacity, and size of the initial burst. Each takes 0.15 ms of the event
loop over HTTP, and 1 ms over gRPC."""

_MAX_REFUSAL_DELAY: Final = 4.0
"""Maximum delay of a refusal in seconds."""


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


def create_refusal_limiter() -> RateLimiter:
    """Return the limit on refusals for lack of capacity over one protocol."""
    return RateLimiter(_REFUSAL_RATE, burst=_REFUSAL_RATE, max_wait=_MAX_REFUSAL_DELAY)


def find_refusal_delay(error: RequestError, limiter: RateLimiter, now: float) -> float:
    """Return the delay in seconds of an error at time `now`.

    Delaying refusals limits the load from callers that retry at once, and leaves time for admitted requests.
    """
    if isinstance(error, PacedRefusal):
        return error.delay  # of its caller alone, so that other callers get their refusals at once
    return limiter.next_delay(now) if isinstance(error, Overloaded) else 0.0

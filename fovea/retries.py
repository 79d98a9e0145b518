"""When a request to a service is sent again, and how long the client waits before."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

from fovea.service.errors import FoveaError

RETRIED_STATUSES: Final = frozenset({429, 503})
"""Statuses of replies that ask the client to come back later. The service has not classified anything."""

_FIRST_WAIT: Final = 0.1
"""Time in seconds before the second attempt, if the reply gives no time or 0. It doubles each time."""

_LONGEST_WAIT: Final = 5.0

_MAX_DOUBLINGS: Final = 10

_JITTER: Final = 0.2
"""Largest share of a wait that is added at random, so that many clients do not come back at once."""

_CONNECTION_RETRIES: Final = 4
"""Number of retries after failed connections. They take 1.5 s together: nobody may be there at all."""


class Retries:
    """The retries of one request, which wait `seconds` in total at most; 0 for no retry.

    Classification changes nothing, so that a request whose connection failed may be sent again although the
    service may have received it.
    """

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._count = 0
        self._connection_count = 0

    def next_wait(self, error: FoveaError, *, is_connection: bool = False) -> float:
        """Return the time in seconds to wait before the request is sent again.

        Raises `error` if the request must not be sent again, or if there is no time left.
        """
        self._connection_count += is_connection
        wait: float | None = getattr(error, "retry_after", None)
        if not wait:  # a service that says 0 while it is overloaded must not be asked without a pause
            wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(self._count, _MAX_DOUBLINGS))
        wait *= 1 + random.uniform(0, _JITTER)  # noqa: S311 - not a secret
        self._count += 1
        if self._connection_count > _CONNECTION_RETRIES or time.monotonic() + wait > self._deadline:
            raise error
        return wait


def parse_retry_after(value: str | None) -> float | None:
    """Return the time in seconds that a header `Retry-After` gives (RFC 9110, section 10.2.3).

    The value is a number of seconds or a date. Return None without a header, and for a malformed one.
    """
    if value is None:
        return None
    try:
        return max(0.0, float(value)) if value.strip().isdecimal() else _seconds_until(value)
    except (ValueError, OverflowError):
        return None


def _seconds_until(date: str) -> float:
    moment = parsedate_to_datetime(date)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())

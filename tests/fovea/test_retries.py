"""The times after which a request is sent again."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from fovea.errors import ConnectionFailed, UnexpectedReply
from fovea.retries import Retries, parse_retry_after


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("-1", None),
        ("1.5", None),
        ("inf", None),
        ("soon", None),
    ],
)
def test_retry_after_is_a_number_of_seconds(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value) == seconds


def test_retry_after_may_be_a_date() -> None:
    later = datetime.now(UTC) + timedelta(seconds=50)
    for date in (format_datetime(later, usegmt=True), later.strftime("%a, %d %b %Y %H:%M:%S -0000")):
        assert 40 < (parse_retry_after(date) or 0) <= 50
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert parse_retry_after("Mon, 99999999999999999999 Jan 2020 00:00:00 GMT") is None


def test_waits_grow_and_end_before_the_limit() -> None:
    error = UnexpectedReply("busy", status=503)
    retries = Retries(1000)
    waits = [retries.next_wait(error) for _ in range(9)]
    for wait, least in zip(waits, [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5], strict=True):
        assert least <= wait <= 1.2 * least
    retries = Retries(1000)
    refusal = UnexpectedReply("busy", status=503, retry_after=0)
    waits = [retries.next_wait(refusal) for _ in range(2000)]
    assert waits[0] >= 0.1
    assert waits[-1] >= 5
    for seconds in (0, 0.05):
        with pytest.raises(UnexpectedReply):
            Retries(seconds).next_wait(error)
    started_at = time.monotonic()
    with pytest.raises(UnexpectedReply):
        Retries(30).next_wait(UnexpectedReply("busy", status=503, retry_after=31))
    assert time.monotonic() - started_at < 10


def test_connections_are_retried_four_times() -> None:
    retries = Retries(1000)
    for _ in range(4):
        retries.next_wait(ConnectionFailed("lost"), is_connection=True)
    with pytest.raises(ConnectionFailed):
        retries.next_wait(ConnectionFailed("lost"), is_connection=True)

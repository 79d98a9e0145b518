"""The limits of one caller: rate, images in flight, and share, with a clock of the test."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from fovea.service.access.caller import Caller, name_caller
from fovea.service.access.caller_limits import (
    CallerLimits,
    CallerReservation,
    QuestionPlaces,
    has_caller_limits,
)
from fovea.service.access.caller_table import CallerTable
from fovea.service.errors import BadRequest, RateLimited, SettingsError, ShareExceeded, TooManyInFlight
from fovea.service.resources.body_memory import BodyMemory
from fovea.service.settings import Settings, load_settings

ANNE = Caller("anne", "192.0.2.1")
BEN = Caller("", "192.0.2.2")


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def make_limits(
    clock: Clock | None = None, table: CallerTable | None = None, **settings: Any
) -> CallerLimits:
    return CallerLimits(
        Settings(**settings),
        table or CallerTable.create(),
        estimate_seconds=lambda images: images / 10,
        clock=clock or Clock(),
    )


def send_images(limits: CallerLimits, caller: Caller, count: int = 1) -> None:
    """Send a request with `count` images, and get its answer."""
    reservation = limits.reserve(caller)
    try:
        reservation.extend(count)
    finally:
        reservation.release()


def count_accepted(limits: CallerLimits, caller: Caller, attempts: int) -> int:
    accepted = 0
    for _ in range(attempts):
        try:
            send_images(limits, caller)
        except RateLimited:
            continue
        accepted += 1
    return accepted


# --- rate ---


def test_burst_passes_at_once_then_the_rate_holds() -> None:
    clock = Clock()
    limits = make_limits(clock, caller_rate=10.0, caller_burst=25)
    assert count_accepted(limits, ANNE, 100) == 25
    for _ in range(30):
        clock.now += 0.1
        assert count_accepted(limits, ANNE, 5) == 1
    clock.now += 1.0
    assert count_accepted(limits, ANNE, 100) == 10
    clock.now += 1000.0  # a full bucket does not overflow
    assert count_accepted(limits, ANNE, 100) == 25


def test_burst_is_that_of_one_second_by_default() -> None:
    assert count_accepted(make_limits(caller_rate=7.5), ANNE, 100) == 8
    assert count_accepted(make_limits(caller_rate=0.2), ANNE, 100) == 1


def test_each_caller_has_its_own_rate() -> None:
    limits = make_limits(caller_rate=1.0, caller_burst=5)
    assert count_accepted(limits, ANNE, 100) == 5
    assert count_accepted(limits, BEN, 100) == 5
    # The same key from another address is the same caller.
    assert count_accepted(limits, Caller("anne", "192.0.2.99"), 100) == 0


def test_retry_after_is_the_time_after_which_the_request_passes() -> None:
    clock = Clock()
    limits = make_limits(clock, caller_rate=4.0, caller_burst=8)
    send_images(limits, ANNE, 8)
    with pytest.raises(RateLimited) as caught:
        send_images(limits, ANNE)
    assert caught.value.retry_after == pytest.approx(0.25)
    clock.now += 1.0
    with pytest.raises(RateLimited) as caught:
        send_images(limits, ANNE, 8)
    clock.now += caught.value.retry_after
    send_images(limits, ANNE, 8)


def test_more_images_than_the_burst_need_a_full_bucket_and_leave_a_debt() -> None:
    clock = Clock()
    limits = make_limits(clock, caller_rate=10.0, caller_burst=4)
    send_images(limits, ANNE, 64)
    clock.now += 5.0
    assert count_accepted(limits, ANNE, 10) == 0
    clock.now += 1.2  # 64 images take 6.4 s, of which the burst was 0.4 s
    assert count_accepted(limits, ANNE, 10) == 2


def test_refused_request_holds_no_place() -> None:
    limits = make_limits(caller_rate=1.0, caller_burst=2, caller_images=100)
    send_images(limits, ANNE, 2)
    with pytest.raises(RateLimited):
        send_images(limits, ANNE)
    assert not limits._accounts
    assert limits._table.count_images(limits._find_caller(ANNE)[1]) == 0


def test_caller_that_is_refused_often_gets_its_refusals_late() -> None:
    clock = Clock()
    limits = make_limits(clock, caller_rate=0.001, caller_burst=1)
    for caller in (ANNE, BEN):
        send_images(limits, caller)

    def get_delay(caller: Caller) -> float:
        with pytest.raises(RateLimited) as caught:
            limits.reserve(caller)
        return caught.value.delay

    delays = [get_delay(ANNE) for _ in range(200)]
    assert delays[:20] == pytest.approx([0.0] * 20, abs=0.001)
    assert delays[20] == pytest.approx(0.05, abs=0.001)
    assert max(delays) <= 4.0
    assert get_delay(BEN) == 0.0
    clock.now += 60.0
    assert get_delay(ANNE) == 0.0


# --- images in flight ---


def test_images_in_flight_are_limited_until_they_are_released() -> None:
    limits = make_limits(caller_images=3)
    reservations = [limits.reserve(ANNE) for _ in range(3)]
    with pytest.raises(TooManyInFlight) as caught:
        limits.reserve(ANNE)
    assert caught.value.retry_after == pytest.approx(0.3)
    limits.reserve(BEN).release()
    reservations[0].release()
    reservations[0].release()  # a second call does nothing
    limits.reserve(ANNE)
    with pytest.raises(TooManyInFlight):
        limits.reserve(ANNE)


def test_images_and_boxes_of_a_request_count() -> None:
    limits = make_limits(caller_images=10)
    first, second = limits.reserve(ANNE), limits.reserve(ANNE)
    first.extend(8)
    with pytest.raises(TooManyInFlight):
        second.extend(3)
    second.extend(2)
    first.release()
    second.extend(10)


def test_more_images_than_a_caller_may_ever_have_are_a_bad_request() -> None:
    reservation = make_limits(caller_images=10).reserve(ANNE)
    with pytest.raises(BadRequest, match=r"11 images, and at most 10.*FOVEA_CALLER_IMAGES"):
        reservation.extend(11)


def test_request_without_images_counts_until_its_end() -> None:
    """All images by URL may have failed."""
    memory = BodyMemory(1000)
    limits = make_limits(caller_images=3, caller_rate=0.1, caller_burst=9, caller_shares=True)
    other = limits.reserve(ANNE)
    for _ in range(4):
        reservation = limits.reserve(ANNE)
        reservation.extend(2)
        reservation.add_bytes(200, memory)
        reservation.extend(0)
        assert limits._table.count_images(limits._find_caller(ANNE)[1]) == 2
        reservation.extend(1)
        reservation.release()
        assert limits._accounts["key anne"].body_bytes == 0
    with pytest.raises(RateLimited):  # the images that failed have used the rate
        limits.reserve(ANNE)
    other.release()
    assert not limits._accounts


def test_state_of_callers_ends_with_their_requests() -> None:
    limits = make_limits(caller_rate=5.0, caller_images=10, caller_shares=True)
    for number in range(10_000):
        send_images(limits, Caller("", f"2001:db8:{number:x}::1"), 2)
    assert not limits._accounts
    assert limits._find_caller.cache_info().currsize <= 4096


def test_workers_share_the_limits() -> None:
    clock, table = Clock(), CallerTable.create()
    workers = [make_limits(clock, table, caller_rate=1.0, caller_burst=6, caller_images=4) for _ in range(2)]
    reservations = [workers[number % 2].reserve(ANNE) for number in range(4)]
    with pytest.raises(TooManyInFlight):
        workers[0].reserve(ANNE)
    for reservation in reservations:
        reservation.release()
    assert count_accepted(workers[0], ANNE, 10) + count_accepted(workers[1], ANNE, 10) == 2


# --- shares ---


def fill_queue(limits: CallerLimits, caller: Caller) -> list[CallerReservation]:
    """Send requests until one is refused."""
    reservations = []
    with pytest.raises(ShareExceeded):
        for _ in range(1000):
            reservations.append(limits.reserve(caller))
    return reservations


def test_lone_caller_leaves_half_of_the_places_to_others() -> None:
    limits = make_limits(queue_images=100, request_images=1, caller_shares=True)
    assert len(fill_queue(limits, ANNE)) == 50
    assert len(fill_queue(limits, BEN)) == 33
    with pytest.raises(ShareExceeded):
        limits.reserve(ANNE)
    assert len(fill_queue(limits, Caller("carl", ""))) == 25


def test_refusal_does_not_tell_how_many_others_there_are() -> None:
    messages = set()
    for others in (1, 2, 5):
        limits = make_limits(queue_images=100, request_images=1, caller_shares=True)
        for number in range(others):
            limits.reserve(Caller(str(number), ""))
        fill_queue(limits, ANNE)
        with pytest.raises(ShareExceeded) as caught:
            limits.reserve(ANNE)
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_flooding_caller_is_refused_before_others() -> None:
    limits = make_limits(queue_images=100, request_images=1, caller_shares=True)
    flood = fill_queue(limits, ANNE)
    for _ in range(500):
        limits.reserve(BEN).release()
        flood.pop(0).release()
        flood.append(limits.reserve(ANNE))
        with pytest.raises(ShareExceeded):
            limits.reserve(ANNE)


def test_caller_may_have_all_places_of_an_empty_half() -> None:
    limits = make_limits(queue_images=100, caller_shares=True)
    reservation = limits.reserve(ANNE)
    reservation.extend(50)
    with pytest.raises(ShareExceeded):
        reservation.extend(51)


def test_each_caller_has_one_place_among_many() -> None:
    limits = make_limits(queue_images=4, request_images=1, caller_shares=True)
    for number in range(10):
        limits.reserve(Caller(str(number), ""))
    with pytest.raises(ShareExceeded):
        limits.reserve(Caller("0", ""))


# --- names ---


@pytest.mark.parametrize(
    ("caller", "expected"),
    [
        (Caller("anne", "192.0.2.1"), "key anne"),
        (Caller("192.0.2.1", "192.0.2.2"), "key 192.0.2.1"),
        (Caller("", "192.0.2.1"), "address 192.0.2.1"),
        (Caller("", "2001:db8:1:2:3:4:5:6"), "network 2001:db8:1:2::/64"),
        (Caller("", "2001:db8:1:2::ffff"), "network 2001:db8:1:2::/64"),
        (Caller("", "fe80::1%eth0"), "network fe80::/64"),
        (Caller("", "64:ff9b::192.0.2.1"), "address 192.0.2.1"),
        (Caller("", ""), "address "),
    ],
)
def test_caller_is_counted_by_key_or_address_or_network(caller: Caller, expected: str) -> None:
    assert name_caller(caller) == expected


def test_limits_are_off_by_default() -> None:
    assert not has_caller_limits(Settings())
    assert CallerLimits.create(Settings(), None, lambda images: 0.0) is None
    for settings in ({"caller_rate": 1.0}, {"caller_images": 1}, {"caller_shares": True}):
        assert has_caller_limits(Settings(**settings))


def test_burst_without_rate_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_CALLER_BURST", "5")
    with pytest.raises(SettingsError, match="FOVEA_CALLER_BURST is 5 without FOVEA_CALLER_RATE"):
        load_settings()


# --- shares of memory and of explanations ---


def test_memory_of_bodies_is_shared_out() -> None:
    memory = BodyMemory(1000)
    limits = make_limits(caller_shares=True)
    flood, second_flood, other = limits.reserve(ANNE), limits.reserve(ANNE), limits.reserve(BEN)
    for _ in range(5):  # nothing is refused before half of the memory is taken
        flood.add_bytes(90, memory)
        assert memory.reserve(90)
    with pytest.raises(ShareExceeded, match="FOVEA_BODIES_BYTES"):
        flood.add_bytes(90, memory)
    other.add_bytes(300, memory)
    flood.release()
    memory.release(450)
    memory.reserve(500)
    second_flood.add_bytes(90, memory)


def test_memory_of_bodies_is_not_counted_without_shares() -> None:
    memory = BodyMemory(1000)
    reservation = make_limits(caller_images=5).reserve(ANNE)
    for _ in range(20):
        reservation.add_bytes(90, memory)


def test_places_for_explanations_are_shared_out() -> None:
    places = QuestionPlaces(make_limits(caller_shares=True), 8)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(places.reserve("flood"))
        for caller in ("flood", "flood"):
            with pytest.raises(ShareExceeded), places.reserve(caller):
                pass
        for _ in range(2):
            stack.enter_context(places.reserve("other"))
    assert not places._counts
    for limits in (None, make_limits(caller_shares=True)):  # without names of callers
        with ExitStack() as stack:
            for _ in range(20):
                stack.enter_context(QuestionPlaces(limits, 8).reserve(None))

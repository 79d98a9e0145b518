"""Limits of each caller: images per second, images in flight, and a fair share of a full queue.

* **Rate.** The generic cell rate algorithm (ITU-T I.371) is a token bucket that needs one number for each
  caller: the time at which all of the caller's tokens were or will be used. An image moves this time by
  1 / rate. A caller whose time is `burst` / rate in the past has a full bucket, and one whose time is in the
  future has a debt.
* **Images in flight.** A request counts from its headers to its end, so that slow uploads count too.
* **Shares.** While more than half of the places in the queue are taken, a caller may have `limit / (n + 1)`
  places, if n callers have any. So there is always room for one more caller.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Final

from fovea.service.access.caller import Caller, exceeds_share, name_caller
from fovea.service.access.caller_table import CallerTable, Slots
from fovea.service.access.refusal_pace import RefusalPace
from fovea.service.errors import (
    BadRequest,
    CallerLimited,
    RateLimited,
    ShareExceeded,
    TooManyInFlight,
)
from fovea.service.resources.body_memory import BodyMemory
from fovea.service.settings import Settings

_MAX_CACHED_CALLERS: Final = 4096
"""Maximum number of callers whose slots are cached. Computing the slots takes longer than a lookup."""

_TOLERANCE: Final = 1e-6
"""Tolerance of the rate for rounding, in seconds."""


class CallerLimits:
    """The limits of all callers. Call every method on the event loop."""

    def __init__(
        self,
        settings: Settings,
        table: CallerTable,
        *,
        estimate_seconds: Callable[[int], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the limits from the settings.

        `estimate_seconds` returns the time in which the service finishes a number of images.
        """
        self._table = table
        self._estimate_seconds = estimate_seconds
        self._clock = clock
        self._pace = RefusalPace(table, clock)
        self._interval = 1 / settings.caller_rate if settings.caller_rate else 0.0
        """Time in seconds between two images at the rate; 0 without a rate."""
        self._burst = settings.caller_burst or math.ceil(settings.caller_rate)
        self._max_images = settings.caller_images
        self._queue_images = settings.queue_images
        self.has_shares = settings.caller_shares
        """True if callers have fair shares of the queue and of the runners' time."""
        self._accounts: dict[str, _Account] = {}
        """Callers with images in flight in this worker, at most one for each request in flight."""
        self._images_in_flight = 0
        self._find_caller = lru_cache(_MAX_CACHED_CALLERS)(self._find_uncached)

    @classmethod
    def create(
        cls, settings: Settings, table: CallerTable | None, estimate_seconds: Callable[[int], float]
    ) -> CallerLimits | None:
        """Return the limits, or None if the settings have none.

        Without a `table` that workers share, the limits have their own.
        """
        if not has_caller_limits(settings):
            return None
        return cls(settings, table or CallerTable.create(), estimate_seconds=estimate_seconds)

    def reserve(self, caller: Caller) -> CallerReservation:
        """Count the first image of a request, before its body is read.

        Raises `CallerLimited`.
        """
        name, slots = self._find_caller(caller)
        account = self._accounts.get(name)
        try:
            self._check(account, slots, 1)
        except CallerLimited as error:
            error.delay = self._pace.count_in_slots(slots)
            raise
        if account is None:
            account = self._accounts[name] = _Account(name, slots)
        self._add_images(account, 1)
        return CallerReservation(self, account)

    def check_share(
        self, *, count: int, total: int, callers: int, limit: int, noun: str = "places in the queue"
    ) -> None:
        """Raise `ShareExceeded` if a caller has more than its share; see `exceeds_share`."""
        if exceeds_share(own=count, total=total, callers=callers, limit=limit):
            # Without the share, which would tell a caller how many others there are.
            raise ShareExceeded(
                f"more than half of the {limit} {noun} are taken, and this caller has its share of them "
                "(FOVEA_CALLER_SHARES)",
                retry_after=self._estimate_seconds(self._images_in_flight),
            )

    def _check(self, account: _Account | None, slots: Slots, count: int, present: int = 0) -> None:
        """Check whether a caller may have `count` more images, and use its rate for them.

        They belong to a request for which `present` images are counted already.

        Raises `CallerLimited`.
        """
        own_images = account.images if account else 0
        if self._max_images and self._table.count_images(slots) + count > self._max_images:
            raise TooManyInFlight(
                f"at most {self._max_images} images of one caller may be in flight (FOVEA_CALLER_IMAGES)",
                retry_after=self._estimate_seconds(own_images),
            )
        if self.has_shares:
            self.check_share(
                count=own_images + count,
                total=self._images_in_flight + count,
                callers=len(self._accounts) + (account is None),
                limit=self._queue_images,
            )
        if self._interval and count:  # last, because it has an effect
            self._use_rate(slots, count, present)

    def _use_rate(self, slots: Slots, count: int, present: int) -> None:
        """Use the rate of a caller for `count` images, or raise `RateLimited`.

        A request with more images than the burst needs a full bucket, and leaves a debt. So any request is
        accepted sooner or later, and the average holds.
        """
        now, interval = self._clock(), self._interval
        start = max(self._table.read_image_time(slots), now - self._burst * interval)
        needed_images = min(present + count, self._burst)
        # The next attempt uses the rate for the images that are present here once more.
        wait = start + needed_images * interval - now
        if wait - present * interval > _TOLERANCE:
            raise RateLimited(
                f"one caller may send {1 / interval:g} images per second, and {self._burst} at once "
                "(FOVEA_CALLER_RATE, FOVEA_CALLER_BURST)",
                retry_after=wait,
            )
        self._table.advance_image_time(slots, start + count * interval)

    def _extend(self, account: _Account, present: int, count: int) -> None:
        """Count `count` more images of a request that has `present` images."""
        if self._max_images and present + count > self._max_images:
            raise BadRequest(
                f"the request has {present + count} images, and at most {self._max_images} of one caller may "
                "be in flight (FOVEA_CALLER_IMAGES); send fewer at once"
            )
        self._check(account, account.slots, count, present)
        self._add_images(account, count)

    def _add_images(self, account: _Account, count: int) -> None:
        """Change the number of a caller's images in flight, and forget a caller without any."""
        account.images += count
        self._images_in_flight += count
        if self._max_images:
            self._table.add_images(account.slots, count)
        if not account.images:
            del self._accounts[account.name]

    def _add_bytes(self, account: _Account, size: int, memory: BodyMemory) -> None:
        """Count bytes of a body. Raises `ShareExceeded`."""
        self.check_share(
            count=account.body_bytes + size,
            total=memory.body_bytes + size,
            callers=len(self._accounts),
            limit=memory.limit,
            noun="bytes for bodies (FOVEA_BODIES_BYTES)",
        )
        account.body_bytes += size

    def _find_uncached(self, caller: Caller) -> tuple[str, Slots]:
        name = name_caller(caller)
        return name, self._table.find_slots(name.encode())


class _Account:
    """The images in flight of one caller in this worker, and the bytes of their bodies."""

    __slots__ = ("body_bytes", "images", "name", "slots")

    def __init__(self, name: str, slots: Slots) -> None:
        self.name = name
        self.slots = slots
        self.images = 0
        self.body_bytes = 0


class CallerReservation:
    """The images of one request, as they count against the limits of its caller.

    Release them by calling `release`.
    """

    __slots__ = ("_account", "_body_bytes", "_images", "_limits")

    def __init__(self, limits: CallerLimits, account: _Account) -> None:
        self._limits = limits
        self._account = account
        self._images = 1
        self._body_bytes = 0

    @property
    def queue_name(self) -> str | None:
        """Name under which the caller's images wait in turn; None if callers have no shares."""
        return self._account.name if self._limits.has_shares else None

    def extend(self, image_count: int) -> None:
        """Count `image_count` images in all for the request.

        Raises `CallerLimited`, or `BadRequest` for more images than a caller may ever have.
        """
        image_count = max(1, image_count)  # a request without images still counts, until its end
        if count := image_count - self._images:
            if count > 0:
                self._limits._extend(self._account, self._images, count)
            else:  # images that could not be fetched; the rate stays used
                self._limits._add_images(self._account, count)
            self._images = image_count

    def add_bytes(self, size: int, memory: BodyMemory) -> None:
        """Count `size` bytes of the body, before they are reserved in `memory`. Raises `ShareExceeded`."""
        if self._limits.has_shares and self._images:
            self._limits._add_bytes(self._account, size, memory)
            self._body_bytes += size

    def release(self) -> None:
        """Release places and bytes; the rate stays used. Further calls do nothing."""
        if images := self._images:
            self._images = 0
            self._account.body_bytes -= self._body_bytes
            self._limits._add_images(self._account, -images)


class QuestionPlaces:
    """The places in which questions wait for a process that explains."""

    def __init__(self, limits: CallerLimits | None, limit: int) -> None:
        self._limits = limits
        self._limit = limit
        self._counts: Counter[str] = Counter()
        """Number of questions by caller."""

    @contextmanager
    def reserve(self, caller: str | None) -> Iterator[None]:
        """Count a question inside the block; `caller` is `CallerReservation.queue_name`.

        Raises `ShareExceeded`.
        """
        if caller is None or self._limits is None:
            yield
            return
        counts = self._counts
        self._limits.check_share(
            count=counts[caller] + 1,
            total=counts.total() + 1,
            callers=len(counts) + (caller not in counts),
            limit=self._limit,
            noun="places for explanations",
        )
        counts[caller] += 1
        try:
            yield
        finally:
            counts[caller] -= 1
            if not counts[caller]:
                del counts[caller]


def has_caller_limits(settings: Settings) -> bool:
    """Return whether any limit of callers is set."""
    return bool(settings.caller_rate or settings.caller_images or settings.caller_shares)

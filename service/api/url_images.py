"""Images by URL: those that were sent before, and https URLs at the hosts in FOVEA_URL_HOSTS.

`service.remote.guarded_https` decides what may be asked. It blocks, so each fetch has a thread, and the
threads are limited. A fetch ends early when its caller leaves: its connection is shut down.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Final, TypeAlias

from fovea.service.access.caller import name_caller
from fovea.service.access.fair_slots import FairSlots
from fovea.service.api.uploads import SCHEME, Uploads
from fovea.service.errors import (
    BodyTooLarge,
    Internal,
    Overloaded,
    RequestError,
    UrlNotAllowed,
    UrlTimeout,
    UrlUnavailable,
)
from fovea.service.http.request_record import RequestRecord
from fovea.service.observability.metrics import CLIENT_LEFT, Metrics
from fovea.service.remote.guarded_https import (
    FetchControl,
    GuardedHttps,
    UrlFailed,
    UrlLimits,
    UrlRefused,
    UrlTooSlow,
)
from fovea.service.runners.batch_messages import Image
from fovea.service.settings import Settings

FetchUrl: TypeAlias = Callable[[str], Awaitable[bytes]]
"""Function that returns the image at a URL. Raises `RequestError`."""

ReserveBytes: TypeAlias = Callable[[int], None]
"""Function that reserves memory for a request, on the event loop. Raises `Overloaded`."""

_RESERVED_BYTES: Final = 1 << 20
"""Bytes that are reserved at once while they arrive; a fetch waits for the event loop each time."""

_RESERVE_TIMEOUT: Final = 10.0
"""Time limit in seconds for the event loop to reserve memory. A loop that takes longer has ended."""

_Outcome: TypeAlias = bytes | Exception


class UrlImages:
    """Fetches images by URL, a limited number at a time. Every method is called on the event loop."""

    def __init__(
        self, settings: Settings, metrics: Metrics, uploads: Uploads, https: GuardedHttps | None = None
    ) -> None:
        """Allow the hosts in `settings`; `https` replaces the client that fetches."""
        self.uploads = uploads
        self._settings = settings
        self._metrics = metrics
        self._https = https
        self._slots = FairSlots(
            settings.url_fetches, settings.queue_images, "images wait to be fetched by URL"
        )

    def bind(self, reserve: ReserveBytes, record: RequestRecord) -> FetchUrl:
        """Return the function that fetches for one request, which reserves memory by `reserve`."""
        return partial(self._get_image, reserve, record)

    async def _get_image(self, reserve: ReserveBytes, record: RequestRecord, url: str) -> bytes:
        if url.startswith(SCHEME):
            image = self.uploads.find_image(url, record.caller)
            reserve(len(image))  # the image may be dropped while this request still needs it
            return image
        if not self._settings.url_hosts:
            return await refuse_url(url)
        return await self._fetch_counted(reserve, name_caller(record.caller), url)

    async def _fetch_counted(self, reserve: ReserveBytes, caller: str, url: str) -> bytes:
        result = CLIENT_LEFT
        try:
            content = await self._fetch(reserve, caller, url)
            result = "ok"
        except RequestError as error:
            result = _RESULTS.get(type(error), "failed")
            raise
        finally:
            self._metrics.url_fetches.labels(result).inc()
        return content

    async def _fetch(self, reserve: ReserveBytes, caller: str, url: str) -> bytes:
        if self._https is None:
            settings = self._settings
            limits = UrlLimits(settings.url_bytes, settings.url_seconds, bytes_setting="FOVEA_URL_BYTES")
            # Reading the certificates of the system takes 20 ms.
            self._https = await asyncio.to_thread(GuardedHttps, settings.url_hosts, limits)
        try:
            self._https.check(url)  # a URL that is not allowed needs no place
        except UrlRefused as error:
            raise UrlNotAllowed(str(error)) from None
        await self._take_slot(caller)
        return await self._fetch_in_thread(self._https, url, reserve)

    async def _take_slot(self, caller: str) -> None:
        """Wait for a place; callers have turns. Raises `Overloaded` if too many wait, and `UrlTimeout`."""
        try:
            async with asyncio.timeout(self._settings.url_seconds):
                await self._slots.take(caller)
        except TimeoutError:
            raise UrlTimeout(
                f"the image was not fetched within {self._settings.url_seconds:g} s (FOVEA_URL_SECONDS): "
                f"{self._settings.url_fetches} others were being fetched (FOVEA_URL_FETCHES)"
            ) from None

    async def _fetch_in_thread(self, https: GuardedHttps, url: str, reserve: ReserveBytes) -> bytes:
        """Fetch in a thread that gives the place back at its end, which may come after this call's."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Outcome] = loop.create_future()
        account = _MemoryAccount(loop, reserve)
        control = FetchControl(account.count)

        def end(outcome: _Outcome) -> None:
            self._slots.give()
            if not future.done():
                future.set_result(outcome)

        def run() -> None:
            try:
                outcome: _Outcome = https.fetch(url, control)
            except Exception as error:
                outcome = error
            with suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(end, outcome)

        # A daemon, so that the end of the service does not wait for the name server.
        try:
            threading.Thread(target=run, name="url", daemon=True).start()
        except RuntimeError as error:  # the system has no room for a thread
            self._slots.give()
            raise Overloaded(f"the image cannot be fetched: {error}", retry_after=1.0) from None
        try:
            outcome = await future
        except asyncio.CancelledError:
            control.cancel()
            raise
        if isinstance(outcome, bytes):
            account.reserve_rest()
            return outcome
        raise _to_request_error(outcome)


class _MemoryAccount:
    """The memory of one fetch, reserved in large steps while the bytes arrive."""

    def __init__(self, loop: asyncio.AbstractEventLoop, reserve: ReserveBytes) -> None:
        self._loop = loop
        self._reserve = reserve
        self._unreserved_bytes = 0

    def count(self, size: int) -> None:
        """Count bytes, in the thread that fetches. Raises `Overloaded`."""
        self._unreserved_bytes += size
        if self._unreserved_bytes >= _RESERVED_BYTES:
            future: Future[None] = Future()
            self._loop.call_soon_threadsafe(self._reserve_for, future)
            future.result(_RESERVE_TIMEOUT)

    def reserve_rest(self) -> None:
        """Reserve what is not reserved yet, on the event loop. Raises `Overloaded`."""
        size, self._unreserved_bytes = self._unreserved_bytes, 0
        self._reserve(size)

    def _reserve_for(self, future: Future[None]) -> None:
        try:
            self.reserve_rest()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(None)


async def refuse_url(url: str) -> bytes:
    """Refuse a URL, because the service has no list of hosts. Raises `UrlNotAllowed`."""
    raise UrlNotAllowed("images by URL are switched off; FOVEA_URL_HOSTS lists the hosts that may be asked")


async def fetch_images(
    images: list[Image], urls: Mapping[int, str], fetch_url: FetchUrl
) -> dict[int, RequestError]:
    """Fetch the images that have a URL into their places in `images`, and return the errors by place.

    Cancelling the call ends all fetches.
    """
    if not urls:
        return {}

    async def fetch(index: int, url: str) -> tuple[int, bytes | RequestError]:
        try:
            return index, await fetch_url(url)
        except RequestError as error:
            return index, error.with_traceback(None)

    failures: dict[int, RequestError] = {}
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(fetch(index, url)) for index, url in urls.items()]
    for index, outcome in (task.result() for task in tasks):
        if isinstance(outcome, RequestError):
            failures[index] = outcome
        else:
            images[index] = outcome
    return failures


def _to_request_error(error: Exception) -> Exception:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, UrlRefused):
        return UrlNotAllowed(str(error))
    if isinstance(error, UrlTooSlow):
        return UrlTimeout(f"{error} (FOVEA_URL_SECONDS)")
    return UrlUnavailable(str(error)) if isinstance(error, UrlFailed) else error


_RESULTS: Final[Mapping[type[RequestError], str]] = {
    UrlNotAllowed: "refused",
    UrlTimeout: "timeout",
    BodyTooLarge: "too_large",
    Overloaded: "overloaded",
    Internal: "failed",
}
"""Results of the metric by error; others are `failed`."""

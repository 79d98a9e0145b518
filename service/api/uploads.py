"""Images that are sent once and asked about many times.

`POST /v1/images` keeps an image for some minutes and returns its URL, `upload:…`, which JSON bodies can name
like any other URL of an image. Each worker has images of its own, in a small part of the memory for bodies.
An image that is not there, because it is too old or in another worker, is 404 `upload_not_found`. The client
then sends the image again: its URL stays the same, so that sooner or later every worker has it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

from fovea.service.access.caller import Caller, name_caller
from fovea.service.errors import UploadNotFound
from fovea.service.resources.body_memory import BodyMemory

SCHEME: Final = "upload:"
"""Start of the URL of an image that was sent before."""

MAX_IDLE_SECONDS: Final = 600
"""Time in seconds for which an image is kept after the last question about it."""

_MEMORY_SHARE: Final = 8
"""Images take at most the n-th part of the memory for bodies: 32 of 256 MiB, some ten photos of a phone."""

MAX_IMAGES: Final = 1024
"""Maximum number of images: very small ones would take more memory than their bytes."""

_DIGEST_BYTES: Final = 16
"""Size in bytes of the digest of an image: nobody finds another image with the same one."""


class _Key(NamedTuple):
    caller: str
    url: str


class _Upload(NamedTuple):
    content: bytes
    last_used: float
    """Time of the last question on the monotonic clock, in seconds."""


class Uploads:
    """The images of one worker. The least recently used ones make room for new ones.

    A caller finds its own images only. Call every method on the event loop.
    """

    def __init__(self, memory: BodyMemory, clock: Callable[[], float] = time.monotonic) -> None:
        """Keep images in a part of `memory`, which counts them."""
        self.max_bytes = memory.limit // _MEMORY_SHARE
        self._memory = memory
        self._clock = clock
        self._uploads: OrderedDict[_Key, _Upload] = OrderedDict()
        """Images, least recently used first."""
        self._total_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    async def add_image(self, content: bytes, caller: Caller) -> str | None:
        """Keep an image, and return its URL, or None if there is no memory for it now."""
        digest = await asyncio.to_thread(hashlib.blake2b, content, digest_size=_DIGEST_BYTES)
        key = _Key(name_caller(caller), SCHEME + digest.hexdigest())
        self._drop(key)
        if len(content) > self.max_bytes:
            return None
        while self._uploads and (
            self._total_bytes + len(content) > self.max_bytes or len(self._uploads) == MAX_IMAGES
        ):
            self._drop(next(iter(self._uploads)))
        if not self._memory.reserve(len(content)):
            return None
        self._uploads[key] = _Upload(content, self._clock())
        self._total_bytes += len(content)
        self._start_timer()
        return key.url

    def find_image(self, url: str, caller: Caller) -> bytes:
        """Return the image of this caller with this URL.

        Raises `UploadNotFound`.
        """
        self._drop_old()
        key = _Key(name_caller(caller), url)
        if (upload := self._uploads.pop(key, None)) is None:
            raise UploadNotFound(
                "there is no image with this URL here, or not any more; send it again (POST /v1/images)"
            )
        self._uploads[key] = upload._replace(last_used=self._clock())
        return upload.content

    def close(self) -> None:
        """Drop all images."""
        if self._timer:
            self._timer.cancel()
        for key in list(self._uploads):
            self._drop(key)

    def _drop(self, key: _Key) -> None:
        if upload := self._uploads.pop(key, None):
            self._total_bytes -= len(upload.content)
            self._memory.release(len(upload.content))

    def _drop_old(self) -> None:
        oldest_time = self._clock() - MAX_IDLE_SECONDS
        while self._uploads and next(iter(self._uploads.values())).last_used <= oldest_time:
            self._drop(next(iter(self._uploads)))

    def _start_timer(self) -> None:
        """Give memory back also when nobody asks any more."""
        if self._timer is None and self._uploads:
            self._timer = asyncio.get_running_loop().call_later(MAX_IDLE_SECONDS, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._drop_old()
        self._start_timer()

"""The last encoded images of a model. A new version is tried on them before it is served."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from fovea.service.runners.messages import ImageRequest, Item
from fovea.service.runners.shared_memory import SharedRef

BYTES: Final = 16 << 20
"""Maximum size in bytes of all kept images of a model."""

_LARGEST: Final = 4 << 20
"""Maximum size in bytes of a kept image. Copying more would block the event loop for over a millisecond."""

_PAUSE: Final = 0.25
"""Minimum time in seconds between two kept images once the store is full, because copying every image would
be noticeable."""


class Replay:
    """The last images of one model."""

    def __init__(self, most: int, fetch: Callable[[SharedRef], bytes], *, most_bytes: int = BYTES) -> None:
        """Keep at most `most` images and `most_bytes` bytes. `fetch` copies an image out of shared memory."""
        self._bytes = most_bytes
        self._largest = min(_LARGEST, most_bytes // 4)
        self._most = most
        self._fetch = fetch
        self._kept: deque[bytes] = deque()
        self._size = 0
        self._next = 0.0

    @property
    def images(self) -> list[bytes]:
        """Return the kept images, oldest first."""
        return list(self._kept)

    def offer(self, item: Item) -> None:
        """Keep a copy of a successfully answered image.

        Only encoded images are kept. A full store takes at most one image per `_PAUSE`.
        """
        if isinstance(item, ImageRequest) and item.tensor_name:
            return
        image = item.content if isinstance(item, ImageRequest) else item
        if not self._most or len(image) > self._largest:
            return
        if len(self._kept) == self._most or self._size > self._bytes - self._largest:
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + _PAUSE
        # Copy now: the slot is given back when the request is over.
        self._kept.append(self._fetch(image) if isinstance(image, SharedRef) else bytes(image))
        self._size += len(image)
        while len(self._kept) > self._most or self._size > self._bytes:
            self._size -= len(self._kept.popleft())

"""The last images of a model, encoded as they came: a new version is tried on them before it is served."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from fovea.service.runners.messages import Item, Query
from fovea.service.runners.shared_memory import Stored

BYTES: Final = 16 << 20
"""Of all images that are kept."""

_LARGEST: Final = 4 << 20
"""Bytes of an image that is kept: to copy more would hold the event loop for over a millisecond."""

_PAUSE: Final = 0.25
"""Seconds from one image that is kept to the next, once there are as many as there may be: to copy each
would be felt."""


class Replay:
    """One model's."""

    def __init__(self, most: int, fetch: Callable[[Stored], bytes], *, most_bytes: int = BYTES) -> None:
        """Keep at most so many, and so many bytes; `fetch` copies those that lie in shared memory."""
        self._bytes = most_bytes
        self._largest = min(_LARGEST, most_bytes // 4)
        self._most = most
        self._fetch = fetch
        self._kept: deque[bytes] = deque()
        self._size = 0
        self._next = 0.0

    @property
    def images(self) -> list[bytes]:
        """The oldest first."""
        return list(self._kept)

    def offer(self, item: Item) -> None:
        """It was answered well; keep a copy, if it is an encoded image and time for one."""
        if isinstance(item, Query) and item.tensor:
            return
        image = item.content if isinstance(item, Query) else item
        if not self._most or len(image) > self._largest:
            return
        if len(self._kept) == self._most or self._size > self._bytes - self._largest:
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + _PAUSE
        self._kept.append(self._fetch(image) if isinstance(image, Stored) else bytes(image))
        self._size += len(image)
        while len(self._kept) > self._most or self._size > self._bytes:
            self._size -= len(self._kept.popleft())

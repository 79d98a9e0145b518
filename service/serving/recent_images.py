"""The last encoded images of a model. A new version is compared on them before it is served."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from fovea.service.runners.batch_messages import ImageRequest, Item
from fovea.service.runners.shared_memory import SharedRef

MAX_BYTES: Final = 16 << 20
"""Maximum size in bytes of all kept images of a model."""

_MAX_IMAGE_BYTES: Final = 4 << 20
"""Maximum size in bytes of a kept image. Copying more would block the event loop for over a millisecond."""

_MIN_INTERVAL: Final = 0.25
"""Minimum time in seconds between two kept images once the store is full, because copying every image would
be noticeable."""


class RecentImages:
    """The last images of one model."""

    def __init__(
        self, max_images: int, fetch_image: Callable[[SharedRef], bytes], *, max_bytes: int = MAX_BYTES
    ) -> None:
        """Keep at most `max_images` images and `max_bytes` bytes.

        `fetch_image` copies an image out of shared memory. `add_image` calls it in the calling thread.
        """
        self._max_bytes = max_bytes
        self._max_image_bytes = min(_MAX_IMAGE_BYTES, max_bytes // 4)
        self._max_images = max_images
        self._fetch_image = fetch_image
        self._images: deque[bytes] = deque()
        self._total_bytes = 0
        self._next_time = 0.0

    @property
    def images(self) -> list[bytes]:
        """Return the kept images, oldest first."""
        return list(self._images)

    def add_image(self, item: Item) -> None:
        """Keep a copy of a successfully answered image.

        Only encoded images are kept. A full store takes at most one image per `_MIN_INTERVAL`. The image's
        request must not be over yet: its shared memory would hold another image.
        """
        if isinstance(item, ImageRequest) and item.tensor_name:
            return
        image = item.content if isinstance(item, ImageRequest) else item
        if not self._max_images or len(image) > self._max_image_bytes:
            return
        if (
            len(self._images) == self._max_images
            or self._total_bytes > self._max_bytes - self._max_image_bytes
        ):
            now = time.monotonic()
            if now < self._next_time:
                return
            self._next_time = now + _MIN_INTERVAL
        # Copy now: the image's shared memory is reused when the request is over.
        self._images.append(self._fetch_image(image) if isinstance(image, SharedRef) else bytes(image))
        self._total_bytes += len(image)
        while len(self._images) > self._max_images or self._total_bytes > self._max_bytes:
            self._total_bytes -= len(self._images.popleft())

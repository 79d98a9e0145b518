"""Limit on the memory of all images that are being decoded at the same time."""

from __future__ import annotations

import fcntl
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from fovea.service.errors import TooManyPixels

_LARGE_IMAGE_BYTES: Final = 4 << 20
"""Size in bytes from which the decoder may keep memory for the next image."""

_MAX_SMALL_IMAGES: Final = 16
"""Number of small images in a row after which the decoder returns the memory that it keeps."""


def process_share(limit: int, processes: int) -> int:
    """Return the share in bytes of each of `processes` processes.

    The shares together are a quarter of `limit`.
    """
    return limit // (4 * processes)


class DecodeMemory:
    """A memory budget for all threads. A thread that needs more than is left waits.

    First come, first served: a small image does not overtake a waiting large one, so a stream of small images
    cannot starve the large one.

    With several processes, a quarter of the budget is divided into equal shares. If an image needs more than
    a share, the service reserves memory from the rest before it sends the image to a process (`set_grant`).
    If an image needs more than was reserved, because its header promised less, only one such image at a time
    may proceed in all processes. A lock on a common file ensures this; the system releases the lock when its
    process dies.

    Decoding threads call `reserve`. The main loop of a runner calls `set_grant` between two batches, when no
    image is being decoded.
    """

    def __init__(
        self,
        limit: int,
        *,
        processes: int = 1,
        lock_descriptor: int | None = None,
        release_memory: Callable[[], None] = lambda: None,
    ) -> None:
        """Set the budget to `limit` bytes.

        `lock_descriptor` is the descriptor of the common file, if there are several processes.

        `release_memory` is called when the decoder should return the memory that it keeps: after some small
        images that follow a large one. The internal lock is held during the call, so `release_memory` must be
        quick.
        """
        self._share = limit if lock_descriptor is None else process_share(limit, processes)
        self.limit = limit if lock_descriptor is None else limit - processes * self._share
        """Limit for one image in bytes."""
        self._grant_bytes = 0
        self._lock_descriptor = lock_descriptor
        self._release_memory = release_memory
        self._small_images: int | None = None
        """Number of small images since the last large one; None if the decoder keeps no memory."""
        self._large_image_lock = threading.Lock()
        self._bytes_in_use = 0
        self._queue: deque[object] = deque()
        self._condition = threading.Condition()

    @property
    def bytes_in_use(self) -> int:
        """Bytes in use now."""
        return self._bytes_in_use

    @contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Hold `size` bytes during the `with` block.

        Block the calling thread until the bytes are available. Raises `TooManyPixels` if they exceed the
        limit for one image.
        """
        if size > self.limit:
            raise TooManyPixels(
                f"image takes {size} bytes to decode; at most {self.limit} (by FOVEA_DECODE_BYTES)"
            )
        # Try the grant first: the lock below keeps all other processes waiting.
        if size > self._share and self._use_grant(size):
            try:
                yield
            finally:
                with self._condition:
                    self._grant_bytes += size
                self._record_image(size)
            return
        if size > self._share and self._lock_descriptor is not None:
            # Threads first: an fcntl lock belongs to the process and does not exclude its other threads.
            with self._large_image_lock:
                fcntl.lockf(self._lock_descriptor, fcntl.LOCK_EX)
                try:
                    yield
                finally:
                    fcntl.lockf(self._lock_descriptor, fcntl.LOCK_UN)
                    self._record_image(size)
            return
        self._wait_for_share(size)
        try:
            yield
        finally:
            with self._condition:
                self._bytes_in_use -= size
                self._condition.notify_all()
            self._record_image(size)

    def set_grant(self, size: int) -> None:
        """Set the bytes granted for large images to `size`, in place of the earlier grant.

        The service has already reserved these bytes for the next batch, so no thread waits for them. Call
        this before the batch is decoded, and after all images of the batch before are decoded.
        """
        with self._condition:
            self._grant_bytes = size

    def _use_grant(self, size: int) -> bool:
        """Take `size` bytes of the grant. Return False if less is left."""
        with self._condition:
            if size > self._grant_bytes:
                return False
            self._grant_bytes -= size
            return True

    def _record_image(self, size: int) -> None:
        """Record that an image of `size` bytes is done, and return kept memory when it is due."""
        with self._condition:
            if size >= _LARGE_IMAGE_BYTES:
                self._small_images = 0
            elif self._small_images is not None:
                self._small_images += 1
                if self._small_images >= _MAX_SMALL_IMAGES:
                    self._small_images = None
                    self._release_memory()

    def _wait_for_share(self, size: int) -> None:
        """Wait for `size` bytes of the share, in order of arrival."""
        with self._condition:
            if not self._queue and self._bytes_in_use + size <= self._share:
                self._bytes_in_use += size
                return
            # Wait in line: the thread at the head continues when its bytes fit. `wait_for` releases the lock.
            ticket = object()
            self._queue.append(ticket)
            try:
                self._condition.wait_for(
                    lambda: self._queue[0] is ticket and self._bytes_in_use + size <= self._share
                )
                self._bytes_in_use += size
            finally:
                # Also when the wait is interrupted: a ticket that stays would block all threads behind it.
                self._queue.remove(ticket)
                self._condition.notify_all()  # the next thread may fit too

"""Limit on the memory of all images that are being decoded at the same time."""

from __future__ import annotations

import fcntl
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from fovea.service.errors import TooManyPixels

_LARGE: Final = 4 << 20
"""Size in bytes from which the decoder may keep memory for the next image."""

_SMALL_IMAGES: Final = 16
"""Number of small images in a row after which the decoder returns the memory that it keeps."""


def share_of(limit: int, processes: int) -> int:
    """Return the share in bytes of each of `processes` processes.

    The shares together are a quarter of `limit`.
    """
    return limit // (4 * processes)


class DecodeMemory:
    """A memory budget for all threads. A thread that needs more than is left waits.

    First come, first served: a small image does not overtake a waiting large one, so a stream of small images
    cannot starve the large one.

    With several processes, a quarter of the budget is divided into equal shares. If an image needs more than
    a share, the service reserves memory from the rest before it sends the image to a process (`grant`). If an
    image needs more than was reserved, because its header promised less, only one such image at a time may
    proceed in all processes. A lock on a common file ensures this; the system releases the lock when its
    process dies.
    """

    def __init__(
        self,
        limit: int,
        *,
        processes: int = 1,
        lock: int | None = None,
        give_back: Callable[[], None] = lambda: None,
    ) -> None:
        """Set the budget to `limit` bytes.

        `lock` is the descriptor of the common file, if there are several processes.

        `give_back` is called when the decoder should return the memory that it keeps: after some small images
        that follow a large one. The internal lock is held during the call, so `give_back` must be quick.
        """
        self._share = limit if lock is None else share_of(limit, processes)
        self.limit = limit if lock is None else limit - processes * self._share
        """Limit for one image in bytes."""
        self._granted = 0
        self._lock = lock
        self._give_back = give_back
        self._small_images: int | None = None
        """Number of small images since the last large one; None if the decoder keeps no memory."""
        self._one_large = threading.Lock()
        self._held = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """Bytes in use now."""
        return self._held

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Hold `size` bytes inside the `with` block.

        Block until the bytes are available. Raises `TooManyPixels` if they exceed the limit for one image.
        """
        if size > self.limit:
            raise TooManyPixels(
                f"image takes {size} bytes to decode; at most {self.limit} (by FOVEA_DECODE_BYTES)"
            )
        if size > self._share and self._use_grant(size):
            try:
                yield
            finally:
                with self._changed:
                    self._granted += size
                self._note(size)
            return
        if size > self._share and self._lock is not None:
            # Threads first: an fcntl lock belongs to the process and does not exclude its other threads.
            with self._one_large:
                fcntl.lockf(self._lock, fcntl.LOCK_EX)
                try:
                    yield
                finally:
                    fcntl.lockf(self._lock, fcntl.LOCK_UN)
                    self._note(size)
            return
        self._take(size)
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()
            self._note(size)

    def grant(self, size: int) -> None:
        """Set the bytes granted for large images to `size`, in place of the earlier grant."""
        with self._changed:
            self._granted = size

    def _use_grant(self, size: int) -> bool:
        """Take `size` bytes of the grant. Return False if less is left."""
        with self._changed:
            if size > self._granted:
                return False
            self._granted -= size
            return True

    def _note(self, size: int) -> None:
        """Record that an image of `size` bytes is done, and return kept memory when it is due."""
        with self._changed:
            if size >= _LARGE:
                self._small_images = 0
            elif self._small_images is not None:
                self._small_images += 1
                if self._small_images >= _SMALL_IMAGES:
                    self._small_images = None
                    self._give_back()

    def _take(self, size: int) -> None:
        """Wait for `size` bytes of the share, in order of arrival."""
        with self._changed:
            if not self._waiting and self._held + size <= self._share:
                self._held += size
                return
            # Wait in line: the thread at the head goes on when its bytes fit.
            turn = object()
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is turn and self._held + size <= self._share)
                self._held += size
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()  # the next thread may fit too

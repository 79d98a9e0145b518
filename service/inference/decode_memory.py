"""The bound on the memory of all images that are being decoded at one time."""

from __future__ import annotations

import fcntl
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from fovea.service.errors import TooManyPixels

_LARGE: Final = 4 << 20
"""Bytes from which on the decoder may keep memory for the next image."""

_SMALL_IMAGES: Final = 16
"""In a row, after which it need not keep any."""


def share_of(limit: int, processes: int) -> int:
    """Return how many of `limit` bytes each of several processes has of its own."""
    return limit // (4 * processes)


class DecodeMemory:
    """So many bytes for all threads together; whoever needs more than is left waits in its thread.

    First come, first served: a small image does not overtake a large one that waits, so that no stream
    of small ones can starve it.

    Several processes have a quarter of it as equal shares. Of the rest, the service reserves what an image
    needs that is larger than a share, before it gives the image to a process (`grant`). Where more is needed
    than was reserved, as the header promised less, one image at a time in all processes may go on; the lock
    on a common file that says so is freed by the system when its process dies.
    """

    def __init__(
        self,
        limit: int,
        *,
        processes: int = 1,
        lock: int | None = None,
        give_back: Callable[[], None] = lambda: None,
    ) -> None:
        """`lock` is the descriptor of the common file, where there are several processes.

        `give_back` is called when the decoder should return what it keeps: some small images after a large
        one.
        """
        self._share = limit if lock is None else share_of(limit, processes)
        self.limit = limit if lock is None else limit - processes * self._share
        """Most bytes for one image."""
        self._granted = 0
        self._lock = lock
        self._give_back = give_back
        self._small_images: int | None = None
        """Since the last large one; None when nothing is kept."""
        self._one_large = threading.Lock()
        self._held = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """Bytes held now."""
        return self._held

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Hold `size` bytes inside the `with`. Raises `TooManyPixels` when they could never fit."""
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
        """Have `size` bytes for large images from now on, in place of what was granted before."""
        with self._changed:
            self._granted = size

    def _use_grant(self, size: int) -> bool:
        with self._changed:
            if size > self._granted:
                return False
            self._granted -= size
            return True

    def _note(self, size: int) -> None:
        with self._changed:
            if size >= _LARGE:
                self._small_images = 0
            elif self._small_images is not None:
                self._small_images += 1
                if self._small_images >= _SMALL_IMAGES:
                    self._small_images = None
                    self._give_back()

    def _take(self, size: int) -> None:
        with self._changed:
            if not self._waiting and self._held + size <= self._share:
                self._held += size
                return
            turn = object()
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is turn and self._held + size <= self._share)
                self._held += size
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()  # the next may fit too

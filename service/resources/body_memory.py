"""Memory accounting for all bodies: arriving bodies, waiting bodies, and answers not yet read by clients."""

from __future__ import annotations

from typing import Protocol


class Reader(Protocol):
    """A connection whose client has not read the answer yet."""

    def cut_off(self) -> None:
        """Close the connection at once and drop the answer."""


class BodyMemory:
    """Bytes of all bodies together, within one limit. Call every method on the event loop.

    Unread answers count towards the limit. When memory is needed, unread answers are dropped first: the
    connections that have waited longest for their clients are cut off.
    """

    def __init__(self, limit: int) -> None:
        """Set the limit, in bytes (FOVEA_BODIES_BYTES)."""
        self.limit = limit
        self._bodies = 0
        self._unread = 0
        self._readers: dict[Reader, int] = {}
        """Size of each connection's unread answer in bytes, longest wait first."""

    @property
    def used(self) -> int:
        """Bytes in use now."""
        return self._bodies + self._unread

    @property
    def of_bodies(self) -> int:
        """Bytes of request bodies in use now, without unread answers, which make room for bodies."""
        return self._bodies

    def take(self, size: int) -> bool:
        """Reserve `size` bytes for a body. Return False, and reserve nothing, if this exceeds the limit."""
        if self._bodies + size > self.limit:
            return False
        self._bodies += size
        self._make_room()
        return True

    def give_back(self, size: int) -> None:
        """Release `size` bytes of bodies."""
        self._bodies -= size

    def hold_answer(self, reader: Reader, size: int) -> None:
        """Account for an unread answer of `size` bytes until `drop_answer`.

        A later size replaces the earlier size of the same connection.
        """
        self._unread += size - self._readers.get(reader, 0)
        self._readers[reader] = size
        self._make_room(spared=reader)

    def drop_answer(self, reader: Reader) -> None:
        """Release a connection's answer: the client has read the answer or has disconnected."""
        self._unread -= self._readers.pop(reader, 0)

    def _make_room(self, spared: Reader | None = None) -> None:
        """Cut off readers until the limit is met, except `spared`, which had no time to read yet."""
        for reader in list(self._readers):
            if self.used <= self.limit:
                return
            if reader is not spared:
                # Release the bytes first: `cut_off` is foreign code and may call `drop_answer` again.
                self.drop_answer(reader)
                reader.cut_off()

"""The memory of all bodies: those that arrive, those that wait, and answers that clients do not read."""

from __future__ import annotations

from typing import Protocol


class Reader(Protocol):
    """A connection with an answer that its client has not read yet."""

    def cut_off(self) -> None:
        """Close at once and drop the answer."""


class BodyMemory:
    """Bytes of all bodies together, within one limit. Every method must be called on the event loop.

    Answers that clients do not read count too. They are the first to go: where bytes are needed, the
    connections that have waited longest for their client to read are cut off.
    """

    def __init__(self, limit: int) -> None:
        """`limit` is in bytes (FOVEA_BODIES_BYTES)."""
        self.limit = limit
        self._bodies = 0
        self._unread = 0
        self._readers: dict[Reader, int] = {}
        """Bytes of each connection's unread answer; the one that has waited longest comes first."""

    @property
    def used(self) -> int:
        """Bytes that are held now."""
        return self._bodies + self._unread

    @property
    def of_bodies(self) -> int:
        """Bytes that bodies hold now; unread answers would make room for others."""
        return self._bodies

    def take(self, size: int) -> bool:
        """Hold `size` bytes more of a body. Return False, and hold nothing, where that is too much."""
        if self._bodies + size > self.limit:
            return False
        self._bodies += size
        self._make_room()
        return True

    def give_back(self, size: int) -> None:
        """Hold `size` bytes of bodies less."""
        self._bodies -= size

    def hold_answer(self, reader: Reader, size: int) -> None:
        """Hold an answer of `size` bytes until `drop_answer`; a later size takes the place of the earlier."""
        self._unread += size - self._readers.get(reader, 0)
        self._readers[reader] = size
        self._make_room(spared=reader)

    def drop_answer(self, reader: Reader) -> None:
        """Hold a connection's answer no more: its client has read it, or has gone."""
        self._unread -= self._readers.pop(reader, 0)

    def _make_room(self, spared: Reader | None = None) -> None:
        """Cut off readers until all fits, except one that had no time to read yet."""
        for reader in list(self._readers):
            if self.used <= self.limit:
                return
            if reader is not spared:
                self.drop_answer(reader)
                reader.cut_off()

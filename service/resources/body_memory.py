"""Memory accounting for all bodies: arriving bodies, waiting bodies, and answers not yet read by clients."""

from __future__ import annotations

from typing import Final, Protocol

from fovea.service.allocator import DelayedTrim

_LARGE_BYTES: Final = 1 << 20
"""Size in bytes from which the memory of a body is worth returning to the system."""


class SlowReader(Protocol):
    """A connection whose client has not read the answer yet. It lives on the event loop."""

    def cut_off(self) -> None:
        """Close the connection at once and drop the answer.

        `BodyMemory` calls this while another connection reserves memory. It must not block or raise.
        """


class BodyMemory:
    """Bytes of all bodies together, within one limit. Call every method on the event loop.

    Unread answers count towards the limit. When memory is needed, unread answers are dropped first: the
    connections that have waited longest for their clients are cut off.
    """

    def __init__(self, limit: int) -> None:
        """Set the limit, in bytes (FOVEA_BODIES_BYTES)."""
        self.limit = limit
        self._body_bytes = 0
        self._answer_bytes = 0
        self._trim = DelayedTrim()
        self._answer_sizes: dict[SlowReader, int] = {}
        """Size of each connection's unread answer in bytes, longest wait first."""

    @property
    def used_bytes(self) -> int:
        """Bytes in use now."""
        return self._body_bytes + self._answer_bytes

    @property
    def body_bytes(self) -> int:
        """Bytes of request bodies in use now, without unread answers, which make room for bodies."""
        return self._body_bytes

    def reserve(self, size: int) -> bool:
        """Reserve `size` bytes for a body. Return False, and reserve nothing, if this exceeds the limit."""
        if self._body_bytes + size > self.limit:
            return False
        self._body_bytes += size
        if self._answer_sizes:
            self._cut_off_readers()
        return True

    def release(self, size: int) -> None:
        """Release `size` bytes of bodies. After a large body the process returns its memory to the system."""
        self._body_bytes -= size
        if size > _LARGE_BYTES:
            self._trim.schedule()

    def reserve_answer(self, reader: SlowReader, size: int) -> None:
        """Account for an unread answer of `size` bytes until `release_answer`.

        A later size replaces the earlier size of the same connection.
        """
        self._answer_bytes += size - self._answer_sizes.get(reader, 0)
        self._answer_sizes[reader] = size
        self._cut_off_readers(exempt=reader)

    def release_answer(self, reader: SlowReader) -> None:
        """Release a connection's answer: the client has read the answer or has disconnected."""
        self._answer_bytes -= self._answer_sizes.pop(reader, 0)

    def _cut_off_readers(self, exempt: SlowReader | None = None) -> None:
        """Cut off readers until the limit is met, except `exempt`, which had no time to read yet."""
        for reader in list(self._answer_sizes):
            if self.used_bytes <= self.limit:
                return
            if reader is not exempt:
                # Release the bytes first: `cut_off` is foreign code and may call `release_answer` again.
                self.release_answer(reader)
                reader.cut_off()

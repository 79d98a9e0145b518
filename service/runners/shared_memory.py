"""Memory for large bodies, shared by the service and its runners.

A body is received into a slot and decoded from there: only its location is sent to a runner. The slots lie
one after another in one memory file. The slot that was returned last is taken first, because its pages are
already allocated. Pages beyond `MAX_RESIDENT_BYTES` bytes are returned to the system.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from dataclasses import dataclass
from typing import Final

from fovea.service.errors import StartError

MAX_RESIDENT_BYTES: Final = 32 << 20
"""Number of bytes that stay allocated while no slot is in use."""

_MAX_TRIM_BYTES: Final = 4 << 20
"""Maximum number of bytes that are returned to the system at once, which takes up to a millisecond."""

_MAX_ADDRESS_SPACE: Final = 1 << 36
"""Address space limit in bytes. Unused address space costs nothing."""


@dataclass(frozen=True, slots=True)
class SharedRef:
    """The location of bytes in the shared memory."""

    offset: int
    size: int

    def __len__(self) -> int:
        return self.size


def read_shared(descriptor: int, ref: SharedRef) -> bytes:
    """Return a copy of stored bytes from the file with this descriptor. Unwritten bytes are zero."""
    return os.pread(descriptor, ref.size, ref.offset)


def read_shared_into(descriptor: int, ref: SharedRef, target: memoryview) -> None:
    """Copy stored bytes from the file with this descriptor into `target`, which has the same size."""
    os.preadv(descriptor, [target], ref.offset)


class SharedBodies:
    """All slots. Call every method on the event loop."""

    def __init__(self, count: int, size: int, *, max_resident_bytes: int = MAX_RESIDENT_BYTES) -> None:
        """Create at most `count` slots of at least `size` bytes.

        `max_resident_bytes` bytes stay allocated while no slot is in use. Raises `StartError` when the system
        has no memory for the slots.
        """
        self._max_resident_bytes = max_resident_bytes
        self.capacity = size
        """Capacity of a slot in bytes."""
        self._buffer_size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        count = max(1, min(count, _MAX_ADDRESS_SPACE // self._buffer_size))
        try:
            self.descriptor = os.memfd_create("fovea-bodies")
            os.ftruncate(self.descriptor, count * self._buffer_size)
            self._memory = mmap.mmap(self.descriptor, count * self._buffer_size)
        except OSError as error:
            raise StartError(f"no memory to share with runners: {error.strerror}") from None
        self._view = memoryview(self._memory)
        self._free_buffers = [
            SharedBuffer(self, number * self._buffer_size) for number in reversed(range(count))
        ]
        self._resident_bytes = 0

    @property
    def free_count(self) -> int:
        """Number of free slots."""
        return len(self._free_buffers)

    def allocate(self) -> SharedBuffer:
        """Take a free slot. Raises `IndexError` when no slot is free."""
        return self._free_buffers.pop()

    def close(self) -> None:
        """Close the descriptor. The memory is freed when the last process that has it ends."""
        os.close(self.descriptor)

    def view(self, offset: int, size: int) -> memoryview:
        """Return a view of these bytes."""
        return self._view[offset : offset + size]

    def release(self, buffer: SharedBuffer, used_bytes: int) -> None:
        """Return a slot. See `SharedBuffer.release`."""
        self._resident_bytes += max(0, used_bytes - buffer.resident_bytes)
        buffer.resident_bytes = max(buffer.resident_bytes, used_bytes)
        self._free_buffers.append(buffer)
        self._trim_pages()

    def _trim_pages(self) -> None:
        """Return surplus pages to the system, starting with the slots that will be taken last."""
        buffer = next((one for one in self._free_buffers if one.resident_bytes), None)
        if buffer and self._resident_bytes > self._max_resident_bytes:
            start = max(0, buffer.resident_bytes - _MAX_TRIM_BYTES) // mmap.PAGESIZE * mmap.PAGESIZE
            self._memory.madvise(mmap.MADV_REMOVE, buffer.offset + start, buffer.resident_bytes - start)
            self._resident_bytes -= buffer.resident_bytes - start
            buffer.resident_bytes = start
            # One piece at a time: other callbacks of the event loop run between two pieces.
            asyncio.get_running_loop().call_soon(self._trim_pages)


class SharedBuffer:
    """Room for one body."""

    __slots__ = ("_bodies", "offset", "resident_bytes")

    def __init__(self, bodies: SharedBodies, offset: int) -> None:
        self._bodies = bodies
        self.offset = offset
        self.resident_bytes = 0
        """Number of bytes from the start of the slot that have pages."""

    def view(self, start: int, stop: int) -> memoryview:
        """Return a writable view of the bytes from `start` to `stop`."""
        return self._bodies.view(self.offset + start, stop - start)

    def read_bytes(self, size: int) -> bytes:
        """Return a copy of the first `size` bytes. Other threads can run during the copy."""
        return read_shared(self._bodies.descriptor, self.to_ref(0, size))

    def to_ref(self, start: int, stop: int) -> SharedRef:
        """Return the location of the bytes from `start` to `stop`, for a runner."""
        return SharedRef(self.offset + start, stop - start)

    def release(self, used_bytes: int) -> None:
        """Return the slot, of which the first `used_bytes` bytes were written.

        A runner may still read the slot. The next body may then overwrite the bytes, but no caller waits for
        that result.
        """
        self._bodies.release(self, used_bytes)

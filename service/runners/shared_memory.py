"""Memory for large bodies, shared by the service and its runners.

A body is received into a buffer and decoded from there: only its location is sent to a runner. The buffers
lie one after another in one memory file. The buffer that was released last is allocated first, because its
pages exist already. Pages beyond `MAX_RESIDENT_BYTES` bytes are returned to the system.

There are no locks. Only the service allocates and writes, on its event loop. It sends the `SharedRef` of a
body to a runner after the whole body has been written, and this message hands the bytes over: from then on
the runner may read them at any time, until it has answered the batch. The service releases the buffer when
the outcome has arrived, or when the caller has left. In the second case a runner may read bytes of the next
body, but no caller receives the result.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Final

from fovea.service.errors import StartError

MAX_RESIDENT_BYTES: Final = 32 << 20
"""Number of bytes that stay allocated while no buffer is in use."""

_MAX_TRIM_BYTES: Final = 4 << 20
"""Maximum number of bytes that are returned to the system at once, which takes up to a millisecond."""

_MAX_ADDRESS_SPACE: Final = 1 << 36
"""Address space limit in bytes. Unused address space costs nothing."""


@dataclass(frozen=True, slots=True)
class SharedRef:
    """The location of bytes in the shared memory. It keeps no buffer from being released."""

    offset: int
    size: int

    def __len__(self) -> int:
        return self.size


def read_shared(descriptor: int, ref: SharedRef) -> bytes:
    """Return a copy of bytes from the memory file with this descriptor. Unwritten bytes are zero.

    Runners call this in their threads, as does the service. The global interpreter lock is released during
    the copy.
    """
    return os.pread(descriptor, ref.size, ref.offset)


def read_shared_into(descriptor: int, ref: SharedRef, target: memoryview) -> None:
    """Copy bytes from the memory file with this descriptor into `target`, which has the same size."""
    os.preadv(descriptor, [target], ref.offset)


class SharedBodies:
    """All buffers, in the service. Call every method on the event loop."""

    def __init__(self, count: int, size: int, *, max_resident_bytes: int = MAX_RESIDENT_BYTES) -> None:
        """Create at most `count` buffers of at least `size` bytes.

        `max_resident_bytes` bytes stay allocated while no buffer is in use. Raises `StartError` when the
        system has no memory for the buffers.
        """
        self._max_resident_bytes = max_resident_bytes
        self.capacity = size
        """Capacity of a buffer in bytes."""
        self._buffer_size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        count = max(1, min(count, _MAX_ADDRESS_SPACE // self._buffer_size))
        try:
            self.descriptor = os.memfd_create("fovea-bodies")
            os.ftruncate(self.descriptor, count * self._buffer_size)
            self._memory = mmap.mmap(self.descriptor, count * self._buffer_size)
        except OSError as error:
            raise StartError(
                f"{count * self._buffer_size >> 20} MB of address space for bodies cannot be shared with the "
                f"runners: {error.strerror}; raise the limits of the process, or lower FOVEA_QUEUE_IMAGES or "
                "FOVEA_BODY_BYTES"
            ) from None
        # Every page starts as a hole in the file: it takes no memory until a body is written into it.
        self._view = memoryview(self._memory)
        self._free_buffers = [
            SharedBuffer(self, number * self._buffer_size) for number in reversed(range(count))
        ]
        self._resident_bytes = 0

    @property
    def free_count(self) -> int:
        """Number of free buffers."""
        return len(self._free_buffers)

    def allocate(self) -> SharedBuffer:
        """Return a free buffer, which the caller must release once. Raises `IndexError` when none is free."""
        return self._free_buffers.pop()

    def close(self) -> None:
        """Close the descriptor. The memory is freed when the last process that has inherited it ends."""
        os.close(self.descriptor)

    def view(self, offset: int, size: int) -> memoryview:
        """Return a writable view of these bytes, without a copy."""
        return self._view[offset : offset + size]

    def release(self, buffer: SharedBuffer, used_bytes: int) -> None:
        """Take a buffer back. See `SharedBuffer.release`."""
        self._resident_bytes += max(0, used_bytes - buffer.resident_bytes)
        buffer.resident_bytes = max(buffer.resident_bytes, used_bytes)
        self._free_buffers.append(buffer)
        self._trim_pages()

    def _trim_pages(self) -> None:
        """Return surplus pages to the system, starting with the buffers that will be allocated last.

        Only free buffers are trimmed. A late reader of a trimmed page gets zeros, not an error.
        """
        buffer = next((one for one in self._free_buffers if one.resident_bytes), None)
        if buffer and self._resident_bytes > self._max_resident_bytes:
            start = max(0, buffer.resident_bytes - _MAX_TRIM_BYTES) // mmap.PAGESIZE * mmap.PAGESIZE
            self._memory.madvise(mmap.MADV_REMOVE, buffer.offset + start, buffer.resident_bytes - start)
            self._resident_bytes -= buffer.resident_bytes - start
            buffer.resident_bytes = start
            # One piece at a time: other callbacks of the event loop run between two pieces.
            import asyncio  # runners use this module too, and need no event loop (see `allocator`)

            asyncio.get_running_loop().call_soon(self._trim_pages)


class SharedBuffer:
    """Memory for one body."""

    __slots__ = ("_bodies", "offset", "resident_bytes")

    def __init__(self, bodies: SharedBodies, offset: int) -> None:
        self._bodies = bodies
        self.offset = offset
        self.resident_bytes = 0
        """Number of bytes from the start of the buffer that have pages."""

    def view(self, start: int, stop: int) -> memoryview:
        """Return a writable view of the bytes from `start` to `stop`. Do not use it after `release`."""
        return self._bodies.view(self.offset + start, stop - start)

    def read_bytes(self, size: int) -> bytes:
        """Return a copy of the first `size` bytes. Other threads can run during the copy."""
        return read_shared(self._bodies.descriptor, self.to_ref(0, size))

    def to_ref(self, start: int, stop: int) -> SharedRef:
        """Return the location of the bytes from `start` to `stop`, for a runner.

        Write the bytes before the location is sent.
        """
        return SharedRef(self.offset + start, stop - start)

    def release(self, used_bytes: int) -> None:
        """Release the buffer, of which the first `used_bytes` bytes were written.

        A runner may still read the buffer. The next body may then overwrite the bytes, but no caller waits
        for that result.
        """
        self._bodies.release(self, used_bytes)

"""Memory for large bodies, shared by the service and its runners.

A body is received into a slot and decoded from there: only its location is sent to a runner. The slots lie
one after another in one memory file. The slot that was returned last is taken first, because its pages are
already allocated. Pages beyond `KEPT` bytes are returned to the system.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from dataclasses import dataclass
from typing import Final

from fovea.service.errors import StartError

KEPT: Final = 32 << 20
"""Number of bytes that stay allocated while no slot is in use."""

_PIECE: Final = 4 << 20
"""Maximum number of bytes that are returned to the system at once, which takes up to a millisecond."""

_RESERVED: Final = 1 << 36
"""Address space limit in bytes. Unused address space costs nothing."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The location of bytes in the shared memory."""

    offset: int
    size: int

    def __len__(self) -> int:
        return self.size


def fetch(descriptor: int, stored: Stored) -> bytes:
    """Return a copy of stored bytes from the file with this descriptor. Unwritten bytes are zero."""
    return os.pread(descriptor, stored.size, stored.offset)


def fetch_into(descriptor: int, stored: Stored, room: memoryview) -> None:
    """Copy stored bytes from the file with this descriptor into `room`, which has the same size."""
    os.preadv(descriptor, [room], stored.offset)


class Slots:
    """All slots. Call every method on the event loop."""

    def __init__(self, count: int, size: int, *, kept: int = KEPT) -> None:
        """Create at most `count` slots of at least `size` bytes.

        `kept` bytes stay allocated while no slot is in use. Raises `StartError` when the system has no memory
        for the slots.
        """
        self._kept = kept
        self.limit = size
        """Capacity of a slot in bytes."""
        self._size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        count = max(1, min(count, _RESERVED // self._size))
        try:
            self.descriptor = os.memfd_create("fovea-bodies")
            os.ftruncate(self.descriptor, count * self._size)
            self._memory = mmap.mmap(self.descriptor, count * self._size)
        except OSError as error:
            raise StartError(f"no memory to share with runners: {error.strerror}") from None
        self._view = memoryview(self._memory)
        self._free = [Slot(self, number * self._size) for number in reversed(range(count))]
        self._resident = 0

    @property
    def free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def take(self) -> Slot:
        """Take a free slot. Raises `IndexError` when no slot is free."""
        return self._free.pop()

    def close(self) -> None:
        """Close the descriptor. The memory is freed when the last process that has it ends."""
        os.close(self.descriptor)

    def view(self, offset: int, size: int) -> memoryview:
        """Return a view of these bytes."""
        return self._view[offset : offset + size]

    def give_back(self, slot: Slot, used: int) -> None:
        """Return a slot. See `Slot.give_back`."""
        self._resident += max(0, used - slot.resident)
        slot.resident = max(slot.resident, used)
        self._free.append(slot)
        self._trim()

    def _trim(self) -> None:
        """Return surplus pages to the system, starting with the slots that will be taken last."""
        slot = next((one for one in self._free if one.resident), None)
        if slot and self._resident > self._kept:
            start = max(0, slot.resident - _PIECE) // mmap.PAGESIZE * mmap.PAGESIZE
            self._memory.madvise(mmap.MADV_REMOVE, slot.offset + start, slot.resident - start)
            self._resident -= slot.resident - start
            slot.resident = start
            # One piece at a time: other callbacks of the event loop run between two pieces.
            asyncio.get_running_loop().call_soon(self._trim)


class Slot:
    """Room for one body."""

    __slots__ = ("_slots", "offset", "resident")

    def __init__(self, slots: Slots, offset: int) -> None:
        self._slots = slots
        self.offset = offset
        self.resident = 0
        """Number of bytes from the start of the slot that have pages."""

    def view(self, start: int, stop: int) -> memoryview:
        """Return a writable view of the bytes from `start` to `stop`."""
        return self._slots.view(self.offset + start, stop - start)

    def read(self, size: int) -> bytes:
        """Return a copy of the first `size` bytes. Other threads can run during the copy."""
        return fetch(self._slots.descriptor, self.stored(0, size))

    def stored(self, start: int, stop: int) -> Stored:
        """Return the location of the bytes from `start` to `stop`, for a runner."""
        return Stored(self.offset + start, stop - start)

    def give_back(self, used: int) -> None:
        """Return the slot, of which the first `used` bytes were written.

        A runner may still read the slot. The next body may then overwrite the bytes, but no caller waits for
        that result.
        """
        self._slots.give_back(self, used)

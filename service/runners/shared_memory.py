"""Large bodies in memory that the service and its runners share.

A body is received into a slot and decoded out of it: it is never sent to a runner, only its place is. The
slots lie behind each other in one file in memory. The one that was given back last is taken first, as its
pages are there already. Pages of more than `KEPT` bytes are returned to the system.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from dataclasses import dataclass
from typing import Final

from fovea.service.errors import StartError

KEPT: Final = 32 << 20
"""Bytes that stay when nobody needs them."""

_PIECE: Final = 4 << 20
"""Most bytes that are returned to the system at once: that takes up to a millisecond."""

_RESERVED: Final = 1 << 36
"""Most bytes of address space; it costs nothing until it is used."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes in the shared memory, by their place."""

    offset: int
    size: int

    def __len__(self) -> int:
        return self.size


def fetch(descriptor: int, stored: Stored) -> bytes:
    """A copy of stored bytes, out of the file with this descriptor. What nobody has written is zero."""
    return os.pread(descriptor, stored.size, stored.offset)


def fetch_into(descriptor: int, stored: Stored, room: memoryview) -> None:
    """The same, into `room` of as many bytes."""
    os.preadv(descriptor, [room], stored.offset)


class Slots:
    """All slots; every method must be called on the event loop."""

    def __init__(self, count: int, size: int, *, kept: int = KEPT) -> None:
        """At most `count` slots of at least `size` bytes; `kept` bytes stay when nobody needs them. Raises
        `StartError` when there cannot be any."""
        self._kept = kept
        self.limit = size
        """Bytes that a slot has room for."""
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
        """How many nobody has."""
        return len(self._free)

    def take(self) -> Slot:
        """A slot, while there is a free one."""
        return self._free.pop()

    def close(self) -> None:
        """Let go of the descriptor; the memory goes with the last process that has it."""
        os.close(self.descriptor)

    def view(self, offset: int, size: int) -> memoryview:
        """These bytes."""
        return self._view[offset : offset + size]

    def give_back(self, slot: Slot, used: int) -> None:
        """See `Slot.give_back`."""
        self._resident += max(0, used - slot.resident)
        slot.resident = max(slot.resident, used)
        self._free.append(slot)
        self._trim()

    def _trim(self) -> None:
        """Return what is too much to the system: first of the slots that will be taken last."""
        slot = next((one for one in self._free if one.resident), None)
        if slot and self._resident > self._kept:
            start = max(0, slot.resident - _PIECE) // mmap.PAGESIZE * mmap.PAGESIZE
            self._memory.madvise(mmap.MADV_REMOVE, slot.offset + start, slot.resident - start)
            self._resident -= slot.resident - start
            slot.resident = start
            asyncio.get_running_loop().call_soon(self._trim)


class Slot:
    """Room for one body."""

    __slots__ = ("_slots", "offset", "resident")

    def __init__(self, slots: Slots, offset: int) -> None:
        self._slots = slots
        self.offset = offset
        self.resident = 0
        """Bytes from its start on that have pages."""

    def view(self, start: int, stop: int) -> memoryview:
        """These of its bytes, to write and read."""
        return self._slots.view(self.offset + start, stop - start)

    def read(self, size: int) -> bytes:
        """A copy of the first `size` bytes; other threads run meanwhile."""
        return fetch(self._slots.descriptor, self.stored(0, size))

    def stored(self, start: int, stop: int) -> Stored:
        """The same, as a runner finds them."""
        return Stored(self.offset + start, stop - start)

    def give_back(self, used: int) -> None:
        """It is not needed any more; the first `used` bytes were written. A runner may still read it: what
        it finds then is of no use to anybody."""
        self._slots.give_back(self, used)

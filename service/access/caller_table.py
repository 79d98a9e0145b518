"""Counts per caller, in memory of a fixed size that all workers share.

The table is a count-min sketch (Cormode and Muthukrishnan, 2005) with conservative updates (Estan and
Varghese, 2002). The hash of a caller selects a slot in each of two rows, and the smaller of both values
counts. A caller is therefore never undercounted. It is overcounted only if other callers share both of its
slots: with 10,000 other callers at the same time, this happens to 1 caller in 50.

A table of exact entries would need a lock between the workers for new entries, and a rule for what happens
when it is full. An attacker with many addresses can fill any such table. Here nothing is created, evicted or
forgotten, whatever arrives.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
import struct
from array import array
from typing import Final, NamedTuple

ROW_SLOTS: Final = 1 << 16
"""Number of slots in a row."""

_ROW_COUNT: Final = 2

_SLOT_COUNT: Final = _ROW_COUNT * ROW_SLOTS

_SECRET_BYTES: Final = 16
"""Size in bytes of the key of the hash, at the start of the memory. Nobody outside can compute which callers
share a slot."""

_VALUE_BYTES: Final = 8

_TIME_VALUES: Final = 2
"""Number of values of a slot before its columns: the time of the images, and the time of the refusals."""

_HASH_FORMAT: Final = struct.Struct("<II")


class Slots(NamedTuple):
    """The positions of a caller's slots, one in each row."""

    first: int
    second: int


class CallerTable:
    """The counts of all callers.

    Each slot has two times and one column for each worker. The times are those of the generic cell rate
    algorithm (`caller_limits`). Any worker writes them without a lock, as one aligned value of 8 bytes: if
    two workers write at the same moment, one request of the caller is not counted. A column has the number of
    a worker's images in flight, and only this worker writes it, so that no count is ever lost.
    """

    def __init__(self, memory: mmap.mmap, *, column: int) -> None:
        """Use `memory` as the worker that owns `column`."""
        self._memory = memory
        self._secret = bytes(memory[:_SECRET_BYTES])
        self._stride = (len(memory) - _SECRET_BYTES) // (_SLOT_COUNT * _VALUE_BYTES)
        self._values = memoryview(memory)[_SECRET_BYTES:].cast("d")
        self._column = _TIME_VALUES + column
        if not _TIME_VALUES <= self._column < self._stride:
            raise ValueError(f"there is no column {column} in a table with slots of {self._stride} values")

    @classmethod
    def create(cls) -> CallerTable:
        """Create a table for one process."""
        memory = mmap.mmap(-1, _compute_size(1))
        memory[:_SECRET_BYTES] = secrets.token_bytes(_SECRET_BYTES)
        return cls(memory, column=0)

    @classmethod
    def open(cls, descriptor: int, *, column: int) -> CallerTable:
        """Open the table in the memory file `descriptor`, which `create_table_file` has created."""
        return cls(mmap.mmap(descriptor, 0), column=column)

    def find_slots(self, name: bytes) -> Slots:
        """Return the slots of a caller."""
        digest = hashlib.blake2b(name, digest_size=_HASH_FORMAT.size, key=self._secret).digest()
        first, second = _HASH_FORMAT.unpack(digest)
        return Slots(first % ROW_SLOTS * self._stride, (ROW_SLOTS + second % ROW_SLOTS) * self._stride)

    # --- times, in seconds of the monotonic clock, which all processes share ---

    def read_image_time(self, slots: Slots) -> float:
        """Return the time until which the caller's images use its rate; 0 before the first image."""
        values = self._values
        return min(values[slots.first], values[slots.second])

    def advance_image_time(self, slots: Slots, time: float) -> None:
        """Set the time of the caller's images, unless a slot has a later time."""
        self._advance(slots, 0, time)

    def read_refusal_time(self, slots: Slots) -> float:
        """Return the time until which the caller's refusals use their rate; 0 before the first refusal."""
        values = self._values
        return min(values[slots.first + 1], values[slots.second + 1])

    def advance_refusal_time(self, slots: Slots, time: float) -> None:
        """Set the time of the caller's refusals, unless a slot has a later time."""
        self._advance(slots, 1, time)

    def _advance(self, slots: Slots, offset: int, time: float) -> None:
        values = self._values
        for slot in slots:
            if values[slot + offset] < time:
                values[slot + offset] = time

    # --- images in flight ---

    def count_images(self, slots: Slots) -> int:
        """Return the number of the caller's images in flight, in all workers together."""
        return min(self._sum_columns(slots.first), self._sum_columns(slots.second))

    def _sum_columns(self, slot: int) -> int:
        return int(sum(self._values[slot + _TIME_VALUES : slot + self._stride]))

    def add_images(self, slots: Slots, count: int) -> None:
        """Add `count` images of this worker; a negative number removes them."""
        values, column = self._values, self._column
        for slot in slots:
            values[slot + column] += count

    def clear_column(self) -> None:
        """Remove the images of this table's worker, which has died."""
        self._values[self._column :: self._stride] = memoryview(array("d", bytes(_SLOT_COUNT * _VALUE_BYTES)))

    def close(self) -> None:
        """Unmap the memory."""
        self._values.release()
        self._memory.close()


def create_table_file(columns: int) -> int:
    """Create a memory file for a table with this number of columns, and return its descriptor.

    Only the pages that callers use take memory: at most 1 MB for each column, and 2 MB. Raises `OSError`.
    """
    descriptor = os.memfd_create("fovea-callers")
    try:
        os.write(descriptor, secrets.token_bytes(_SECRET_BYTES))
        os.ftruncate(descriptor, _compute_size(columns))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _compute_size(columns: int) -> int:
    """Return the size in bytes of a table with this number of columns."""
    return _SECRET_BYTES + _SLOT_COUNT * (_TIME_VALUES + columns) * _VALUE_BYTES

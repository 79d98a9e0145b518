"""The memory for large bodies that service and runners share."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable, Iterator

import pytest

from fovea.service.runners.shared_memory import SharedBodies

MB = 1 << 20


@pytest.fixture
def shared_bodies() -> Iterator[SharedBodies]:
    bodies = SharedBodies(4, 24 * MB)
    yield bodies
    bodies.close()


def count_resident_bytes(bodies: SharedBodies) -> int:
    """Return the number of allocated bytes of the shared memory."""
    return os.fstat(bodies.descriptor).st_blocks * 512


def run_on_loop(action: Callable[[], None]) -> None:
    """Run `action` on an event loop, and then the callbacks that it has scheduled."""

    async def run() -> None:
        action()
        for _ in range(20):
            await asyncio.sleep(0)

    asyncio.run(run())


def test_written_bytes_are_at_the_referenced_offset(shared_bodies: SharedBodies) -> None:
    with mmap.mmap(shared_bodies.descriptor, 0, prot=mmap.PROT_READ) as runner:
        slots = [shared_bodies.allocate() for _ in range(4)]
        for number, slot in enumerate(slots):
            slot.view(10, 13)[:] = b"%d%d%d" % (number, number, number)
        for number, slot in enumerate(slots):
            ref = slot.to_ref(10, 13)
            assert runner[ref.offset : ref.offset + len(ref)] == b"%d%d%d" % (
                number,
                number,
                number,
            )


def test_slots_are_limited_and_reused(shared_bodies: SharedBodies) -> None:
    def run() -> None:
        slots = [shared_bodies.allocate() for _ in range(4)]
        assert shared_bodies.free_count == 0
        assert len({slot.offset for slot in slots}) == 4
        slots[2].release(1000)
        assert shared_bodies.free_count == 1
        assert shared_bodies.allocate() is slots[2]

    run_on_loop(run)


def test_memory_beyond_32_mb_is_returned(shared_bodies: SharedBodies) -> None:
    """At most about 32 MB stay allocated, whatever the sizes."""

    def fill_slots(*sizes: int) -> None:
        slots = [shared_bodies.allocate() for _ in sizes]
        for slot, size in zip(slots, sizes, strict=True):
            slot.view(0, size)[:] = bytes(size)
            slot.view(0, size)[::4096] = b"x" * len(range(0, size, 4096))
        for slot, size in zip(slots, sizes, strict=True):
            slot.release(size)

    run_on_loop(lambda: fill_slots(5 * MB))
    assert count_resident_bytes(shared_bodies) == 5 * MB
    run_on_loop(lambda: fill_slots(5 * MB + 1, 17 * MB, 23 * MB, 20 * MB))
    assert 20 * MB < count_resident_bytes(shared_bodies) <= 33 * MB
    assert shared_bodies.free_count == 4


def test_large_slots_are_limited_by_the_address_space() -> None:
    shared_bodies = SharedBodies(1000, 1 << 30)
    assert shared_bodies.free_count == 64
    shared_bodies.close()

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
def slots() -> Iterator[SharedBodies]:
    made = SharedBodies(4, 24 * MB)
    yield made
    made.close()


def resident_bytes(bodies: SharedBodies) -> int:
    """Return the number of allocated bytes of the shared memory."""
    return os.fstat(bodies.descriptor).st_blocks * 512


def run_on_loop(action: Callable[[], None]) -> None:
    """Run `action` on an event loop, and then the callbacks that it has scheduled."""

    async def run() -> None:
        action()
        for _ in range(20):
            await asyncio.sleep(0)

    asyncio.run(run())


def test_what_is_written_is_where_a_runner_looks(slots: SharedBodies) -> None:
    with mmap.mmap(slots.descriptor, 0, prot=mmap.PROT_READ) as runner:
        taken = [slots.allocate() for _ in range(4)]
        for number, slot in enumerate(taken):
            slot.view(10, 13)[:] = b"%d%d%d" % (number, number, number)
        for number, slot in enumerate(taken):
            stored = slot.to_ref(10, 13)
            assert runner[stored.offset : stored.offset + len(stored)] == b"%d%d%d" % (number, number, number)


def test_there_are_so_many_and_the_warmest_is_taken_first(slots: SharedBodies) -> None:
    def run() -> None:
        taken = [slots.allocate() for _ in range(4)]
        assert slots.free_count == 0
        assert len({slot.offset for slot in taken}) == 4
        taken[2].release(1000)
        assert slots.free_count == 1
        assert slots.allocate() is taken[2]

    run_on_loop(run)


def test_little_memory_stays_and_much_is_returned(slots: SharedBodies) -> None:
    """At most about 32 MB stay allocated, whatever the sizes."""

    def use(*sizes: int) -> None:
        taken = [slots.allocate() for _ in sizes]
        for slot, size in zip(taken, sizes, strict=True):
            slot.view(0, size)[:] = bytes(size)
            slot.view(0, size)[::4096] = b"x" * len(range(0, size, 4096))
        for slot, size in zip(taken, sizes, strict=True):
            slot.release(size)

    run_on_loop(lambda: use(5 * MB))
    assert resident_bytes(slots) == 5 * MB
    run_on_loop(lambda: use(5 * MB + 1, 17 * MB, 23 * MB, 20 * MB))
    assert 20 * MB < resident_bytes(slots) <= 33 * MB
    assert slots.free_count == 4


def test_there_are_fewer_where_they_are_too_large_for_the_address_space() -> None:
    slots = SharedBodies(1000, 1 << 30)
    assert slots.free_count == 64
    slots.close()

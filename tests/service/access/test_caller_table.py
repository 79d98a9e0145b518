"""The table of callers: exact for few callers, of a fixed size for many, and shared by workers."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from fovea.service.access.caller_table import ROW_SLOTS, CallerTable, create_table_file


@pytest.fixture
def table_file() -> Iterator[int]:
    """Yield the descriptor of a table for three workers."""
    descriptor = create_table_file(3)
    yield descriptor
    os.close(descriptor)


def test_callers_are_counted_apart() -> None:
    table = CallerTable.create()
    slots = {number: table.find_slots(b"caller %d" % number) for number in range(200)}
    for number, caller_slots in slots.items():
        table.add_images(caller_slots, number)
        table.advance_image_time(caller_slots, 1000.0 + number)
        table.advance_refusal_time(caller_slots, 2000.0 + number)
    for number, caller_slots in slots.items():
        assert table.count_images(caller_slots) == number
        assert table.read_image_time(caller_slots) == 1000.0 + number
        assert table.read_refusal_time(caller_slots) == 2000.0 + number


def test_many_callers_need_no_further_memory_and_disturb_few(table_file: int) -> None:
    table = CallerTable.open(table_file, column=0)
    size = os.fstat(table_file).st_size
    for number in range(10_000):
        table.add_images(table.find_slots(b"flood %d" % number), 1)
    assert os.fstat(table_file).st_size == size < 6 << 20
    others = [table.find_slots(b"other %d" % number) for number in range(1000)]
    assert sum(table.count_images(slots) > 0 for slots in others) < 60  # 20 by chance
    assert max(slots.second for slots in others) > ROW_SLOTS


def test_time_never_goes_back() -> None:
    table = CallerTable.create()
    slots = table.find_slots(b"caller")
    table.advance_image_time(slots, 5.0)
    table.advance_image_time(slots, 4.0)
    assert table.read_image_time(slots) == 5.0


def test_workers_share_times_and_sum_their_images(table_file: int) -> None:
    tables = [CallerTable.open(table_file, column=column) for column in range(3)]
    slots = [table.find_slots(b"caller") for table in tables]
    assert slots[0] == slots[1] == slots[2]  # one secret
    for number, table in enumerate(tables):
        table.add_images(slots[0], number + 1)
    tables[1].advance_image_time(slots[0], 7.0)
    assert [table.count_images(slots[0]) for table in tables] == [6, 6, 6]
    assert [table.read_image_time(slots[0]) for table in tables] == [7.0, 7.0, 7.0]


def test_images_of_dead_worker_are_removed_and_others_stay(table_file: int) -> None:
    tables = [CallerTable.open(table_file, column=column) for column in range(3)]
    slots = tables[0].find_slots(b"caller")
    for number, table in enumerate(tables):
        table.add_images(slots, 10**number)
        table.advance_image_time(slots, 7.0)
    CallerTable.open(table_file, column=1).clear_column()
    assert tables[0].count_images(slots) == 101
    assert tables[0].read_image_time(slots) == 7.0


def test_nobody_can_compute_the_slots_of_another_service() -> None:
    names = [b"caller %d" % number for number in range(8)]
    first, second = CallerTable.create(), CallerTable.create()
    assert [first.find_slots(name) for name in names] != [second.find_slots(name) for name in names]


def test_column_outside_the_table_is_an_error(table_file: int) -> None:
    with pytest.raises(ValueError, match="no column 3"):
        CallerTable.open(table_file, column=3)

"""Standard input that is read again."""

from __future__ import annotations

import io
import os

from fovea.bulk.inputs.name_list import read_names
from fovea.bulk.recorded_input import RecordedInput


def test_list_is_read_again_from_its_beginning() -> None:
    content = "".join(f"photos/{number}.jpg\n" for number in range(20_000)).encode()
    recorded = RecordedInput(io.BytesIO(content))
    names = [name.text for name in read_names(recorded.open())]
    assert len(names) == 20_000
    assert [name.text for name in read_names(recorded.open())] == names
    assert recorded.open().read() == content


def test_readers_may_take_turns() -> None:
    """One stops in the middle, such as that of a sorting that has found its image."""
    recorded = RecordedInput(io.BytesIO(b"abcdefgh" * 10_000))
    first, second = recorded.open(), recorded.open()
    parts = [first.read(3), second.read(30_000), first.read(50_000), second.read()]
    assert parts[0] + parts[2] + first.read() == parts[1] + parts[3] == b"abcdefgh" * 10_000
    assert RecordedInput(io.BytesIO()).open().read() == b""


def test_names_are_read_as_they_arrive() -> None:
    """A list that somebody still writes: each name can be used before the next one is there."""
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as stream, open(write_end, "wb", buffering=0) as writer:  # noqa: PTH123
        names = read_names(RecordedInput(stream).open())
        for number in range(1, 4):
            writer.write(b"%d.jpg\n" % number)
            assert next(names) == (number, f"{number}.jpg")

"""A list of names on standard input: one in each line, or with null bytes between them (`find -print0`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, Final, NamedTuple

_BLOCK_BYTES: Final = 64 << 10

_MAX_NAME_BYTES: Final = 64 << 10
"""Longest name in bytes. A path of Linux has at most 4,096, and a URL that Fovea asks for too."""

_UTF8_MARK: Final = b"\xef\xbb\xbf"


class ListedName(NamedTuple):
    """A name of the list; `text` is None if the name is too long."""

    number: int
    """Number of the line, from 1 on."""
    text: str | None


def read_names(stream: BinaryIO) -> Iterator[ListedName]:
    """Yield the names as soon as they arrive, without blank lines.

    The first end of a name decides: if a null byte comes before or together with the first line break, all
    names end with null bytes, and may have line breaks in them.
    """
    read = getattr(stream, "read1", stream.read)
    rest = b""
    separator: bytes | None = None
    number, is_too_long, is_start = 0, False, True
    while block := read(_BLOCK_BYTES):
        rest += block
        if is_start and len(rest) >= len(_UTF8_MARK):
            rest, is_start = rest.removeprefix(_UTF8_MARK), False
        if separator is None and (b"\0" in rest or b"\n" in rest):
            separator = b"\0" if b"\0" in rest else b"\n"
        *complete, rest = rest.split(separator) if separator is not None else (rest,)
        for name in complete:
            number += 1
            if not is_too_long:
                yield from _decode_name(number, name, separator)
            is_too_long = False
        if len(rest) > _MAX_NAME_BYTES and not is_too_long:
            yield ListedName(number + 1, None)
            is_too_long = True
        if is_too_long:
            rest = b""
    if rest and not is_too_long:
        yield from _decode_name(number + 1, rest.removeprefix(_UTF8_MARK) if is_start else rest, separator)


def _decode_name(number: int, name: bytes, separator: bytes | None) -> Iterator[ListedName]:
    if separator != b"\0":
        name = name.removesuffix(b"\r")
    if len(name) > _MAX_NAME_BYTES:
        yield ListedName(number, None)
    elif name.strip():
        yield ListedName(number, os.fsdecode(name))

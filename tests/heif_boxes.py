"""Builder of HEIC and AVIF files (ISO/IEC 23008-12) with any structure."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple


class Item(NamedTuple):
    """A picture of a file. The place in the list of items is its number, counted from 1."""

    kind: bytes
    content: bytes
    properties: Sequence[int]
    """Places in the list of properties, counted from 1."""


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def make_size(width: int, height: int) -> bytes:
    return box(b"ispe", bytes(4), struct.pack(">II", width, height))


def make_reference(kind: bytes, item: int, *targets: int) -> bytes:
    return box(kind, struct.pack(">HH", item, len(targets)), *(struct.pack(">H", one) for one in targets))


def read_box(content: bytes, kind: bytes) -> bytes:
    """Return the first box of a kind."""
    start = content.index(kind) - 4
    return content[start : start + struct.unpack_from(">I", content, start)[0]]


def build_heif(
    brand: bytes, items: Sequence[Item], properties: Sequence[bytes], references: Sequence[bytes] = (), *,
    further: Sequence[bytes] = (), behind: bytes = b"",
) -> bytes:  # fmt: skip
    """Return a file whose picture is the first item.

    `further` are boxes at the end of `meta`, and `behind` what comes behind the items.
    """
    numbered = list(enumerate(items, 1))
    head = box(b"ftyp", brand, bytes(4), b"mif1", brand)

    def build_meta(start: int) -> bytes:
        places = []
        for number, item in numbered:
            places.append(struct.pack(">HHHII", number, 0, 1, start, len(item.content)))
            start += len(item.content)
        infos = (
            box(b"infe", b"\2\0\0\0", struct.pack(">HH", number, 0), item.kind, b"\0")
            for number, item in numbered
        )
        return box(
            b"meta",
            bytes(4),
            box(b"hdlr", bytes(8), b"pict", bytes(13)),
            box(b"pitm", bytes(4), struct.pack(">H", 1)),
            box(b"iinf", bytes(4), struct.pack(">H", len(items)), *infos),
            box(b"iref", bytes(4), *references) if references else b"",
            box(
                b"iprp",
                box(b"ipco", *properties),
                box(
                    b"ipma", bytes(4), struct.pack(">I", len(items)),
                    *(
                        struct.pack(">HB", number, len(item.properties)) + bytes(item.properties)
                        for number, item in numbered
                    ),
                ),
            ),
            box(b"iloc", b"\0\0\0\0\x44\0", struct.pack(">H", len(items)), *places),
            *further,
        )  # fmt: skip

    start = len(head) + len(build_meta(0)) + 8
    return head + build_meta(start) + box(b"mdat", *(item.content for item in items)) + behind

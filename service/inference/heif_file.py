"""The structure of HEIC and AVIF files, and a check of the pictures in it before a codec runs.

Both formats are ISO base media files with pictures as items (ISO/IEC 23008-12). A codec decodes what the
items contain: the header may promise 64 x 64 pixels, and the coded picture behind it may have millions, or
the same tile may be asked for thousands of times. `check_pictures` refuses a file whose coded pictures are
larger than its promise. Pixels, memory and time then follow from the header, as for all formats.

A parser that takes another box than the codec does would check another picture. So each box that may be
there once is refused if it is there twice.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from fovea.service.errors import BadImage

ReadCodedSize = Callable[["HeifFile", int], tuple[int, int]]
"""Function that returns the size of the coded picture of an item, in pixels. Raises `BadImage`."""

_MAX_BOXES: Final = 20_000
"""Largest number of boxes and entries in one file. A phone's photo has some 200."""

CODED_MARGIN: Final = 64
"""Pixels by which a coded picture may exceed its size on each axis: the largest coding block (H.265)."""

_MAX_EXCESS: Final = 4
"""Largest ratio of the pixels of all tiles, or of all masks, to those of their picture."""

_SMALL_PIXELS: Final = 1 << 22
"""Pixels of tiles that any picture may have: tiles of 512 x 512 make up small pictures too."""

_SINGLE_BOXES: Final = frozenset({b"pitm", b"iinf", b"iref", b"iloc", b"idat", b"iprp", b"ipco"})
"""Boxes that may be in a `meta` box once."""

_DECODED_REFERENCES: Final = frozenset({b"dimg", b"auxl"})
"""Kinds of references that lead a codec to further pictures: tiles and masks."""


class Box(NamedTuple):
    """A box of an ISO base media file: its type, and where its content begins and ends."""

    kind: bytes
    start: int
    end: int


class HeifFile:
    """The boxes of a file, and what its `meta` box says about its pictures."""

    def __init__(self, data: bytes, format_name: str, *, may_end_early: bool = False) -> None:
        """Read the `meta` box, if there is one. Raises `BadImage`.

        With `may_end_early`, whatever follows the `meta` box may be damaged: the codec does not read on.
        """
        self.data = data
        self.format_name = format_name
        self.primary: int | None = None
        """Item of the picture; None without a `meta` box."""
        self.kinds: dict[int, bytes] = {}
        self.properties: list[Box] = []
        self.indices: dict[int, list[int]] = {}
        """Properties of each item, counted from 1."""
        self.references: dict[tuple[bytes, int], list[int]] = {}
        self._locations: dict[int, tuple[int, list[tuple[int, int]]]] = {}
        """Construction method of each item, and offset and length of its extents."""
        self._item_data: Box | None = None
        self._left = _MAX_BOXES
        self._seen: set[bytes] = set()
        self.boxes: list[Box] = []
        """Boxes of the file itself."""
        metas: list[Box] = []
        try:
            for box in self.read_boxes(0, len(data)):
                self.boxes.append(box)
                metas += [box] if box.kind == b"meta" else []
        except BadImage:
            if not (metas and may_end_early):
                raise
        if len(metas) > 1:
            raise self.error("it has several boxes `meta`")
        if metas:
            self.primary = -1
            self._read_meta(metas[0].start + 4, metas[0].end)

    def error(self, problem: str) -> BadImage:
        """Return the error for a damaged file."""
        return BadImage(f"the {self.format_name} file is damaged: {problem}")

    def count(self, number: int = 1) -> None:
        """Count boxes and entries. Raises `BadImage` if there are too many."""
        self._left -= number
        if self._left < 0:
            raise BadImage(f"the {self.format_name} file has more than {_MAX_BOXES} boxes and entries")

    def number(self, start: int, size: int) -> int:
        """Return a number of some bytes; 0 for none. Raises `BadImage` behind the end."""
        if start < 0 or start + size > len(self.data):
            raise self.error("it ends within its header")
        return int.from_bytes(self.data[start : start + size])

    def read_boxes(self, start: int, end: int) -> Iterator[Box]:
        """Yield the boxes between two positions. Raises `BadImage`."""
        while start + 8 <= end:
            self.count()
            size, head = self.number(start, 4), 8
            if size == 1:
                size, head = self.number(start + 8, 8), 16
            elif size == 0:
                size = end - start
            if size < head or start + size > end:
                raise self.error("a box is longer than what contains it")
            yield Box(self.data[start + 4 : start + 8], start + head, start + size)
            start += size

    def _note_single(self, kind: bytes) -> None:
        if kind in _SINGLE_BOXES:
            if kind in self._seen:
                raise self.error(f"it has several boxes `{kind.decode()}`")
            self._seen.add(kind)

    def _read_meta(self, start: int, end: int) -> None:
        for box in self.read_boxes(start, end):
            self._note_single(box.kind)
            version = self.number(box.start, 1) if box.end > box.start else 0
            if box.kind == b"pitm":
                self.primary = self.number(box.start + 4, 4 if version else 2)
            elif box.kind == b"iinf":
                self._read_items(box, version)
            elif box.kind == b"iref":
                self._read_references(box, version)
            elif box.kind == b"iloc":
                self._read_locations(box, version)
            elif box.kind == b"idat":
                self._item_data = box
            elif box.kind == b"iprp":
                self._read_properties(box)

    def _read_items(self, box: Box, version: int) -> None:
        for entry in self.read_boxes(box.start + (8 if version else 6), box.end):
            if entry.kind == b"infe" and (entry_version := self.number(entry.start, 1)) >= 2:
                size = 2 if entry_version == 2 else 4
                item = self.number(entry.start + 4, size)
                if item in self.kinds:
                    raise self.error(f"the item {item} has several kinds")
                self.kinds[item] = self.data[entry.start + 6 + size : entry.start + 10 + size]

    def _read_references(self, box: Box, version: int) -> None:
        size = 4 if version else 2
        for entry in self.read_boxes(box.start + 4, box.end):
            item = self.number(entry.start, size)
            count = self.number(entry.start + size, 2)
            self.count(count)
            first = entry.start + size + 2
            targets = [self.number(first + size * index, size) for index in range(count)]
            if entry.kind in _DECODED_REFERENCES and (entry.kind, item) in self.references:
                raise self.error(f"the item {item} has several lists of pictures")
            self.references.setdefault((entry.kind, item), []).extend(targets)

    def _read_locations(self, box: Box, version: int) -> None:
        sizes = self.number(box.start + 4, 2)
        offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
        if max(offset_size, length_size, base_size, index_size) > 8:
            raise self.error("a number has more than 64 bits")
        id_size = 4 if version == 2 else 2
        position = box.start + 6
        count = self.number(position, id_size)
        position += id_size
        for _ in range(count):
            self.count()
            item = self.number(position, id_size)
            position += id_size
            method = self.number(position, 2) & 15 if version else 0
            position += (2 if version else 0) + 2
            base = self.number(position, base_size)
            position += base_size
            extent_count = self.number(position, 2)
            position += 2
            self.count(extent_count)
            extents = []
            for _ in range(extent_count):
                position += index_size if version else 0
                offset = base + self.number(position, offset_size)
                extents.append((offset, self.number(position + offset_size, length_size)))
                position += offset_size + length_size
            if item in self._locations:
                raise self.error(f"the item {item} has several places")
            self._locations[item] = method, extents

    def _read_properties(self, box: Box) -> None:
        for child in self.read_boxes(box.start, box.end):
            self._note_single(child.kind)
            if child.kind == b"ipco":
                self.properties += self.read_boxes(child.start, child.end)
            elif child.kind == b"ipma":
                version, flags = self.number(child.start, 1), self.number(child.start + 3, 1)
                position, id_size, index_size = child.start + 8, 4 if version else 2, 2 if flags & 1 else 1
                for _ in range(self.number(child.start + 4, 4)):
                    self.count()
                    item = self.number(position, id_size)
                    count = self.number(position + id_size, 1)
                    self.count(count)
                    position += id_size + 1
                    mask = 0x7FFF if index_size == 2 else 0x7F
                    if item in self.indices:
                        raise self.error(f"the item {item} has several lists of properties")
                    self.indices[item] = [
                        self.number(position + index_size * index, index_size) & mask
                        for index in range(count)
                    ]
                    position += index_size * count

    def find_properties(self, item: int, kind: bytes) -> list[Box]:
        """Return the properties of one kind that an item has."""
        indices = (index for index in self.indices.get(item, ()) if 0 < index <= len(self.properties))
        return [self.properties[index - 1] for index in indices if self.properties[index - 1].kind == kind]

    def find_size(self, item: int) -> tuple[int, int]:
        """Return the size that an item promises. Raises `BadImage` if there is not exactly one.

        Raises `BadImage` also for an item that a codec would make larger afterwards.
        """
        boxes = self.find_properties(item, b"ispe")
        sizes = {(self.number(box.start + 4, 4), self.number(box.start + 8, 4)) for box in boxes}
        if len(sizes) != 1:
            raise self.error(f"a picture has {len(sizes)} sizes (ispe)")
        size = sizes.pop()
        for aperture in self.find_properties(item, b"clap"):  # ISO/IEC 14496-12, 12.1.4
            for position, side in zip((aperture.start, aperture.start + 8), size, strict=True):
                if not 0 < self.number(position, 4) <= side * self.number(position + 4, 4):
                    raise self.error("its clean aperture (clap) is not a part of its picture")
        if self.find_properties(item, b"iscl"):
            raise BadImage(f"the {self.format_name} file asks for another size of its picture (iscl)")
        return size

    def read_item(self, item: int) -> memoryview:
        """Return the content of an item. Raises `BadImage`."""
        method, extents = self._locations.get(item, (-1, []))
        start, end = 0, len(self.data)
        if method == 1 and self._item_data:
            _, start, end = self._item_data
        elif method != 0:
            raise self.error("the content of a picture has no place")
        view = memoryview(self.data)
        parts = []
        for offset, length in extents:
            position = start + offset
            length = length or max(end - position, 0)  # 0 means the rest (ISO/IEC 14496-12, 8.11.3)
            if position + length > end:
                raise self.error("it ends within a picture")
            parts.append(view[position : position + length])
        if len(parts) == 1:
            return parts[0]
        if sum(map(len, parts)) > len(self.data):
            raise self.error("a picture is longer than the file")
        return memoryview(b"".join(parts))


def check_pictures(file: HeifFile, coded_kind: bytes, read_coded_size: ReadCodedSize) -> None:
    """Raise `BadImage` if decoding could take more than the size in the header suggests.

    `coded_kind` is the kind of items whose coded picture `read_coded_size` reads.
    """
    if file.primary is None:
        raise BadImage(f"the {file.format_name} file has no picture: it has no box `meta`")
    checker = _Checker(file, coded_kind, read_coded_size)
    width, height = checker.check(file.primary)
    masks: dict[int, list[int]] = {}
    for (kind, item), targets in file.references.items():
        if kind == b"auxl":
            for target in set(targets):
                masks.setdefault(target, []).append(item)
    mask_pixels = 0
    while checker.new_items:  # a codec decodes the masks of the picture, of its tiles, and of masks
        for item in masks.get(checker.new_items.pop(), ()):
            if item in checker.checked:
                continue
            mask_width, mask_height = checker.check(item)
            mask_pixels += mask_width * mask_height
            if mask_width * mask_height > width * height or mask_pixels > max(
                _MAX_EXCESS * width * height, _SMALL_PIXELS
            ):
                raise BadImage(f"the {file.format_name} file has masks that are larger than its picture")


class _Checker:
    """Checks pictures, and keeps which items belong to them."""

    def __init__(self, file: HeifFile, coded_kind: bytes, read_coded_size: ReadCodedSize) -> None:
        self._file = file
        self._coded_kind = coded_kind
        self._read_coded_size = read_coded_size
        self._pixels: dict[int, int] = {}
        """Pixels of the coded picture of each item: an item may be a tile of several pictures."""
        self.checked: set[int] = set()
        self.new_items: list[int] = []
        """Checked items whose masks are not checked yet."""

    def check(self, item: int) -> tuple[int, int]:
        """Return the size of a picture. Raises `BadImage` if its coded pictures do not fit into it."""
        file = self._file
        self._note(item)
        kind = file.kinds.get(item, b"")
        width, height = file.find_size(item)
        if kind == self._coded_kind:
            self._check_coded_size(item)
        elif kind == b"grid":
            self._check_grid(item, width, height)
        else:
            name, coded = kind.decode("latin-1") or "missing", self._coded_kind.decode()
            raise BadImage(
                f"a picture of the {file.format_name} file is of the kind {name!r}; "
                f"{coded} and grid are served"
            )
        return width, height

    def _note(self, item: int) -> None:
        if item not in self.checked:
            self.checked.add(item)
            self.new_items.append(item)

    def _check_grid(self, item: int, width: int, height: int) -> None:
        file, name = self._file, self._file.format_name
        content = file.read_item(item)
        is_long = len(content) >= 12 and content[1] & 1
        if len(content) < 8:
            raise file.error("its grid has no size")
        if struct.unpack_from(">II" if is_long else ">HH", content, 4) != (width, height):
            raise file.error("its grid has another size than its picture")
        tiles = file.references.get((b"dimg", item), [])
        if len(tiles) != (content[2] + 1) * (content[3] + 1):
            raise file.error(f"its grid has {len(tiles)} tiles")
        pixels = 0
        for tile in tiles:
            if file.kinds.get(tile) != self._coded_kind:
                raise BadImage(f"the {name} file has a grid of something else than pictures")
            self._note(tile)
            pixels += self._check_coded_size(tile)
        if pixels > max(_MAX_EXCESS * width * height, _SMALL_PIXELS):
            raise BadImage(f"the {name} file has tiles with many more pixels than its picture")

    def _check_coded_size(self, item: int) -> int:
        """Return the pixels of a coded picture. Raises `BadImage` if it is larger than its size says."""
        if item not in self._pixels:
            coded_size = self._read_coded_size(self._file, item)
            check_promise(self._file.format_name, self._file.find_size(item), coded_size)
            self._pixels[item] = coded_size[0] * coded_size[1]
        return self._pixels[item]


def check_promise(format_name: str, size: tuple[int, int], coded_size: tuple[int, int]) -> None:
    """Raise `BadImage` if a coded picture is larger than its size says."""
    if coded_size[0] > size[0] + CODED_MARGIN or coded_size[1] > size[1] + CODED_MARGIN:
        raise BadImage(
            f"the {format_name} file promises {size[0]} x {size[1]} px and contains "
            f"{coded_size[0]} x {coded_size[1]} px"
        )


class Bits:
    """Bits of a header, from the first on."""

    def __init__(self, content: bytes, file: HeifFile) -> None:
        """Read `content`, whose first 256 bytes are enough for any header; `file` names the errors."""
        self._content = content[:256]
        self._value = int.from_bytes(self._content)
        self._left = 8 * len(self._content)
        self._file = file

    def read(self, count: int) -> int:
        """Return the number of the next bits. Raises `BadImage` behind the end."""
        self._left -= count
        if self._left < 0:
            raise self._file.error("its parameters end too early")
        return self._value >> self._left & ((1 << count) - 1)

    def read_golomb(self) -> int:
        """Return the next number in Exp-Golomb code (H.265, 9.2), which `uvlc` of AV1 is too."""
        zeros = 0
        while not self.read(1):
            zeros += 1
            if zeros > 32:
                raise self._file.error("a parameter is too large")
        return (1 << zeros) - 1 + self.read(zeros)

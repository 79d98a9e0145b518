"""HEIC, the format of iPhones: an optional codec (extra `heic`), and a check of each file before it runs.

The codec (libheif) decodes what the file's structure asks for: the header may promise 64 x 64 pixels, and the
coded pictures behind it may have millions, or the same tile may be asked for thousands of times. So
`check_structure` reads the boxes that describe the pictures (ISO/IEC 23008-12) and refuses a file whose coded
pictures are larger than its promise. Pixels, memory and time then follow from the header, as for all formats.
"""

from __future__ import annotations

import importlib
import importlib.util
import struct
from collections.abc import Callable, Iterator
from functools import cache
from io import BytesIO
from typing import Any, Final, NamedTuple

from PIL import ImageFile

from fovea.service.errors import BadImage

EXTRA_HINT: Final = "HEIC needs the extra `heic` on the side of the service: pip install 'fovea-serve[heic]'"
"""Sentence for whoever sends HEIC to a service without the codec."""

_MAX_BOXES: Final = 20_000
"""Largest number of boxes and entries in one file. A phone's photo has some 200."""

_CODED_MARGIN: Final = 64
"""Pixels by which a coded picture may exceed its size on each axis: the largest coding block (H.265)."""

_MAX_TILE_EXCESS: Final = 4
"""Largest ratio of the pixels of all tiles to those of their picture."""

_SMALL_PIXELS: Final = 1 << 22
"""Pixels of tiles that any picture may have: tiles of 512 x 512 make up small pictures too."""

_SPS: Final = 33
"""Type of the unit that has the size of the coded picture (H.265, table 7-1)."""


@cache
def is_available() -> bool:
    """Return True if the codec is installed."""
    return importlib.util.find_spec("pi_heif") is not None


def open_heic(stream: BytesIO) -> ImageFile.ImageFile:
    """Open an HEIC whose structure is sound. No pixel is decoded. Raises `BadImage` or Pillow's errors."""
    check_structure(stream.getvalue())
    image_file: ImageFile.ImageFile = _load_image_class()(stream)
    return image_file


@cache
def _load_image_class() -> Callable[[BytesIO], ImageFile.ImageFile]:
    """Return the class of Pillow's plugin. The module is imported with the first HEIC: it takes 30 ms."""
    pi_heif: Any = importlib.import_module("pi_heif")
    options: Any = importlib.import_module("pi_heif.options")
    options.DECODE_THREADS = 1  # a runner has one processor
    options.THUMBNAILS = options.DEPTH_IMAGES = options.AUX_IMAGES = False

    class HeicImageFile(pi_heif.HeifImageFile):  # type: ignore[misc]
        """Pillow's image of an HEIC, under the name that the service has for the format."""

        # The codec turns the picture upright by the file's own property (`irot`, `imir`), and the plugin sets
        # the orientation in EXIF and XMP to upright: nothing is turned twice (ISO/IEC 23008-12, A.2.3).
        format = "HEIC"

    return HeicImageFile


# --- structure -----------------------------------------------------------------------------------


class _Box(NamedTuple):
    """A box of an ISO base media file: its type, and where its content begins and ends."""

    kind: bytes
    start: int
    end: int


class _Structure:
    """What the `meta` box says about the pictures of a file."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.primary = -1
        self.kinds: dict[int, bytes] = {}
        self.properties: list[tuple[bytes, int, int]] = []
        """Kind of each property, and two numbers: the size of `ispe` or of the picture in `hvcC`."""
        self.indices: dict[int, list[int]] = {}
        """Properties of each item, counted from 1."""
        self.references: dict[tuple[bytes, int], list[int]] = {}
        self.locations: dict[int, tuple[int, int, int]] = {}
        """Construction method, offset and length of each item with one extent."""
        self.item_data = (0, 0)
        self._left = _MAX_BOXES
        meta = next((box for box in self.read_boxes(0, len(data)) if box.kind == b"meta"), None)
        if meta is None:
            raise BadImage("the HEIC file has no picture: it has no box `meta`")
        self._read_meta(meta.start + 4, meta.end)

    def count(self, number: int = 1) -> None:
        """Count boxes and entries. Raises `BadImage` if there are too many."""
        self._left -= number
        if self._left < 0:
            raise BadImage(f"the HEIC file has more than {_MAX_BOXES} boxes and entries")

    def number(self, start: int, size: int) -> int:
        """Return a number of some bytes; 0 for none. Raises `BadImage` behind the end."""
        if start < 0 or start + size > len(self.data):
            raise BadImage("the HEIC file ends within its header")
        return int.from_bytes(self.data[start : start + size])

    def read_boxes(self, start: int, end: int) -> Iterator[_Box]:
        """Yield the boxes between two positions."""
        while start + 8 <= end:
            self.count()
            size, head = self.number(start, 4), 8
            if size == 1:
                size, head = self.number(start + 8, 8), 16
            elif size == 0:
                size = end - start
            if size < head or start + size > end:
                raise BadImage("the HEIC file is damaged: a box is longer than what contains it")
            yield _Box(self.data[start + 4 : start + 8], start + head, start + size)
            start += size

    def _read_meta(self, start: int, end: int) -> None:
        for box in self.read_boxes(start, end):
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
                self.item_data = (box.start, box.end)
            elif box.kind == b"iprp":
                self._read_properties(box)

    def _read_items(self, box: _Box, version: int) -> None:
        for entry in self.read_boxes(box.start + (8 if version else 6), box.end):
            if entry.kind == b"infe" and (entry_version := self.number(entry.start, 1)) >= 2:
                size = 2 if entry_version == 2 else 4
                item = self.number(entry.start + 4, size)
                self.kinds[item] = self.data[entry.start + 6 + size : entry.start + 10 + size]

    def _read_references(self, box: _Box, version: int) -> None:
        size = 4 if version else 2
        for entry in self.read_boxes(box.start + 4, box.end):
            item = self.number(entry.start, size)
            count = self.number(entry.start + size, 2)
            self.count(count)
            first = entry.start + size + 2
            targets = [self.number(first + size * index, size) for index in range(count)]
            self.references.setdefault((entry.kind, item), []).extend(targets)

    def _read_locations(self, box: _Box, version: int) -> None:
        sizes = self.number(box.start + 4, 2)
        offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
        if max(offset_size, length_size, base_size, index_size) > 8:
            raise BadImage("the HEIC file is damaged: a number has more than 64 bits")
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
            extents = self.number(position, 2)
            position += 2
            self.count(extents)
            extent_size = (index_size if version else 0) + offset_size + length_size
            first = position + (index_size if version else 0)
            if extents == 1:
                offset = base + self.number(first, offset_size)
                self.locations[item] = method, offset, self.number(first + offset_size, length_size)
            position += extents * extent_size

    def _read_properties(self, box: _Box) -> None:
        for child in self.read_boxes(box.start, box.end):
            if child.kind == b"ipco":
                for one in self.read_boxes(child.start, child.end):
                    size = (0, 0)
                    if one.kind == b"ispe":
                        size = self.number(one.start + 4, 4), self.number(one.start + 8, 4)
                    elif one.kind == b"hvcC":
                        size = _read_coded_size(self, one)
                    self.properties.append((one.kind, *size))
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
                    self.indices.setdefault(item, []).extend(
                        self.number(position + index_size * index, index_size) & mask
                        for index in range(count)
                    )
                    position += index_size * count

    def find_size(self, item: int, kind: bytes) -> tuple[int, int]:
        """Return the size that a property of an item has. Raises `BadImage` if there is not exactly one."""
        sizes = {
            self.properties[index - 1][1:]
            for index in self.indices.get(item, ())
            if 0 < index <= len(self.properties) and self.properties[index - 1][0] == kind
        }
        if len(sizes) != 1:
            raise BadImage(f"the HEIC file is damaged: a picture has {len(sizes)} sizes ({kind.decode()})")
        return sizes.pop()

    def read_item(self, item: int) -> bytes:
        """Return the first bytes of a small item. Raises `BadImage`."""
        method, offset, length = self.locations.get(item, (-1, 0, 0))
        if method not in (0, 1):
            raise BadImage("the HEIC file is damaged: the content of a picture has no place")
        start = offset + (self.item_data[0] if method else 0)
        content = self.data[start : start + min(length, 16)]
        if len(content) < min(length, 16):
            raise BadImage("the HEIC file ends within its header")
        return content


def check_structure(data: bytes) -> None:
    """Raise `BadImage` if decoding could take more than the size in the header suggests."""
    structure = _Structure(data)
    width, height = _check_picture(structure, structure.primary)
    for (kind, item), targets in structure.references.items():
        if (
            kind == b"auxl"
            and structure.primary in targets
            and structure.kinds.get(item) in (b"hvc1", b"grid")
        ):
            other_width, other_height = _check_picture(structure, item)  # transparency is decoded too
            if other_width * other_height > width * height:
                raise BadImage("the HEIC file has a mask that is larger than its picture")


def _check_picture(structure: _Structure, item: int) -> tuple[int, int]:
    """Return the size of a picture. Raises `BadImage` if its coded pictures do not fit into it."""
    kind = structure.kinds.get(item, b"")
    width, height = structure.find_size(item, b"ispe")
    if kind == b"hvc1":
        _check_coded_size(structure, item)
        return width, height
    if kind != b"grid":
        name = kind.decode("latin-1") or "missing"
        raise BadImage(f"the picture of the HEIC file is of the kind {name!r}; hvc1 and grid are served")
    content = structure.read_item(item)
    is_long = len(content) >= 12 and content[1] & 1
    if len(content) < 8:
        raise BadImage("the HEIC file is damaged: its grid has no size")
    if struct.unpack_from(">II" if is_long else ">HH", content, 4) != (width, height):
        raise BadImage("the HEIC file is damaged: its grid has another size than its picture")
    tiles = structure.references.get((b"dimg", item), [])
    if len(tiles) != (content[2] + 1) * (content[3] + 1):
        raise BadImage(f"the HEIC file is damaged: its grid has {len(tiles)} tiles")
    sizes = {}
    for tile in set(tiles):
        if structure.kinds.get(tile) != b"hvc1":
            raise BadImage("the HEIC file has a grid of something else than pictures")
        sizes[tile] = _check_coded_size(structure, tile)
    if sum(sizes[tile] for tile in tiles) > max(_MAX_TILE_EXCESS * width * height, _SMALL_PIXELS):
        raise BadImage("the HEIC file has tiles with many more pixels than its picture")
    return width, height


def _check_coded_size(structure: _Structure, item: int) -> int:
    """Return the pixels of a coded picture. Raises `BadImage` if it is larger than its size says."""
    width, height = structure.find_size(item, b"ispe")
    coded_width, coded_height = structure.find_size(item, b"hvcC")
    if coded_width > width + _CODED_MARGIN or coded_height > height + _CODED_MARGIN:
        raise BadImage(
            f"the HEIC file promises {width} x {height} px and contains {coded_width} x {coded_height} px"
        )
    return coded_width * coded_height


def _read_coded_size(structure: _Structure, box: _Box) -> tuple[int, int]:
    """Return the largest size in the configuration of the decoder (ISO/IEC 14496-15, 8.3.2.1)."""
    position = box.start + 23
    width = height = 0
    for _ in range(structure.number(box.start + 22, 1)):
        kind, count = structure.number(position, 1) & 0x3F, structure.number(position + 1, 2)
        position += 3
        for _ in range(count):
            structure.count()
            length = structure.number(position, 2)
            if kind == _SPS:
                unit = structure.data[position + 2 : position + 2 + length]
                unit_width, unit_height = _read_sps_size(unit)
                width, height = max(width, unit_width), max(height, unit_height)
            position += 2 + length
    if position > box.end or not width:
        raise BadImage("the HEIC file is damaged: the size of its coded picture is missing")
    return width, height


def _read_sps_size(unit: bytes) -> tuple[int, int]:
    """Return the size in a sequence parameter set (H.265, 7.3.2.2.1). Raises `BadImage`."""
    bits = _Bits(unit[2:].replace(b"\0\0\3", b"\0\0"))
    bits.read(4)
    max_sub_layers = bits.read(3)
    bits.read(1)
    bits.read(88 + 8)  # the general profile, tier and level
    present = [(bits.read(1), bits.read(1)) for _ in range(max_sub_layers)]
    if max_sub_layers:
        bits.read(2 * (8 - max_sub_layers))
    for has_profile, has_level in present:
        bits.read(88 * has_profile + 8 * has_level)
    bits.read_golomb()
    if bits.read_golomb() == 3:  # chroma_format_idc
        bits.read(1)
    return bits.read_golomb(), bits.read_golomb()


class _Bits:
    """Bits of a unit, from the first on."""

    def __init__(self, content: bytes) -> None:
        self._content = content[:256]
        self._value = int.from_bytes(self._content)
        self._left = 8 * len(self._content)

    def read(self, count: int) -> int:
        """Return the number of the next bits. Raises `BadImage` behind the end."""
        self._left -= count
        if self._left < 0:
            raise BadImage("the HEIC file is damaged: its parameters end too early")
        return self._value >> self._left & ((1 << count) - 1)

    def read_golomb(self) -> int:
        """Return the next number in Exp-Golomb code (H.265, 9.2)."""
        zeros = 0
        while not self.read(1):
            zeros += 1
            if zeros > 32:
                raise BadImage("the HEIC file is damaged: a parameter is too large")
        return (1 << zeros) - 1 + self.read(zeros)

"""Directories of a TIFF: the choice of the intended picture, and the detection of camera raw files.

Sources: TIFF 6.0, section 2; Adobe's technical notes for PageMaker 6.0 (SubIFDs); BigTIFF; DNG 1.7, chapter
4.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from fovea.service.errors import UnsupportedFormat
from fovea.service.image_warnings import ImageWarning, WarningCode

_MAX_DIRECTORIES: Final = 64
"""Limit of directories that are read. A directory may be as small as 18 bytes."""

_MAX_ENTRIES: Final = 512
"""Limit of entries of a directory that are read."""

_SUBFILE, _OLD_SUBFILE, _WIDTH, _HEIGHT, PHOTOMETRIC, _MAKE, _ORIENTATION = 254, 255, 256, 257, 262, 271, 274
BITS_PER_SAMPLE, ROWS_PER_STRIP, PLANAR_CONFIGURATION, TILE_WIDTH, TILE_LENGTH = 258, 278, 284, 322, 323
_SUB_DIRECTORIES, _DNG = 330, 50706
_TAGS: Final = frozenset(
    {_SUBFILE, _OLD_SUBFILE, _WIDTH, _HEIGHT, PHOTOMETRIC, _MAKE, _ORIENTATION, _SUB_DIRECTORIES, _DNG}
)

_VALUE_FORMATS: Final = {1: "B", 2: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
"""Struct formats of values by their type number."""

_RAW_PHOTOMETRICS: Final = frozenset({32803, 34892})
"""Photometric interpretations of sensors: colour filter array, and linear raw (DNG 1.7)."""

_REDUCED, _MASK = 1, 4
"""Bits of the new subfile type."""

_MASK_PHOTOMETRICS: Final = frozenset({4, 51177, 52527})
"""Photometric interpretations of masks: transparency, depth and photometric masks (DNG 1.7)."""

_MAX_THUMBNAIL_SIDE: Final = 256
"""Longest side of a thumbnail in pixels, if another picture has at least four times as many pixels."""


class Directory(NamedTuple):
    """A directory: one picture."""

    offset: int
    width: int
    height: int
    is_reduced: bool
    """True if the picture is a smaller copy of another picture in the file."""
    is_child: bool
    """True if another directory refers to the directory, which is then not a page."""
    orientation: int | None

    @property
    def pixel_count(self) -> int:
        """Number of pixels."""
        return self.width * self.height


class PictureChoice(NamedTuple):
    """The chosen picture of a TIFF."""

    image: bytes
    """File in which this picture is the first."""
    warnings: list[ImageWarning]
    orientation: int | None
    """EXIF orientation of the original first picture, if another picture was chosen that has none."""


def choose_picture(image: bytes) -> PictureChoice:
    """Choose the intended picture: the first picture, or the largest if the first one is a thumbnail.

    Raises `UnsupportedFormat` for a camera raw file.
    """
    directories = list(_read_directories(image))
    if not directories:  # Pillow reports the error
        return PictureChoice(image, [], None)
    first, *others = directories
    largest = max(directories, key=lambda one: (one.pixel_count, -directories.index(one)))
    pages = sum(not (one.is_reduced or one.is_child) for one in directories)
    is_thumbnail = (
        max(first.width, first.height) <= _MAX_THUMBNAIL_SIDE and largest.pixel_count >= 4 * first.pixel_count
    )
    child_pixels = max((one.pixel_count for one in others if one.is_child), default=0)
    if largest is first or not (first.is_reduced or is_thumbnail or child_pixels > first.pixel_count):
        if pages < 2:
            return PictureChoice(image, [], None)
        count = f"{pages}" if len(directories) < _MAX_DIRECTORIES else "many"
        text = f"the file has {count} pages; only the first was used"
        return PictureChoice(image, [ImageWarning(WarningCode.SEVERAL_PICTURES, text)], None)
    size = f"{largest.width} x {largest.height}"
    text = f"the file has {len(directories)} pictures; only the largest, {size}, was used"
    warnings = [ImageWarning(WarningCode.SEVERAL_PICTURES, text)] if pages > 1 else []
    orientation = first.orientation if largest.orientation is None else None
    return PictureChoice(_set_first_directory(image, largest.offset), warnings, orientation)


def _set_first_directory(image: bytes, offset: int) -> bytes:
    """Return the file with another directory as its first."""
    order, is_big = _byte_order(image), image[2:4] in (b"+\x00", b"\x00+")
    if is_big:
        return image[:8] + struct.pack(f"{order}Q", offset) + image[16:]
    return image[:4] + struct.pack(f"{order}I", offset) + image[8:]


def _byte_order(image: bytes) -> str:
    return "<" if image[:2] == b"II" else ">"


def _read_directories(image: bytes) -> Iterator[Directory]:
    """Yield the directories of pictures: pages in order, each followed by the directories it refers to.

    Raises `UnsupportedFormat` if a directory belongs to a sensor.
    """
    order = _byte_order(image)
    is_big = image[2:4] in (b"+\x00", b"\x00+")
    offset_bytes = 8 if is_big else 4
    start = _read_number(image, 8 if is_big else 4, offset_bytes, order)
    if image[8:10] == b"CR" and not is_big:
        raise _raw_format_error("Canon CR2")
    if image[8:12] in (b"IIII", b"MMMM"):
        raise _raw_format_error("Phase One IIQ")
    queue = [(start, False)]
    visited_offsets: set[int] = set()
    while queue and len(visited_offsets) < _MAX_DIRECTORIES:
        offset, is_child = queue.pop()
        if offset in visited_offsets or not 0 < offset < len(image):
            continue
        visited_offsets.add(offset)
        tags, next_offset = _read_directory(image, offset, order, is_big=is_big)
        if _DNG in tags:
            raise _raw_format_error("DNG")
        photometric = _first_value(tags, PHOTOMETRIC)
        if photometric in _RAW_PHOTOMETRICS:
            raise _raw_format_error(_raw_format_name(tags))
        queue.append((next_offset, is_child))
        queue += [(child, True) for child in reversed(tags.get(_SUB_DIRECTORIES, ())[:_MAX_DIRECTORIES])]
        kind = _first_value(tags, _SUBFILE) or 0
        size = _first_value(tags, _WIDTH) or 0, _first_value(tags, _HEIGHT) or 0
        if min(size) > 0 and not kind & _MASK and photometric not in _MASK_PHOTOMETRICS:
            is_reduced = bool(kind & _REDUCED) or _first_value(tags, _OLD_SUBFILE) == 2
            yield Directory(offset, *size, is_reduced, is_child, _first_value(tags, _ORIENTATION))


def _raw_format_error(kind: str) -> UnsupportedFormat:
    return UnsupportedFormat(raw_format_message(kind))


def raw_format_message(kind: str) -> str:
    """Return the error message for a camera raw file."""
    return f"a camera's raw file ({kind}) is not served; send a JPEG or TIFF developed from it"


def _raw_format_name(tags: dict[int, tuple[int, ...]]) -> str:
    """Return the format's name, from the camera's maker if known."""
    make = bytes(value for value in tags.get(_MAKE, ()) if value < 256).decode("latin-1").upper()
    formats = {"NIKON": "Nikon NEF", "SONY": "Sony ARW", "PENTAX": "Pentax PEF", "SAMSUNG": "Samsung SRW"}
    return next((name for maker, name in formats.items() if make.startswith(maker)), "TIFF with sensor data")


def _read_directory(
    image: bytes, offset: int, order: str, *, is_big: bool
) -> tuple[dict[int, tuple[int, ...]], int]:
    """Return the wanted tags of a directory, and the offset of the next directory (0 if there is none)."""
    offset_bytes = 8 if is_big else 4
    head = 8 if is_big else 2
    size = 20 if is_big else 12
    count = _read_number(image, offset, head, order)
    start = offset + head
    tags: dict[int, tuple[int, ...]] = {}
    for index in range(min(count, _MAX_ENTRIES)):
        entry = image[start + index * size : start + (index + 1) * size]
        if len(entry) < size:
            return tags, 0
        tag, kind = struct.unpack_from(f"{order}HH", entry)
        if tag in _TAGS and kind in _VALUE_FORMATS:
            tags.setdefault(tag, _read_values(image, entry, kind, order, offset_bytes))
    return tags, _read_number(image, start + count * size, offset_bytes, order)


def _read_values(image: bytes, entry: bytes, kind: int, order: str, offset_bytes: int) -> tuple[int, ...]:
    count = min(
        int.from_bytes(entry[4 : 4 + offset_bytes], "little" if order == "<" else "big"), _MAX_DIRECTORIES
    )
    layout = f"{order}{count}{_VALUE_FORMATS[kind]}"
    content = entry[4 + offset_bytes :]
    if struct.calcsize(layout) > offset_bytes:
        offset = _read_number(entry, 4 + offset_bytes, offset_bytes, order)
        content = image[offset : offset + struct.calcsize(layout)]
    return struct.unpack(layout, content[: struct.calcsize(layout)]) if _fits_layout(layout, content) else ()


def _fits_layout(layout: str, content: bytes) -> bool:
    return len(content) >= struct.calcsize(layout)


def _first_value(tags: dict[int, tuple[int, ...]], tag: int) -> int | None:
    values = tags.get(tag)
    return values[0] if values else None


def _read_number(content: bytes, offset: int, width: int, order: str) -> int:
    """Return an unsigned integer; 0 beyond the end of `content`."""
    return int.from_bytes(content[offset : offset + width], "little" if order == "<" else "big")

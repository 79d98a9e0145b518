"""The directories of a TIFF: which of its pictures is meant, and whether it is a camera's raw file.

TIFF 6.0, section 2; Adobe's technical notes for PageMaker 6.0 (SubIFDs); BigTIFF; DNG 1.7, chapter 4.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from fovea.service.errors import UnsupportedFormat
from fovea.service.image_warnings import ImageWarning, WarningCode

_MOST: Final = 64
"""Directories that are looked at. Each may be as small as 18 bytes."""

_ENTRIES: Final = 512
"""Entries of a directory that are looked at."""

_SUBFILE, _OLD_SUBFILE, _WIDTH, _HEIGHT, _PHOTOMETRIC, _MAKE, _ORIENTATION = 254, 255, 256, 257, 262, 271, 274
_SUB_DIRECTORIES, _DNG = 330, 50706
_WANTED: Final = frozenset(
    {_SUBFILE, _OLD_SUBFILE, _WIDTH, _HEIGHT, _PHOTOMETRIC, _MAKE, _ORIENTATION, _SUB_DIRECTORIES, _DNG}
)

_SIZES: Final = {1: "B", 2: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
"""Formats of values by their type."""

_RAW: Final = frozenset({32803, 34892})
"""Photometric interpretations of sensors: colour filter array, and linear raw (DNG 1.7)."""

_REDUCED, _MASK = 1, 4
"""Bits of the new subfile type."""

_NO_PICTURES: Final = frozenset({4, 51177, 52527})
"""Photometric interpretations of masks: transparency, depth and photometric masks (DNG 1.7)."""

_THUMBNAIL: Final = 256
"""Longest side of a first picture that counts as a thumbnail beside one of four times as many pixels."""


class Directory(NamedTuple):
    """A directory: one picture."""

    offset: int
    width: int
    height: int
    is_reduced: bool
    """Another picture of the file is the same in full."""
    is_below: bool
    """Another directory refers to it, and it is no page."""
    orientation: int | None

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.width * self.height


class Choice(NamedTuple):
    """The picture of a TIFF that is meant."""

    image: bytes
    """The file, so that this picture is its first."""
    warnings: list[ImageWarning]
    orientation: int | None
    """EXIF orientation that the file's first picture has, where this one is another and has none."""


def choose(image: bytes) -> Choice:
    """Find the picture that is meant: the first, or where the first is a thumbnail the largest.

    Raises `UnsupportedFormat` for a camera's raw file.
    """
    found = list(_directories(image))
    if not found:  # Pillow says what is wrong
        return Choice(image, [], None)
    first, *others = found
    largest = max(found, key=lambda one: (one.pixels, -found.index(one)))
    pages = sum(not (one.is_reduced or one.is_below) for one in found)
    is_thumbnail = max(first.width, first.height) <= _THUMBNAIL and largest.pixels >= 4 * first.pixels
    below = max((one.pixels for one in others if one.is_below), default=0)
    if largest is first or not (first.is_reduced or is_thumbnail or below > first.pixels):
        if pages < 2:
            return Choice(image, [], None)
        count = f"{pages}" if len(found) < _MOST else "many"
        text = f"the file has {count} pages; the first was looked at"
        return Choice(image, [ImageWarning(WarningCode.SEVERAL, text)], None)
    size = f"{largest.width} x {largest.height}"
    text = f"the file has {len(found)} pictures; the largest, {size}, was looked at"
    warnings = [ImageWarning(WarningCode.SEVERAL, text)] if pages > 1 else []
    orientation = first.orientation if largest.orientation is None else None
    return Choice(_with_first(image, largest.offset), warnings, orientation)


def _with_first(image: bytes, offset: int) -> bytes:
    """The file with another directory as its first."""
    order, is_big = _order(image), image[2:4] in (b"+\x00", b"\x00+")
    if is_big:
        return image[:8] + struct.pack(f"{order}Q", offset) + image[16:]
    return image[:4] + struct.pack(f"{order}I", offset) + image[8:]


def _order(image: bytes) -> str:
    return "<" if image[:2] == b"II" else ">"


def _directories(image: bytes) -> Iterator[Directory]:
    """Yield those of pictures: pages in order, and behind each what it refers to.

    Raises `UnsupportedFormat` where one is of a sensor.
    """
    order = _order(image)
    is_big = image[2:4] in (b"+\x00", b"\x00+")
    width = 8 if is_big else 4
    start = _number(image, 8 if is_big else 4, width, order)
    if image[8:10] == b"CR" and not is_big:
        raise _raw("Canon CR2")
    if image[8:12] in (b"IIII", b"MMMM"):
        raise _raw("Phase One IIQ")
    waiting = [(start, False)]
    seen: set[int] = set()
    while waiting and len(seen) < _MOST:
        offset, is_below = waiting.pop()
        if offset in seen or not 0 < offset < len(image):
            continue
        seen.add(offset)
        tags, following = _read(image, offset, order, is_big=is_big)
        if _DNG in tags:
            raise _raw("DNG")
        photometric = _first(tags, _PHOTOMETRIC)
        if photometric in _RAW:
            raise _raw(_maker(tags))
        waiting.append((following, is_below))
        waiting += [(below, True) for below in reversed(tags.get(_SUB_DIRECTORIES, ())[:_MOST])]
        kind = _first(tags, _SUBFILE) or 0
        size = _first(tags, _WIDTH) or 0, _first(tags, _HEIGHT) or 0
        if min(size) > 0 and not kind & _MASK and photometric not in _NO_PICTURES:
            is_reduced = bool(kind & _REDUCED) or _first(tags, _OLD_SUBFILE) == 2
            yield Directory(offset, *size, is_reduced, is_below, _first(tags, _ORIENTATION))


def _raw(kind: str) -> UnsupportedFormat:
    return UnsupportedFormat(raw_refusal(kind))


def raw_refusal(kind: str) -> str:
    """Return what the sender of a camera's raw file is told."""
    return f"a camera's raw file ({kind}) is not served; send the JPEG or TIFF that was developed from it"


def _maker(tags: dict[int, tuple[int, ...]]) -> str:
    """What the format is called, as far as the camera's maker tells."""
    make = bytes(value for value in tags.get(_MAKE, ()) if value < 256).decode("latin-1").upper()
    formats = {"NIKON": "Nikon NEF", "SONY": "Sony ARW", "PENTAX": "Pentax PEF", "SAMSUNG": "Samsung SRW"}
    return next((name for maker, name in formats.items() if make.startswith(maker)), "TIFF with sensor data")


def _read(image: bytes, offset: int, order: str, *, is_big: bool) -> tuple[dict[int, tuple[int, ...]], int]:
    """The wanted tags of a directory, and the offset of the next; 0 where there is none."""
    width = 8 if is_big else 4
    head = 8 if is_big else 2
    size = 20 if is_big else 12
    count = _number(image, offset, head, order)
    start = offset + head
    tags: dict[int, tuple[int, ...]] = {}
    for place in range(min(count, _ENTRIES)):
        entry = image[start + place * size : start + (place + 1) * size]
        if len(entry) < size:
            return tags, 0
        tag, kind = struct.unpack_from(f"{order}HH", entry)
        if tag in _WANTED and kind in _SIZES:
            tags.setdefault(tag, _values(image, entry, kind, order, width))
    return tags, _number(image, start + count * size, width, order)


def _values(image: bytes, entry: bytes, kind: int, order: str, width: int) -> tuple[int, ...]:
    count = min(int.from_bytes(entry[4 : 4 + width], "little" if order == "<" else "big"), _MOST)
    layout = f"{order}{count}{_SIZES[kind]}"
    content = entry[4 + width :]
    if struct.calcsize(layout) > width:
        place = _number(entry, 4 + width, width, order)
        content = image[place : place + struct.calcsize(layout)]
    return struct.unpack(layout, content[: struct.calcsize(layout)]) if _fits(layout, content) else ()


def _fits(layout: str, content: bytes) -> bool:
    return len(content) >= struct.calcsize(layout)


def _first(tags: dict[int, tuple[int, ...]], tag: int) -> int | None:
    values = tags.get(tag)
    return values[0] if values else None


def _number(content: bytes, offset: int, width: int, order: str) -> int:
    """0 behind the end."""
    return int.from_bytes(content[offset : offset + width], "little" if order == "<" else "big")

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

_MOST: Final = 64
"""Limit of directories that are read. A directory may be as small as 18 bytes."""

_ENTRIES: Final = 512
"""Limit of entries of a directory that are read."""

_SUBFILE, _OLD_SUBFILE, _WIDTH, _HEIGHT, _PHOTOMETRIC, _MAKE, _ORIENTATION = 254, 255, 256, 257, 262, 271, 274
_SUB_DIRECTORIES, _DNG = 330, 50706
_WANTED: Final = frozenset(
    {_SUBFILE, _OLD_SUBFILE, _WIDTH, _HEIGHT, _PHOTOMETRIC, _MAKE, _ORIENTATION, _SUB_DIRECTORIES, _DNG}
)

_SIZES: Final = {1: "B", 2: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
"""Struct formats of values by their type number."""

_RAW: Final = frozenset({32803, 34892})
"""Photometric interpretations of sensors: colour filter array, and linear raw (DNG 1.7)."""

_REDUCED, _MASK = 1, 4
"""Bits of the new subfile type."""

_NO_PICTURES: Final = frozenset({4, 51177, 52527})
"""Photometric interpretations of masks: transparency, depth and photometric masks (DNG 1.7)."""

_THUMBNAIL: Final = 256
"""Longest side of a thumbnail in pixels, if another picture has at least four times as many pixels."""


class Directory(NamedTuple):
    """A directory: one picture."""

    offset: int
    width: int
    height: int
    is_reduced: bool
    """True if the picture is a smaller copy of another picture in the file."""
    is_below: bool
    """True if another directory refers to the directory, which is then not a page."""
    orientation: int | None

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.width * self.height


class Choice(NamedTuple):
    """The chosen picture of a TIFF."""

    image: bytes
    """File in which this picture is the first."""
    warnings: list[ImageWarning]
    orientation: int | None
    """EXIF orientation of the original first picture, if another picture was chosen that has none."""


def choose(image: bytes) -> Choice:
    """Choose the intended picture: the first picture, or the largest if the first one is a thumbnail.

    Raises `UnsupportedFormat` for a camera raw file.
    """
    found = list(_directories(image))
    if not found:  # Pillow reports the error
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
    """Return the file with another directory as its first."""
    order, is_big = _order(image), image[2:4] in (b"+\x00", b"\x00+")
    if is_big:
        return image[:8] + struct.pack(f"{order}Q", offset) + image[16:]
    return image[:4] + struct.pack(f"{order}I", offset) + image[8:]


def _order(image: bytes) -> str:
    return "<" if image[:2] == b"II" else ">"


def _directories(image: bytes) -> Iterator[Directory]:
    """Yield the directories of pictures: pages in order, each followed by the directories it refers to.

    Raises `UnsupportedFormat` if a directory belongs to a sensor.
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
    """Return the error message for a camera raw file."""
    return f"a camera's raw file ({kind}) is not served; send the JPEG or TIFF that was developed from it"


def _maker(tags: dict[int, tuple[int, ...]]) -> str:
    """Return the format's name, from the camera's maker if known."""
    make = bytes(value for value in tags.get(_MAKE, ()) if value < 256).decode("latin-1").upper()
    formats = {"NIKON": "Nikon NEF", "SONY": "Sony ARW", "PENTAX": "Pentax PEF", "SAMSUNG": "Samsung SRW"}
    return next((name for maker, name in formats.items() if make.startswith(maker)), "TIFF with sensor data")


def _read(image: bytes, offset: int, order: str, *, is_big: bool) -> tuple[dict[int, tuple[int, ...]], int]:
    """Return the wanted tags of a directory, and the offset of the next directory (0 if there is none)."""
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
    """Return an unsigned integer; 0 beyond the end of `content`."""
    return int.from_bytes(content[offset : offset + width], "little" if order == "<" else "big")

"""Estimated cost of decoding an image, from its header only. No pixel is decoded and no codec is called.

The service estimates the cost before it sends an image to a runner. Expensive images then cannot occupy all
runners, and the memory for decoding is reserved before it is used. The estimates are upper bounds. A header
that cannot be read costs as much as the most expensive image.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, NamedTuple

from fovea.service.artifact.contract import Geometry, PixelPath
from fovea.service.inference.preprocess import draft_scale

Bytes = bytes | memoryview


class Cost(NamedTuple):
    """The estimated cost of decoding one image."""

    seconds: float
    """Processor time in seconds on a machine of 2023 (a Xeon with AMX).

    On other machines only the order of magnitude is right.
    """
    bytes: int
    """Peak memory in bytes, including the encoded image."""


class Header(NamedTuple):
    """The properties of an image in its first bytes. Sizes are in pixels."""

    format: str
    width: int
    height: int
    deep: bool = False
    """True for a PNG of 16 bits, which is decoded twice: for the upper and the lower bytes of its values."""
    scans: int = 0
    """Number of passes over the pixels of a progressive JPEG; 0 for a baseline JPEG and other formats."""


FREE: Final = Cost(0.0, 0)
"""Cost of bytes that are no image in a served format: they are refused by their first bytes."""

_SECONDS: Final = {
    "JPEG": 10e-9,
    "PNG": 36e-9,
    "WEBP": 36e-9,
    "GIF": 20e-9,
    "BMP": 8e-9,
    "TIFF": 25e-9,
    "AVIF": 30e-9,
}
"""Seconds per pixel to decode at full size, convert and resize a noisy image of 12 MP."""

_DRAFTED_SECONDS: Final = 4e-9
"""Seconds per pixel of a JPEG that is decoded at a fraction of its size: only its entropy decoding."""

_SCAN_SECONDS: Final = 3e-9
"""Seconds per pixel and scan of a progressive JPEG."""

_BYTES: Final = {"JPEG": 24, "PNG": 28, "WEBP": 32, "GIF": 24, "BMP": 24, "TIFF": 32, "AVIF": 32}
"""Peak memory in bytes per pixel, at least that of `preprocess` in the worst mode.

It covers the image, the decoder's own memory, and the result of the conversion.
"""

_COEFFICIENT_BYTES: Final = 8
"""Bytes per pixel of a progressive JPEG at full size: four components of 16 bits."""

_DEEP_BYTES: Final = 16
"""Bytes per pixel of a PNG of 16 bits: the lower bytes of its values."""

_WORK_BYTES: Final = 2 << 20
"""Bytes that any decode takes beside its pixels."""

_SEARCHED: Final = 256 << 10
"""Number of bytes to search for scans, or the boxes of an AVIF.

A search of 50 MB would block the event loop.
"""

_MARKERS: Final = 200
"""Limit of JPEG segments, or TIFF directory entries, to read before the header counts as unreadable."""


def cost_of(image: Bytes, geometry: Geometry, *, most_pixels: int) -> Cost | None:
    """Estimate the cost of decoding. Return None if the header cannot be read: assume the worst then.

    An image of more than `most_pixels` pixels is free, because it is refused by its header.
    """
    try:
        header = read_header(image)
    except (IndexError, ValueError):
        return None
    if header is None:
        return FREE
    pixels = header.width * header.height
    if pixels > most_pixels or not pixels:
        return FREE
    seconds = pixels * _SECONDS[header.format] * (2 if header.deep else 1)
    decoded = pixels
    if header.format == "JPEG" and geometry.pixel_path is PixelPath.FAST:
        scale = draft_scale((header.width, header.height), geometry)
        if scale > 1:
            seconds = pixels * _DRAFTED_SECONDS
            decoded = -(-header.width // scale) * -(-header.height // scale)
    seconds += pixels * header.scans * _SCAN_SECONDS
    more = pixels * (_COEFFICIENT_BYTES if header.scans else _DEEP_BYTES if header.deep else 0)
    return Cost(seconds, _WORK_BYTES + len(image) + decoded * _BYTES[header.format] + more)


def read_header(image: Bytes) -> Header | None:
    """Read format and size; return None for a format that is not served.

    Raises `ValueError` or `IndexError` for a header that is cut off or invalid.
    """
    head = bytes(image[:32])
    for signature, read in _READERS:
        if head.startswith(signature):
            return read(image)
    if head[4:8] == b"ftyp":
        return _read_avif(image)
    return None


def _read_png(image: Bytes) -> Header:
    """Read IHDR, the first chunk (PNG, third edition, 5.6)."""
    return Header("PNG", _number(image, 16, 4), _number(image, 20, 4), deep=image[24] == 16)


def _read_gif(image: Bytes) -> Header:
    """Read the size of the logical screen (GIF89a, 18)."""
    return Header("GIF", _number(image, 6, 2, "little"), _number(image, 8, 2, "little"))


def _read_bmp(image: Bytes) -> Header:
    """Read the size of a bitmap.

    BITMAPCOREHEADER has 16 bits for a side. All later headers have 32 bits with a sign.
    """
    if _number(image, 14, 4, "little") == 12:
        return Header("BMP", _number(image, 18, 2, "little"), _number(image, 20, 2, "little"))
    height = _number(image, 22, 4, "little")
    return Header("BMP", _number(image, 18, 4, "little"), min(height, (1 << 32) - height))


def _read_webp(image: Bytes) -> Header | None:
    """Read the first chunk (RFC 9649, 2.5 to 2.7)."""
    if bytes(image[8:12]) != b"WEBP":
        return None
    kind = bytes(image[12:16])
    if kind == b"VP8X":
        return Header("WEBP", 1 + _number(image, 24, 3, "little"), 1 + _number(image, 27, 3, "little"))
    if kind == b"VP8L":
        bits = _number(image, 21, 4, "little")
        return Header("WEBP", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    return Header("WEBP", _number(image, 26, 2, "little") & 0x3FFF, _number(image, 28, 2, "little") & 0x3FFF)


def _read_jpeg(image: Bytes) -> Header:
    """Skip segments up to the frame header (ISO/IEC 10918-1, B.2.2)."""
    at = 2
    for _ in range(_MARKERS):
        if image[at] != 0xFF:  # decoders skip bytes between segments
            gap = bytes(image[at : at + _SEARCHED]).find(0xFF)
            if gap < 0:
                raise ValueError("no segment")
            at += gap
        marker = image[at + 1]
        if marker in _FRAMES:
            size = (_number(image, at + 7, 2), _number(image, at + 5, 2))
            return Header("JPEG", *size, scans=_count_scans(image) if marker in _PROGRESSIVE else 0)
        alone = marker == 0xFF or marker == 0x00 or 0xD0 <= marker <= 0xD9 or marker == 0x01
        at += (1 if marker == 0xFF else 2) if alone else 2 + _number(image, at + 2, 2)
    raise ValueError("no frame header")


_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})


def _count_scans(image: Bytes) -> int:
    """Count the scans of a progressive JPEG. The result is at least 10, the usual number."""
    return max(10, len(re.findall(b"\xff\xda", image[:_SEARCHED])))


def _read_tiff(image: Bytes) -> Header:
    """Read the first directory's width and length (TIFF 6.0, section 2), or those of its larger tiles."""
    order = "little" if image[0] == 0x49 else "big"
    if _number(image, 2, 2, order) != 42:
        raise ValueError("a BigTIFF, or a raw file")
    at = _number(image, 4, 4, order)
    sides: dict[int, int] = {}
    for entry in range(min(_number(image, at, 2, order), _MARKERS)):
        start = at + 2 + 12 * entry
        tag, kind = _number(image, start, 2, order), _number(image, start + 2, 2, order)
        if tag in (_WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH, _SUB_DIRECTORIES):
            sides[tag] = _number(image, start + 8, 2 if kind == _SHORT else 4, order)
    if _SUB_DIRECTORIES in sides:
        raise ValueError("its largest picture may be in another directory")
    width = max(sides.get(_WIDTH, 0), sides.get(_TILE_WIDTH, 0))
    length = max(sides.get(_LENGTH, 0), sides.get(_TILE_LENGTH, 0))
    return Header("TIFF", width, length)


_WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH, _SUB_DIRECTORIES = 256, 257, 322, 323, 330
_SHORT: Final = 3


def _read_avif(image: Bytes) -> Header:
    """Return the largest image spatial extents (`ispe`, ISO/IEC 23008-12, 6.5.3) of any item."""
    found = [match.start() for match in re.finditer(b"ispe", image[:_SEARCHED])]
    sizes = [(_number(image, at + 8, 4), _number(image, at + 12, 4)) for at in found]
    if not sizes:
        raise ValueError("no image spatial extents")
    return Header("AVIF", *max(sizes, key=lambda size: size[0] * size[1]))


def _number(image: Bytes, start: int, size: int, order: str = "big") -> int:
    content = bytes(image[start : start + size])
    if len(content) < size:
        raise ValueError("the image ends within its header")
    return int.from_bytes(content, "little" if order == "little" else "big")


_READERS: Final[tuple[tuple[bytes, Callable[[Bytes], Header | None]], ...]] = (
    (b"\xff\xd8", _read_jpeg),
    (b"\x89PNG\r\n\x1a\n", _read_png),
    (b"GIF8", _read_gif),
    (b"BM", _read_bmp),
    (b"RIFF", _read_webp),
    (b"II", _read_tiff),
    (b"MM", _read_tiff),
)

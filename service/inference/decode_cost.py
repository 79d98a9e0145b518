"""Estimated cost of decoding an image, from its header only. No pixel is decoded and no codec is called.

The service estimates the cost before it sends an image to a runner. Expensive images then cannot occupy all
runners, and the memory for decoding is reserved before it is used. The estimates are upper bounds. A header
that cannot be read costs as much as the most expensive image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from fovea.service.artifact.contract import Geometry, PixelPath
from fovea.service.inference.boxes import PixelBox
from fovea.service.inference.draft_scale import choose_draft_scale

ImageBytes = bytes | memoryview


class DecodeCost(NamedTuple):
    """The estimated cost of decoding one image."""

    seconds: float
    """Processor time in seconds on a machine of 2023 (a Xeon with AMX).

    On other machines only the order of magnitude is right.
    """
    memory_bytes: int
    """Peak memory in bytes, including the encoded image."""


class ImageHeader(NamedTuple):
    """The properties of an image in its first bytes. Sizes are in pixels."""

    format: str
    width: int
    height: int
    is_16_bit: bool = False
    """True for a PNG of 16 bits, which is decoded twice: for the upper and the lower bytes of its values."""
    scans: int = 0
    """Number of passes over the pixels of a progressive JPEG; 0 for a baseline JPEG and other formats."""


NO_COST: Final = DecodeCost(0.0, 0)
"""Cost of bytes that are no image in a served format: they are refused by their first bytes."""

_SECONDS_PER_PIXEL: Final = {
    "JPEG": 10e-9,
    "PNG": 36e-9,
    "WEBP": 36e-9,
    "GIF": 20e-9,
    "BMP": 8e-9,
    "TIFF": 25e-9,
    "AVIF": 30e-9,
    "HEIC": 80e-9,
}
"""Seconds per pixel to decode at full size, convert and resize a noisy image of 12 MP."""

_DRAFT_SECONDS: Final = 4e-9
"""Seconds per pixel of a JPEG that is decoded at a fraction of its size: only its entropy decoding."""

_SCAN_SECONDS: Final = 3e-9
"""Seconds per pixel and scan of a progressive JPEG."""

_BYTES_PER_PIXEL: Final = {
    "JPEG": 24,
    "PNG": 28,
    "WEBP": 32,
    "GIF": 24,
    "BMP": 24,
    "TIFF": 32,
    "AVIF": 32,
    "HEIC": 32,
}
"""Peak memory in bytes per pixel, at least that of `peak_memory` in the worst mode.

It covers the image, the decoder's own memory, and the result of the conversion.
"""

_COEFFICIENT_BYTES: Final = 8
"""Bytes per pixel of a progressive JPEG at full size: four components of 16 bits."""

_16_BIT_BYTES: Final = 16
"""Bytes per pixel of a PNG of 16 bits: the lower bytes of its values."""

_BOX_BYTES: Final = 4
"""Bytes per pixel of the largest box, which is cut out of the image."""

_WORK_BYTES: Final = 2 << 20
"""Bytes that any decode takes beside its pixels."""

_SEARCH_BYTES: Final = 256 << 10
"""Number of bytes to search for scans, or the boxes of an AVIF or HEIC.

A search of 50 MB would block the event loop.
"""

_MAX_MARKERS: Final = 200
"""Limit of JPEG segments, or TIFF directory entries, to read before the header counts as unreadable."""


def estimate_cost(
    image: ImageBytes, geometry: Geometry, *, max_pixels: int, boxes: Sequence[PixelBox] | None = None
) -> DecodeCost | None:
    """Estimate the cost of decoding. Return None if the header cannot be read: assume the worst then.

    With `boxes` the image is decoded at full size, and each box is cut out of it. An image of more than
    `max_pixels` pixels is free, because it is refused by its header.
    """
    try:
        header = read_header(image)
    except (IndexError, ValueError):
        return None
    if header is None:
        return NO_COST
    pixels = header.width * header.height
    if pixels > max_pixels and header.format in _UPPER_BOUNDS:
        pixels = max_pixels  # the decoder may read a smaller size, which it does not refuse
    if pixels > max_pixels or not pixels:
        return NO_COST
    seconds = pixels * _SECONDS_PER_PIXEL[header.format] * (2 if header.is_16_bit else 1)
    decoded_pixels = pixels
    if header.format == "JPEG" and geometry.pixel_path is PixelPath.FAST and boxes is None:
        scale = choose_draft_scale((header.width, header.height), geometry)
        if scale > 1:
            seconds = pixels * _DRAFT_SECONDS
            decoded_pixels = -(-header.width // scale) * -(-header.height // scale)
    seconds += pixels * header.scans * _SCAN_SECONDS
    extra_bytes = pixels * (_COEFFICIENT_BYTES if header.scans else _16_BIT_BYTES if header.is_16_bit else 0)
    if boxes:
        largest_box = max((right - left) * (bottom - top) for left, top, right, bottom in boxes)
        extra_bytes += _BOX_BYTES * min(pixels, max(largest_box, 0))
    return DecodeCost(
        seconds, _WORK_BYTES + len(image) + decoded_pixels * _BYTES_PER_PIXEL[header.format] + extra_bytes
    )


def read_header(image: ImageBytes) -> ImageHeader | None:
    """Read format and size; return None for a format that is not served.

    Raises `ValueError` or `IndexError` for a header that is cut off or invalid.
    """
    head = bytes(image[:32])
    for signature, read_format in _READERS:
        if head.startswith(signature):
            return read_format(image)
    if head[4:8] == b"ftyp":
        return _read_heif(image)
    return None


def _read_png(image: ImageBytes) -> ImageHeader:
    """Read IHDR (PNG, third edition, 5.6).

    Raises `ValueError` if there are several before the pixels: decoders differ in which one they take.
    """
    header: ImageHeader | None = None
    offset = 8
    for _ in range(_MAX_MARKERS):
        kind = bytes(image[offset + 4 : offset + 8])
        if kind == b"IDAT" and header:
            return header
        if kind == b"IHDR":
            if header:
                raise ValueError("several headers")
            width, height = _read_number(image, offset + 8, 4), _read_number(image, offset + 12, 4)
            header = ImageHeader("PNG", width, height, is_16_bit=image[offset + 16] == 16)
        offset += 12 + _read_number(image, offset, 4)
    raise ValueError("no pixels")


def _read_gif(image: ImageBytes) -> ImageHeader:
    """Read the size of the logical screen, or of the first picture if it is larger (GIF89a, 18 and 20)."""
    start = _find_gif_picture(image)
    left, top, width, height = (_read_number(image, start + 2 * index, 2, "little") for index in range(4))
    return ImageHeader(
        "GIF",
        max(_read_number(image, 6, 2, "little"), left + width),
        max(_read_number(image, 8, 2, "little"), top + height),
    )


def _find_gif_picture(image: ImageBytes) -> int:
    """Return the offset of the first picture's position and size, behind colours and extensions.

    Raises `ValueError` for extensions whose end depends on the decoder.
    """
    offset = 13 + (3 << (image[10] & 7) + 1 if image[10] & 128 else 0)
    while offset < _SEARCH_BYTES:
        kind = image[offset]
        offset += 1
        if kind == _GIF_PICTURE:
            return offset
        if kind == _GIF_END:
            break
        if kind == _GIF_EXTENSION:
            start = offset + 1
            offset = start
            while size := image[offset]:
                offset += 1 + size
            # Pillow then takes the blocks behind for a part of the extension.
            is_empty = offset == start or (
                bytes(image[start + 1 : start + 12]) == b"NETSCAPE2.0" and not image[start + 1 + image[start]]
            )
            if is_empty and image[start - 1] != _GIF_COMMENT:
                raise ValueError("an extension without data")
            offset += 1
    raise ValueError("no picture")


_GIF_PICTURE, _GIF_END, _GIF_EXTENSION, _GIF_COMMENT = 0x2C, 0x3B, 0x21, 0xFE


def _read_bmp(image: ImageBytes) -> ImageHeader:
    """Read the size of a bitmap.

    BITMAPCOREHEADER has 16 bits for a side. All later headers have 32 bits with a sign.
    """
    if _read_number(image, 14, 4, "little") == 12:
        return ImageHeader("BMP", _read_number(image, 18, 2, "little"), _read_number(image, 20, 2, "little"))
    height = _read_number(image, 22, 4, "little")
    return ImageHeader("BMP", _read_number(image, 18, 4, "little"), min(height, (1 << 32) - height))


def _read_webp(image: ImageBytes) -> ImageHeader | None:
    """Read the first chunk (RFC 9649, 2.5 to 2.7)."""
    if bytes(image[8:12]) != b"WEBP":
        return None
    kind = bytes(image[12:16])
    if kind == b"VP8X":
        return ImageHeader(
            "WEBP", 1 + _read_number(image, 24, 3, "little"), 1 + _read_number(image, 27, 3, "little")
        )
    if kind == b"VP8L":
        bits = _read_number(image, 21, 4, "little")
        return ImageHeader("WEBP", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if kind != b"VP8 ":
        raise ValueError("an unknown first chunk")
    return ImageHeader(
        "WEBP", _read_number(image, 26, 2, "little") & 0x3FFF, _read_number(image, 28, 2, "little") & 0x3FFF
    )


def _read_jpeg(image: ImageBytes) -> ImageHeader:
    """Read the frame header (ISO/IEC 10918-1, B.2.2).

    Raises `ValueError` if there are several before the scan, or a segment that decoders read differently.
    """
    header: ImageHeader | None = None
    offset = 2
    for _ in range(_MAX_MARKERS):
        if image[offset] != 0xFF:  # decoders skip bytes between segments
            gap = bytes(image[offset : offset + _SEARCH_BYTES]).find(0xFF)
            if gap < 0:
                raise ValueError("no segment")
            offset += gap
        marker = image[offset + 1]
        if marker == _START_OF_SCAN and header:
            return header
        if marker in _FRAME_MARKERS:
            if header:
                raise ValueError("several frame headers")
            width = image[offset + 7] << 8 | image[offset + 8]
            height = image[offset + 5] << 8 | image[offset + 6]
            scans = _count_scans(image) if marker in _PROGRESSIVE_MARKERS else 0
            header = ImageHeader("JPEG", width, height, scans=scans)
        if marker in _RESERVED_MARKERS:
            raise ValueError("a segment that decoders read differently")
        if marker == 0xFF:  # a fill byte
            offset += 1
        elif marker in _BARE_MARKERS:
            offset += 2
        else:
            offset += 2 + (image[offset + 2] << 8 | image[offset + 3])
    raise ValueError("no frame header")


_START_OF_SCAN: Final = 0xDA
_FRAME_MARKERS: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE_MARKERS: Final = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})
"""Markers without a length: restart markers, start and end of the image, TEM, and a byte that is stuffed."""

_RESERVED_MARKERS: Final = frozenset({0xC8, 0xDE, *range(0xF0, 0xFE)})
"""Extensions, and the header of hierarchical images (DE).

Pillow takes DE for a frame header, and looks for segments within the others.
"""

_PROGRESSIVE_MARKERS: Final = frozenset({0xC2, 0xC6, 0xCA, 0xCE})


def _count_scans(image: ImageBytes) -> int:
    """Count the scans of a progressive JPEG. The result is at least 10, the usual number."""
    return max(10, len(re.findall(b"\xff\xda", image[:_SEARCH_BYTES])))


def _read_tiff(image: ImageBytes) -> ImageHeader:
    """Read width and length of the largest directory (TIFF 6.0, section 2), or of its larger tiles.

    The largest of several pages is decoded if the first one is a thumbnail. Raises `ValueError` if a size is
    there twice, or is anything but one number of 16 or 32 bits.
    """
    byte_order = "little" if image[0] == 0x49 else "big"
    if _read_number(image, 2, 2, byte_order) != 42:
        raise ValueError("a BigTIFF, or a raw file")
    header = ImageHeader("TIFF", 0, 0)
    remaining_entries = _MAX_MARKERS
    place = 4
    while offset := _read_number(image, place, 4, byte_order):
        entries = _read_number(image, offset, 2, byte_order)
        remaining_entries -= 1 + entries
        if remaining_entries < 0:
            raise ValueError("many directories, or many entries in one")
        place = offset + 2 + 12 * entries
        width, length = _read_tiff_sides(image, range(offset + 2, place, 12), byte_order)
        if width * length > header.width * header.height:
            header = ImageHeader("TIFF", width, length)
    return header


def _read_tiff_sides(image: ImageBytes, entries: Sequence[int], byte_order: str) -> tuple[int, int]:
    """Return the width and the length in a directory whose entries lie at these offsets."""
    sides: dict[int, int] = {}
    for start in entries:
        tag, kind = _read_number(image, start, 2, byte_order), _read_number(image, start + 2, 2, byte_order)
        count = _read_number(image, start + 4, 4, byte_order)
        if tag == _SUB_DIRECTORIES:
            raise ValueError("its largest picture may be in another directory")
        if tag in (_WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH):
            if tag in sides or kind not in _INTEGER_BYTES or count != 1:
                raise ValueError("a size that decoders read differently")
            sides[tag] = _read_number(image, start + 8, _INTEGER_BYTES[kind], byte_order)
    width = max(sides.get(_WIDTH, 0), sides.get(_TILE_WIDTH, 0))
    return width, max(sides.get(_LENGTH, 0), sides.get(_TILE_LENGTH, 0))


_WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH, _SUB_DIRECTORIES = 256, 257, 322, 323, 330
_INTEGER_BYTES: Final = {3: 2, 4: 4}
"""Bytes of a value by its type number: SHORT and LONG."""


def _read_heif(image: ImageBytes) -> ImageHeader:
    """Return the largest image spatial extents (`ispe`, ISO/IEC 23008-12, 6.5.3) of any item.

    Raises `ValueError` for a film (`moov`), whose size is elsewhere, and for a second `meta` box.
    """
    sizes: list[tuple[int, int]] = []
    offset = 0
    for _ in range(_MAX_MARKERS):
        if offset >= len(image):
            break
        size, kind = _read_number(image, offset, 4), bytes(image[offset + 4 : offset + 8])
        if size == 1:
            size = _read_number(image, offset + 8, 8)
        end = offset + size if size else len(image)
        if kind == b"moov" or (kind == b"meta" and sizes) or end < offset + 8:
            raise ValueError("not one picture")
        if kind == b"meta":
            if end - offset > _SEARCH_BYTES:
                raise ValueError("too much metadata")
            places = [offset + match.start() for match in re.finditer(b"ispe", image[offset:end])]
            sizes = [
                (_read_number(image, place + 8, 4), _read_number(image, place + 12, 4)) for place in places
            ]
        offset = end
    if not sizes:
        raise ValueError("no image spatial extents")
    # A file with brands of both formats is decoded as AVIF (`image_format`).
    brands = bytes(image[8 : min(_read_number(image, 0, 4), 64)])
    name = "AVIF" if b"avif" in brands or b"avis" in brands else "HEIC"
    return ImageHeader(name, *max(sizes, key=lambda size: size[0] * size[1]))


_UPPER_BOUNDS: Final = frozenset({"AVIF", "HEIC", "TIFF"})
"""Formats of which the header gives only an upper bound: the largest of several sizes."""


def _read_number(image: ImageBytes, start: int, size: int, byte_order: str = "big") -> int:
    content = bytes(image[start : start + size])
    if len(content) < size:
        raise ValueError("the image ends within its header")
    return int.from_bytes(content, "little" if byte_order == "little" else "big")


_READERS: Final[tuple[tuple[bytes, Callable[[ImageBytes], ImageHeader | None]], ...]] = (
    (b"\xff\xd8", _read_jpeg),
    (b"\x89PNG\r\n\x1a\n", _read_png),
    (b"GIF8", _read_gif),
    (b"BM", _read_bmp),
    (b"RIFF", _read_webp),
    (b"II", _read_tiff),
    (b"MM", _read_tiff),
)

"""Repair of damaged files whose pixels are complete: the same file without the damage.

This code runs only after a file has failed to decode, so intact files cost nothing. A repair removes metadata
or adds a missing end; it never invents pixels. For a truncated JPEG, the decoder fills missing pixels with
grey. A repaired JPEG therefore comes with an `altered_image`, which shows whether pixels are missing.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from fovea.service.image_warnings import ImageWarning, WarningCode
from fovea.service.inference import jpeg


class Repair(NamedTuple):
    """A file that may decode in place of the damaged file."""

    image: bytes
    warnings: list[ImageWarning]
    altered_image: bytes | None = None
    """Same file with different bytes in place of a possibly missing part.

    If both files do not give the same pixels, pixels are missing.
    """


def find_repairs(kind: str, image: bytes) -> Iterator[Repair]:
    """Yield repairs of `image`, first the repair that removes least.

    Each repair is made only when the caller asks for it, after the repair before has failed.
    """
    previous_images = {image}
    repair = _REPAIRS.get(kind)
    for one in repair(image) if repair else ():
        if one.image not in previous_images:
            previous_images.add(one.image)
            yield one


_METADATA_WARNING: Final = ImageWarning(
    WarningCode.METADATA_IGNORED,
    "damaged metadata was ignored; it may have held the orientation or the colour profile",
)


# --- PNG -----------------------------------------------------------------------------------------

_PNG_COLOURS: Final = frozenset({b"iCCP", b"cICP", b"sRGB", b"gAMA", b"cHRM", b"eXIf"})
"""Optional chunks, besides tRNS, that affect the display of the pixels."""

_XMP: Final = b"XML:com.adobe.xmp\x00\x00\x00"
"""Start of a text chunk with uncompressed XMP."""

_MAX_TEXT_BYTES: Final = 1 << 20
"""Limit in bytes of a text that Pillow reads."""

_RESUME_CHUNK: Final = re.compile(rb"(?:PLTE|tRNS|IDAT)")
"""Pattern of the chunks at which to resume after a chunk with an impossible length."""


class _Chunk(NamedTuple):
    kind: bytes
    content: bytes
    """Whole chunk: length, kind, data and checksum."""
    is_valid: bool


def _repair_png(image: bytes) -> Iterator[Repair]:
    chunks = list(_read_png_chunks(image))
    critical = [chunk.kind[:1].isupper() or chunk.kind == b"tRNS" for chunk in chunks]
    for keep_metadata in (True, False):
        keep_flags = [
            is_critical or (keep_metadata and chunk.is_valid and _affects_display(chunk))
            for chunk, is_critical in zip(chunks, critical, strict=True)
        ]
        has_lost_metadata = any(
            _affects_display(chunk) for chunk, keep in zip(chunks, keep_flags, strict=True) if not keep
        )
        content = b"".join(chunk.content for chunk, keep in zip(chunks, keep_flags, strict=True) if keep)
        yield Repair(image[:8] + content, [_METADATA_WARNING] if has_lost_metadata else [])


def _affects_display(chunk: _Chunk) -> bool:
    """Return True if the chunk affects the display of the pixels."""
    if chunk.kind == b"iTXt":
        return chunk.content[8:].startswith(_XMP) and len(chunk.content) < _MAX_TEXT_BYTES
    return chunk.kind in _PNG_COLOURS


def _read_png_chunks(image: bytes) -> Iterator[_Chunk]:
    position = 8
    while position + 8 <= len(image):
        length, kind = int.from_bytes(image[position : position + 4]), image[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(image) and kind != b"IDAT":
            chunk_match = _RESUME_CHUNK.search(image, position + 8)
            if not chunk_match:
                return
            yield _Chunk(kind if kind.isalpha() else b"none", b"", is_valid=False)
            position = chunk_match.start() - 4
            continue
        content = image[position:end]
        is_valid = kind.isalpha() and zlib.crc32(content[4:-4]) == int.from_bytes(content[-4:])
        yield _Chunk(kind if kind.isalpha() else b"none", content, is_valid)
        position = end


# --- JPEG ----------------------------------------------------------------------------------------

_APP0, _APP1, _APP2, _APP14, _APP15, _COMMENT = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
_START_OF_SCAN, _END = 0xDA, 0xD9

_FILL_BYTES: Final = b"\xfe\xa5" + bytes((37 * number * number + 11 * number) % 255 for number in range(1022))
"""Bytes in place of a possibly missing part of a scan.

They begin with one bits, where the decoder by itself assumes zeros, and continue irregularly. No byte is FF,
which would be a marker.
"""


def _repair_jpeg(image: bytes) -> Iterator[Repair]:
    if not jpeg.has_end_marker(image):
        body = image.rstrip(b"\xff")
        text = "the end of the file is missing, but no pixel is missing"
        end = b"\xff\xd9"
        yield Repair(body + end, [ImageWarning(WarningCode.END_MISSING, text)], body + _FILL_BYTES + end)
        return
    for keep_metadata in (True, False):
        parts, rest, has_lost_metadata = [image[:2]], len(image), False
        for segment in jpeg.read_segments(image):
            if segment.code in (_START_OF_SCAN, _END):
                rest = segment.start
                break
            content = image[segment.start : segment.end]
            if not (_APP0 <= segment.code <= _APP15 or segment.code == _COMMENT) or _is_needed(
                segment.code, content, keep_metadata=keep_metadata
            ):
                parts.append(content)
            else:
                has_lost_metadata = has_lost_metadata or segment.code in (_APP1, _APP2)
        yield Repair(b"".join([*parts, image[rest:]]), [_METADATA_WARNING] if has_lost_metadata else [])


def _is_needed(code: int, content: bytes, *, keep_metadata: bool) -> bool:
    """Return True if an application segment is long enough and affects the display of the pixels."""
    data = content[4:]
    if code == _APP14:
        return data.startswith(b"Adobe") and len(data) >= 12
    if code == _APP0:
        return data.startswith(b"JFIF\0") and len(data) >= 14
    if code == _APP1:
        return keep_metadata and data.startswith((b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"))
    return keep_metadata and code == _APP2 and data.startswith(b"ICC_PROFILE\0") and len(data) > 14


# --- WebP, AVIF ----------------------------------------------------------------------------------


def _repair_webp(image: bytes) -> Iterator[Repair]:
    """Drop everything after the pixels that is incomplete. A padding byte at the end may be missing."""
    position, end, has_pixels = 12, 12, False
    flags = 0
    while position + 8 <= len(image):
        kind = image[position : position + 4]
        size = int.from_bytes(image[position + 4 : position + 8], "little")
        stop = position + 8 + size
        if stop > len(image):
            break
        if kind in (b"EXIF", b"XMP "):
            flags |= 8 if kind == b"EXIF" else 4
        has_pixels = has_pixels or kind in (b"VP8 ", b"VP8L", b"ANMF")
        position = end = stop + size % 2
    if not has_pixels:
        return
    content = bytearray(image[12:end].ljust(end - 12, b"\0"))
    warnings = []
    if content[:4] == b"VP8X" and content[8] & 12 & ~flags:
        warnings = [_METADATA_WARNING] if content[8] & 8 & ~flags else []
        content[8] &= ~12 | flags
    yield Repair(b"RIFF" + struct.pack("<I", len(content) + 4) + b"WEBP" + content, warnings)


def _repair_avif(image: bytes) -> Iterator[Repair]:
    """Give the EXIF item another type, which no decoder reads. The orientation is stored elsewhere."""
    if item_match := _EXIF_ITEM.search(image, 0, 1 << 16):
        yield Repair(image[: item_match.end() - 4] + b"free" + image[item_match.end() :], [])


_EXIF_ITEM: Final = re.compile(rb"infe[\2\3].{7}(?:..)?Exif", re.DOTALL)
"""Pattern of the entry of an EXIF item (ISO/IEC 14496-12, 8.11.6)."""


_REPAIRS: Final[dict[str, Callable[[bytes], Iterator[Repair]]]] = {
    "PNG": _repair_png,
    "JPEG": _repair_jpeg,
    "WEBP": _repair_webp,
    "AVIF": _repair_avif,
}

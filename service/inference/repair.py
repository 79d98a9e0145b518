"""Damaged files whose pixels are all there: the same file without the damage.

Nothing of this is looked at before the file has failed to decode, so that good files cost nothing. What is
left out is metadata, and what is put in place is an end; no pixel is ever made up. A truncated JPEG, whose
decoder fills what is missing with grey, comes with a `witness` to tell.
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
    """A file that may decode where the damaged one does not."""

    image: bytes
    warnings: list[ImageWarning]
    witness: bytes | None = None
    """The same file with another filling for what may be missing: unless both give the same pixels, some are
    missing."""


def repairs(kind: str, image: bytes) -> Iterator[Repair]:
    """Yield what to try in place of `image`, the gentlest first."""
    tried = {image}
    repair = _REPAIRS.get(kind)
    for one in repair(image) if repair else ():
        if one.image not in tried:
            tried.add(one.image)
            yield one


_IGNORED: Final = ImageWarning(
    WarningCode.METADATA_IGNORED,
    "damaged metadata was left out that may say how the image is turned or coloured",
)


# --- PNG -----------------------------------------------------------------------------------------

_PNG_COLOURS: Final = frozenset({b"iCCP", b"cICP", b"sRGB", b"gAMA", b"cHRM", b"eXIf"})
"""Chunks beside the critical ones and tRNS that say how the pixels are shown."""

_XMP: Final = b"XML:com.adobe.xmp\x00\x00\x00"
"""Beginning of a text chunk with XMP that is not compressed."""

_MOST_TEXT: Final = 1 << 20
"""Bytes of a text that Pillow reads."""

_NEXT: Final = re.compile(rb"(?:PLTE|tRNS|IDAT)")
"""Where to go on after a chunk whose length makes no sense."""


class _Chunk(NamedTuple):
    kind: bytes
    content: bytes
    """All of it: length, kind, data, checksum."""
    is_sound: bool


def _png(image: bytes) -> Iterator[Repair]:
    chunks = list(_png_chunks(image))
    critical = [chunk.kind[:1].isupper() or chunk.kind == b"tRNS" for chunk in chunks]
    for gentle in (True, False):
        kept = [
            is_critical or (gentle and chunk.is_sound and _is_shown(chunk))
            for chunk, is_critical in zip(chunks, critical, strict=True)
        ]
        lost = any(_is_shown(chunk) for chunk, keep in zip(chunks, kept, strict=True) if not keep)
        content = b"".join(chunk.content for chunk, keep in zip(chunks, kept, strict=True) if keep)
        yield Repair(image[:8] + content, [_IGNORED] if lost else [])


def _is_shown(chunk: _Chunk) -> bool:
    """Whether it says how the pixels are shown."""
    if chunk.kind == b"iTXt":
        return chunk.content[8:].startswith(_XMP) and len(chunk.content) < _MOST_TEXT
    return chunk.kind in _PNG_COLOURS


def _png_chunks(image: bytes) -> Iterator[_Chunk]:
    position = 8
    while position + 8 <= len(image):
        length, kind = int.from_bytes(image[position : position + 4]), image[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(image) and kind != b"IDAT":
            found = _NEXT.search(image, position + 8)
            if not found:
                return
            yield _Chunk(kind if kind.isalpha() else b"none", b"", is_sound=False)
            position = found.start() - 4
            continue
        content = image[position:end]
        is_sound = kind.isalpha() and zlib.crc32(content[4:-4]) == int.from_bytes(content[-4:])
        yield _Chunk(kind if kind.isalpha() else b"none", content, is_sound)
        position = end


# --- JPEG ----------------------------------------------------------------------------------------

_APP0, _APP1, _APP2, _APP14, _APP15, _COMMENT = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
_SCAN, _END = 0xDA, 0xD9

_FILLING: Final = b"\xfe\xa5" + bytes((37 * number * number + 11 * number) % 255 for number in range(1022))
"""For what may be missing of a scan: it begins with ones, where the decoder by itself takes zeros, and goes
on in disorder; no byte is FF, which would be a marker."""


def _jpeg(image: bytes) -> Iterator[Repair]:
    if not jpeg.has_end(image):
        body = image.rstrip(b"\xff")
        text = "the end of the file is missing, though no pixel is"
        end = b"\xff\xd9"
        yield Repair(body + end, [ImageWarning(WarningCode.END_MISSING, text)], body + _FILLING + end)
        return
    for gentle in (True, False):
        parts, rest, lost = [image[:2]], len(image), False
        for segment in jpeg.segments(image):
            if segment.code in (_SCAN, _END):
                rest = segment.start
                break
            content = image[segment.start : segment.end]
            if not (_APP0 <= segment.code <= _APP15 or segment.code == _COMMENT) or _is_needed(
                segment.code, content, gentle=gentle
            ):
                parts.append(content)
            else:
                lost = lost or segment.code in (_APP1, _APP2)
        yield Repair(b"".join([*parts, image[rest:]]), [_IGNORED] if lost else [])


def _is_needed(code: int, content: bytes, *, gentle: bool) -> bool:
    """Whether an application segment says how the pixels are shown, and is long enough to say it."""
    data = content[4:]
    if code == _APP14:
        return data.startswith(b"Adobe") and len(data) >= 12
    if code == _APP0:
        return data.startswith(b"JFIF\0") and len(data) >= 14
    if code == _APP1:
        return gentle and data.startswith((b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"))
    return gentle and code == _APP2 and data.startswith(b"ICC_PROFILE\0") and len(data) > 14


# --- WebP, AVIF ----------------------------------------------------------------------------------


def _webp(image: bytes) -> Iterator[Repair]:
    """Without what is behind the pixels and not whole; a byte of padding at the end may be missing."""
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
        warnings = [_IGNORED] if content[8] & 8 & ~flags else []
        content[8] &= ~12 | flags
    yield Repair(b"RIFF" + struct.pack("<I", len(content) + 4) + b"WEBP" + content, warnings)


def _avif(image: bytes) -> Iterator[Repair]:
    """With its EXIF as an item of another kind, which nobody reads. Its orientation is elsewhere."""
    if found := _EXIF_ITEM.search(image, 0, 1 << 16):
        yield Repair(image[: found.end() - 4] + b"free" + image[found.end() :], [])


_EXIF_ITEM: Final = re.compile(rb"infe[\2\3].{7}(?:..)?Exif", re.DOTALL)
"""Entry of an item that is EXIF (ISO/IEC 14496-12, 8.11.6)."""


_REPAIRS: Final[dict[str, Callable[[bytes], Iterator[Repair]]]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "WEBP": _webp,
    "AVIF": _avif,
}

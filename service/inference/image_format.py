"""Image formats: identification by the first bytes, and Pillow's decoder for each format."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from io import BytesIO
from typing import Final

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from fovea.service.errors import UnsupportedFormat
from fovea.service.inference import avif, heic, tiff

IMAGE_CLASSES: Final[dict[str, Callable[[BytesIO], ImageFile.ImageFile]]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,  # includes MPO: a JPEG followed by further pictures
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "AVIF": avif.open_avif,
    "HEIC": heic.open_heic,
}
"""Pillow's classes by format.

They are called directly, because `Image.open` would apply Pillow's process-wide pixel limit.
"""

_SIGNATURES: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00\x10\x00\x00\x00CR", "Canon CR2"),
    (b"II\x1a\x00\x00\x00HEAPCCDR", "Canon CRW"),
    (b"IIU\x00", "Panasonic RW2"),
    (b"IIRO", "Olympus ORF"),
    (b"IIRS", "Olympus ORF"),
    (b"MMOR", "Olympus ORF"),
    (b"FUJIFILMCCD-RAW", "Fujifilm RAF"),
    (b"FOVb", "Sigma X3F"),
    (b"\x00MRM", "Minolta MRW"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"BM", "BMP"),
    (b"PK\x03\x04", "ZIP"),
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML"),
)

_BRANDS: Final = {
    b"crx ": "Canon CR3",
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), "HEIC"),
}
"""Brands of ISO base media files in order of precedence (ISO/IEC 23008-12)."""

_RAW_FORMATS: Final = frozenset(
    {"Canon CR2", "Canon CRW", "Canon CR3", "Panasonic RW2", "Olympus ORF", "Fujifilm RAF", "Sigma X3F",
     "Minolta MRW"}
)  # fmt: skip
"""Camera raw formats that the first bytes identify. `tiff` finds raw files that begin like a TIFF."""


@cache
def supported_formats() -> tuple[str, ...]:
    """Return the formats that this installation can decode."""
    codecs = {"WEBP": "webp", "AVIF": "avif", "JPEG": "jpg"}
    return tuple(
        kind
        for kind in IMAGE_CLASSES
        if (heic.is_available() if kind == "HEIC" else kind not in codecs or features.check(codecs[kind]))
    )


def identify_format(head: bytes) -> str:
    """Return the format of an image by its first 64 bytes. Raises `UnsupportedFormat` unless it is served."""
    kind = _match_signature(head)
    if kind in supported_formats():
        return kind
    if kind in _RAW_FORMATS:
        raise UnsupportedFormat(tiff.raw_format_message(kind))
    formats = ", ".join(supported_formats())
    if kind:
        hint = f". {heic.EXTRA_HINT}" if kind == "HEIC" else ""
        raise UnsupportedFormat(f"{kind} is not served; send one of {formats}{hint}")
    hint = "; JSON needs `Content-Type: application/json`" if head[:1] == b"{" else ""
    raise UnsupportedFormat(f"the bytes are not an image of a known format; send one of {formats}{hint}")


def _match_signature(head: bytes) -> str:
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = head[8 : min(int.from_bytes(head[:4]), len(head))]
        return next((kind for brand, kind in _BRANDS.items() if brand in _split_brands(brands)), "")
    return next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), "")


def _split_brands(brands: bytes) -> list[bytes]:
    return [brands[start : start + 4] for start in range(0, len(brands), 4)]

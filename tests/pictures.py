"""Encoded pictures for the tests."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def draw_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draw smooth random colours in RGB."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode_image(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode the image in one of Pillow's formats."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encode_heic(image: Image.Image, orientation: int = 1) -> bytes:
    """Encode the image as HEIC, with an orientation in its EXIF data; needs pillow-heif, a test package."""
    import pillow_heif

    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=95, exif=exif.tobytes())
    return buffer.getvalue()


def make_jpeg(width: int = 64, height: int = 48, seed: int = 0, **options: Any) -> bytes:
    """Return a JPEG of smooth random colours."""
    return encode_image(draw_picture(width, height, seed), "JPEG", **options)


def make_png_header(width: int, height: int) -> bytes:
    """Return a PNG of 57 bytes that claims a size in its header and has no pixels."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + _chunk(b"IDAT", b"")
        + _chunk(b"IEND", b"")
    )


def make_png16(values: npt.NDArray[np.uint16], *, interlaced: bool = False) -> bytes:
    """Encode uint16 (height, width, 1 … 4) as a PNG, which Pillow cannot; rows alternate between filters."""
    height, width, bands = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[bands]

    def pack_rows(values: Any) -> bytes:
        rows, row_above = b"", np.zeros(values.shape[1] * bands * 2, np.uint8)
        for number, row in enumerate(values.astype(">u2")):
            line = np.frombuffer(row.tobytes(), np.uint8)
            left = np.concatenate([np.zeros(2 * bands, np.uint8), line[: -2 * bands]])
            filters = {0: line, 1: line - left, 2: line - row_above}
            rows += bytes([number % 3]) + filters[number % 3].astype(np.uint8).tobytes()
            row_above = line
        return rows

    passes = [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]
    parts = [values[y::dy, x::dx] for x, y, dx, dy in passes] if interlaced else [values]
    content = zlib.compress(b"".join(map(pack_rows, parts)))

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, int(interlaced))
    start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)
    return start + _chunk(b"IDAT", content) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

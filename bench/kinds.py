"""The kinds of requests for a service: good, bad and hostile requests (`bench.crowd`)."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from typing import Final

import numpy as np
from PIL import Image

from fovea.bench.crowd import Kind, Manner, request

_MANY: Final = 16
"""Number of images in one multipart body."""

_BOMB: Final = (40_000, 40_000)
"""Size in pixels that 57 bytes claim; the limit is 50 MP."""

_HUGE_JPEG: Final = (4000, 3000)
_HUGE_PNG: Final = (5000, 4000)


def good(images: Sequence[bytes]) -> Kind:
    """Return the kind of good requests."""
    return Kind("good", [request(image) for image in images], 0)


def bad(images: Sequence[bytes]) -> list[Kind]:
    """Return kinds for 14 % of all requests: corrupt images, bombs, and clients that stall, drip or leave."""
    damaged = {"bad_image": 1}
    late = {"body_timeout": 1}
    whole = [request(image) for image in images]
    bomb = request(png_header(*_BOMB))
    return [
        Kind("truncated", [request(image[: len(image) // 2]) for image in images], 0.04, 422, damaged),
        Kind("overwritten", [request(overwritten(image)) for image in images], 0.03, 422, damaged),
        Kind("no image", [request(b"no image at all" * 64)], 0.03, 415, {"unsupported_format": 1}),
        Kind("bomb", [bomb], 0.01, 413, {"too_many_pixels": 1}),
        Kind("stalls", whole, 0.01, 408, late, Manner.STALLS),
        Kind("drips headers", whole, 0.005, 408, {"header_timeout": 1}, Manner.DRIPS_HEADERS),
        Kind("drips body", whole, 0.005, 408, late, Manner.DRIPS_BODY),
        Kind("leaves", whole, 0.005, 0, {"client_left": 1}, Manner.LEAVES),
        Kind("leaves halfway", whole, 0.005, 0, {"client_left": 1}, Manner.LEAVES_HALFWAY),
    ]


def mixed(images: Sequence[bytes]) -> list[Kind]:
    """Return the kinds of a long operation: everything, in all formats and sizes."""
    slow = (Manner.STALLS, Manner.DRIPS_BODY, Manner.DRIPS_HEADERS)
    return [
        good(images),
        *(replace(kind, share=kind.share / 5 if kind.manner in slow else kind.share) for kind in bad(images)),
        Kind("as PNG", [request(_again(image, "PNG")) for image in images[:50]], 0.03),
        Kind("as WebP", [request(_again(image, "WEBP")) for image in images[:50]], 0.02),
        Kind("JSON", [_json(image) for image in images[:50]], 0.03),
        Kind("many", [_multipart(images[:_MANY])], 0.005),
        Kind("many, one bad", [_multipart([*images[: _MANY - 1], b"none"])], 0.002,
             reasons={"unsupported_format": 1}),
        Kind("12 MP", [request(huge_jpeg())], 0.001),
        Kind("20 MP", [request(_huge_png())], 0.0002),
    ]  # fmt: skip


def overwritten(image: bytes) -> bytes:
    """Return a JPEG with zeros after the first marker: only its signature is valid."""
    return image[:4] + bytes(len(image) - 4)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims this size and has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def _again(image: bytes, kind: str) -> bytes:
    with Image.open(BytesIO(image)) as opened:
        return encoded(opened, kind)


def huge_jpeg() -> bytes:
    """Return noise in blocks of 8 x 8: about 2 MB, as expensive to decode as a photograph."""
    random = np.random.default_rng(0)
    width, height = _HUGE_JPEG
    coarse = random.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return encoded(Image.fromarray(coarse).resize(_HUGE_JPEG, Image.Resampling.BICUBIC), "JPEG", quality=90)


def _huge_png() -> bytes:
    """Return a gradient as PNG: few bytes, but all pixels must be decoded."""
    width, height = _HUGE_PNG
    gradient = np.add.outer(np.arange(height), np.arange(width)).astype(np.uint8)
    return encoded(Image.fromarray(gradient).convert("RGB"), "PNG", compress_level=1)


def encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    """Encode the image in one of Pillow's formats."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _json(image: bytes) -> bytes:
    body = json.dumps({"images": [{"b64": base64.b64encode(image).decode()}]})
    return request(body.encode(), "application/json")


def _multipart(images: Sequence[bytes]) -> bytes:
    boundary = "fovea-bench"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="x.jpg"\r\n\r\n'
    parts = b"".join(head.encode() + image + b"\r\n" for image in images)
    return request(parts + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}")

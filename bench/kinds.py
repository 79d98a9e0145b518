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

from fovea.bench.crowd import ClientBehaviour, RequestKind, build_request

_MULTIPART_IMAGES: Final = 16
"""Number of images in one multipart body."""

_BOMB_SIZE: Final = (40_000, 40_000)
"""Size in pixels that 57 bytes claim; the limit is 50 MP."""

_HUGE_JPEG_SIZE: Final = (4000, 3000)
_HUGE_PNG_SIZE: Final = (5000, 4000)


def make_good_kind(images: Sequence[bytes]) -> RequestKind:
    """Return the kind of good requests."""
    return RequestKind("good", [build_request(image) for image in images], 0)


def make_bad_kinds(images: Sequence[bytes]) -> list[RequestKind]:
    """Return kinds for 14 % of all requests: corrupt images, bombs, and clients that stall, drip or leave."""
    bad_image_error = {"bad_image": 1}
    timeout_error = {"body_timeout": 1}
    whole_requests = [build_request(image) for image in images]
    bomb = build_request(build_png_header(*_BOMB_SIZE))
    return [
        RequestKind(
            "truncated",
            [build_request(image[: len(image) // 2]) for image in images],
            0.04,
            422,
            bad_image_error,
        ),
        RequestKind(
            "overwritten",
            [build_request(overwrite_image(image)) for image in images],
            0.03,
            422,
            bad_image_error,
        ),
        RequestKind(
            "no image", [build_request(b"no image at all" * 64)], 0.03, 415, {"unsupported_format": 1}
        ),
        RequestKind("bomb", [bomb], 0.01, 413, {"too_many_pixels": 1}),
        RequestKind("stalls", whole_requests, 0.01, 408, timeout_error, ClientBehaviour.STALLS),
        RequestKind(
            "drips headers", whole_requests, 0.005, 408, {"header_timeout": 1}, ClientBehaviour.DRIPS_HEADERS
        ),
        RequestKind("drips body", whole_requests, 0.005, 408, timeout_error, ClientBehaviour.DRIPS_BODY),
        RequestKind("leaves", whole_requests, 0.005, 0, {"client_left": 1}, ClientBehaviour.LEAVES),
        RequestKind(
            "leaves halfway", whole_requests, 0.005, 0, {"client_left": 1}, ClientBehaviour.LEAVES_HALFWAY
        ),
    ]


def make_mixed_kinds(images: Sequence[bytes]) -> list[RequestKind]:
    """Return the kinds of a long operation: everything, in all formats and sizes."""
    slow = (ClientBehaviour.STALLS, ClientBehaviour.DRIPS_BODY, ClientBehaviour.DRIPS_HEADERS)
    bad_kinds = [
        replace(kind, share=kind.share / 5 if kind.behaviour in slow else kind.share)
        for kind in make_bad_kinds(images)
    ]
    many_with_bad = _build_multipart_request([*images[: _MULTIPART_IMAGES - 1], b"none"])
    return [
        make_good_kind(images),
        *bad_kinds,
        RequestKind("as PNG", [build_request(_convert_image(image, "PNG")) for image in images[:50]], 0.03),
        RequestKind("as WebP", [build_request(_convert_image(image, "WEBP")) for image in images[:50]], 0.02),
        RequestKind("JSON", [_build_json_request(image) for image in images[:50]], 0.03),
        RequestKind("many", [_build_multipart_request(images[:_MULTIPART_IMAGES])], 0.005),
        RequestKind("many, one bad", [many_with_bad], 0.002, error_counts={"unsupported_format": 1}),
        RequestKind("12 MP", [build_request(draw_huge_jpeg())], 0.001),
        RequestKind("20 MP", [build_request(_draw_huge_png())], 0.0002),
    ]  # fmt: skip


def overwrite_image(image: bytes) -> bytes:
    """Return a JPEG with zeros after the first marker: only its signature is valid."""
    return image[:4] + bytes(len(image) - 4)


def build_png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims this size and has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def _convert_image(image: bytes, image_format: str) -> bytes:
    with Image.open(BytesIO(image)) as picture:
        return encode_picture(picture, image_format)


def draw_huge_jpeg() -> bytes:
    """Return noise in blocks of 8 x 8: about 2 MB, as expensive to decode as a photograph."""
    random = np.random.default_rng(0)
    width, height = _HUGE_JPEG_SIZE
    coarse = random.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return encode_picture(
        Image.fromarray(coarse).resize(_HUGE_JPEG_SIZE, Image.Resampling.BICUBIC), "JPEG", quality=90
    )


def _draw_huge_png() -> bytes:
    """Return a gradient as PNG: few bytes, but all pixels must be decoded."""
    width, height = _HUGE_PNG_SIZE
    gradient = np.add.outer(np.arange(height), np.arange(width)).astype(np.uint8)
    return encode_picture(Image.fromarray(gradient).convert("RGB"), "PNG", compress_level=1)


def encode_picture(picture: Image.Image, image_format: str, **options: int) -> bytes:
    """Encode the image in one of Pillow's formats."""
    buffer = BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def _build_json_request(image: bytes) -> bytes:
    body = json.dumps({"images": [{"b64": base64.b64encode(image).decode()}]})
    return build_request(body.encode(), "application/json")


def _build_multipart_request(images: Sequence[bytes]) -> bytes:
    boundary = "fovea-bench"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="x.jpg"\r\n\r\n'
    parts = b"".join(head.encode() + image + b"\r\n" for image in images)
    return build_request(parts + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}")

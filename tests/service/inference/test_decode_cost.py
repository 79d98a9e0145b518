"""Estimated costs of images, by their headers: the memory is never less than decoding takes."""

from __future__ import annotations

import struct
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from fovea.service.artifact.contract import PixelPath
from fovea.service.inference.decode_cost import NO_COST, estimate_cost, read_header
from fovea.service.inference.image_format import IMAGE_CLASSES
from fovea.service.inference.peak_memory import estimate_peak_bytes
from fovea.service.inference.preprocess import _identify_image
from fovea.service.inference.resize import draft_jpeg
from tests.graphs import SMALL_GEOMETRY
from tests.pictures import draw_picture, encode_image, make_jpeg

MOST = 50_000_000
EXACT = replace(SMALL_GEOMETRY, pixel_path=PixelPath.EXACT)
FAST = replace(SMALL_GEOMETRY, pixel_path=PixelPath.FAST)


def _jpeg_with_thumbnail() -> bytes:
    """Return a JPEG with another JPEG inside its Exif segment."""
    inside = make_jpeg(32, 24)
    segment = b"Exif\0\0" + inside
    whole = make_jpeg(301, 203)
    return whole[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + whole[2:]


PICTURE = draw_picture(301, 203)
IMAGES: dict[str, tuple[str, bytes]] = {
    "jpeg": ("JPEG", encode_image(PICTURE, "JPEG")),
    "jpeg progressive": ("JPEG", encode_image(PICTURE, "JPEG", progressive=True)),
    "jpeg grey": ("JPEG", encode_image(PICTURE.convert("L"), "JPEG")),
    "jpeg cmyk": ("JPEG", encode_image(PICTURE.convert("CMYK"), "JPEG")),
    "jpeg thumbnail": ("JPEG", _jpeg_with_thumbnail()),
    "jpeg fill bytes": ("JPEG", encode_image(PICTURE, "JPEG").replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1)),
    "png": ("PNG", encode_image(PICTURE, "PNG")),
    "png alpha": ("PNG", encode_image(PICTURE.convert("RGBA"), "PNG")),
    "png palette": ("PNG", encode_image(PICTURE.convert("P"), "PNG", transparency=0)),
    "png grey 16": ("PNG", encode_image(PICTURE.convert("I;16"), "PNG")),
    "gif": ("GIF", encode_image(PICTURE, "GIF")),
    "bmp": ("BMP", encode_image(PICTURE, "BMP")),
    "webp": ("WEBP", encode_image(PICTURE, "WEBP")),
    "webp lossless": ("WEBP", encode_image(PICTURE, "WEBP", lossless=True)),
    "webp alpha": ("WEBP", encode_image(PICTURE.convert("RGBA"), "WEBP")),
    "webp frames": ("WEBP", encode_image(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(90)])),
    "tiff": ("TIFF", encode_image(PICTURE, "TIFF")),
    "tiff lzw": ("TIFF", encode_image(PICTURE, "TIFF", compression="tiff_lzw")),
    "tiff big endian": ("TIFF", encode_image(draw_picture(301, 203).convert("I;16B"), "TIFF")),
    "avif": ("AVIF", encode_image(PICTURE, "AVIF")),
}


@pytest.mark.parametrize("name", IMAGES)
def test_format_and_size_are_read_without_a_codec(name: str) -> None:
    kind, content = IMAGES[name]
    header = read_header(memoryview(content))
    assert header is not None
    assert (header.format, header.width, header.height) == (kind, 301, 203)


@pytest.mark.parametrize("geometry", [EXACT, FAST], ids=["exact", "fast"])
@pytest.mark.parametrize("name", IMAGES)
def test_no_less_memory_is_reserved_than_the_decoder_asks_for(name: str, geometry: Any) -> None:
    """Small pictures take hardly more than tables, so the numbers are scaled to a larger picture."""
    kind, content = IMAGES[name]
    with Image.open(BytesIO(content)) as small:
        options = {"transparency": 0} if small.mode == "P" and kind == "PNG" else {}
        options |= {"progressive": True} if "progressive" in small.info else {}
        large = encode_image(small.resize((1900, 1300)), kind, **options)
    cost = estimate_cost(large, geometry, max_pixels=MOST)
    assert cost is not None
    _, image = _identify_image(large)
    opened = IMAGE_CLASSES[kind](BytesIO(image))
    size = opened.size
    draft_jpeg(opened, geometry)
    assert cost.memory_bytes >= len(large) + estimate_peak_bytes(opened, size, geometry)


@pytest.mark.parametrize("name", IMAGES)
def test_a_header_that_is_cut_off_may_cost_anything(name: str) -> None:
    assert estimate_cost(IMAGES[name][1][: 9 if name == "gif" else 13], EXACT, max_pixels=MOST) is None


@pytest.mark.parametrize("content", [b"", b"\xff", b"nonsense" * 9, b"RIFF1234WAVEfmt ", b"\x89PNG\r\n"])
def test_what_is_no_image_is_free(content: bytes) -> None:
    assert estimate_cost(content, EXACT, max_pixels=MOST) == NO_COST


def test_an_image_above_the_limit_is_free_as_its_header_refuses_it() -> None:
    content = encode_image(Image.new("1", (9000, 9000)), "PNG")
    assert estimate_cost(content, EXACT, max_pixels=MOST) == NO_COST
    assert estimate_cost(content, EXACT, max_pixels=MOST * 2) != NO_COST


def test_a_small_file_of_many_pixels_is_expensive_and_a_photograph_is_not() -> None:
    giant = encode_image(Image.new("RGB", (7000, 7000)), "WEBP", lossless=True, method=0)
    photo = make_jpeg(4000, 3000)
    costly, ordinary = (estimate_cost(one, FAST, max_pixels=MOST) for one in (giant, photo))
    assert costly is not None
    assert ordinary is not None
    assert len(giant) < 10_000
    assert costly.seconds > 1
    assert ordinary.seconds < 0.25


def test_scans_of_a_progressive_jpeg_are_counted() -> None:
    content = encode_image(PICTURE, "JPEG", progressive=True)
    header = read_header(content + b"\xff\xda" * 50)
    assert header is not None
    assert header.scans >= 50


def test_what_may_hide_a_larger_picture_may_cost_anything() -> None:
    """A BigTIFF, and a TIFF with pictures in sub-directories as raw files have them, cost the maximum."""
    tiff = encode_image(PICTURE, "TIFF")
    assert estimate_cost(tiff[:2] + b"\x2b\0" + tiff[4:], EXACT, max_pixels=MOST) is None
    with Image.open(BytesIO(tiff)) as image:
        hidden = encode_image(image, "TIFF", tiffinfo={330: 8})
    assert estimate_cost(hidden, EXACT, max_pixels=MOST) is None


def test_bytes_between_segments_are_passed_over_and_never_one_by_one() -> None:
    whole = make_jpeg(301, 203)
    padded = whole[:2] + b"x" * 1000 + whole[2:]
    header = read_header(padded)
    assert header is not None
    assert (header.width, header.height) == (301, 203)
    assert estimate_cost(b"\xff\xd8\xff" + b"x" * 1_000_000, EXACT, max_pixels=MOST) is None

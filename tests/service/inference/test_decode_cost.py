"""Estimated costs of images, by their headers: the memory is never less than decoding takes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from fovea.service.artifact.contract import PixelPath
from fovea.service.inference.decode_cost import NO_COST, estimate_cost, read_header
from fovea.service.inference.image_format import IMAGE_CLASSES
from fovea.service.inference.image_opening import open_image
from fovea.service.inference.peak_memory import estimate_peak_bytes
from fovea.service.inference.preprocess import _identify_image
from fovea.service.inference.resize import draft_jpeg
from tests.graphs import SMALL_GEOMETRY
from tests.pictures import draw_picture, encode_image, make_jpeg

MAX_PIXELS = 50_000_000
EXACT = replace(SMALL_GEOMETRY, pixel_path=PixelPath.EXACT)
FAST = replace(SMALL_GEOMETRY, pixel_path=PixelPath.FAST)


def _make_jpeg_with_thumbnail() -> bytes:
    """Return a JPEG with another JPEG inside its Exif segment."""
    thumbnail = make_jpeg(32, 24)
    segment = b"Exif\0\0" + thumbnail
    jpeg = make_jpeg(301, 203)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


PICTURE = draw_picture(301, 203)
IMAGES: dict[str, tuple[str, bytes]] = {
    "jpeg": ("JPEG", encode_image(PICTURE, "JPEG")),
    "jpeg progressive": ("JPEG", encode_image(PICTURE, "JPEG", progressive=True)),
    "jpeg grey": ("JPEG", encode_image(PICTURE.convert("L"), "JPEG")),
    "jpeg cmyk": ("JPEG", encode_image(PICTURE.convert("CMYK"), "JPEG")),
    "jpeg thumbnail": ("JPEG", _make_jpeg_with_thumbnail()),
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
def test_estimated_memory_covers_the_decoder_peak(name: str, geometry: Any) -> None:
    """Small pictures take hardly more than tables, so the numbers are scaled to a larger picture."""
    kind, small_content = IMAGES[name]
    with Image.open(BytesIO(small_content)) as small_image:
        options = {"transparency": 0} if small_image.mode == "P" and kind == "PNG" else {}
        options |= {"progressive": True} if "progressive" in small_image.info else {}
        content = encode_image(small_image.resize((1900, 1300)), kind, **options)
    cost = estimate_cost(content, geometry, max_pixels=MAX_PIXELS)
    assert cost is not None
    _, image = _identify_image(content)
    opened_image = IMAGE_CLASSES[kind](BytesIO(image))
    size = opened_image.size
    draft_jpeg(opened_image, geometry)
    assert cost.memory_bytes >= len(content) + estimate_peak_bytes(opened_image, size, geometry)


@pytest.mark.parametrize("name", IMAGES)
def test_truncated_header_has_unknown_cost(name: str) -> None:
    assert estimate_cost(IMAGES[name][1][: 9 if name == "gif" else 13], EXACT, max_pixels=MAX_PIXELS) is None


@pytest.mark.parametrize("content", [b"", b"\xff", b"nonsense" * 9, b"RIFF1234WAVEfmt ", b"\x89PNG\r\n"])
def test_non_image_has_no_cost(content: bytes) -> None:
    assert estimate_cost(content, EXACT, max_pixels=MAX_PIXELS) == NO_COST


def test_image_above_the_pixel_limit_has_no_cost() -> None:
    content = encode_image(Image.new("1", (9000, 9000)), "PNG")
    assert estimate_cost(content, EXACT, max_pixels=MAX_PIXELS) == NO_COST
    assert estimate_cost(content, EXACT, max_pixels=MAX_PIXELS * 2) != NO_COST


def test_small_file_of_many_pixels_is_expensive() -> None:
    giant = encode_image(Image.new("RGB", (7000, 7000)), "WEBP", lossless=True, method=0)
    photo = make_jpeg(4000, 3000)
    giant_cost, photo_cost = (
        estimate_cost(content, FAST, max_pixels=MAX_PIXELS) for content in (giant, photo)
    )
    assert giant_cost is not None
    assert photo_cost is not None
    assert len(giant) < 10_000
    assert giant_cost.seconds > 1
    assert photo_cost.seconds < 0.25


def test_scans_of_a_progressive_jpeg_are_counted() -> None:
    content = encode_image(PICTURE, "JPEG", progressive=True)
    header = read_header(content + b"\xff\xda" * 50)
    assert header is not None
    assert header.scans >= 50


def test_tiff_with_possible_hidden_pictures_has_unknown_cost() -> None:
    """This holds for a BigTIFF, and for a TIFF with pictures in sub-directories, like a raw file."""
    tiff = encode_image(PICTURE, "TIFF")
    assert estimate_cost(tiff[:2] + b"\x2b\0" + tiff[4:], EXACT, max_pixels=MAX_PIXELS) is None
    with Image.open(BytesIO(tiff)) as image:
        tiff_with_subdirectory = encode_image(image, "TIFF", tiffinfo={330: 8})
    assert estimate_cost(tiff_with_subdirectory, EXACT, max_pixels=MAX_PIXELS) is None


def test_tiff_of_many_entries_has_unknown_cost() -> None:
    entries = b"".join(struct.pack("<HHII", 65000 + index, 3, 1, 0) for index in range(300))
    content = b"II*\0" + struct.pack("<IH", 8, 300) + entries + bytes(4)
    assert estimate_cost(content, EXACT, max_pixels=MAX_PIXELS) is None


def test_bytes_between_jpeg_segments_are_skipped() -> None:
    jpeg = make_jpeg(301, 203)
    padded_jpeg = jpeg[:2] + b"x" * 1000 + jpeg[2:]
    header = read_header(padded_jpeg)
    assert header is not None
    assert (header.width, header.height) == (301, 203)
    assert estimate_cost(b"\xff\xd8\xff" + b"x" * 1_000_000, EXACT, max_pixels=MAX_PIXELS) is None


def _compute_png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _insert_png_header(side: int) -> bytes:
    """Return a PNG of 30 x 20 pixels with a header of another size before its own."""
    content = encode_image(PICTURE.resize((30, 20)), "PNG")
    other = _compute_png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return content[:8] + other + content[8:]


def _insert_frame_header(side: int) -> bytes:
    """Return a JPEG of 30 x 20 pixels with a frame header of another size before its own."""
    return _insert_before_frame(lambda frame: frame[:5] + struct.pack(">HH", side, side) + frame[9:])


def _insert_before_frame(make_segment: Callable[[bytes], bytes]) -> bytes:
    content = make_jpeg(30, 20)
    offset = content.index(b"\xff\xc0")
    return content[:offset] + make_segment(content[offset : offset + 19]) + content[offset:]


def _insert_tiff_entry(entry: bytes) -> bytes:
    """Return a TIFF of 30 x 20 pixels whose directory has one more entry, at its end."""
    content = encode_image(PICTURE.resize((30, 20)), "TIFF")
    (offset,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, offset)
    end = offset + 2 + 12 * count
    directory = struct.pack("<H", count + 1) + content[offset + 2 : end] + entry + bytes(4)
    return content[:4] + struct.pack("<I", len(content)) + content[8:] + directory


@pytest.mark.parametrize(
    "content",
    [
        *(_insert_png_header(side) for side in (1, 60_000)),
        *(_insert_frame_header(side) for side in (1, 60_000)),
        _insert_before_frame(lambda frame: b"\xff\xde" + frame[2:]),
        *(
            _insert_before_frame(lambda frame, code=code: bytes([0xFF, code, 0, 21]) + frame)  # type: ignore[misc]
            for code in (0xC8, 0xF0, 0xFD)
        ),
        _insert_tiff_entry(struct.pack("<HHII", 256, 3, 1, 0)),
        _insert_tiff_entry(struct.pack("<HHII", 322, 3, 2, 60_000)),
        _insert_tiff_entry(struct.pack("<HHII", 322, 5, 1, 8)),
    ],
    ids=[
        *("PNG 1", "PNG 60000", "JPEG 1", "JPEG 60000", "hierarchy", "C8", "F0", "FD"),
        *("second width", "wide tile of two numbers", "wide tile as a fraction"),
    ],
)
def test_image_of_which_decoders_may_read_another_size_has_unknown_cost(content: bytes) -> None:
    """A false size may be small, or so large that the image would count as refused."""
    assert estimate_cost(content, EXACT, max_pixels=MAX_PIXELS) is None


def _draw_larger_picture_in_gif() -> bytes:
    content = encode_image(PICTURE.resize((30, 20)), "GIF")
    return content[:6] + struct.pack("<HH", 1, 1) + content[10:]


def _draw_thumbnail_before_page() -> bytes:
    """Return a TIFF whose first page is a thumbnail of the second one, which is decoded."""
    pages = [PICTURE.resize((8, 5)), PICTURE.resize((30, 20))]
    return encode_image(pages[0], "TIFF", save_all=True, append_images=pages[1:])


def _draw_many_extents() -> bytes:
    """Return an AVIF with an extent that no item has, of more pixels than are allowed."""
    content = encode_image(PICTURE.resize((30, 20)), "AVIF")
    meta = content.index(b"meta") - 4
    size = struct.unpack_from(">I", content, meta)[0]
    fake = struct.pack(">I", 24) + b"free" + b"ispe" + bytes(4) + struct.pack(">II", 1 << 20, 1 << 20)
    longer = struct.pack(">I", size + len(fake)) + content[meta + 4 : meta + size] + fake
    end = content[meta + size :]
    return _move_items(content[:meta] + longer, len(fake)) + end


def _move_items(head: bytes, distance: int) -> bytes:
    """Return the head of an AVIF whose items lie further behind."""
    place = head.index(b"iloc") + 18  # offset of the first extent
    (offset,) = struct.unpack_from(">I", head, place)
    return head[:place] + struct.pack(">I", offset + distance) + head[place + 4 :]


@pytest.mark.parametrize(
    "draw", [_draw_larger_picture_in_gif, _draw_thumbnail_before_page, _draw_many_extents]
)
def test_header_never_promises_less_than_the_decoder_allocates(draw: Callable[[], bytes]) -> None:
    """Files that show a small header or a false one first would take memory that nobody has reserved."""
    content = draw()
    kind, image = _identify_image(content)
    assert open_image(kind, image, MAX_PIXELS, []).image_file.size == (30, 20)
    cost = estimate_cost(content, EXACT, max_pixels=MAX_PIXELS)
    assert cost is not None
    assert cost.memory_bytes >= (2 << 20) + len(content) + 30 * 20 * 24


@pytest.mark.parametrize("blocks", [b"!\xf9\0\0", b"!\xff\x0bNETSCAPE2.0\0\0", b";"])
def test_gif_that_decoders_read_differently_has_unknown_cost(blocks: bytes) -> None:
    content = encode_image(PICTURE.resize((30, 20)), "GIF")
    start = 13 + (3 << (content[10] & 7) + 1)
    assert estimate_cost(content[:start] + b"!\xfe\x02ab\0" + content[start:], EXACT, max_pixels=10**6)
    assert estimate_cost(content[:start] + blocks + content[start:], EXACT, max_pixels=10**6) is None


def test_film_and_hidden_metadata_have_unknown_cost() -> None:
    content = encode_image(PICTURE, "AVIF")
    box = struct.pack(">I", 8)
    for kind in (b"moov", b"meta"):
        assert estimate_cost(content + box + kind, EXACT, max_pixels=MAX_PIXELS) is None
    hidden = content.replace(b"meta", b"free", 1) + b"ispe"
    assert estimate_cost(hidden, EXACT, max_pixels=MAX_PIXELS) is None

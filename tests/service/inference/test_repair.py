"""Repair of damaged metadata and missing ends. A file that lacks pixels is refused."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fovea.service.artifact.contract import Geometry, Interpolation, PixelPath
from fovea.service.errors import BadImage, TooManyPixels
from fovea.service.image_warnings import WarningCode
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.decode_trace import DecodeTrace
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.preprocess import DecodedImage, decode_image
from tests.pictures import draw_picture, encode_image, make_jpeg

EXACT = Geometry.cropped(32, 32, 32, Interpolation.BILINEAR, PixelPath.EXACT)
FAST = replace(EXACT, pixel_path=PixelPath.FAST)
TALL_GEOMETRY = Geometry.cropped(32, 32, 36, Interpolation.BILINEAR, PixelPath.FAST)
MEMORY = DecodeMemory(1 << 28)


def decode_default(content: bytes, geometry: Geometry = EXACT) -> DecodedImage:
    return decode_image(content, geometry, max_pixels=20_000_000, memory=MEMORY)


def decode_pixels(content: bytes) -> Pixels:
    return decode_default(content).pixels


def list_warning_codes(content: bytes) -> list[str]:
    return [warning.code for warning in decode_default(content).warnings]


def make_noise(width: int = 200, height: int = 200) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- JPEG ----------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "optimized": {"optimize": True},
    "progressive": {"progressive": True},
    "grey": {},
    "restarts": {"restart_marker_blocks": 4},
    "finest": {"quality": 100, "subsampling": 0},
}


def encode_kind(kind: str, image: Image.Image) -> bytes:
    return encode_image(image.convert("L") if kind == "grey" else image, "JPEG", **KINDS[kind])


@pytest.mark.parametrize("missing_bytes", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", [EXACT, FAST], ids=["exact", "fast"])
def test_jpeg_without_end_marker_is_decoded(kind: str, missing_bytes: int, geometry: Geometry) -> None:
    for image in (make_noise(), draw_picture(601, 455)):
        content = encode_kind(kind, image)
        result = decode_default(content[:-missing_bytes], geometry)
        assert np.array_equal(result.pixels, decode_default(content, geometry).pixels)
        assert [warning.code for warning in result.warnings] == [WarningCode.END_MISSING]
        assert not decode_default(content, geometry).warnings


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_jpeg_is_refused(kind: str) -> None:
    for image in (make_noise(), draw_picture(601, 455)):
        content = encode_kind(kind, image)
        for kept_share in (0.2, 0.5, 0.8, 0.95, 0.99):
            with pytest.raises(BadImage, match="JPEG"):
                decode_default(content[: int(len(content) * kept_share)])


def test_jpeg_that_lacks_a_few_bytes_is_refused() -> None:
    """Only the last byte of a scan may be padding, so a file that lacks more bytes lacks pixels."""
    content = make_jpeg(200, 200, quality=95)
    for missing_bytes in range(4, 40):
        with pytest.raises(BadImage, match="JPEG"):
            decode_default(content[:-missing_bytes])


def test_truncated_jpeg_with_complete_crop_is_refused() -> None:
    content = encode_image(make_noise(100, 600), "JPEG")
    with pytest.raises(BadImage, match="JPEG"):
        decode_default(content[: int(len(content) * 0.9)], TALL_GEOMETRY)


def test_truncated_jpeg_of_uniform_grey_is_refused() -> None:
    """The decoder fills missing pixels with the same grey."""
    image = Image.new("L", (400, 400), 128)
    image.paste(0, (0, 300, 400, 400))
    content = encode_image(image, "JPEG")
    with pytest.raises(BadImage, match="JPEG"):
        decode_default(content[: len(content) // 2])


def test_progressive_jpeg_without_all_scans_is_refused() -> None:
    content = encode_image(make_noise(), "JPEG", progressive=True)
    starts = [offset for offset in range(len(content)) if content[offset : offset + 2] == b"\xff\xc4"]
    for start in starts[2:]:
        with pytest.raises(BadImage, match="JPEG"):
            decode_default(content[:start])


def test_trace_shows_only_the_successful_attempt() -> None:
    trace = DecodeTrace()
    decode_image(make_jpeg()[:-1], EXACT, max_pixels=10**6, trace=trace)
    assert [step for step, _ in trace.steps].count("decode") == 1


def make_segment(code: int, content: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", len(content) + 2) + content


@pytest.mark.parametrize(
    ("code", "content"),
    [
        (0xE0, b"JFIF\0"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
        (0xEE, b"Adobe"),
        (0xE2, b"MPF\0garbage"),
        (0xE1, b"Exif\0\0" + bytes(range(200))),
        (0xFE, bytes(60_000)),
    ],
)
def test_damaged_jpeg_metadata_is_ignored(code: int, content: bytes) -> None:
    plain = make_jpeg()
    assert np.array_equal(
        decode_pixels(plain[:2] + make_segment(code, content) + plain[2:]), decode_pixels(plain)
    )


# --- scans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("progressive", [True, False])
def test_scan_markers_outside_the_image_are_not_counted(progressive: bool) -> None:
    content = encode_image(draw_picture(64, 64), "JPEG", progressive=progressive)
    video = 300 * b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
    thumbnail = make_segment(0xE1, b"Exif\0\0" + 200 * b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00")
    for changed_content in (content + video, content[:2] + thumbnail + content[2:]):
        assert np.array_equal(decode_pixels(changed_content), decode_pixels(content))


def test_scans_after_an_end_marker_in_a_segment_are_counted() -> None:
    content = encode_image(draw_picture(64, 64).convert("L"), "JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    end_segment = make_segment(0xFE, b"\xff\xd9")
    with pytest.raises(BadImage, match="more than 100 scans"):
        decode_default(content[:start] + end_segment + 150 * content[start:-2] + b"\xff\xd9")


# --- PNG -----------------------------------------------------------------------------------------


def make_chunk(kind: bytes, content: bytes, *, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


PLAIN = encode_image(draw_picture(60, 40), "PNG")
TEXT = b"Comment\0"
BOMB = zlib.compress(bytes(3 << 20), 9)

HARMLESS_CHUNKS = {
    "a long text": make_chunk(b"tEXt", TEXT + b"x" * 3_000_000),
    "a long compressed text": make_chunk(b"zTXt", TEXT + b"\0" + BOMB),
    "a long international text": make_chunk(b"iTXt", TEXT + b"\1\0\0\0" + BOMB),
    "many texts": 80 * make_chunk(b"zTXt", TEXT + b"\0" + zlib.compress(bytes(1 << 20), 9)),
    "an unknown compression": make_chunk(b"zTXt", TEXT + b"\7garbage"),
    "a short density": make_chunk(b"pHYs", b"\0"),
    "a bad animation": make_chunk(b"acTL", b"\0") + make_chunk(b"fcTL", bytes(26)),
}
DAMAGED_CHUNKS = {
    "a text": make_chunk(b"tEXt", TEXT + b"hello", checksum=1),
    "a time": make_chunk(b"tIME", bytes(7), checksum=1),
    "an unknown": make_chunk(b"abCd", b"hello", checksum=1),
    "an unreadable": make_chunk(b"\xff\xfe\xfd\xfc", b"hello"),
}
RELEVANT_CHUNKS = {
    "a gamma": make_chunk(b"gAMA", b"\0"),
    "an orientation": make_chunk(b"eXIf", b"garbage", checksum=1),
    "a profile": make_chunk(b"iCCP", b"name\0\1"),
    "primaries": make_chunk(b"cHRM", bytes(32), checksum=1),
}


@pytest.mark.parametrize(
    "content", [*HARMLESS_CHUNKS.values(), *DAMAGED_CHUNKS.values()], ids=[*HARMLESS_CHUNKS, *DAMAGED_CHUNKS]
)
@pytest.mark.parametrize("where", ["before", "behind"])
def test_long_or_damaged_png_metadata_is_ignored(content: bytes, where: str) -> None:
    offset = 33 if where == "before" else len(PLAIN) - 12
    modified_png = PLAIN[:offset] + content + PLAIN[offset:]
    assert np.array_equal(decode_pixels(modified_png), decode_pixels(PLAIN))
    assert list_warning_codes(modified_png) == []


@pytest.mark.parametrize("content", RELEVANT_CHUNKS.values(), ids=RELEVANT_CHUNKS)
def test_damaged_png_metadata_that_matters_gives_warning(content: bytes) -> None:
    modified_png = PLAIN[:33] + content + PLAIN[33:]
    assert np.array_equal(decode_pixels(modified_png), decode_pixels(PLAIN))
    assert list_warning_codes(modified_png) == [WarningCode.METADATA_IGNORED]


def test_png_chunk_with_damaged_length_is_skipped() -> None:
    modified_png = PLAIN[:33] + b"\x7f\xff\xff\xfftEXthello" + PLAIN[33:]
    assert np.array_equal(decode_pixels(modified_png), decode_pixels(PLAIN))


def test_sound_metadata_beside_damaged_is_applied() -> None:
    """The orientation and the transparency still apply; only a text is damaged."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = draw_picture(60, 40).quantize(8)
    content = encode_image(image, "PNG", exif=exif, transparency=bytes(8))
    modified_png = content[:33] + DAMAGED_CHUNKS["a text"] + content[33:]
    assert (decode_default(modified_png).width, decode_default(modified_png).height) == (40, 60)
    assert np.array_equal(decode_pixels(modified_png), decode_pixels(content))


def test_png_without_end_is_decoded_and_without_pixels_refused() -> None:
    for missing_bytes in range(13):
        assert np.array_equal(decode_pixels(PLAIN[: len(PLAIN) - missing_bytes]), decode_pixels(PLAIN))
    info = PngInfo()
    info.add_text("a", "b")
    content = encode_image(make_noise(), "PNG", pnginfo=info)
    for kept_share in (0.3, 0.6, 0.9):
        with pytest.raises(BadImage, match="PNG"):
            decode_default(content[: int(len(content) * kept_share)])


def test_damaged_png_header_is_refused() -> None:
    damaged_png = bytearray(PLAIN)
    damaged_png[30] ^= 1
    with pytest.raises(BadImage, match="PNG"):
        decode_default(bytes(damaged_png))


# --- GIF, WebP, AVIF -----------------------------------------------------------------------------


def test_gif_without_trailer_is_decoded() -> None:
    content = encode_image(draw_picture(60, 40).quantize(16), "GIF")
    for missing_bytes in (1, 2):
        assert np.array_equal(decode_pixels(content[:-missing_bytes]), decode_pixels(content))


@pytest.mark.parametrize("lossless", [True, False])
def test_webp_truncated_in_its_metadata_is_decoded(lossless: bool) -> None:
    exif = Image.Exif()
    exif[0x010E] = "x" * 500
    content = encode_image(draw_picture(60, 40), "WEBP", exif=exif, xmp=b"y" * 500, lossless=lossless)
    for missing_bytes in (1, 100, 480, 700, 1000):
        assert np.array_equal(decode_pixels(content[:-missing_bytes]), decode_pixels(content))
    with pytest.raises(BadImage, match="WEBP"):
        decode_default(encode_image(make_noise(), "WEBP")[:-100])


def test_webp_without_its_padding_byte_is_decoded() -> None:
    for seed in range(20):
        content = encode_image(draw_picture(60, 40, seed), "WEBP", lossless=True)
        if content[-1] == 0 and int.from_bytes(content[16:20], "little") % 2:
            assert np.array_equal(decode_pixels(content[:-1]), decode_pixels(content))
            return
    pytest.fail("none of twenty images has an odd length")


def test_damaged_avif_exif_is_ignored() -> None:
    image = draw_picture(60, 40)
    exif = Image.Exif()
    exif[0x010E] = "a picture"
    content = encode_image(image, "AVIF", exif=exif)
    content = content.replace(b"MM\0*", b"garb").replace(b"II*\0", b"garb")
    assert np.array_equal(decode_pixels(content), decode_pixels(encode_image(image, "AVIF")))


# --- TIFF ----------------------------------------------------------------------------------------


def make_tiff(image: Image.Image, tags: list[tuple[int, int, int, bytes]], **options: str) -> bytes:
    """Return a TIFF with further tags: number, type, count, and four bytes of a value or an offset."""
    content = bytearray(encode_image(image, "TIFF", **options))
    offset = int.from_bytes(content[4:8], "little")
    count = int.from_bytes(content[offset : offset + 2], "little")
    entries = [bytes(content[start : start + 12]) for start in range(offset + 2, offset + 2 + 12 * count, 12)]
    entries += [struct.pack("<HHI", *tag[:3]) + tag[3] for tag in tags]
    entries.sort(key=lambda entry: int.from_bytes(entry[:2], "little"))
    start = len(content)
    content[4:8] = struct.pack("<I", start)
    return bytes(content) + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize(
    "tag",
    [
        (34665, 4, 1, b"\xff\xff\xff\x7f"),  # the offset of an EXIF directory
        (34665, 2, 4, b"abcd"),
        (34853, 4, 1, b"\x01\0\0\0"),
        (700, 1, 1 << 30, bytes(4)),  # XMP
        (34675, 7, 1 << 30, bytes(4)),  # a profile
        (33723, 4, 1, bytes(4)),
        (270, 2, 1 << 20, b"\xff\xff\xff\0"),
        (305, 99, 1, bytes(4)),
        (274, 2, 4, b"abc\0"),  # an orientation
        (282, 5, 1, bytes(4)),  # a resolution
    ],
)
def test_damaged_tiff_tags_are_ignored(tag: tuple[int, int, int, bytes], compression: str | None) -> None:
    image = draw_picture(60, 40)
    content = make_tiff(image, [tag], **({"compression": compression} if compression else {}))
    assert np.array_equal(decode_pixels(content), decode_pixels(encode_image(image, "PNG")))


def test_limits_apply_to_repaired_images() -> None:
    content = encode_image(Image.new("RGB", (3000, 3000)), "PNG")
    damaged_png = content[:33] + DAMAGED_CHUNKS["a text"] + content[33:]
    with pytest.raises(TooManyPixels):
        decode_image(damaged_png, EXACT, max_pixels=8_000_000)
    with pytest.raises(TooManyPixels):
        decode_image(damaged_png, EXACT, max_pixels=20_000_000, memory=DecodeMemory(1 << 20))

"""Conversion of encoded images to pixels."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from fovea.service.artifact.geometry import Geometry, Interpolation, PixelPath, ResizeStep
from fovea.service.errors import BadImage, BadRequest, RequestError, TooManyPixels, UnsupportedFormat
from fovea.service.inference.draft_scale import choose_draft_scale
from fovea.service.inference.image_format import supported_formats
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.preprocess import DecodedImage, decode_image
from fovea.service.inference.resize import apply_geometry
from tests.pictures import draw_picture, encode_image, make_jpeg, make_png_header
from tests.proof.large import make_mosaic, open_photographs
from tests.servers import ROOT

EXACT = Geometry.cropped(32, 32, 32, Interpolation.BILINEAR, PixelPath.EXACT)
FAST = replace(EXACT, pixel_path=PixelPath.FAST)
PHOTO = Geometry.cropped(224, 224, 256, Interpolation.BILINEAR, PixelPath.EXACT)
UNCROPPED = Geometry.cropped(224, 224, 224, Interpolation.BILINEAR, PixelPath.EXACT)
MAX_PIXELS = 50_000_000


def decode_default(image: bytes | memoryview, geometry: Geometry = EXACT) -> DecodedImage:
    return decode_image(image, geometry, max_pixels=MAX_PIXELS)


def preprocess_by_hand(image: Image.Image, geometry: Geometry) -> Pixels:
    """Run the usual pipeline, like torchvision's Resize and CenterCrop."""
    resize = geometry.steps[0]
    assert isinstance(resize, ResizeStep)
    width, height = image.size
    side = resize.height
    scale = side / min(width, height)
    size = (int(width * scale), side) if width > height else (side, int(height * scale))
    resized_image = image.resize(size, Image.Resampling[resize.interpolation.upper()])
    left = round((size[0] - geometry.width) / 2)
    top = round((size[1] - geometry.height) / 2)
    return np.asarray(resized_image.crop((left, top, left + geometry.width, top + geometry.height)))


# --- formats and modes ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP", "WEBP"])
def test_lossless_formats_match_the_hand_written_pipeline(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = draw_picture(70, 50)
    if kind == "GIF":
        image = image.quantize(64)
    result = decode_default(encode_image(image, kind, **options), PHOTO)
    assert np.array_equal(result.pixels, preprocess_by_hand(image.convert("RGB"), PHOTO))
    assert (result.format, result.width, result.height) == (kind, 70, 50)


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "AVIF"])
def test_lossy_formats_match_the_decoder_of_pillow(kind: str) -> None:
    content = encode_image(draw_picture(70, 50), kind)
    with Image.open(BytesIO(content)) as image:
        assert np.array_equal(
            decode_default(content, PHOTO).pixels, preprocess_by_hand(image.convert("RGB"), PHOTO)
        )


def test_all_promised_formats_are_supported() -> None:
    assert set(supported_formats()) == {"JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "HEIC"}


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_first_frame_is_used(kind: str) -> None:
    first, second = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    content = encode_image(first, kind, save_all=True, append_images=[second])
    assert decode_default(content).pixels[16, 16, 0] > 200


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_plain_modes_are_converted_like_pillow(mode: str) -> None:
    image = draw_picture(40, 32).convert(mode)
    content = encode_image(image, "TIFF")
    assert np.array_equal(decode_default(content).pixels, preprocess_by_hand(image.convert("RGB"), EXACT))


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    grey = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    for content in (encode_image(Image.fromarray(grey), "PNG"), encode_image(Image.fromarray(grey), "TIFF")):
        pixels = decode_default(content).pixels
        assert np.array_equal(pixels[..., 0], np.round(grey / 257))
        assert (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 16, 32))
    image.paste((0, 0, 0, 128), (16, 16, 32, 32))
    content = encode_image(image.convert(mode) if mode != "P" else image.quantize(8), "PNG")
    pixels = decode_default(content).pixels
    assert (pixels[4, 4] == 0).all()
    assert (pixels[4, 24] == 255).all()
    assert np.abs(pixels[24, 24].astype(int) - 127).max() <= 1


def test_transparent_key_colour_becomes_white() -> None:
    image = Image.new("RGB", (32, 32), (1, 2, 3))
    assert (decode_default(encode_image(image, "PNG", transparency=(1, 2, 3))).pixels == 255).all()


def test_cmyk_jpeg_keeps_its_colours() -> None:
    content = encode_image(Image.new("RGB", (64, 64), (200, 40, 40)).convert("CMYK"), "JPEG")
    assert np.abs(decode_default(content).pixels[16, 16].astype(int) - (200, 40, 40)).max() <= 3


@pytest.mark.parametrize("mode", ["F", "I"])
def test_unsupported_modes_are_refused(mode: str) -> None:
    with pytest.raises(BadImage, match=f"mode {mode}"):
        decode_default(encode_image(Image.new(mode, (40, 40)), "TIFF"))


# --- orientation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode_image(draw_picture(60, 40), kind, exif=exif, **options)
    with Image.open(BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image)
    result = decode_default(content)
    assert np.array_equal(result.pixels, preprocess_by_hand(upright, EXACT))
    assert (result.width, result.height) == upright.size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_by_the_fast_path(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = make_jpeg(1003, 701, exif=exif)
    exact, fast = decode_default(content), decode_default(content, FAST)
    assert (fast.width, fast.height) == (exact.width, exact.height)
    assert np.abs(fast.pixels.astype(int) - exact.pixels).mean() < 1


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\xff\xff\xff\0\0\0\0",
    ],
)
def test_corrupt_exif_is_ignored(exif: bytes) -> None:
    image = draw_picture(60, 40)
    plain_content, corrupt_content = encode_image(image, "JPEG"), encode_image(image, "JPEG", exif=exif)
    assert np.array_equal(decode_default(corrupt_content).pixels, decode_default(plain_content).pixels)


def test_unreadable_exif_is_ignored() -> None:
    image, text = draw_picture(60, 40), PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n9\nthis is not hexadecimal")
    with Image.open(BytesIO(encode_image(image, "PNG", pnginfo=text))) as opened_image:
        opened_image.load()
        with pytest.raises(ValueError, match="hex"):
            opened_image.getexif()
    assert np.array_equal(
        decode_default(encode_image(image, "PNG", pnginfo=text)).pixels,
        decode_default(encode_image(image, "PNG")).pixels,
    )


# --- geometry ------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", Interpolation)
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (100, 90), (1000, 257)])
def test_exact_path_equals_the_hand_written_pipeline(
    size: tuple[int, int], interpolation: Interpolation
) -> None:
    geometry = Geometry.cropped(224, 224, 256, interpolation, PixelPath.EXACT)
    image = draw_picture(*size)
    assert np.array_equal(
        decode_default(encode_image(image, "PNG"), geometry).pixels, preprocess_by_hand(image, geometry)
    )


@given(
    width=st.integers(20, 700),
    height=st.integers(20, 700),
    resize_to=st.sampled_from([17, 32, 48, 64, 100, 128, 232, 256]),
    crop_share=st.sampled_from([0.5, 0.875, 1.0]),
    interpolation=st.sampled_from(Interpolation),
)
def test_exact_path_leaves_out_only_what_the_crop_drops(
    width: int, height: int, resize_to: int, crop_share: float, interpolation: Interpolation
) -> None:
    """Noise shows a difference of one value in the last bit, which smooth pictures hide."""
    crop = max(1, int(resize_to * crop_share))
    geometry = Geometry.cropped(crop, crop, resize_to, interpolation, PixelPath.EXACT)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    size = resize_to * width // min(width, height), resize_to * height // min(width, height)
    left, top = (round((side - crop) / 2) for side in size)
    filter_ = Image.Resampling[interpolation.upper()]
    expected = Image.fromarray(noise).resize(size, filter_).crop((left, top, left + crop, top + crop))
    pixels = apply_geometry(Image.fromarray(noise), geometry, (width, height), (0, 0, width, height), None)
    assert np.array_equal(pixels, np.asarray(expected))


def test_stretch_uses_the_whole_image() -> None:
    geometry = Geometry.stretched(20, 60, Interpolation.BICUBIC, PixelPath.EXACT)
    image = draw_picture(100, 90)
    expected = np.asarray(image.resize((60, 20), Image.Resampling.BICUBIC))
    assert np.array_equal(decode_default(encode_image(image, "PNG"), geometry).pixels, expected)
    fast_pixels = decode_default(make_jpeg(1200, 700), replace(geometry, pixel_path=PixelPath.FAST)).pixels
    assert np.abs(fast_pixels.astype(int) - decode_default(make_jpeg(1200, 700), geometry).pixels).mean() < 1


@pytest.mark.parametrize(("geometry", "limit"), [(EXACT, 0.01), (PHOTO, 0.05)], ids=["32", "224"])
def test_fast_path_is_close_to_exact_on_photographs(
    photographs: list[Path], geometry: Geometry, limit: float
) -> None:
    differences = [_measure_mean_difference(path.read_bytes(), geometry) for path in photographs]
    assert np.mean(differences) <= limit
    assert max(differences) <= 0.3


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("geometry", [EXACT, UNCROPPED, PHOTO], ids=["32", "224", "256"])
def test_fast_path_is_close_to_exact_on_a_phone_photograph(
    photographs: list[Path], geometry: Geometry, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph = make_mosaic(open_photographs(photographs), np.random.default_rng(4), 8)
    assert choose_draft_scale(photograph.size, replace(geometry, pixel_path=PixelPath.FAST)) > 1
    content = encode_image(photograph, "JPEG", quality=90, subsampling=2, exif=exif)
    assert _measure_mean_difference(content, geometry) <= 0.3


@pytest.mark.parametrize("geometry", [FAST, replace(PHOTO, pixel_path=PixelPath.FAST)], ids=["32", "224"])
def test_draft_keeps_four_times_the_target_and_256_px(geometry: Geometry) -> None:
    minimum = max(4 * geometry.longest_resize_side, 256)
    for shorter_side in (minimum, 2 * minimum - 1, 2 * minimum, 4 * minimum, 8 * minimum, 16 * minimum):
        scale = choose_draft_scale((shorter_side, 2 * shorter_side), geometry)
        assert shorter_side // scale >= minimum
        assert scale == 8 or shorter_side // (2 * scale) < minimum


def _measure_mean_difference(content: bytes, exact: Geometry) -> float:
    fast_pixels = decode_default(content, replace(exact, pixel_path=PixelPath.FAST)).pixels
    return float(np.abs(fast_pixels.astype(int) - decode_default(content, exact).pixels).mean())


def test_fast_path_decodes_fewer_pixels() -> None:
    content = make_jpeg(4000, 3000)
    tracemalloc.start()
    try:
        decode_default(content, FAST)
        assert tracemalloc.get_traced_memory()[1] < 4000 * 3000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (3, 3), (2, 4000)])
@pytest.mark.parametrize("geometry", [EXACT, FAST, PHOTO], ids=["exact", "fast", "photo"])
def test_extreme_shapes_are_decoded(size: tuple[int, int], geometry: Geometry) -> None:
    for kind in ("PNG", "JPEG"):
        image = Image.new("RGB", size, (10, 200, 30))
        pixels = decode_default(encode_image(image, kind), geometry).pixels
        assert pixels.shape == (geometry.height, geometry.width, 3)
        assert np.abs(pixels.astype(int) - (10, 200, 30)).max() <= 3


def test_long_strip_takes_little_memory() -> None:
    """A resize of the whole image for a model of 224 would make 256 x 5,120,000 pixels: 5 GB."""
    code = (
        "import re, pathlib\n"
        "status = pathlib.Path('/proc/self/status')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1])\n"
        "from tests.service.inference.test_preprocess import PHOTO, decode_default\n"
        "from tests.pictures import encode_image, draw_picture\n"
        "content = encode_image(draw_picture(1, 20_000), 'PNG')\n"
        "before = peak()\n"
        "decode_default(content, PHOTO)\n"
        "print(peak() - before)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(process.stdout) < 50_000  # KiB


def test_long_strip_is_cropped_to_its_middle() -> None:
    strip = np.zeros((4, 20_000, 3), np.uint8)
    strip[:, 9_000:11_000] = 255
    assert (decode_default(encode_image(Image.fromarray(strip), "PNG"), PHOTO).pixels == 255).all()


@given(st.integers(1, 300), st.integers(1, 300), st.booleans(), st.sampled_from(PixelPath))
def test_any_size_gives_the_shape_of_the_model(
    width: int, height: int, stretches: bool, path: PixelPath
) -> None:
    geometry = (
        Geometry.stretched(24, 32, Interpolation.BILINEAR, path)
        if stretches
        else Geometry.cropped(24, 32, 36, Interpolation.BILINEAR, path)
    )
    pixels = decode_default(encode_image(Image.new("RGB", (width, height)), "JPEG"), geometry).pixels
    assert pixels.shape == (24, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous


# --- bad input -----------------------------------------------------------------------------------


def test_empty_image_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="empty"):
        decode_default(b"")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"hello, this is text", "not an image"),
        (b"PK\x03\x04" + bytes(100), "ZIP"),
        (b"%PDF-1.7", "PDF"),
        (b"\xff\x0a" + bytes(50), "JPEG XL"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"RIFF\0\0\0\0WAVEfmt ", "not an image"),
        (b"\xff", "not an image"),
    ],
)
def test_other_file_types_are_refused_by_name(content: bytes, name: str) -> None:
    with pytest.raises(UnsupportedFormat, match=name):
        decode_default(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "AVIF"])
@pytest.mark.parametrize("kept_share", [0.1, 0.5, 0.9])
def test_truncated_image_is_refused(kind: str, kept_share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    content = encode_image(noise, kind)
    with pytest.raises(BadImage, match=kind) as refusal:
        decode_default(content[: int(len(content) * kept_share)])
    assert str(refusal.value).endswith(
        ("its end is missing; was it copied or downloaded completely?", "its content is damaged")
    )


@pytest.mark.parametrize("size", [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (7_072, 7_072)])
def test_decompression_bomb_is_refused_from_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(TooManyPixels, match=rf"{size[0]} x {size[1]} px; at most 50 MP"):
        decode_default(make_png_header(*size))


def test_bomb_detected_by_pillow_has_too_many_pixels() -> None:
    gif = bytearray(encode_image(Image.new("L", (8, 8)), "GIF"))
    frame_offset = gif.index(b"\x2c\0\0\0\0") + 5
    gif[frame_offset : frame_offset + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(TooManyPixels):
        decode_default(bytes(gif))


def test_tiff_tile_above_the_pixel_limit_is_refused() -> None:
    tile = zlib.compress(bytes(8000 * 8000), 9)
    tags = [(256, 4, 10), (257, 4, 10), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), (322, 4, 8000),
            (323, 4, 8000), (324, 4, 146), (325, 4, len(tile))]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    with pytest.raises(TooManyPixels, match="8000 x 8000"):
        decode_default(content.ljust(146, b"\0") + tile)


def test_jpeg_with_too_many_scans_is_refused() -> None:
    content = encode_image(draw_picture(64, 64).convert("L"), "JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    content_with_many_scans = content[:start] + 1000 * content[start:-2] + b"\xff\xd9"
    with pytest.raises(BadImage, match="more than 100 scans"):
        decode_default(content_with_many_scans)
    decode_default(memoryview(content))


def test_grey_tiff_with_another_white_value_is_refused() -> None:
    content = bytearray(encode_image(Image.fromarray(np.full((20, 20), 4095, np.uint16)), "TIFF"))
    for tag, value in ((258, 12), (262, 0)):
        changed_tiff = content.copy()
        entry_offset = changed_tiff.index(struct.pack("<HHI", tag, 3, 1))
        changed_tiff[entry_offset + 8 : entry_offset + 10] = struct.pack("<H", value)
        with pytest.raises(BadImage, match="grey TIFF"):
            decode_default(bytes(changed_tiff))


def test_16_bit_transparent_grey_becomes_white() -> None:
    image = Image.fromarray(np.full((32, 32), 1000, np.uint16))
    assert (decode_default(encode_image(image, "PNG", transparency=1000)).pixels == 255).all()
    assert (decode_default(encode_image(image, "PNG", transparency=1001)).pixels == 4).all()


def test_pixel_limit_is_inclusive() -> None:
    content = encode_image(Image.new("L", (100, 10)), "PNG")
    decode_image(content, EXACT, max_pixels=1000)
    with pytest.raises(TooManyPixels):
        decode_image(content, EXACT, max_pixels=999)


@given(
    head=st.sampled_from(
        [
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\n",
            b"GIF89a",
            b"II*\0",
            b"BM",
            b"RIFF\xff\0\0\0WEBP",
            b"\0\0\0 ftypavif",
        ]
    ),
    rest=st.binary(max_size=300),
)
def test_random_bytes_raise_only_request_errors(head: bytes, rest: bytes) -> None:
    try:
        decode_image(head + rest, FAST, max_pixels=1_000_000)
    except RequestError as error:
        assert 400 <= error.status < 500


@given(
    position=st.integers(0, 3000),
    value=st.binary(min_size=1, max_size=8),
    kind=st.sampled_from(["JPEG", "PNG", "TIFF", "WEBP", "GIF"]),
)
def test_damaged_images_raise_only_request_errors(position: int, value: bytes, kind: str) -> None:
    content = bytearray(encode_image(draw_picture(40, 40), kind))
    position %= len(content)
    content[position : position + len(value)] = value
    try:
        decode_image(bytes(content), FAST, max_pixels=1_000_000)
    except RequestError as error:
        assert 400 <= error.status < 500

"""Embedded colour profiles and colour tags are converted to sRGB, for the model and for explanations."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from fovea.service.artifact.contract import Geometry, Interpolation, PixelPath
from fovea.service.image_warnings import WarningCode
from fovea.service.inference import colour
from fovea.service.inference.colour import (
    ADOBE_RGB,
    SRGB_PRIMARIES,
    BadProfile,
    ColourTags,
    Profile,
    build_profile,
)
from fovea.service.inference.decode_trace import DecodeTrace
from fovea.service.inference.preprocess import DecodedImage, decode_image, decode_upright
from tests import profiles
from tests.pictures import draw_picture, encode_image

EXACT = Geometry.cropped(32, 32, 32, Interpolation.BILINEAR, PixelPath.EXACT)
GEOMETRIES = [EXACT, replace(EXACT, pixel_path=PixelPath.FAST)]

GREEN = (97, 176, 89)
"""A green in Display P3, which is (62, 178, 76) in sRGB."""


def decode_default(content: bytes, geometry: Geometry = EXACT) -> DecodedImage:
    return decode_image(content, geometry, max_pixels=1_000_000)


def list_warning_codes(content: bytes) -> list[str]:
    return [warning.code for warning in decode_default(content).warnings]


def get_middle_pixel(content: bytes, geometry: Geometry = EXACT) -> list[int]:
    pixels: list[int] = decode_default(content, geometry).pixels[16, 16].tolist()
    return pixels


def is_near(actual: Any, expected: Any, levels: float = 1.5) -> bool:
    return bool(np.abs(np.asarray(actual, float) - np.asarray(expected, float)).max() <= levels)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["exact", "fast"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
def test_display_p3_is_converted_in_every_format(kind: str, geometry: Geometry) -> None:
    options_by_format: dict[str, dict[str, Any]] = {
        "WEBP": {"lossless": True}, "JPEG": {"quality": 98}, "AVIF": {"quality": 100}
    }  # fmt: skip
    options = options_by_format.get(kind, {})
    image = Image.new("RGB", (640, 480), GREEN)
    content = encode_image(image, kind, icc_profile=profiles.display_p3_profile(), **options)
    assert is_near(get_middle_pixel(content, geometry), profiles.p3_to_srgb(GREEN), 3)
    assert not decode_default(content).warnings  # an ordinary photograph
    assert is_near(
        decode_upright(content, max_pixels=1_000_000).getpixel((100, 100)), profiles.p3_to_srgb(GREEN), 3
    )


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_palette_and_alpha_images_are_converted(mode: str) -> None:
    image = Image.new("RGB", (40, 40), GREEN)
    converted_image = image.quantize(4) if mode == "P" else image.convert(mode)
    content = encode_image(converted_image, "PNG", icc_profile=profiles.display_p3_profile())
    assert is_near(get_middle_pixel(content), profiles.p3_to_srgb(GREEN))


def test_translucent_colours_are_converted_before_blending() -> None:
    content = encode_image(
        Image.new("RGBA", (40, 40), (*GREEN, 128)), "PNG", icc_profile=profiles.display_p3_profile()
    )
    assert is_near(get_middle_pixel(content), profiles.p3_to_srgb(GREEN) * 128 / 255 + 127)


def test_conversion_matches_the_reference_formula() -> None:
    image = draw_picture(32, 32)
    content = encode_image(image, "PNG", icc_profile=profiles.display_p3_profile())
    assert is_near(decode_default(content).pixels, profiles.p3_to_srgb(np.asarray(image)))


def test_trace_names_the_profile() -> None:
    trace = DecodeTrace()
    content = encode_image(draw_picture(40, 40), "PNG", icc_profile=profiles.display_p3_profile())
    decode_image(content, EXACT, max_pixels=10_000, trace=trace)
    assert ("colours", "from made for a test to sRGB, by the image's profile") in trace.steps


def test_srgb_profile_changes_nothing() -> None:
    image = draw_picture(70, 50)
    srgb_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb_profile, build_profile(ColourTags(SRGB_PRIMARIES, None))):
        content = encode_image(image, "PNG", icc_profile=profile)
        assert np.array_equal(
            decode_default(content).pixels, decode_default(encode_image(image, "PNG")).pixels
        )
        assert Profile(profile).get_conversion().transform is None


def test_grey_profile_is_applied() -> None:
    """The profile has linear light: half of the light is a light grey on a screen."""
    for image in (Image.new("L", (40, 40), 128), Image.new("LA", (40, 40), (128, 255))):
        content = encode_image(image, "PNG", icc_profile=profiles.grey_profile(1.0))
        assert is_near(get_middle_pixel(content), profiles.linear_to_srgb([128 / 255] * 3))
    grey16 = Image.fromarray(np.full((40, 40), 128 * 257, np.uint16))
    assert is_near(
        get_middle_pixel(encode_image(grey16, "PNG", icc_profile=profiles.grey_profile(1.0))), [188] * 3
    )


def test_colour_profile_leaves_grey_image_grey() -> None:
    content = encode_image(Image.new("L", (40, 40), 100), "JPEG", icc_profile=profiles.display_p3_profile())
    assert is_near(get_middle_pixel(content), [100] * 3)
    assert not decode_default(content).warnings


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_profile_is_applied(kind: str) -> None:
    """The profile shows only cyan: magenta leaves the paper white."""
    magenta = encode_image(
        Image.new("CMYK", (40, 40), (0, 255, 0, 0)), kind, icc_profile=profiles.cmyk_profile()
    )
    cyan = encode_image(
        Image.new("CMYK", (40, 40), (255, 0, 0, 0)), kind, icc_profile=profiles.cmyk_profile()
    )
    assert is_near(get_middle_pixel(magenta), [255] * 3, 3)
    assert is_near(get_middle_pixel(cyan), [0] * 3, 3)
    assert not decode_default(cyan).warnings


def test_cmyk_without_profile_gives_warning() -> None:
    content = encode_image(Image.new("CMYK", (40, 40), (0, 255, 0, 0)), "JPEG")
    assert list_warning_codes(content) == [WarningCode.NO_PROFILE]


def test_cielab_is_converted() -> None:
    """L 50 % is a grey of 119; Pillow has 128 for the a and b of greys."""
    lab = encode_image(Image.new("LAB", (40, 40), (128, 128, 128)), "TIFF")
    assert is_near(get_middle_pixel(lab), [119] * 3, 2)


# --- profiles that cannot be used ----------------------------------------------------------------

P3 = profiles.display_p3_profile()


@pytest.mark.parametrize(
    "profile",
    [b"nonsense", P3[:200], P3[:-1500], bytes(3000), P3[:36] + b"xxxx" + P3[40:], P3 + bytes(5 << 20)],
    ids=["text", "header", "cut", "zeros", "signature", "enormous"],
)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_damaged_or_enormous_profile_is_ignored_with_warning(kind: str, profile: bytes) -> None:
    image = draw_picture(40, 40)
    plain_content = encode_image(image, kind)
    content = encode_image(image, kind, icc_profile=profile)
    assert np.array_equal(decode_default(content).pixels, decode_default(plain_content).pixels)
    assert list_warning_codes(content) == [WarningCode.PROFILE_IGNORED]


def test_profile_of_another_colour_space_is_ignored() -> None:
    image = draw_picture(40, 40)
    for profile in (profiles.cmyk_profile(), profiles.grey_profile(1.0)):
        content = encode_image(image, "PNG", icc_profile=profile)
        assert np.array_equal(
            decode_default(content).pixels, decode_default(encode_image(image, "PNG")).pixels
        )
        assert list_warning_codes(content) == [WarningCode.PROFILE_IGNORED]


def test_incomplete_jpeg_profile_is_ignored() -> None:
    content = encode_image(draw_picture(40, 40), "JPEG", icc_profile=P3 + bytes(100_000))
    start = content.rindex(b"\xff\xe2")
    size = int.from_bytes(content[start + 2 : start + 4])
    assert list_warning_codes(content[:start] + content[start + 2 + size :]) == [WarningCode.PROFILE_IGNORED]


def test_decompression_bomb_profile_is_ignored() -> None:
    plain_content = encode_image(draw_picture(40, 40), "PNG")
    content = insert_chunk(plain_content, b"iCCP", b"x\0\0" + zlib.compress(bytes(100 << 20), 9))
    assert np.array_equal(decode_default(content).pixels, decode_default(plain_content).pixels)
    assert list_warning_codes(content) == [WarningCode.METADATA_IGNORED]


@given(st.integers(0, len(P3) - 1), st.binary(min_size=1, max_size=8))
def test_damaged_profile_does_not_prevent_decoding(position: int, damage: bytes) -> None:
    profile = bytearray(P3)
    profile[position : position + len(damage)] = damage
    assert decode_default(
        encode_image(draw_picture(40, 40), "WEBP", icc_profile=bytes(profile))
    ).pixels.shape == (32, 32, 3)


def test_number_of_cached_transforms_is_limited() -> None:
    for number in range(50):
        Profile(build_profile(ColourTags(SRGB_PRIMARIES, 1 + number / 50))).get_conversion()
    assert len(colour._cache) <= 16
    with pytest.raises(BadProfile):
        Profile(b"").get_conversion()


# --- colour tags ---------------------------------------------------------------------------------


def insert_chunk(png: bytes, kind: bytes, content: bytes) -> bytes:
    """Return the PNG with a chunk after its header."""
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png[:33] + chunk + png[33:]


PLAIN = encode_image(Image.new("RGB", (40, 40), GREEN), "PNG")


def test_png_code_points_take_precedence() -> None:
    content = insert_chunk(PLAIN, b"cICP", bytes([12, 13, 0, 1]))
    assert is_near(get_middle_pixel(content), profiles.p3_to_srgb(GREEN))
    assert get_middle_pixel(insert_chunk(PLAIN, b"cICP", bytes([1, 13, 0, 1]))) == list(GREEN)
    info = PngInfo()
    info.add(b"cICP", bytes([1, 13, 0, 1]))
    content_with_both = encode_image(Image.new("RGB", (40, 40), GREEN), "PNG", pnginfo=info, icc_profile=P3)
    assert get_middle_pixel(content_with_both) == list(GREEN)


@pytest.mark.parametrize("transfer", [16, 18])
def test_high_dynamic_range_gives_warning(transfer: int) -> None:
    assert list_warning_codes(insert_chunk(PLAIN, b"cICP", bytes([9, transfer, 0, 1]))) == [WarningCode.HDR]


def test_png_gamma_is_applied() -> None:
    linear_content = insert_chunk(PLAIN, b"gAMA", struct.pack(">I", 100_000))
    assert is_near(get_middle_pixel(linear_content), profiles.linear_to_srgb(np.array(GREEN) / 255))
    for gamma in (45_455, 0):
        assert get_middle_pixel(insert_chunk(PLAIN, b"gAMA", struct.pack(">I", gamma))) == list(GREEN)
    assert list_warning_codes(insert_chunk(PLAIN, b"gAMA", bytes(4))) == [WarningCode.PROFILE_IGNORED]
    content_with_both = insert_chunk(linear_content, b"sRGB", b"\0")
    assert get_middle_pixel(content_with_both) == list(GREEN)


def test_png_primaries_are_applied() -> None:
    p3 = [31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000]
    content = insert_chunk(PLAIN, b"cHRM", struct.pack(">8I", *p3))
    assert get_middle_pixel(content) == list(GREEN)  # without a curve they are ignored
    expected = profiles.linear_to_srgb((np.array(GREEN) / 255) ** 2.2 @ profiles.SRGB_FROM_P3.T)
    assert is_near(get_middle_pixel(insert_chunk(content, b"gAMA", struct.pack(">I", 45_455))), expected)
    invalid_content = insert_chunk(PLAIN, b"cHRM", bytes(32))
    assert get_middle_pixel(insert_chunk(invalid_content, b"gAMA", struct.pack(">I", 45_455))) == list(GREEN)


def test_adobe_rgb_in_exif_alone_is_applied() -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0xA001: 65535, 0xA005: {1: "R03", 2: b"0100"}})
    content = encode_image(Image.new("RGB", (40, 40), (144, 176, 90)), "JPEG", quality=98, exif=exif)
    content_with_profile = encode_image(
        Image.new("RGB", (40, 40), (144, 176, 90)), "JPEG", quality=98, icc_profile=build_profile(ADOBE_RGB)
    )
    assert is_near(get_middle_pixel(content), [130, 178, 83], 3)
    assert get_middle_pixel(content) == get_middle_pixel(content_with_profile)


def test_avif_code_points_are_applied() -> None:
    content = encode_image(Image.new("RGB", (40, 40), GREEN), "AVIF", quality=100)
    offset = content.index(b"colrnclx") + 8
    modified_content = content[:offset] + bytes([0, 12, 0, 13]) + content[offset + 4 :]
    assert is_near(get_middle_pixel(modified_content), profiles.p3_to_srgb(get_middle_pixel(content)), 2)


def test_bmp_profile_is_applied() -> None:
    plain_content = encode_image(Image.new("RGB", (40, 40), GREEN), "BMP")
    pixels = plain_content[54:]
    header = (
        struct.pack("<I", 124) + plain_content[18:54] + bytes(16) + b"DEBM" + bytes(48) + struct.pack("<I", 4)
    )
    header += struct.pack("<III", 124 + len(pixels), len(P3), 0)
    content = b"BM" + struct.pack("<IHHI", 14 + len(header) + len(pixels) + len(P3), 0, 0, 14 + 124)
    assert is_near(get_middle_pixel(content + header + pixels + P3), profiles.p3_to_srgb(GREEN))
    assert list_warning_codes(content + header + pixels + P3[:-10]) == [WarningCode.PROFILE_IGNORED]


def test_built_profile_is_readable_by_pillow() -> None:
    profile = ImageCms.ImageCmsProfile(BytesIO(build_profile(ColourTags(SRGB_PRIMARIES, 2.2))))
    assert ImageCms.getProfileDescription(profile).strip() == "colours by their tags"

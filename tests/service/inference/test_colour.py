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

from fovea.service.artifact.contract import Geometry, Interpolation, PixelPath, Resize
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

EXACT = Geometry(32, 32, Resize.SHORTER, 32, Interpolation.BILINEAR, PixelPath.EXACT)
BOTH = [EXACT, replace(EXACT, pixel_path=PixelPath.FAST)]

GREEN = (97, 176, 89)
"""A green in Display P3, which is (62, 178, 76) in sRGB."""


def decode_default(content: bytes, geometry: Geometry = EXACT) -> DecodedImage:
    return decode_image(content, geometry, max_pixels=1_000_000)


def warning_codes(content: bytes) -> list[str]:
    return [warning.code for warning in decode_default(content).warnings]


def middle_pixel(content: bytes, geometry: Geometry = EXACT) -> list[int]:
    pixels: list[int] = decode_default(content, geometry).pixels[16, 16].tolist()
    return pixels


def is_near(one: Any, other: Any, levels: float = 1.5) -> bool:
    return bool(np.abs(np.asarray(one, float) - np.asarray(other, float)).max() <= levels)


@pytest.mark.parametrize("geometry", BOTH, ids=["exact", "fast"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
def test_display_p3_is_converted_in_every_format_that_carries_profiles(kind: str, geometry: Geometry) -> None:
    finest: dict[str, dict[str, Any]] = {
        "WEBP": {"lossless": True}, "JPEG": {"quality": 98}, "AVIF": {"quality": 100}
    }  # fmt: skip
    options = finest.get(kind, {})
    image = Image.new("RGB", (640, 480), GREEN)
    content = encode_image(image, kind, icc_profile=profiles.display_p3_profile(), **options)
    assert is_near(middle_pixel(content, geometry), profiles.p3_to_srgb(GREEN), 3)
    assert not decode_default(content).warnings  # an everyday photograph
    assert is_near(
        decode_upright(content, max_pixels=1_000_000).getpixel((100, 100)), profiles.p3_to_srgb(GREEN), 3
    )


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_palettes_and_transparent_images_are_converted_too(mode: str) -> None:
    image = Image.new("RGB", (40, 40), GREEN)
    changed = image.quantize(4) if mode == "P" else image.convert(mode)
    content = encode_image(changed, "PNG", icc_profile=profiles.display_p3_profile())
    assert is_near(middle_pixel(content), profiles.p3_to_srgb(GREEN))


def test_half_transparent_colours_are_converted_before_they_are_laid_on_white() -> None:
    content = encode_image(
        Image.new("RGBA", (40, 40), (*GREEN, 128)), "PNG", icc_profile=profiles.display_p3_profile()
    )
    assert is_near(middle_pixel(content), profiles.p3_to_srgb(GREEN) * 128 / 255 + 127)


def test_all_colours_are_converted_as_the_book_says() -> None:
    image = draw_picture(32, 32)
    content = encode_image(image, "PNG", icc_profile=profiles.display_p3_profile())
    assert is_near(decode_default(content).pixels, profiles.p3_to_srgb(np.asarray(image)))


def test_the_receipt_names_the_profile() -> None:
    receipt = DecodeTrace()
    content = encode_image(draw_picture(40, 40), "PNG", icc_profile=profiles.display_p3_profile())
    decode_image(content, EXACT, max_pixels=10_000, trace=receipt)
    assert ("colours", "from made for a test to sRGB, by the image's profile") in receipt.steps


def test_a_profile_that_means_srgb_changes_nothing() -> None:
    image = draw_picture(70, 50)
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (made, build_profile(ColourTags(SRGB_PRIMARIES, None))):
        content = encode_image(image, "PNG", icc_profile=profile)
        assert np.array_equal(
            decode_default(content).pixels, decode_default(encode_image(image, "PNG")).pixels
        )
        assert Profile(profile).get_conversion().transform is None


def test_a_grey_profile_is_used() -> None:
    """Return a profile of linear light: half of the light is a light grey on a screen."""
    for image in (Image.new("L", (40, 40), 128), Image.new("LA", (40, 40), (128, 255))):
        content = encode_image(image, "PNG", icc_profile=profiles.grey_profile(1.0))
        assert is_near(middle_pixel(content), profiles.linear_to_srgb([128 / 255] * 3))
    sixteen = Image.fromarray(np.full((40, 40), 128 * 257, np.uint16))
    assert is_near(
        middle_pixel(encode_image(sixteen, "PNG", icc_profile=profiles.grey_profile(1.0))), [188] * 3
    )


def test_a_grey_image_with_a_profile_of_colours_is_grey() -> None:
    content = encode_image(Image.new("L", (40, 40), 100), "JPEG", icc_profile=profiles.display_p3_profile())
    assert is_near(middle_pixel(content), [100] * 3)
    assert not decode_default(content).warnings


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_are_converted_by_their_profile(kind: str) -> None:
    """Return a profile of a press on which only cyan is visible: magenta leaves the paper white."""
    magenta = encode_image(
        Image.new("CMYK", (40, 40), (0, 255, 0, 0)), kind, icc_profile=profiles.cmyk_profile()
    )
    cyan = encode_image(
        Image.new("CMYK", (40, 40), (255, 0, 0, 0)), kind, icc_profile=profiles.cmyk_profile()
    )
    assert is_near(middle_pixel(magenta), [255] * 3, 3)
    assert is_near(middle_pixel(cyan), [0] * 3, 3)
    assert not decode_default(cyan).warnings


def test_inks_without_a_profile_are_told_of() -> None:
    content = encode_image(Image.new("CMYK", (40, 40), (0, 255, 0, 0)), "JPEG")
    assert warning_codes(content) == [WarningCode.NO_PROFILE]


def test_cielab_is_converted() -> None:
    """L 50 % is a grey of 119; Pillow has 128 for the a and b of greys."""
    lab = encode_image(Image.new("LAB", (40, 40), (128, 128, 128)), "TIFF")
    assert is_near(middle_pixel(lab), [119] * 3, 2)


# --- profiles that cannot be used ----------------------------------------------------------------

P3 = profiles.display_p3_profile()


@pytest.mark.parametrize(
    "profile",
    [b"nonsense", P3[:200], P3[:-1500], bytes(3000), P3[:36] + b"xxxx" + P3[40:], P3 + bytes(5 << 20)],
    ids=["text", "header", "cut", "zeros", "signature", "enormous"],
)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_a_profile_that_is_damaged_or_enormous_is_left_out_with_a_warning(kind: str, profile: bytes) -> None:
    image = draw_picture(40, 40)
    plain = encode_image(image, kind)
    content = encode_image(image, kind, icc_profile=profile)
    assert np.array_equal(decode_default(content).pixels, decode_default(plain).pixels)
    assert warning_codes(content) == [WarningCode.PROFILE_IGNORED]


def test_a_profile_of_other_colours_is_left_out_with_a_warning() -> None:
    image = draw_picture(40, 40)
    for profile in (profiles.cmyk_profile(), profiles.grey_profile(1.0)):
        content = encode_image(image, "PNG", icc_profile=profile)
        assert np.array_equal(
            decode_default(content).pixels, decode_default(encode_image(image, "PNG")).pixels
        )
        assert warning_codes(content) == [WarningCode.PROFILE_IGNORED]


def test_a_jpeg_whose_profile_lacks_a_piece_is_answered() -> None:
    content = encode_image(draw_picture(40, 40), "JPEG", icc_profile=P3 + bytes(100_000))
    start = content.rindex(b"\xff\xe2")
    size = int.from_bytes(content[start + 2 : start + 4])
    assert warning_codes(content[:start] + content[start + 2 + size :]) == [WarningCode.PROFILE_IGNORED]


def test_a_profile_that_inflates_to_a_bomb_is_left_out() -> None:
    plain = encode_image(draw_picture(40, 40), "PNG")
    content = insert_chunk(plain, b"iCCP", b"x\0\0" + zlib.compress(bytes(100 << 20), 9))
    assert np.array_equal(decode_default(content).pixels, decode_default(plain).pixels)
    assert warning_codes(content) == [WarningCode.METADATA_IGNORED]


@given(st.integers(0, len(P3) - 1), st.binary(min_size=1, max_size=8))
def test_no_damage_to_a_profile_refuses_an_image(position: int, damage: bytes) -> None:
    profile = bytearray(P3)
    profile[position : position + len(damage)] = damage
    assert decode_default(
        encode_image(draw_picture(40, 40), "WEBP", icc_profile=bytes(profile))
    ).pixels.shape == (32, 32, 3)


def test_few_transforms_are_kept() -> None:
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


def test_the_code_points_of_a_png_are_used_and_come_first() -> None:
    content = insert_chunk(PLAIN, b"cICP", bytes([12, 13, 0, 1]))
    assert is_near(middle_pixel(content), profiles.p3_to_srgb(GREEN))
    assert middle_pixel(insert_chunk(PLAIN, b"cICP", bytes([1, 13, 0, 1]))) == list(GREEN)
    info = PngInfo()
    info.add(b"cICP", bytes([1, 13, 0, 1]))
    both = encode_image(Image.new("RGB", (40, 40), GREEN), "PNG", pnginfo=info, icc_profile=P3)
    assert middle_pixel(both) == list(GREEN)


@pytest.mark.parametrize("transfer", [16, 18])
def test_high_dynamic_range_is_told_of(transfer: int) -> None:
    assert warning_codes(insert_chunk(PLAIN, b"cICP", bytes([9, transfer, 0, 1]))) == [WarningCode.HDR]


def test_the_gamma_of_a_png_is_used() -> None:
    linear = insert_chunk(PLAIN, b"gAMA", struct.pack(">I", 100_000))
    assert is_near(middle_pixel(linear), profiles.linear_to_srgb(np.array(GREEN) / 255))
    for gamma in (45_455, 0):
        assert middle_pixel(insert_chunk(PLAIN, b"gAMA", struct.pack(">I", gamma))) == list(GREEN)
    assert warning_codes(insert_chunk(PLAIN, b"gAMA", bytes(4))) == [WarningCode.PROFILE_IGNORED]
    both = insert_chunk(linear, b"sRGB", b"\0")
    assert middle_pixel(both) == list(GREEN)


def test_the_primaries_of_a_png_are_used() -> None:
    p3 = [31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000]
    content = insert_chunk(PLAIN, b"cHRM", struct.pack(">8I", *p3))
    assert middle_pixel(content) == list(GREEN)  # without a curve they are ignored
    wanted = profiles.linear_to_srgb((np.array(GREEN) / 255) ** 2.2 @ profiles.SRGB_FROM_P3.T)
    assert is_near(middle_pixel(insert_chunk(content, b"gAMA", struct.pack(">I", 45_455))), wanted)
    senseless = insert_chunk(PLAIN, b"cHRM", bytes(32))
    assert middle_pixel(insert_chunk(senseless, b"gAMA", struct.pack(">I", 45_455))) == list(GREEN)


def test_a_camera_that_says_adobe_rgb_by_exif_alone_is_understood() -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0xA001: 65535, 0xA005: {1: "R03", 2: b"0100"}})
    content = encode_image(Image.new("RGB", (40, 40), (144, 176, 90)), "JPEG", quality=98, exif=exif)
    as_profile = encode_image(
        Image.new("RGB", (40, 40), (144, 176, 90)), "JPEG", quality=98, icc_profile=build_profile(ADOBE_RGB)
    )
    assert is_near(middle_pixel(content), [130, 178, 83], 3)
    assert middle_pixel(content) == middle_pixel(as_profile)


def test_the_code_points_of_an_avif_are_used() -> None:
    content = encode_image(Image.new("RGB", (40, 40), GREEN), "AVIF", quality=100)
    place = content.index(b"colrnclx") + 8
    changed = content[:place] + bytes([0, 12, 0, 13]) + content[place + 4 :]
    assert is_near(middle_pixel(changed), profiles.p3_to_srgb(middle_pixel(content)), 2)


def test_the_profile_of_a_bitmap_is_used() -> None:
    old = encode_image(Image.new("RGB", (40, 40), GREEN), "BMP")
    pixels = old[54:]
    header = struct.pack("<I", 124) + old[18:54] + bytes(16) + b"DEBM" + bytes(48) + struct.pack("<I", 4)
    header += struct.pack("<III", 124 + len(pixels), len(P3), 0)
    content = b"BM" + struct.pack("<IHHI", 14 + len(header) + len(pixels) + len(P3), 0, 0, 14 + 124)
    assert is_near(middle_pixel(content + header + pixels + P3), profiles.p3_to_srgb(GREEN))
    assert warning_codes(content + header + pixels + P3[:-10]) == [WarningCode.PROFILE_IGNORED]


def test_made_profiles_are_read_by_others_too() -> None:
    opened = ImageCms.ImageCmsProfile(BytesIO(build_profile(ColourTags(SRGB_PRIMARIES, 2.2))))
    assert ImageCms.getProfileDescription(opened).strip() == "colours by their tags"

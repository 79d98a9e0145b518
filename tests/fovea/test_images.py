"""PIL images and arrays get the answers of the files that hold the same pixels."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

import fovea
from fovea.errors import BadImage, TooManyPixels
from fovea.images import encode_source
from fovea.service.inference.preprocess import decode_upright
from tests.pictures import draw_picture, encode_image, make_jpeg, make_png_header
from tests.profiles import display_p3_profile

PICTURE = draw_picture(60, 40)
GREY16 = np.arange(60 * 40, dtype=np.uint16).reshape(40, 60) * 27


def to_pixels(source: Any) -> Any:
    """Return the whole image as the decoder of the service sees it, uint8 (height, width, 3)."""
    encoded = encode_source(source, max_bytes=1 << 30)
    return np.asarray(decode_upright(encoded, max_pixels=1 << 30))


@pytest.fixture(scope="module")
def model(small_zoo: Path) -> fovea.Model:
    return fovea.load(small_zoo)


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(draw_picture(60, 40, 1).convert("L"))
    return image


def test_array_is_rgb_and_its_own_pixels() -> None:
    array = np.asarray(PICTURE)
    assert np.array_equal(to_pixels(array), array)
    assert np.array_equal(to_pixels(np.asfortranarray(array)), array)
    assert np.array_equal(to_pixels(array[::-1, ::2]), array[::-1, ::2])
    assert np.array_equal(to_pixels(array[..., ::-1]), array[..., ::-1])  # OpenCV's order, put right


@pytest.mark.parametrize(
    ("array", "image"),
    [
        (np.asarray(PICTURE.convert("L")), PICTURE.convert("L")),
        (np.asarray(PICTURE.convert("L"))[..., None], PICTURE.convert("L")),
        (np.asarray(with_alpha(PICTURE.copy())), with_alpha(PICTURE.copy())),
        (GREY16, Image.fromarray(GREY16)),
    ],
    ids=["grey", "grey with an axis", "opacity", "16 bits"],
)
def test_other_arrays_follow_the_rules_of_files(array: Any, image: Image.Image, model: fovea.Model) -> None:
    in_file = model.classify(encode_image(image, "PNG")).to_dict()
    assert model.classify(array).to_dict() == {**in_file, "image": {**in_file["image"], "format": "TIFF"}}


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (PICTURE, "PNG"),
        (PICTURE.convert("1"), "PNG"),
        (PICTURE.convert("L"), "PNG"),
        (with_alpha(PICTURE.convert("L")), "PNG"),
        (PICTURE.quantize(16), "PNG"),
        (with_alpha(PICTURE.copy()), "PNG"),
        (with_alpha(PICTURE.copy()).quantize(16), "PNG"),
        (Image.fromarray(GREY16), "PNG"),
        (PICTURE.convert("CMYK"), "TIFF"),
    ],
    ids=["RGB", "1", "L", "LA", "P", "RGBA", "P of RGBA", "I;16", "CMYK"],
)
def test_pil_image_gets_the_answer_of_its_file(image: Image.Image, kind: str, model: fovea.Model) -> None:
    in_file = model.classify(encode_image(image, kind)).to_dict()
    assert model.classify(image).to_dict() == {**in_file, "image": {**in_file["image"], "format": "TIFF"}}


@pytest.mark.parametrize("mode", ["HSV", "YCbCr", "RGBX", "RGBa", "PA"])
def test_modes_without_a_file_are_converted_like_pillow_does(mode: str) -> None:
    image = (with_alpha(PICTURE.copy()) if mode == "RGBa" else PICTURE).convert(mode)
    opaque = image.convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), opaque).convert("RGB")
    assert np.array_equal(to_pixels(image), np.asarray(expected))


def test_transparent_colour_becomes_white() -> None:
    image = PICTURE.quantize(4)
    image.info["transparency"] = 2
    assert np.array_equal(to_pixels(image), to_pixels(encode_image(image, "PNG", transparency=2)))
    assert (to_pixels(image)[np.asarray(image) == 2] == 255).all()


def test_opened_file_keeps_orientation_and_profile() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode_image(PICTURE, "PNG", exif=exif, icc_profile=display_p3_profile())
    opened = Image.open(BytesIO(encoded))
    assert np.array_equal(to_pixels(opened), to_pixels(encoded))
    assert to_pixels(opened).shape == (60, 40, 3)
    assert not np.array_equal(to_pixels(opened), to_pixels(encode_image(PICTURE, "PNG", exif=exif)))
    assert np.array_equal(to_pixels(ImageOps.exif_transpose(opened)), to_pixels(encoded))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            np.zeros((4, 4, 3), np.float32),
            "an array of type float32 is not served, because its range is unknown",
        ),
        (np.zeros((4, 4), bool), "an array of type bool is not served"),
        (np.zeros((4, 4, 3), np.uint16), "a uint16 array of colours is not served; pass uint8"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\) is not an image.*the channels come last"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"shape \(2, 4, 4, 3\) is not an image.*several images as a list"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\) is not an image"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\) is not an image"),
        (np.zeros(4, np.uint8), r"shape \(4,\) is not an image"),
        (np.zeros((), np.uint8), r"shape \(\) is not an image"),
        (PICTURE.convert("F"), "images of mode F cannot be converted to 8-bit RGB"),
        (PICTURE.convert("I"), "images of mode I cannot be converted to 8-bit RGB"),
        (Image.new("RGB", (0, 4)), "an image of 0 x 4 px has no pixels"),
    ],
)
def test_pixels_without_a_rule_are_refused(value: Any, sentence: str, model: fovea.Model) -> None:
    with pytest.raises(BadImage, match=sentence):
        model.classify(value)
    (outcome,) = model.classify([value], on_error="return")
    assert isinstance(outcome, BadImage)


@pytest.mark.parametrize(
    ("make_value", "sentence"),
    [
        (lambda: None, "NoneType is not an image; pass a path, bytes, a PIL image or a uint8 array"),
        (lambda: 5, "int is not an image"),
        (lambda: [b"", 5], r"images\[1\]: int is not an image"),
        (lambda: BytesIO(b""), "pass the bytes that its `read\\(\\)` returns"),
        (lambda: {"a": b""}, "dict is not an image"),
    ],
    ids=["None", "int", "in a list", "file", "dict"],
)
def test_values_that_are_no_images_are_type_errors(
    make_value: Callable[[], Any], sentence: str, model: fovea.Model
) -> None:
    with pytest.raises(TypeError, match=sentence):
        model.classify(make_value(), on_error="return")


def test_damaged_and_huge_pil_images_are_refused_before_they_are_decoded(
    model: fovea.Model, tmp_path: Path
) -> None:
    content = make_jpeg(600, 400)
    with pytest.raises(BadImage, match="the PIL image cannot be decoded"):
        model.classify(Image.open(BytesIO(content[: len(content) // 2])))
    with pytest.raises(TooManyPixels, match="image is 10000 x 10000 px; at most 50 MP"):
        model.classify(Image.open(BytesIO(make_png_header(10_000, 10_000))))
    huge = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (1_000_000, 1_000_000, 3))  # 3 TB
    with pytest.raises(TooManyPixels, match="image is 1000000 x 1000000 px; at most 50 MP"):
        model.classify(huge)


def test_bytes_may_be_any_buffer(model: fovea.Model) -> None:
    content = make_jpeg()
    expected = model.classify(content)
    assert model.classify(bytearray(content)) == model.classify(memoryview(content)) == expected


def test_opened_image_may_be_shared_between_threads(tmp_path: Path) -> None:
    """Pillow reads the file at the first use, and all threads use its one position."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(make_jpeg(1600, 1200, 1))
    with Image.open(path) as image:
        expected = to_pixels(image)
    for _ in range(4):
        with Image.open(path) as image, ThreadPoolExecutor(4) as pool:
            for pixels in pool.map(to_pixels, [image] * 4):
                assert np.array_equal(pixels, expected)

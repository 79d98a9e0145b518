"""Boxes cut out of the upright image: their pixels, their checks, and the memory for them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from fovea.service.artifact.contract import Geometry, Interpolation, PixelPath
from fovea.service.artifact.geometry import find_last_size
from fovea.service.artifact.geometry_text import parse_steps
from fovea.service.errors import BadBox, BadImage, RequestError, TooManyPixels
from fovea.service.inference.boxes import Boxes, check_boxes, check_inside
from fovea.service.inference.decode_cost import estimate_cost
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.image_opening import open_image
from fovea.service.inference.peak_memory import estimate_boxes_peak_bytes, estimate_source_peak_bytes
from fovea.service.inference.preprocess import UprightImage, decode_image, decode_upright, open_upright
from fovea.service.settings import Settings
from tests.pictures import draw_picture, encode_image, make_jpeg, make_png16, make_png_header
from tests.servers import ROOT

MAX_PIXELS = 50_000_000

EXACT = Geometry.cropped(32, 32, 40, Interpolation.BICUBIC, PixelPath.EXACT)
STEPS = parse_steps("crop aspect 24, resize stretch 24 bilinear no-antialias")
FAST = replace(EXACT, pixel_path=PixelPath.FAST)
GEOMETRIES = [EXACT, FAST, Geometry(*find_last_size(STEPS), STEPS, PixelPath.EXACT)]

BOXES: Boxes = (
    (0, 0, 160, 240),
    (13, 27, 134, 181),
    (100, 100, 101, 101),
    (159, 0, 160, 240),
    (0, 239, 160, 240),
    (90, 0, 160, 70),
)
"""Boxes in an upright image of 160 x 240: the whole image, a part, a pixel, a column, a row, a square."""


def make_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@cache
def make_image(kind: str, mode: str, orientation: int) -> bytes:
    """Return an image that is 160 x 240 once it is upright; it is noisy, so that any other pixel shows."""
    size = (240, 160) if orientation > 4 else (160, 240)
    noise = np.random.default_rng(1).integers(-30, 30, (size[1], size[0], 3))
    picture = Image.fromarray((np.asarray(draw_picture(*size)) + noise).clip(0, 255).astype(np.uint8))
    if mode == "RGBA":
        picture.putalpha(Image.linear_gradient("L").resize(size))
    image = picture.convert(mode)
    return encode_image(image, kind, exif=make_exif(orientation))


CASES = [
    *(("JPEG", "RGB", orientation) for orientation in range(1, 9)),
    *(("JPEG", "CMYK", 1), ("JPEG", "L", 3), ("PNG", "RGBA", 6), ("PNG", "P", 1), ("WEBP", "RGB", 8)),
    *(("TIFF", "RGB", 6), ("AVIF", "RGB", 1), ("BMP", "RGB", 1)),
]


@pytest.mark.parametrize(("kind", "mode", "orientation"), CASES)
def test_pixels_of_a_box_are_those_of_the_region_saved_as_a_png(
    kind: str, mode: str, orientation: int
) -> None:
    image = make_image(kind, mode, orientation)
    upright = decode_upright(image, max_pixels=MAX_PIXELS)
    assert upright.size == (160, 240)
    parts = [encode_image(upright.crop(box), "PNG") for box in BOXES]
    for geometry in GEOMETRIES:
        with open_upright(image, geometry, BOXES, max_pixels=MAX_PIXELS) as upright_image:
            for box, part in zip(BOXES, parts, strict=True):
                expected = decode_image(part, geometry, max_pixels=MAX_PIXELS)
                decoded = upright_image.decode_box(box, geometry)
                assert np.array_equal(decoded.pixels, expected.pixels)
                assert (decoded.width, decoded.height) == (expected.width, expected.height)
                assert decoded.warnings == expected.warnings


def test_large_jpeg_is_not_decoded_at_a_fraction_of_its_size() -> None:
    image, box = make_jpeg(1600, 1200, quality=95), (100, 200, 164, 264)
    upright = decode_upright(image, max_pixels=MAX_PIXELS)
    expected = decode_image(encode_image(upright.crop(box), "PNG"), FAST, max_pixels=MAX_PIXELS)
    with open_upright(image, FAST, [box], max_pixels=MAX_PIXELS) as upright_image:
        assert upright_image.image.size == (1600, 1200)
        assert np.array_equal(upright_image.decode_box(box, FAST).pixels, expected.pixels)


def test_box_is_cut_where_pillow_cuts_it() -> None:
    """The other test takes the upright image from the decoder itself."""
    image = make_image("PNG", "RGB", 6)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(image)))
    with open_upright(image, EXACT, BOXES, max_pixels=MAX_PIXELS) as upright_image:
        for box in BOXES:
            part = encode_image(upright.crop(box), "PNG")
            expected = decode_image(part, EXACT, max_pixels=MAX_PIXELS)
            assert np.array_equal(upright_image.decode_box(box, EXACT).pixels, expected.pixels)


def test_values_of_16_bits_are_rounded_before_the_box_is_cut() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (60, 80, 3), dtype=np.uint16)
    rounded = Image.fromarray(np.round(values / 257).astype(np.uint8)).crop((5, 6, 70, 50))
    with open_upright(make_png16(values), EXACT, (), max_pixels=MAX_PIXELS) as upright_image:
        pixels = upright_image.decode_box((5, 6, 70, 50), EXACT).pixels
    expected = decode_image(encode_image(rounded, "PNG"), EXACT, max_pixels=MAX_PIXELS).pixels
    assert np.array_equal(pixels, expected)


def test_damage_that_no_pixel_needs_is_repaired() -> None:
    image = make_jpeg(600, 400)
    with open_upright(image[:-2], EXACT, (), max_pixels=MAX_PIXELS) as damaged:
        assert [one.code for one in damaged.warnings] == ["end_missing"]
        with open_upright(image, EXACT, (), max_pixels=MAX_PIXELS) as intact:
            box = (10, 10, 300, 300)
            pixels = damaged.decode_box(box, EXACT).pixels
            assert np.array_equal(pixels, intact.decode_box(box, EXACT).pixels)
    with pytest.raises(BadImage), open_upright(image[:2000], EXACT, (), max_pixels=MAX_PIXELS):
        pass


@pytest.mark.parametrize("box", [(0, 0, 0, 5), (3, 3, 2, 5), (-1, 0, 5, 5), (0, 0, 11, 5), (0, 0, 5, 21)])
def test_box_must_have_pixels_and_be_inside(box: Any) -> None:
    check_inside([(0, 0, 10, 20), (9, 19, 10, 20)], (10, 20))
    with pytest.raises(BadBox, match=rf"box 1, \[{', '.join(map(str, box))}\].*10 x 20 px"):
        check_inside([(0, 0, 10, 20), box], (10, 20))


def test_boxes_of_numpy_become_plain_integers() -> None:
    boxes = check_boxes(np.array([[1, 2, 3, 4]], np.uint16))
    assert boxes == ((1, 2, 3, 4),)
    assert [type(one) for one in boxes[0]] == [int] * 4
    assert check_boxes(iter([range(4)])) == ((0, 1, 2, 3),)


def test_integer_that_python_does_not_write_is_refused() -> None:
    with pytest.raises(ValueError, match="box 0 is a value of the type list; boxes are each four integers"):
        check_boxes([[0, 0, 1, 10**5000]])


def test_memory_is_reserved_until_the_last_box() -> None:
    image, memory = make_jpeg(600, 400), DecodeMemory(1 << 28)
    with open_for_boxes(image, memory):
        assert memory.bytes_in_use > 600 * 400 * 4
    assert memory.bytes_in_use == 0
    for wrong_image in (image[:2000], b"no image"):
        with pytest.raises(RequestError), open_for_boxes(wrong_image, memory):
            pass
        assert memory.bytes_in_use == 0
    with pytest.raises(TooManyPixels), open_for_boxes(image, DecodeMemory(600 * 400 * 4)):
        pass


def open_for_boxes(image: bytes, memory: DecodeMemory) -> AbstractContextManager[UprightImage]:
    return open_upright(image, EXACT, BOXES, max_pixels=MAX_PIXELS, memory=memory)


@pytest.mark.parametrize(("kind", "mode", "orientation"), CASES)
def test_service_reserves_at_least_what_the_runner_needs(kind: str, mode: str, orientation: int) -> None:
    """Otherwise the runner keeps all other runners from large images meanwhile."""
    image = make_image(kind, mode, orientation)
    for geometry in (EXACT, FAST):
        for boxes in (BOXES, BOXES[1:2], ()):
            source = open_image(kind, image, MAX_PIXELS, [])
            cost = estimate_cost(image, geometry, max_pixels=MAX_PIXELS, boxes=boxes)
            assert cost is not None
            needed_bytes = estimate_boxes_peak_bytes(source, geometry, boxes)
            assert cost.memory_bytes >= needed_bytes
            whole_bytes = estimate_source_peak_bytes(source, source.image_file.size, None)
            areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
            assert needed_bytes >= whole_bytes + 4 * max(areas, default=0)


def test_jpeg_with_boxes_costs_as_much_as_its_full_size() -> None:
    image = make_jpeg(4000, 3000)
    drafted, whole = (
        estimate_cost(image, FAST, max_pixels=MAX_PIXELS, boxes=boxes) for boxes in (None, ((0, 0, 1, 1),))
    )
    assert drafted and whole
    assert whole.seconds > 2 * drafted.seconds
    assert whole.memory_bytes > 10 * drafted.memory_bytes


def test_largest_image_with_a_box_of_its_size_fits_by_default() -> None:
    limit = Settings(models=ROOT / "zoo").decode_bytes
    header = make_png_header(7_071, 7_071)
    source = open_image("PNG", header, MAX_PIXELS, [])
    assert estimate_boxes_peak_bytes(source, EXACT, [(0, 0, 7_071, 7_071)]) <= limit
    # A box that is larger than any image is refused later, and must not reserve more.
    assert estimate_boxes_peak_bytes(source, EXACT, [(-(2**31), 0, 2**31 - 1, 2**31 - 1)]) <= limit


@pytest.mark.parametrize("size", [(20_000, 100), (100, 20_000)])
def test_box_outside_an_elongated_image_needs_no_memory(size: tuple[int, int]) -> None:
    """It would otherwise be refused as an image that is too large to decode."""
    image, memory = encode_image(Image.new("L", size), "PNG"), DecodeMemory(1 << 26)
    for box in ((0, 0, 20_000, 20_000), (0, 0, 101, 20_000), (5, 5, 5, 2**31 - 1)):
        with open_upright(image, EXACT, [box], max_pixels=MAX_PIXELS, memory=memory) as upright:
            assert upright.image.size == size
            with pytest.raises(BadBox):
                check_inside([box], size)

"""The position of a heat map on the photo, and the overlay."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fovea.service.artifact.contract import Geometry, Interpolation, PixelPath, Resize
from fovea.service.explain.heatmap import (
    Heatmap,
    InputRegion,
    compute_even_centres,
    compute_field_centres,
    compute_grid_size,
    draw_overlay,
    scale_to_unit,
)
from fovea.service.explain.receptive_field import Span
from fovea.service.inference.decode_trace import DecodeTrace
from fovea.service.inference.preprocess import decode_image
from tests.pictures import encode_image

SHORTER = Geometry(32, 32, Resize.SHORTER, 40, Interpolation.BILINEAR, PixelPath.EXACT)
STRETCH = Geometry(32, 48, Resize.STRETCH, 0, Interpolation.BILINEAR, PixelPath.EXACT)


def draw_spot(width: int, height: int, at: tuple[int, int]) -> Image.Image:
    """A white spot on black."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[max(0, at[1] - 12) : at[1] + 12, max(0, at[0] - 12) : at[0] + 12] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("geometry", [SHORTER, STRETCH])
@pytest.mark.parametrize("path", [PixelPath.EXACT, PixelPath.FAST])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("at", [(150, 80), (220, 150), (190, 110)])
def test_what_is_bright_in_the_input_is_bright_in_the_photo(
    geometry: Geometry, path: PixelPath, orientation: int, at: tuple[int, int]
) -> None:
    """With brightness as the map, the hottest place is the bright spot after EXIF, resize and crop."""
    geometry = Geometry(**{**geometry.__dict__, "pixel_path": path})
    photo = draw_spot(400, 240, at)
    turn = {
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
    }
    stored = photo.transpose(turn[orientation]) if orientation in turn else photo
    exif = Image.Exif()
    exif[0x0112] = orientation
    receipt = DecodeTrace()
    decoded = decode_image(
        encode_image(stored, "JPEG", exif=exif, quality=95), geometry, max_pixels=10**6, trace=receipt
    )
    assert (decoded.width, decoded.height) == (400, 240)
    values = decoded.pixels.mean(axis=2).astype(np.float32)
    heat = Heatmap(
        values,
        compute_even_centres(geometry.height, geometry.height),
        compute_even_centres(geometry.width, geometry.width),
    )
    place = InputRegion((400, 240), receipt.crop_box, (geometry.height, geometry.width))
    over = heat.project_to_grid(place, (240, 400))
    rows, columns = np.nonzero(over > 0.5)
    assert np.mean(columns) + 0.5 == pytest.approx(at[0], abs=2.5)
    assert np.mean(rows) + 0.5 == pytest.approx(at[1], abs=2.5)


@settings(deadline=None)  # others may be at work too
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([SHORTER, STRETCH]))
def test_the_box_is_inside_the_photo_and_has_the_crops_shape(
    width: int, height: int, geometry: Geometry
) -> None:
    if width * height > 200_000:
        width, height = width % 400 + 1, height % 400 + 1
    receipt = DecodeTrace()
    decode_image(
        encode_image(Image.new("RGB", (width, height)), "PNG"), geometry, max_pixels=10**7, trace=receipt
    )
    left, top, right, bottom = receipt.crop_box
    assert -1e-6 <= left < right <= width + 1e-6
    assert -1e-6 <= top < bottom <= height + 1e-6
    if geometry.resize is Resize.STRETCH:
        assert receipt.crop_box == pytest.approx((0, 0, width, height))


def test_no_receipt_costs_no_pixel() -> None:
    content = encode_image(draw_spot(400, 240, (150, 80)), "JPEG")
    told = decode_image(content, SHORTER, max_pixels=10**6, trace=DecodeTrace()).pixels
    assert (told == decode_image(content, SHORTER, max_pixels=10**6).pixels).all()


def test_places_lie_where_they_look() -> None:
    """An input of 32 pixels has three places of 8 pixels each, as after pooling that rounds down."""
    centres = compute_field_centres(Span(8, -21, 29), 3)
    assert centres.tolist() == [4.5, 12.5, 20.5]
    heat = Heatmap(np.eye(3, dtype=np.float32)[2:], np.array([16.0]), centres)
    over = heat.project_to_grid(InputRegion((32, 32), (0, 0, 32, 32), (32, 32)), (32, 32))
    assert over[16].argmax() == 20
    assert over[16, 31] < 0.2  # it does not reach to the edge


def test_what_the_model_has_not_seen_has_no_heat() -> None:
    heat = Heatmap(np.ones((4, 4), np.float32), compute_even_centres(4, 32), compute_even_centres(4, 32))
    over = heat.project_to_grid(InputRegion((100, 50), (25, 0, 75, 50), (32, 32)), (50, 100))
    assert (over[:, 25:75] == 1).all()
    assert not over[:, :25].any()
    assert not over[:, 75:].any()


@pytest.mark.parametrize("size", [(5000, 20), (20, 5000)])
def test_a_strip_has_heat_where_the_model_looked(size: tuple[int, int]) -> None:
    """The seen part is narrower than a cell of the grid."""
    receipt = DecodeTrace()
    decode_image(encode_image(Image.new("RGB", size), "PNG"), SHORTER, max_pixels=10**6, trace=receipt)
    heat = Heatmap(np.ones((4, 4), np.float32), compute_even_centres(4, 32), compute_even_centres(4, 32))
    over = heat.project_to_grid(InputRegion(size, receipt.crop_box, (32, 32)), compute_grid_size(size, 96))
    assert over.max() == 1
    assert np.count_nonzero(over) == 1
    assert abs(int(over.argmax()) - 47.5) < 1


def test_scaling_leaves_out_what_speaks_against() -> None:
    assert scale_to_unit(np.array([[-3.0, 1.0, 2.0]], np.float32)).tolist() == [[0, 0.5, 1]]
    assert scale_to_unit(np.array([[-3.0, -1.0]], np.float32)).tolist() == [[0, 0]]


@settings(deadline=None)  # others may be at work too
@given(st.integers(1, 9000), st.integers(1, 9000))
def test_a_grid_has_the_photos_shape(width: int, height: int) -> None:
    rows, columns = compute_grid_size((width, height), 96)
    assert 1 <= rows <= 96
    assert 1 <= columns <= 96
    assert (rows, columns) == (height, width) or max(rows, columns) == 96


def test_an_overlay_leaves_cold_places_as_they_are_and_darkens_what_was_cropped() -> None:
    photo = Image.new("RGB", (40, 200), (100, 100, 100))
    heat = Heatmap(
        np.array([[0.0, 0.0], [0.0, 3.0]], np.float32),
        compute_even_centres(2, 32),
        compute_even_centres(2, 32),
    )
    place = InputRegion((40, 200), (10, 0, 30, 180), (32, 32))
    with Image.open(BytesIO(draw_overlay(photo, heat, place))) as image:
        pixels = np.asarray(image)
    assert pixels[20, 12].tolist() == [100, 100, 100]
    for row, column in ((20, 5), (20, 35), (190, 20)):
        assert pixels[row, column].tolist() == [40, 40, 40]
    assert pixels[160, 27].sum() > 500  # the hottest colour is light


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (130, 129)])
def test_an_overlay_of_nothing_is_the_photo_bit_for_bit(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    heat = Heatmap(np.zeros((2, 2), np.float32), compute_even_centres(2, 32), compute_even_centres(2, 32))
    content = draw_overlay(Image.fromarray(pixels), heat, InputRegion(size, (0, 0, *size), (32, 32)))
    with Image.open(BytesIO(content)) as image:
        image.verify()
    with Image.open(BytesIO(content)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", size)
        assert (np.asarray(image) == pixels).all()


@settings(deadline=None)  # others may be at work too
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_bands_are_the_whole(width: int, height: int, rows: int) -> None:
    random = np.random.default_rng(width)
    heat = Heatmap(
        random.normal(0, 1, (3, 4)).astype(np.float32),
        compute_even_centres(3, 32),
        compute_even_centres(4, 32),
    )
    place = InputRegion((width, height), (0, 0, width, height), (32, 32))
    bands = list(heat.iterate_bands(place, rows))
    assert [first for first, _ in bands] == list(range(0, height, rows))
    whole = np.concatenate([band for _, band in bands])
    assert whole == pytest.approx(heat.project_to_grid(place, (height, width)), abs=1e-5)

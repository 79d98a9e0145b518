"""The position of a heat map on the photo, and the overlay."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fovea.service.artifact.contract import Geometry, Interpolation, PixelPath
from fovea.service.artifact.geometry_text import parse_steps
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

SHORTER = Geometry.cropped(32, 32, 40, Interpolation.BILINEAR, PixelPath.EXACT)
STRETCH = Geometry.stretched(32, 48, Interpolation.BILINEAR, PixelPath.EXACT)
LETTERBOX = Geometry(
    48,
    40,
    parse_steps("resize contain 36 bilinear round, pad 48 x 40 fill 9/9/9"),
    PixelPath.EXACT,
)
ASPECT = Geometry(
    32, 48, parse_steps("crop aspect 1 unrounded, resize stretch 32 x 48 bilinear"), PixelPath.EXACT
)


def draw_spot(width: int, height: int, centre: tuple[int, int]) -> Image.Image:
    """Draw a white spot on black."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[max(0, centre[1] - 12) : centre[1] + 12, max(0, centre[0] - 12) : centre[0] + 12] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("geometry", [SHORTER, STRETCH, LETTERBOX, ASPECT])
@pytest.mark.parametrize("path", [PixelPath.EXACT, PixelPath.FAST])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("centre", [(150, 80), (220, 150), (190, 110)])
def test_heat_is_projected_to_its_place_in_the_photo(
    geometry: Geometry, path: PixelPath, orientation: int, centre: tuple[int, int]
) -> None:
    """With brightness as the map, the hottest place is the bright spot after EXIF, resize and crop."""
    geometry = replace(geometry, pixel_path=path)
    photo = draw_spot(400, 240, centre)
    rotations = {
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
    }
    stored_photo = photo.transpose(rotations[orientation]) if orientation in rotations else photo
    exif = Image.Exif()
    exif[0x0112] = orientation
    trace = DecodeTrace()
    decoded = decode_image(
        encode_image(stored_photo, "JPEG", exif=exif, quality=95), geometry, max_pixels=10**6, trace=trace
    )
    assert (decoded.width, decoded.height) == (400, 240)
    values = decoded.pixels.mean(axis=2).astype(np.float32)
    heat = Heatmap(
        values,
        compute_even_centres(geometry.height, geometry.height),
        compute_even_centres(geometry.width, geometry.width),
    )
    region = InputRegion((400, 240), trace.crop_box, (geometry.height, geometry.width))
    grid = heat.project_to_grid(region, (240, 400))
    rows, columns = np.nonzero(grid > 0.5)
    assert np.mean(columns) + 0.5 == pytest.approx(centre[0], abs=2.5)
    assert np.mean(rows) + 0.5 == pytest.approx(centre[1], abs=2.5)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([SHORTER, STRETCH]))
def test_crop_box_lies_inside_the_photo(width: int, height: int, geometry: Geometry) -> None:
    if width * height > 200_000:
        width, height = width % 400 + 1, height % 400 + 1
    trace = DecodeTrace()
    decode_image(
        encode_image(Image.new("RGB", (width, height)), "PNG"), geometry, max_pixels=10**7, trace=trace
    )
    left, top, right, bottom = trace.crop_box
    assert -1e-6 <= left < right <= width + 1e-6
    assert -1e-6 <= top < bottom <= height + 1e-6
    if geometry is STRETCH:
        assert trace.crop_box == pytest.approx((0, 0, width, height))


def test_decode_trace_does_not_change_pixels() -> None:
    content = encode_image(draw_spot(400, 240, (150, 80)), "JPEG")
    traced_pixels = decode_image(content, SHORTER, max_pixels=10**6, trace=DecodeTrace()).pixels
    assert (traced_pixels == decode_image(content, SHORTER, max_pixels=10**6).pixels).all()


def test_heat_lies_at_centres_of_receptive_fields() -> None:
    """An input of 32 pixels has three places of 8 pixels each, as after pooling that rounds down."""
    centres = compute_field_centres(Span(8, -21, 29), 3)
    assert centres.tolist() == [4.5, 12.5, 20.5]
    heat = Heatmap(np.eye(3, dtype=np.float32)[2:], np.array([16.0]), centres)
    grid = heat.project_to_grid(InputRegion((32, 32), (0, 0, 32, 32), (32, 32)), (32, 32))
    assert grid[16].argmax() == 20
    assert grid[16, 31] < 0.2  # it does not reach to the edge


@pytest.mark.parametrize("size", [(90, 60), (60, 90)])
def test_photo_inside_a_border_is_painted_whole(size: tuple[int, int]) -> None:
    photo = Image.new("RGB", size, (100, 100, 100))
    trace = DecodeTrace()
    decode_image(encode_image(photo, "PNG"), LETTERBOX, max_pixels=10**6, trace=trace)
    heat = Heatmap(np.zeros((4, 4), np.float32), compute_even_centres(4, 48), compute_even_centres(4, 40))
    overlay = draw_overlay(photo, heat, InputRegion(size, trace.crop_box, (48, 40)))
    assert (np.asarray(Image.open(BytesIO(overlay))) == 100).all()  # no part is darkened


def test_cropped_area_has_no_heat() -> None:
    heat = Heatmap(np.ones((4, 4), np.float32), compute_even_centres(4, 32), compute_even_centres(4, 32))
    grid = heat.project_to_grid(InputRegion((100, 50), (25, 0, 75, 50), (32, 32)), (50, 100))
    assert (grid[:, 25:75] == 1).all()
    assert not grid[:, :25].any()
    assert not grid[:, 75:].any()


@pytest.mark.parametrize("size", [(5000, 20), (20, 5000)])
def test_narrow_photo_has_heat_in_the_seen_cell(size: tuple[int, int]) -> None:
    """The seen part is narrower than a cell of the grid."""
    trace = DecodeTrace()
    decode_image(encode_image(Image.new("RGB", size), "PNG"), SHORTER, max_pixels=10**6, trace=trace)
    heat = Heatmap(np.ones((4, 4), np.float32), compute_even_centres(4, 32), compute_even_centres(4, 32))
    grid = heat.project_to_grid(InputRegion(size, trace.crop_box, (32, 32)), compute_grid_size(size, 96))
    assert grid.max() == 1
    assert np.count_nonzero(grid) == 1
    assert abs(int(grid.argmax()) - 47.5) < 1


def test_scaling_sets_negative_values_to_zero() -> None:
    assert scale_to_unit(np.array([[-3.0, 1.0, 2.0]], np.float32)).tolist() == [[0, 0.5, 1]]
    assert scale_to_unit(np.array([[-3.0, -1.0]], np.float32)).tolist() == [[0, 0]]


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_grid_has_photo_size_or_maximum_size(width: int, height: int) -> None:
    rows, columns = compute_grid_size((width, height), 96)
    assert 1 <= rows <= 96
    assert 1 <= columns <= 96
    assert (rows, columns) == (height, width) or max(rows, columns) == 96


def test_overlay_keeps_cold_areas_and_darkens_cropped_ones() -> None:
    photo = Image.new("RGB", (40, 200), (100, 100, 100))
    heat = Heatmap(
        np.array([[0.0, 0.0], [0.0, 3.0]], np.float32),
        compute_even_centres(2, 32),
        compute_even_centres(2, 32),
    )
    region = InputRegion((40, 200), (10, 0, 30, 180), (32, 32))
    with Image.open(BytesIO(draw_overlay(photo, heat, region))) as image:
        pixels = np.asarray(image)
    assert pixels[20, 12].tolist() == [100, 100, 100]
    for row, column in ((20, 5), (20, 35), (190, 20)):
        assert pixels[row, column].tolist() == [40, 40, 40]
    assert pixels[160, 27].sum() > 500  # the hottest colour is light


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (130, 129)])
def test_overlay_without_heat_equals_the_photo(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    heat = Heatmap(np.zeros((2, 2), np.float32), compute_even_centres(2, 32), compute_even_centres(2, 32))
    content = draw_overlay(Image.fromarray(pixels), heat, InputRegion(size, (0, 0, *size), (32, 32)))
    with Image.open(BytesIO(content)) as image:
        image.verify()
    with Image.open(BytesIO(content)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", size)
        assert (np.asarray(image) == pixels).all()


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_bands_add_up_to_whole_projection(width: int, height: int, rows: int) -> None:
    random = np.random.default_rng(width)
    heat = Heatmap(
        random.normal(0, 1, (3, 4)).astype(np.float32),
        compute_even_centres(3, 32),
        compute_even_centres(4, 32),
    )
    region = InputRegion((width, height), (0, 0, width, height), (32, 32))
    bands = list(heat.iterate_bands(region, rows))
    assert [first for first, _ in bands] == list(range(0, height, rows))
    whole = np.concatenate([band for _, band in bands])
    assert whole == pytest.approx(heat.project_to_grid(region, (height, width)), abs=1e-5)

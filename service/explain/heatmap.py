"""Heat maps of the model's input, drawn over the original photo."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from fovea.service.explain.receptive_field import Span
from fovea.service.inference.engine import Floats

_COLOURS_FILE: Final = Path(__file__).parents[1] / "web" / "page" / "colours.json"
"""File with the colour scales, which the web page uses too."""

_MAX_OPACITY: Final = np.float32(0.65)
"""Opacity of the hottest place over the photo; a cold place is transparent."""

_OUTSIDE_BRIGHTNESS: Final = 0.4
"""Brightness of the photo outside the crop that the model sees."""

_BAND_ROWS: Final = 64
"""Number of rows that are painted at once."""

_PEAK_GRID_SIDE: Final = 256
"""Longest side of the grid that is searched for the hottest place."""

Centres = npt.NDArray[np.float64]


@dataclass(frozen=True)
class InputRegion:
    """The position of the model's input in the upright photo."""

    photo_size: tuple[int, int]
    """Width and height of the photo in pixels."""
    box: tuple[float, float, float, float]
    """Part of the photo that the input shows: left, top, right and bottom in pixels of the photo.

    The part is larger than the photo where the input has a border.
    """
    input_size: tuple[int, int]
    """Height and width of the input in pixels."""


@dataclass(frozen=True)
class Heatmap:
    """A map, and the positions of its values on the model's input."""

    values: Floats
    """float32 (h, w); positive values are evidence for the label."""
    rows: Centres
    """Centre of each row's receptive field in pixels of the input; 0.5 is the centre of the first pixel."""
    columns: Centres

    def project_to_grid(self, region: InputRegion, grid: tuple[int, int]) -> Floats:
        """Return the map over the whole photo, float32 `grid` (height, width), 0 … 1.

        Values are interpolated linearly. Evidence against the label is 0, and so are places outside the
        model's input.
        """
        return scale_to_unit(self._interpolate(region, grid))

    def _interpolate(self, region: InputRegion, grid: tuple[int, int]) -> Floats:
        vertical, horizontal = self._create_interpolations(region, grid)
        return vertical.interpolate_rows(horizontal.interpolate_rows(self.values.T).T)

    def _create_interpolations(
        self, region: InputRegion, grid: tuple[int, int]
    ) -> tuple[_Interpolation, _Interpolation]:
        """Return the interpolations from the map's rows to the grid's rows, and from columns to columns."""
        (width, height), (left, top, right, bottom) = region.photo_size, region.box
        grid_y = (np.arange(grid[0]) + 0.5) * height / grid[0]
        grid_x = (np.arange(grid[1]) + 0.5) * width / grid[1]
        return (
            _create_interpolation(
                (grid_y - top) / (bottom - top) * region.input_size[0], self.rows, region.input_size[0]
            ),
            _create_interpolation(
                (grid_x - left) / (right - left) * region.input_size[1], self.columns, region.input_size[1]
            ),
        )

    def iterate_bands(self, region: InputRegion, rows: int) -> Iterator[tuple[int, Floats]]:
        """Yield the map at the photo's size in bands of `rows` rows, each with the index of its first row.

        The whole map of a photo of 50 megapixels would take 200 MB.
        """
        width, height = region.photo_size
        vertical, horizontal = self._create_interpolations(region, (height, width))
        peak = float(self._interpolate(region, compute_grid_size(region.photo_size, _PEAK_GRID_SIDE)).max())
        stretched_columns = horizontal.interpolate_rows(self.values.T).T
        for first in range(0, height, rows):
            band = vertical.select_range(first, first + rows).interpolate_rows(stretched_columns)
            yield first, np.clip(band / np.float32(peak), 0, 1) if peak > 0 else np.zeros_like(band)


class _Interpolation(NamedTuple):
    """A linear interpolation: each place is a weighted sum of two rows."""

    lower_index: npt.NDArray[np.intp]
    upper_index: npt.NDArray[np.intp]
    lower_weight: Floats
    """Weight of the lower row. Both weights sum to 1, or to less at the edges."""
    upper_weight: Floats

    def select_range(self, first: int, end: int) -> _Interpolation:
        """Return the interpolation of some of the places."""
        lower_index, upper_index, lower_weight, upper_weight = (values[first:end] for values in self)
        return _Interpolation(lower_index, upper_index, lower_weight, upper_weight)  # type: ignore[arg-type]  # a tuple of two types

    def interpolate_rows(self, values: Floats) -> Floats:
        """Interpolate (rows, columns) to float32 (places, columns)."""
        return (
            values[self.lower_index] * self.lower_weight[:, None]
            + values[self.upper_index] * self.upper_weight[:, None]
        )


def _create_interpolation(positions: Centres, centres: Centres, end: int) -> _Interpolation:
    """Return the interpolation for places along 0 … `end`; places outside get 0.

    A value extends half a cell beyond the outermost centre, and fades out over one more cell.
    """
    step = centres[1] - centres[0] if len(centres) > 1 else float(end)
    near, far = step / 2, 3 * step / 2
    is_inside = (positions >= 0) & (positions <= end)
    if not is_inside.any():  # a narrow strip: the part that the model saw lies between two places
        nearest = np.abs(positions - end / 2).argmin()
        is_inside[nearest], positions[nearest] = True, end / 2
    row_positions = np.interp(positions, centres, np.arange(len(centres)))
    lower = row_positions.astype(np.intp)
    upper = np.minimum(lower + 1, len(centres) - 1)
    edges = [centres[0] - far, centres[0] - near, centres[-1] + near, centres[-1] + far]
    strength = np.interp(positions, edges, [0, 1, 1, 0])  # fades out beyond the outermost centres
    fraction = row_positions - lower
    strength = strength * is_inside
    return _Interpolation(
        lower, upper, *(np.asarray(one * strength, np.float32) for one in (1 - fraction, fraction))
    )


def scale_to_unit(values: Floats) -> Floats:
    """Remove negative values and divide by the largest value: 0 … 1, same shape."""
    positive = np.maximum(values, np.float32(0))
    top = positive.max(initial=0.0)
    return np.asarray(positive / top if top > 0 else positive, np.float32)


def compute_even_centres(count: int, size: int) -> Centres:
    """Return the centres of `count` equal parts of `size` pixels."""
    return np.asarray((np.arange(count) + 0.5) * (size / count), np.float64)


def compute_field_centres(span: Span, count: int) -> Centres:
    """Return the centres of the receptive fields of `count` places."""
    return np.asarray(span.jump * np.arange(count) + (span.low + span.high + 1) / 2, np.float64)


def compute_grid_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """Return height and width of a grid with the proportions of a photo of `size` (width, height)."""
    scale = min(1.0, max_side / max(size))
    return max(1, round(size[1] * scale)), max(1, round(size[0] * scale))


MAX_PHOTO_SIDE: Final = 1 << 16
"""Maximum side of a photo that is painted, in pixels. An intermediate map is as wide as the photo."""


def draw_overlay(photo: Image.Image, heatmap: Heatmap, region: InputRegion) -> bytes:
    """Return a PNG of an RGB photo under its heat map, darkened outside the model's input."""
    return _encode_png(photo.size, _paint_bands(photo, heatmap, region))


def _paint_bands(
    photo: Image.Image, heatmap: Heatmap, region: InputRegion
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield bands of painted rows, (rows, width, 3)."""
    left, top, right, bottom = (max(0, round(side)) for side in region.box)  # a border lies outside
    for first, band in heatmap.iterate_bands(region, _BAND_ROWS):
        pixels = np.asarray(photo.crop((0, first, photo.width, first + len(band))), np.float32)
        brightness = np.full(band.shape, _OUTSIDE_BRIGHTNESS, np.float32)
        brightness[max(0, top - first) : max(0, bottom - first), left:right] = 1
        pixels *= brightness[..., None]
        pixels += (_load_colour_scale()[np.rint(band * 255).astype(np.uint8)] - pixels) * (
            band * _MAX_OPACITY
        )[..., None]
        yield np.rint(pixels).astype(np.uint8)


def _encode_png(size: tuple[int, int], bands: Iterable[npt.NDArray[np.uint8]]) -> bytes:
    """Return an RGB image of this width and height as a PNG (specification, third edition, W3C, 2025).

    Pillow tries all filters on each row, which takes longer than the deflate itself. For 48 megapixels it
    takes 3.0 s instead of 1.8 s, and the file is as large.
    """
    header = struct.pack(">IIBBBBB", *size, 8, _RGB_COLOUR_TYPE, 0, 0, 0)
    deflate = zlib.compressobj(1)
    data = [deflate.compress(_filter_rows(band)) for band in bands]
    parts = [
        _encode_chunk(b"IHDR", header),
        *(_encode_chunk(b"IDAT", part) for part in [*data, deflate.flush()] if part),
    ]
    return b"".join([_PNG_SIGNATURE, *parts, _encode_chunk(b"IEND", b"")])


_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_RGB_COLOUR_TYPE: Final = 2  # the PNG colour type


def _filter_rows(band: npt.NDArray[np.uint8]) -> bytes:
    """Apply the PNG filter Sub: each pixel minus its left neighbour. Each row starts with its type, 1."""
    flat = band.reshape(len(band), -1)
    rows = np.ones((len(band), 1 + flat.shape[1]), np.uint8)  # (rows, 1 + 3 width)
    rows[:, 1:4] = flat[:, :3]
    np.subtract(flat[:, 3:], flat[:, :-3], out=rows[:, 4:])
    return rows.tobytes()


def _encode_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@cache
def _load_colour_scale() -> Floats:
    """Return the colours from cold to hot, float32 (256, 3)."""
    return np.array(json.loads(_COLOURS_FILE.read_text())["heat"], np.float32)

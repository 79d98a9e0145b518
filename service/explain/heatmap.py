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

from fovea.service.explain.layers import Span
from fovea.service.inference.engine import Floats

_COLOURS: Final = Path(__file__).parents[1] / "web" / "page" / "colours.json"
"""File with the colour scales, which the web page uses too."""

_OPACITY: Final = np.float32(0.65)
"""Opacity of the hottest place over the photo; a cold place is transparent."""

_UNSEEN: Final = 0.4
"""Brightness of the photo outside the crop that the model sees."""

_BAND: Final = 64
"""Number of rows that are painted at once."""

_LOOK: Final = 256
"""Longest side of the grid that is searched for the hottest place."""

Centres = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Place:
    """The position of the model's input in the upright photo."""

    size: tuple[int, int]
    """Width and height of the photo in pixels."""
    box: tuple[float, float, float, float]
    """Part of the photo that the input shows: left, top, right and bottom in pixels of the photo."""
    seen: tuple[int, int]
    """Height and width of the input in pixels."""


@dataclass(frozen=True)
class Heat:
    """A map, and the positions of its values on the model's input."""

    values: Floats
    """float32 (h, w); positive values are evidence for the label."""
    rows: Centres
    """Centre of each row's receptive field in pixels of the input; 0.5 is the centre of the first pixel."""
    columns: Centres

    def over(self, place: Place, grid: tuple[int, int]) -> Floats:
        """Return the map over the whole photo, float32 `grid` (height, width), 0 … 1.

        Values are interpolated linearly. Evidence against the label is 0, and so are places outside the
        model's input.
        """
        return scaled(self._spread(place, grid))

    def _spread(self, place: Place, grid: tuple[int, int]) -> Floats:
        down, across = self._mixes(place, grid)
        return down.rows_of(across.rows_of(self.values.T).T)

    def _mixes(self, place: Place, grid: tuple[int, int]) -> tuple[_Mix, _Mix]:
        """Return the interpolations from the map's rows to the grid's rows, and from columns to columns."""
        (width, height), (left, top, right, bottom) = place.size, place.box
        down = (np.arange(grid[0]) + 0.5) * height / grid[0]
        across = (np.arange(grid[1]) + 0.5) * width / grid[1]
        return (
            _mix((down - top) / (bottom - top) * place.seen[0], self.rows, place.seen[0]),
            _mix((across - left) / (right - left) * place.seen[1], self.columns, place.seen[1]),
        )

    def bands(self, place: Place, rows: int) -> Iterator[tuple[int, Floats]]:
        """Yield the map at the photo's size in bands of `rows` rows, each with the index of its first row.

        The whole map of a photo of 50 megapixels would take 200 MB.
        """
        width, height = place.size
        down, across = self._mixes(place, (height, width))
        peak = float(self._spread(place, grid_of(place.size, _LOOK)).max())
        spread = across.rows_of(self.values.T).T
        for first in range(0, height, rows):
            band = down.part(first, first + rows).rows_of(spread)
            yield first, np.clip(band / np.float32(peak), 0, 1) if peak > 0 else np.zeros_like(band)


class _Mix(NamedTuple):
    """A linear interpolation: each place is a weighted sum of two rows."""

    lower: npt.NDArray[np.intp]
    upper: npt.NDArray[np.intp]
    low: Floats
    """Weight of the lower row. Both weights sum to 1, or to less at the edges."""
    high: Floats

    def part(self, first: int, end: int) -> _Mix:
        """Return the interpolation of some of the places."""
        lower, upper, low, high = (values[first:end] for values in self)
        return _Mix(lower, upper, low, high)  # type: ignore[arg-type]  # a tuple of two types

    def rows_of(self, values: Floats) -> Floats:
        """Interpolate (rows, columns) to float32 (places, columns)."""
        return values[self.lower] * self.low[:, None] + values[self.upper] * self.high[:, None]


def _mix(places: Centres, centres: Centres, end: int) -> _Mix:
    """Return the interpolation for places along 0 … `end`; places outside get 0.

    A value extends half a cell beyond the outermost centre, and fades out over one more cell.
    """
    step = centres[1] - centres[0] if len(centres) > 1 else float(end)
    near, far = step / 2, 3 * step / 2
    inside = (places >= 0) & (places <= end)
    if not inside.any():  # a narrow strip: the part that the model saw lies between two places
        nearest = np.abs(places - end / 2).argmin()
        inside[nearest], places[nearest] = True, end / 2
    at = np.interp(places, centres, np.arange(len(centres)))
    lower = at.astype(np.intp)
    upper = np.minimum(lower + 1, len(centres) - 1)
    edges = [centres[0] - far, centres[0] - near, centres[-1] + near, centres[-1] + far]
    strength = np.interp(places, edges, [0, 1, 1, 0])  # fades out beyond the outermost centres
    share = at - lower
    strength = strength * inside
    return _Mix(lower, upper, *(np.asarray(one * strength, np.float32) for one in (1 - share, share)))


def scaled(values: Floats) -> Floats:
    """Remove negative values and divide by the largest value: 0 … 1, same shape."""
    positive = np.maximum(values, np.float32(0))
    top = positive.max(initial=0.0)
    return np.asarray(positive / top if top > 0 else positive, np.float32)


def evenly(count: int, size: int) -> Centres:
    """Return the centres of `count` equal parts of `size` pixels."""
    return np.asarray((np.arange(count) + 0.5) * (size / count), np.float64)


def middles(span: Span, count: int) -> Centres:
    """Return the centres of the receptive fields of `count` places."""
    return np.asarray(span.jump * np.arange(count) + (span.low + span.high + 1) / 2, np.float64)


def grid_of(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Return height and width of a grid with the proportions of a photo of `size` (width, height)."""
    scale = min(1.0, longest / max(size))
    return max(1, round(size[1] * scale)), max(1, round(size[0] * scale))


LONGEST_SIDE: Final = 1 << 16
"""Maximum side of a photo that is painted, in pixels. An intermediate map is as wide as the photo."""


def overlay(photo: Image.Image, heat: Heat, place: Place) -> bytes:
    """Return a PNG of an RGB photo under its heat map, darkened outside the model's input."""
    return _png(photo.size, _painted(photo, heat, place))


def _painted(photo: Image.Image, heat: Heat, place: Place) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield bands of painted rows, (rows, width, 3)."""
    left, top, right, bottom = (round(side) for side in place.box)
    for first, band in heat.bands(place, _BAND):
        pixels = np.asarray(photo.crop((0, first, photo.width, first + len(band))), np.float32)
        seen = np.full(band.shape, _UNSEEN, np.float32)
        seen[max(0, top - first) : max(0, bottom - first), left:right] = 1
        pixels *= seen[..., None]
        pixels += (_scale()[np.rint(band * 255).astype(np.uint8)] - pixels) * (band * _OPACITY)[..., None]
        yield np.rint(pixels).astype(np.uint8)


def _png(size: tuple[int, int], bands: Iterable[npt.NDArray[np.uint8]]) -> bytes:
    """Return an RGB image of this width and height as a PNG (specification, third edition, W3C, 2025).

    Pillow tries all filters on each row, which takes longer than the deflate itself. For 48 megapixels it
    takes 3.0 s instead of 1.8 s, and the file is as large.
    """
    header = struct.pack(">IIBBBBB", *size, 8, _RGB, 0, 0, 0)
    deflate = zlib.compressobj(1)
    data = [deflate.compress(_filtered(band)) for band in bands]
    parts = [_chunk(b"IHDR", header), *(_chunk(b"IDAT", part) for part in [*data, deflate.flush()] if part)]
    return b"".join([_SIGNATURE, *parts, _chunk(b"IEND", b"")])


_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_RGB: Final = 2  # the PNG colour type


def _filtered(band: npt.NDArray[np.uint8]) -> bytes:
    """Apply the PNG filter Sub: each pixel minus its left neighbour. Each row starts with its type, 1."""
    flat = band.reshape(len(band), -1)
    rows = np.ones((len(band), 1 + flat.shape[1]), np.uint8)  # (rows, 1 + 3 width)
    rows[:, 1:4] = flat[:, :3]
    np.subtract(flat[:, 3:], flat[:, :-3], out=rows[:, 4:])
    return rows.tobytes()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@cache
def _scale() -> Floats:
    """Return the colours from cold to hot, float32 (256, 3)."""
    return np.array(json.loads(_COLOURS.read_text())["heat"], np.float32)

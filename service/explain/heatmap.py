"""Heat maps of the model's input, laid over the photo that it was made of."""

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
"""The page's scales too."""

_OPACITY: Final = np.float32(0.65)
"""Of the hottest place, over the photo; a cold one leaves the photo as it is."""

_UNSEEN: Final = 0.4
"""How bright the photo is where the crop has left it out."""

_BAND: Final = 64
"""Rows that are painted at once."""

_LOOK: Final = 256
"""Longest side of the grid on which the hottest place is looked for."""

Centres = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Place:
    """Where the model's input lies in a photo as it is seen."""

    size: tuple[int, int]
    """Of the photo, width and height in pixels."""
    box: tuple[float, float, float, float]
    """What the input shows of it: left, top, right, bottom, in its pixels."""
    seen: tuple[int, int]
    """Of the input, height and width in pixels."""


@dataclass(frozen=True)
class Heat:
    """A map, and where its values lie on the model's input."""

    values: Floats
    """float32 (h, w): positive speaks for the label."""
    rows: Centres
    """The middle of what each row sees, in pixels of the input: 0.5 is that of the first pixel."""
    columns: Centres

    def over(self, place: Place, grid: tuple[int, int]) -> Floats:
        """Over the whole photo, float32 `grid` (height, width), 0 … 1: linear between the values. What speaks
        against the label is 0, and so is what the model has not seen."""
        return scaled(self._spread(place, grid))

    def _spread(self, place: Place, grid: tuple[int, int]) -> Floats:
        down, across = self._mixes(place, grid)
        return down.rows_of(across.rows_of(self.values.T).T)

    def _mixes(self, place: Place, grid: tuple[int, int]) -> tuple[_Mix, _Mix]:
        """Of the map's rows for the grid's, and of its columns."""
        (width, height), (left, top, right, bottom) = place.size, place.box
        down = (np.arange(grid[0]) + 0.5) * height / grid[0]
        across = (np.arange(grid[1]) + 0.5) * width / grid[1]
        return (
            _mix((down - top) / (bottom - top) * place.seen[0], self.rows, place.seen[0]),
            _mix((across - left) / (right - left) * place.seen[1], self.columns, place.seen[1]),
        )

    def bands(self, place: Place, rows: int) -> Iterator[tuple[int, Floats]]:
        """The same at the photo's own size, `rows` at a time, each with where it begins: of a photo of 50 MP
        all would take 200 MB."""
        width, height = place.size
        down, across = self._mixes(place, (height, width))
        peak = float(self._spread(place, grid_of(place.size, _LOOK)).max())
        spread = across.rows_of(self.values.T).T
        for first in range(0, height, rows):
            band = down.part(first, first + rows).rows_of(spread)
            yield first, np.clip(band / np.float32(peak), 0, 1) if peak > 0 else np.zeros_like(band)


class _Mix(NamedTuple):
    """What each place has of two rows: linear interpolation."""

    lower: npt.NDArray[np.intp]
    upper: npt.NDArray[np.intp]
    low: Floats
    """How much of the lower row; the rest, to 1 or to nothing at the edges, is of the upper one."""
    high: Floats

    def part(self, first: int, end: int) -> _Mix:
        """Some of the places."""
        lower, upper, low, high = (values[first:end] for values in self)
        return _Mix(lower, upper, low, high)  # type: ignore[arg-type]  # a tuple of two kinds

    def rows_of(self, values: Floats) -> Floats:
        """float32 (places, columns) of (rows, columns)."""
        return values[self.lower] * self.low[:, None] + values[self.upper] * self.high[:, None]


def _mix(places: Centres, centres: Centres, end: int) -> _Mix:
    """For places along 0 … `end`; there is nothing outside of it.

    A value reaches half a cell beyond the outermost middle, and fades away over one more.
    """
    step = centres[1] - centres[0] if len(centres) > 1 else float(end)
    near, far = step / 2, 3 * step / 2
    inside = (places >= 0) & (places <= end)
    if not inside.any():  # a strip: what it has seen lies between two places
        nearest = np.abs(places - end / 2).argmin()
        inside[nearest], places[nearest] = True, end / 2
    at = np.interp(places, centres, np.arange(len(centres)))
    lower = at.astype(np.intp)
    upper = np.minimum(lower + 1, len(centres) - 1)
    edges = [centres[0] - far, centres[0] - near, centres[-1] + near, centres[-1] + far]
    strength = np.interp(places, edges, [0, 1, 1, 0])
    share = at - lower
    strength = strength * inside
    return _Mix(lower, upper, *(np.asarray(one * strength, np.float32) for one in (1 - share, share)))


def scaled(values: Floats) -> Floats:
    """0 … 1, the same shape: without what is negative, by the largest."""
    positive = np.maximum(values, np.float32(0))
    top = positive.max(initial=0.0)
    return np.asarray(positive / top if top > 0 else positive, np.float32)


def evenly(count: int, size: int) -> Centres:
    """The middles of `count` equal parts of `size` pixels."""
    return np.asarray((np.arange(count) + 0.5) * (size / count), np.float64)


def middles(span: Span, count: int) -> Centres:
    """The middles of the receptive fields of `count` places."""
    return np.asarray(span.jump * np.arange(count) + (span.low + span.high + 1) / 2, np.float64)


def grid_of(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Height and width of a grid of a photo's shape, by the photo's width and height."""
    scale = min(1.0, longest / max(size))
    return max(1, round(size[1] * scale)), max(1, round(size[0] * scale))


LONGEST_SIDE: Final = 1 << 16
"""Of a photo that is painted, in pixels: on the way the map is as wide as the photo."""


def overlay(photo: Image.Image, heat: Heat, place: Place) -> bytes:
    """A PNG of an RGB photo under its heat; dark where the model has not looked."""
    return _png(photo.size, _painted(photo, heat, place))


def _painted(photo: Image.Image, heat: Heat, place: Place) -> Iterator[npt.NDArray[np.uint8]]:
    """Bands of rows, (rows, width, 3)."""
    left, top, right, bottom = (round(side) for side in place.box)
    for first, band in heat.bands(place, _BAND):
        pixels = np.asarray(photo.crop((0, first, photo.width, first + len(band))), np.float32)
        seen = np.full(band.shape, _UNSEEN, np.float32)
        seen[max(0, top - first) : max(0, bottom - first), left:right] = 1
        pixels *= seen[..., None]
        pixels += (_scale()[np.rint(band * 255).astype(np.uint8)] - pixels) * (band * _OPACITY)[..., None]
        yield np.rint(pixels).astype(np.uint8)


def _png(size: tuple[int, int], bands: Iterable[npt.NDArray[np.uint8]]) -> bytes:
    """An RGB image of this width and height, by the PNG specification, third edition (W3C, 2025).

    Pillow tries all filters on each row, which takes longer than the deflate itself: of 48 MP 3.0 s and not
    1.8 s, for a file as large.
    """
    header = struct.pack(">IIBBBBB", *size, 8, _RGB, 0, 0, 0)
    deflate = zlib.compressobj(1)
    data = [deflate.compress(_filtered(band)) for band in bands]
    parts = [_chunk(b"IHDR", header), *(_chunk(b"IDAT", part) for part in [*data, deflate.flush()] if part)]
    return b"".join([_SIGNATURE, *parts, _chunk(b"IEND", b"")])


_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_RGB: Final = 2  # the colour type


def _filtered(band: npt.NDArray[np.uint8]) -> bytes:
    """Each row less itself a pixel to the left, behind the number of this filter, 1."""
    flat = band.reshape(len(band), -1)
    rows = np.ones((len(band), 1 + flat.shape[1]), np.uint8)
    rows[:, 1:4] = flat[:, :3]
    np.subtract(flat[:, 3:], flat[:, :-3], out=rows[:, 4:])
    return rows.tobytes()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@cache
def _scale() -> Floats:
    """Colours from cold to hot, float32 (256, 3)."""
    return np.array(json.loads(_COLOURS.read_text())["heat"], np.float32)

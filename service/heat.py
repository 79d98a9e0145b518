"""Heat maps of the model's input, laid over the photo that it was made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from service.engine import Floats
from service.network import Span

_COLOURS: Final = Path(__file__).parent / "web" / "page" / "colours.json"
"""The page's scales too."""

_OPACITY: Final = 0.65
"""Of the hottest place, over the photo; a cold one leaves the photo as it is."""

_UNSEEN: Final = 0.4
"""How bright the photo is where the crop has left it out."""

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
        (width, height), (left, top, right, bottom) = place.size, place.box
        down = (np.arange(grid[0]) + 0.5) * height / grid[0]
        across = (np.arange(grid[1]) + 0.5) * width / grid[1]
        rows = _shares((down - top) / (bottom - top) * place.seen[0], self.rows, place.seen[0])
        columns = _shares((across - left) / (right - left) * place.seen[1], self.columns, place.seen[1])
        return scaled(np.asarray(rows @ self.values @ columns.T, np.float32))


def _shares(places: Centres, centres: Centres, end: int) -> Floats:
    """How much of each value each place has, float32 (places, values); none outside of 0 … `end`.

    A value reaches half a cell beyond the outermost middle, and fades away over one more.
    """
    step = centres[1] - centres[0] if len(centres) > 1 else float(end)
    near, far = step / 2, 3 * step / 2
    known = np.concatenate([centres[0] - [far, near], centres, centres[-1] + [near, far]])
    rows = np.pad(np.eye(len(centres)), ((0, 0), (1, 1)), mode="edge")
    rows = np.pad(rows, ((0, 0), (1, 1)))
    shares = np.stack([np.interp(places, known, row) for row in rows], axis=1)
    inside = (places >= 0) & (places <= end)
    return np.asarray(shares * inside[:, None], np.float32)


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


def overlay(photo: Image.Image, heat: Floats, box: tuple[float, float, float, float]) -> bytes:
    """A PNG of an RGB photo under its heat, float32 (height, width) 0 … 1; dark outside of `box`."""
    left, top, right, bottom = (round(side) for side in box)
    painted = np.asarray(photo, np.float32) * np.float32(_UNSEEN)
    painted[top:bottom, left:right] /= np.float32(_UNSEEN)
    colours = _scale()[np.rint(heat * 255).astype(np.uint8)]
    opacity = (heat * np.float32(_OPACITY))[..., None]
    painted += (colours - painted) * opacity
    content = BytesIO()
    Image.fromarray(np.rint(painted).astype(np.uint8)).save(content, "PNG", compress_level=1)
    return content.getvalue()


@cache
def _scale() -> Floats:
    """Colours from cold to hot, float32 (256, 3)."""
    return np.array(json.loads(_COLOURS.read_text())["heat"], np.float32)

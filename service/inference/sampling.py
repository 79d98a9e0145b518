"""Resize without antialiasing: each pixel is interpolated between its four neighbours."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from fovea.service.inference.pixels import Pixels

_WEIGHT_BITS: Final = 11
"""Bits of a weight. OpenCV's `INTER_LINEAR` has as many for uint8 (`INTER_RESIZE_COEF_BITS`)."""

BAND_BYTES: Final = 1 << 18
"""Bytes of the pixels, RGB, that are computed at once; `PEAK_BYTES` allows for the sums."""

_MAX_SOURCE_BYTES: Final = 8 * BAND_BYTES
"""Maximum bytes of source rows that are copied at once."""

_CROP_BYTES: Final = 12_000
"""Bytes that can be copied in the time that one crop takes, 10 µs."""

PEAK_BYTES: Final = 40 * BAND_BYTES + 3 * _MAX_SOURCE_BYTES
"""Peak bytes beside the image and the result, unless two rows of the image are more than `BAND_BYTES`."""


def sample_bilinear(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Pixels:
    """Return `box` (left, top, right, bottom) of an RGB image after a resize to `size`, uint8 (h, w, 3).

    The place of a pixel's centre is scaled, so x becomes (x + 0.5) * scale - 0.5, and the edges continue
    outwards, as in OpenCV's `INTER_LINEAR`, `tf.image.resize`, and PyTorch without `align_corners`.
    Weights have 11 bits and the result is rounded, in the arithmetic of OpenCV. `box` lies inside `size`.
    """
    left, top, right, bottom = box
    columns, column_weights = _find_neighbours(image.width, size[0], left, right)
    rows, row_weights = _find_neighbours(image.height, size[1], top, bottom)
    first, end = int(columns[0, 0]), int(columns[1, -1]) + 1
    columns -= first
    result = np.empty((bottom - top, right - left, 3), np.uint8)
    step = max(1, BAND_BYTES // (3 * max(end - first, right - left)))
    for start in range(0, len(result), step):
        band = slice(start, start + step)
        numbers, places = np.unique(rows[:, band], return_inverse=True)
        source = _read_rows(image, numbers, first, end)
        across = source[:, columns[0]] * column_weights[0][:, None]  # (rows, columns, 3)
        across += source[:, columns[1]] * column_weights[1][:, None]
        across >>= 4
        lower, upper = places.reshape(2, -1)
        down = across[lower] * row_weights[0, band, None, None] >> 16
        down += across[upper] * row_weights[1, band, None, None] >> 16
        result[band] = (down + 2) >> 2
    return result


def _read_rows(image: Image.Image, numbers: npt.NDArray[np.intp], first: int, end: int) -> Pixels:
    """Return rows of an RGB image by rising numbers, from column `first` to `end`, uint8 (n, columns, 3)."""
    row_bytes, (top, bottom) = 3 * (end - first), (int(numbers[0]), int(numbers[-1]) + 1)
    whole_bytes = (bottom - top) * row_bytes
    if whole_bytes <= min(_MAX_SOURCE_BYTES, len(numbers) * (row_bytes + _CROP_BYTES)):
        return np.asarray(image.crop((first, top, end, bottom)))[numbers - top]
    # The image shrinks much: far fewer rows than all are needed.
    content = b"".join(image.crop((first, row, end, row + 1)).tobytes() for row in numbers.tolist())
    return np.frombuffer(content, np.uint8).reshape(len(numbers), end - first, 3)


def _find_neighbours(
    length: int, target: int, first: int, end: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int32]]:
    """Return the lower and upper neighbour of pixels `first` to `end` of `target`, and their weights, (2, n).

    The neighbours are pixels of a row of `length`.
    """
    places = (np.arange(first, end) + 0.5) * (length / target) - 0.5
    places = places.astype(np.float32)  # as OpenCV
    lower = np.floor(places).astype(np.intp)
    fraction = np.where((lower < 0) | (lower >= length - 1), np.float32(0), places - lower)
    lower = lower.clip(0, length - 1)
    upper_weight = np.rint(fraction * np.float32(1 << _WEIGHT_BITS)).astype(np.int32)
    neighbours = np.stack([lower, np.minimum(lower + 1, length - 1)])
    return neighbours, np.stack([(1 << _WEIGHT_BITS) - upper_weight, upper_weight])

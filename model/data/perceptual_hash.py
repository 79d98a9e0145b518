"""Near-duplicate images: a 64-bit perceptual hash and a search for pairs with few differing bits.

Each bit states whether a low frequency of the grey image is above the median of all (pHash: Zauner, 2010,
"Implementation and Benchmarking of Perceptual Image Hash Functions"). Other encodings, sizes, brightness or
contrast of one image change few bits. Crops and reflections change many bits and are not found.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

MAX_DISTANCE: Final = 4
"""Maximum number of differing bits of similar images.

Between the training and the test images of CIFAR-10 there are 161 such pairs. All but a few (planes in a
clear sky) show the same image; at 8 bits most pairs do not.
"""

MIN_CONTRAST: Final = 4.0
"""Minimum contrast: root mean square of the low frequencies, in levels of 255.

Below it the bits are noise, so there is no hash. Fewer than one in a thousand CIFAR-10 images is below 8.
"""

_FREQUENCIES: Final = 8
"""Number of frequencies in each direction."""

_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)
"""Luma weights of ITU-R BT.601, as in JPEG."""

_CHUNK_PAIRS: Final = 1 << 22
"""Number of pairs that are compared at once: 32 MB per column."""

Hashes = npt.NDArray[np.uint64]


def hash_images(pixels: npt.NDArray[np.uint8]) -> Hashes:
    """Return the hash of each image, uint64 (N,), for pixels, uint8 (N, H, W, 3).

    The hash is 0 if the contrast is too low.
    """
    height, width = pixels.shape[1:3]
    grey = pixels.astype(np.float32) @ _LUMA  # (N, H, W)
    coefficients = (_cosine_basis(height) @ grey @ _cosine_basis(width).T).reshape(-1, _FREQUENCIES**2)[
        :, 1:
    ]  # (N, 63)
    contrast = np.sqrt((coefficients**2).sum(axis=1) / (height * width))
    bits = coefficients > np.median(coefficients, axis=1, keepdims=True)
    hashes = np.packbits(np.pad(bits, ((0, 0), (1, 0))), axis=1).view(np.uint64)[:, 0]  # (N,)
    return np.where(contrast < MIN_CONTRAST, np.uint64(0), hashes)


def _cosine_basis(length: int) -> npt.NDArray[np.float32]:
    """Return the first orthonormal DCT-II basis functions, float32 (8, length)."""
    angles = np.pi * (np.arange(length) + 0.5) / length
    basis = np.cos(np.arange(_FREQUENCIES)[:, None] * angles) * np.sqrt(2 / length)  # (8, length)
    basis[0] /= np.sqrt(2)
    float32_basis: npt.NDArray[np.float32] = basis.astype(np.float32)
    return float32_basis


def find_similar(left: Hashes, right: Hashes, max_distance: int = MAX_DISTANCE) -> npt.NDArray[np.int64]:
    """Return all pairs (i, j), int64 (P, 2), of similar hashes `left[i]` and `right[j]`.

    Similar hashes differ in at most `max_distance` bits. They agree in at least one of `max_distance` + 1
    groups of bits (pigeonhole principle), so only hashes that share a group are compared. Images without a
    hash match nothing.
    """
    left_rows, right_rows = np.flatnonzero(left), np.flatnonzero(right)
    edges = np.linspace(0, 64, max_distance + 2).astype(int)
    pair_lists = [np.empty((0, 2), np.int64)]
    for low, high in pairwise(edges.tolist()):
        mask = np.uint64((1 << high) - (1 << low))
        pair_lists += _find_similar_under(left[left_rows], right[right_rows], mask, max_distance)
    pairs = np.unique(np.concatenate(pair_lists), axis=0)
    return np.stack([left_rows[pairs[:, 0]], right_rows[pairs[:, 1]]], axis=1)


def _find_similar_under(
    left: Hashes, right: Hashes, mask: np.uint64, max_distance: int
) -> list[npt.NDArray[np.int64]]:
    """Return the matching pairs among hashes that are equal under `mask`."""
    order = np.argsort(left & mask, kind="stable")
    groups = (left & mask)[order]
    first = np.searchsorted(groups, right & mask, "left")
    counts = np.searchsorted(groups, right & mask, "right") - first
    parts = np.split(np.arange(len(right)), np.flatnonzero(np.diff(np.cumsum(counts) // _CHUNK_PAIRS)) + 1)
    pair_lists = []
    for part in parts:
        repeats = counts[part]
        j = np.repeat(part, repeats)
        offsets = np.arange(len(j)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        i = order[np.repeat(first[part], repeats) + offsets]
        is_similar = np.bitwise_count(left[i] ^ right[j]) <= max_distance
        pair_lists.append(np.stack([i[is_similar], j[is_similar]], axis=1))
    return pair_lists

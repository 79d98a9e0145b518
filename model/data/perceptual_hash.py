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

LIMIT: Final = 4
"""Maximum number of differing bits of similar images.

Between the training and the test images of CIFAR-10 there are 161 such pairs. All but a few (planes in a
clear sky) show the same image; at 8 bits most pairs do not.
"""

FLAT: Final = 4.0
"""Minimum contrast: root mean square of the low frequencies, in levels of 255.

Below it the bits are noise, so there is no hash. Fewer than one in a thousand CIFAR-10 images is below 8.
"""

_SIDE: Final = 8
"""Number of frequencies in each direction."""

_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)
"""Luma weights of ITU-R BT.601, as in JPEG."""

_AT_ONCE: Final = 1 << 22
"""Number of pairs that are compared at once: 32 MB per column."""

Hashes = npt.NDArray[np.uint64]


def likeness(pixels: npt.NDArray[np.uint8]) -> Hashes:
    """Return the hash of each image, uint64 (N,), for pixels, uint8 (N, H, W, 3).

    The hash is 0 if the contrast is too low.
    """
    height, width = pixels.shape[1:3]
    grey = pixels.astype(np.float32) @ _LUMA  # (N, H, W)
    waves = (_cosines(height) @ grey @ _cosines(width).T).reshape(-1, _SIDE**2)[:, 1:]  # (N, 63)
    contrast = np.sqrt((waves**2).sum(axis=1) / (height * width))
    bits = waves > np.median(waves, axis=1, keepdims=True)
    hashes = np.packbits(np.pad(bits, ((0, 0), (1, 0))), axis=1).view(np.uint64)[:, 0]  # (N,)
    return np.where(contrast < FLAT, np.uint64(0), hashes)


def _cosines(length: int) -> npt.NDArray[np.float32]:
    """Return the first orthonormal DCT-II basis functions, float32 (8, length)."""
    places = np.pi * (np.arange(length) + 0.5) / length
    waves = np.cos(np.arange(_SIDE)[:, None] * places) * np.sqrt(2 / length)  # (8, length)
    waves[0] /= np.sqrt(2)
    rounded: npt.NDArray[np.float32] = waves.astype(np.float32)
    return rounded


def alike(left: Hashes, right: Hashes, limit: int = LIMIT) -> npt.NDArray[np.int64]:
    """Return all pairs (i, j), int64 (P, 2), for which left[i] and right[j] differ in at most `limit` bits.

    Such hashes agree in at least one of limit + 1 groups of bits (pigeonhole principle), so only hashes that
    share a group are compared. Images without a hash match nothing.
    """
    kept_left, kept_right = np.flatnonzero(left), np.flatnonzero(right)
    edges = np.linspace(0, 64, limit + 2).astype(int)
    found = [np.empty((0, 2), np.int64)]
    for low, high in pairwise(edges.tolist()):
        mask = np.uint64((1 << high) - (1 << low))
        found += _alike_in(left[kept_left], right[kept_right], mask, limit)
    pairs = np.unique(np.concatenate(found), axis=0)
    return np.stack([kept_left[pairs[:, 0]], kept_right[pairs[:, 1]]], axis=1)


def _alike_in(left: Hashes, right: Hashes, mask: np.uint64, limit: int) -> list[npt.NDArray[np.int64]]:
    """Return the matching pairs among hashes that are equal under `mask`."""
    order = np.argsort(left & mask, kind="stable")
    groups = (left & mask)[order]
    first = np.searchsorted(groups, right & mask, "left")
    counts = np.searchsorted(groups, right & mask, "right") - first
    parts = np.split(np.arange(len(right)), np.flatnonzero(np.diff(np.cumsum(counts) // _AT_ONCE)) + 1)
    found = []
    for part in parts:
        many = counts[part]
        j = np.repeat(part, many)
        within = np.arange(len(j)) - np.repeat(np.cumsum(many) - many, many)
        i = order[np.repeat(first[part], many) + within]
        near = np.bitwise_count(left[i] ^ right[j]) <= limit
        found.append(np.stack([i[near], j[near]], axis=1))
    return found

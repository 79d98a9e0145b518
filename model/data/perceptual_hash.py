"""Which images look alike: a perceptual hash of 64 bits, and a search for pairs that differ in few of them.

The hash tells whether each low frequency of the grey image is above their median (pHash: Zauner, 2010,
"Implementation and Benchmarking of Perceptual Image Hash Functions"). Other encodings, sizes, brightness or
contrast of one picture change few bits; crops and reflections change many, and are not found.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

LIMIT: Final = 4
"""Most bits in which two images differ that count as alike. Of 161 such pairs between the training and the
test images of CIFAR-10 all but a few planes before a clear sky are one picture; at 8 bits most are not."""

FLAT: Final = 4.0
"""Least contrast, as the root mean square of the low frequencies in levels of 255; of less, the bits are
noise, and so there is no hash. Of CIFAR-10 no image in a thousand has less than 8."""

_SIDE: Final = 8
"""Frequencies across and down."""

_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)
"""ITU-R BT.601, as in JPEG."""

_AT_ONCE: Final = 1 << 22
"""Pairs that are compared at once: 32 MB a column."""

Hashes = npt.NDArray[np.uint64]


def likeness(pixels: npt.NDArray[np.uint8]) -> Hashes:
    """The hash of each image, uint64 (N,), of uint8 (N, H, W, 3); 0 where it has too little contrast."""
    height, width = pixels.shape[1:3]
    grey = pixels.astype(np.float32) @ _LUMA  # (N, H, W)
    waves = (_cosines(height) @ grey @ _cosines(width).T).reshape(-1, _SIDE**2)[:, 1:]  # (N, 63)
    contrast = np.sqrt((waves**2).sum(axis=1) / (height * width))
    bits = waves > np.median(waves, axis=1, keepdims=True)
    hashes = np.packbits(np.pad(bits, ((0, 0), (1, 0))), axis=1).view(np.uint64)[:, 0]
    return np.where(contrast < FLAT, np.uint64(0), hashes)


def _cosines(length: int) -> npt.NDArray[np.float32]:
    """The first orthonormal DCT-II waves, float32 (8, length)."""
    places = np.pi * (np.arange(length) + 0.5) / length
    waves = np.cos(np.arange(_SIDE)[:, None] * places) * np.sqrt(2 / length)
    waves[0] /= np.sqrt(2)
    rounded: npt.NDArray[np.float32] = waves.astype(np.float32)
    return rounded


def alike(left: Hashes, right: Hashes, limit: int = LIMIT) -> npt.NDArray[np.int64]:
    """All pairs (i, j), int64 (P, 2), of left[i] and right[j] that differ in at most `limit` bits.

    Of limit + 1 groups of bits, such hashes share one (the pigeonhole principle): only those that do are
    compared. Those without a hash are like none.
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
    """The pairs among those that are equal under `mask`."""
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

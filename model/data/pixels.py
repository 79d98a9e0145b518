"""Storage of pixels: in memory, in a memory-mapped file, or decoded on access."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from fovea.service.artifact.contract import Geometry
from fovea.service.resources.threads import get_thread_count


class Pixels(Protocol):
    """Images, uint8 (N, H, W, 3), RGB, that can be indexed; a tensor is one implementation."""

    @property
    def shape(self) -> torch.Size:
        """(N, H, W, 3)."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor | slice, /) -> Tensor:
        """Return a copy of the images, uint8 (n, H, W, 3)."""


class PixelSelection:
    """A selection of images in a given order, without copies before access."""

    def __init__(self, pixels: Pixels, rows: Tensor) -> None:
        self.pixels, self.rows = pixels, rows

    @property
    def shape(self) -> torch.Size:
        """(N, H, W, 3)."""
        return torch.Size((len(self.rows), *self.pixels.shape[1:]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Tensor | slice, /) -> Tensor:
        rows = self.rows[indices]
        if isinstance(self.pixels, Tensor) and rows.ndim:
            return self.pixels.index_select(0, rows)  # copies whole images: six times as fast as indexing
        return self.pixels[rows]


def select_pixels(pixels: Pixels, indices: Tensor) -> PixelSelection:
    """Return the images at `indices`, int64 (n,), as a selection."""
    if isinstance(pixels, PixelSelection):
        return PixelSelection(pixels.pixels, pixels.rows[indices])
    return PixelSelection(pixels, indices)


class StreamedPixels:
    """Images that are decoded by several threads on every access.

    `decode` returns one image's pixels, uint8 (H, W, 3), for its path. It runs on the threads of a pool; its
    exceptions are raised by the access. Several threads may access the images at a time: training prepares a
    batch on one thread while validation reads on another.
    """

    def __init__(
        self, paths: Sequence[Path], geometry: Geometry, decode: Callable[[Path], np.ndarray[tuple[int, ...]]]
    ) -> None:
        self._paths, self._geometry, self._decode = tuple(paths), geometry, decode
        self._pool = ThreadPoolExecutor(get_thread_count(), "stream")  # the threads end with the pool

    @property
    def shape(self) -> torch.Size:
        """(N, H, W, 3)."""
        return torch.Size((len(self._paths), self._geometry.height, self._geometry.width, 3))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, indices: Tensor | slice, /) -> Tensor:
        rows = torch.arange(len(self))[indices].tolist()
        pixels = np.empty((len(rows), *self.shape[1:]), np.uint8)
        images = self._pool.map(self._decode, [self._paths[index] for index in rows])
        for position, image in enumerate(images):  # in order; waits for the decoding threads
            pixels[position] = image
        return torch.from_numpy(pixels)


def map_pixels(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Return the pixels in a file, uint8 (N, H, W, 3), as a memory map that must not be written to."""
    array = np.memmap(path, np.uint8, "r", shape=shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # the map is never written
        return torch.from_numpy(array)


_CHUNK_IMAGES: Final = 500
"""Number of images that are counted at once."""


def compute_statistics(
    pixels: Pixels,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return mean and standard deviation per channel, on a scale of 0 to 1.

    Both are computed from exact counts of all 256 levels. The deviation is at least one level, so that a
    constant channel does not cause a division by zero.
    """
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for indices in torch.split(torch.arange(len(pixels)), _CHUNK_IMAGES):
        batch = pixels[indices]
        # (3, 256)
        counts += torch.stack([torch.bincount(batch[..., c].flatten(), minlength=256) for c in range(3)])
    levels = torch.arange(256, dtype=torch.float64) / 255
    fractions = counts / counts.sum(dim=1, keepdim=True)
    mean = (fractions * levels).sum(dim=1)
    deviation = (fractions * (levels - mean[:, None]) ** 2).sum(dim=1).sqrt().clamp(min=1 / 255)
    (r, g, b), (dr, dg, db) = mean.tolist(), deviation.tolist()
    return (r, g, b), (dr, dg, db)

"""Occlusion: the effect of each place on a label's logit, measured by hiding random places.

The method is RISE (Petsiuk, Das and Saenko, 2018, "Randomized Input Sampling for Explanation of Black-box
Models"). Masks are small random grids, enlarged smoothly and shifted at random. Here each mask is also used
inverted. A place's value is the mean logit where the place is visible minus the mean logit where it is
hidden. The method needs no knowledge about the network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np
from PIL import Image

from fovea.service.inference.engine import Floats
from fovea.service.inference.preprocess import Pixels

_CELLS: Final = 7
"""Number of cells along a side of a mask's grid, as in the paper."""

MOST_SAMPLES: Final = 8000
"""Maximum number of samples; the paper uses as many for its largest network, of 224 x 224 pixels."""


LONGEST: Final = 60.0
"""Maximum duration in seconds for any number of samples, because other callers wait."""


class Step(NamedTuple):
    """The state of an occlusion after a batch."""

    progress: float
    """Progress 0 … 1, relative to the time limit or to the requested samples."""
    samples: int
    """Number of masked images that were classified."""
    heat: Floats
    """Current map, float32 (height, width) of the model's input; positive values are evidence for the
    label."""


def occlude(
    logits: Callable[[Pixels], Floats],
    pixels: Pixels,
    *,
    seed: int,
    samples: int,
    seconds: float,
    batch: int,
) -> Iterator[Step]:
    """Yield the progress and the current map after each batch of masked images.

    `logits` returns one number for each image of uint8 (n, height, width, 3); `pixels` are (height, width,
    3). The occlusion ends after `samples`, rounded up to whole batches, or after `seconds` if `samples` is 0,
    and after `LONGEST` seconds in any case. The same seed and number of samples give the same map.
    """
    random = np.random.default_rng(seed)
    hidden = pixels.mean(axis=(0, 1), dtype=np.float32)  # hidden places get the mean colour
    height, width = pixels.shape[:2]
    # Weighted sums of logits: [0] while visible, [1] while hidden.
    seen = np.zeros((2, height, width), np.float64)
    weight = np.zeros((2, height, width), np.float64)
    began, count, progress = time.monotonic(), 0, 0.0
    pairs = max(1, batch // 2)
    base = 0.0
    while progress < 1:
        masks = np.stack([_mask(random, height, width) for _ in range(pairs)])
        masks = np.concatenate([masks, 1 - masks])  # (2 pairs, height, width)
        apart = (pixels - hidden) * masks[..., None] + hidden  # (2 pairs, height, width, 3)
        values = np.asarray(logits(np.rint(apart).astype(np.uint8)), np.float64)
        if not count:
            # Subtracting a base value keeps the sums small and reduces rounding errors.
            base = float(values.mean())
        seen += [np.tensordot(values - base, part, axes=1) for part in (masks, 1 - masks)]
        weight += [part.sum(axis=0) for part in (masks, 1 - masks)]
        count += len(masks)
        took = time.monotonic() - began
        spent = max(count / samples, took / LONGEST) if samples else took / seconds
        progress = min(1.0, max(spent, count / MOST_SAMPLES))
        for_it, against = seen / np.maximum(weight, 1e-9)
        yield Step(progress, count, (for_it - against).astype(np.float32))


def _mask(random: np.random.Generator, height: int, width: int) -> Floats:
    """Return a mask, float32 (height, width), 0 hidden … 1 visible.

    The mask is a random window of an enlarged grid of zeros and ones. The grid is one cell larger than the
    image along each axis.
    """
    rows, columns = -(-height // _CELLS), -(-width // _CELLS)
    grid = Image.fromarray(random.integers(0, 2, (_CELLS + 1, _CELLS + 1)).astype(np.float32))
    large = grid.resize(((_CELLS + 1) * columns, (_CELLS + 1) * rows), Image.Resampling.BILINEAR)
    top, left = random.integers(0, rows), random.integers(0, columns)
    return np.asarray(large, np.float32)[top : top + height, left : left + width]

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
from fovea.service.inference.pixels import Pixels

_GRID_CELLS: Final = 7
"""Number of cells along a side of a mask's grid, as in the paper."""

MAX_SAMPLES: Final = 8000
"""Maximum number of samples; the paper uses as many for its largest network, of 224 x 224 pixels."""


MAX_SECONDS: Final = 60.0
"""Maximum duration in seconds for any number of samples, because other callers wait."""


class OcclusionStep(NamedTuple):
    """The state of an occlusion after a batch."""

    progress: float
    """Progress 0 … 1, relative to the time limit or to the requested samples."""
    samples: int
    """Number of masked images that were classified."""
    heatmap: Floats
    """Current map, float32 (height, width) of the model's input; positive values are evidence for the
    label."""


def occlude_image(
    compute_logits: Callable[[Pixels], Floats],
    pixels: Pixels,
    *,
    seed: int,
    samples: int,
    seconds: float,
    batch_size: int,
) -> Iterator[OcclusionStep]:
    """Yield the progress and the current map after each batch of masked images.

    `compute_logits` returns one number for each image of uint8 (n, height, width, 3); `pixels` are (height,
    width, 3). The occlusion ends after `samples`, rounded up to whole batches, or after `seconds` if
    `samples` is 0, and after `MAX_SECONDS` seconds in any case. The same seed and number of samples give the
    same map.
    """
    random = np.random.default_rng(seed)
    mean_colour = pixels.mean(axis=(0, 1), dtype=np.float32)  # hidden places get the mean colour
    height, width = pixels.shape[:2]
    # Weighted sums of logits: [0] while visible, [1] while hidden.
    logit_sums = np.zeros((2, height, width), np.float64)
    mask_sums = np.zeros((2, height, width), np.float64)
    started_at, count, progress = time.monotonic(), 0, 0.0
    pairs = max(1, batch_size // 2)
    base = 0.0
    while progress < 1:
        masks = np.stack([_create_mask(random, height, width) for _ in range(pairs)])
        masks = np.concatenate([masks, 1 - masks])  # (2 pairs, height, width)
        masked_images = (pixels - mean_colour) * masks[..., None] + mean_colour  # (2 pairs, height, width, 3)
        values = np.asarray(compute_logits(np.rint(masked_images).astype(np.uint8)), np.float64)
        if not count:
            # Subtracting a base value keeps the sums small and reduces rounding errors.
            base = float(values.mean())
        logit_sums += [np.tensordot(values - base, part, axes=1) for part in (masks, 1 - masks)]
        mask_sums += [part.sum(axis=0) for part in (masks, 1 - masks)]
        count += len(masks)
        elapsed = time.monotonic() - started_at
        budget_share = max(count / samples, elapsed / MAX_SECONDS) if samples else elapsed / seconds
        progress = min(1.0, max(budget_share, count / MAX_SAMPLES))
        visible_mean, hidden_mean = logit_sums / np.maximum(mask_sums, 1e-9)
        yield OcclusionStep(progress, count, (visible_mean - hidden_mean).astype(np.float32))


def _create_mask(random: np.random.Generator, height: int, width: int) -> Floats:
    """Return a mask, float32 (height, width), 0 hidden … 1 visible.

    The mask is a random window of an enlarged grid of zeros and ones. The grid is one cell larger than the
    image along each axis.
    """
    rows, columns = -(-height // _GRID_CELLS), -(-width // _GRID_CELLS)
    grid = Image.fromarray(random.integers(0, 2, (_GRID_CELLS + 1, _GRID_CELLS + 1)).astype(np.float32))
    large = grid.resize(((_GRID_CELLS + 1) * columns, (_GRID_CELLS + 1) * rows), Image.Resampling.BILINEAR)
    top, left = random.integers(0, rows), random.integers(0, columns)
    return np.asarray(large, np.float32)[top : top + height, left : left + width]

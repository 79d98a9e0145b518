"""Occlusion: what the logit of a label owes to each place, by hiding places at random.

RISE (Petsiuk, Das and Saenko, 2018, "Randomized Input Sampling for Explanation of Black-box Models"): masks
are small random grids, enlarged smoothly and shifted at random. Here each mask comes with its negative, and a
place's number is the mean logit where it is seen less the mean where it is hidden. Nothing of the network
need be known.
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
"""Of a mask's grid a side, as in the paper."""

MOST_SAMPLES: Final = 8000
"""In the paper, for the largest network, of 224 x 224 pixels."""


LONGEST: Final = 60.0
"""Seconds, however many samples are asked for: others wait."""


class Step(NamedTuple):
    """How far it has come."""

    progress: float
    """0 … 1, of the time or of the samples that were asked for."""
    samples: int
    """Masked images that were classified."""
    heat: Floats
    """float32 (height, width) of the model's input, as it is known by now: positive speaks for the label."""


def occlude(
    logits: Callable[[Pixels], Floats],
    pixels: Pixels,
    *,
    seed: int,
    samples: int,
    seconds: float,
    batch: int,
) -> Iterator[Step]:
    """After each batch of masked images: how far, and the map as it is then.

    `logits` gives one number for each image of uint8 (n, height, width, 3); `pixels` are (height, width, 3).
    It ends after so many `samples`, rounded up to whole batches, or where that is 0 after so many `seconds`;
    after `LONGEST` in any case. The same seed and number of samples give the same map.
    """
    random = np.random.default_rng(seed)
    hidden = pixels.mean(axis=(0, 1), dtype=np.float32)  # what is there instead: the mean colour
    height, width = pixels.shape[:2]
    seen = np.zeros((2, height, width), np.float64)  # of what is seen, and of what is hidden
    weight = np.zeros((2, height, width), np.float64)
    began, count, progress = time.monotonic(), 0, 0.0
    pairs = max(1, batch // 2)
    base = 0.0
    while progress < 1:
        masks = np.stack([_mask(random, height, width) for _ in range(pairs)])
        masks = np.concatenate([masks, 1 - masks])  # (2 pairs, height, width)
        apart = (pixels - hidden) * masks[..., None] + hidden
        values = np.asarray(logits(np.rint(apart).astype(np.uint8)), np.float64)
        if not count:
            base = float(values.mean())  # sums of small numbers lose less
        seen += [np.tensordot(values - base, part, axes=1) for part in (masks, 1 - masks)]
        weight += [part.sum(axis=0) for part in (masks, 1 - masks)]
        count += len(masks)
        took = time.monotonic() - began
        spent = max(count / samples, took / LONGEST) if samples else took / seconds
        progress = min(1.0, max(spent, count / MOST_SAMPLES))
        for_it, against = seen / np.maximum(weight, 1e-9)
        yield Step(progress, count, (for_it - against).astype(np.float32))


def _mask(random: np.random.Generator, height: int, width: int) -> Floats:
    """0 hidden … 1 seen, float32 (height, width): a grid of noughts and ones, one cell larger than the image
    each way, enlarged, and a window of it at a random place."""
    rows, columns = -(-height // _CELLS), -(-width // _CELLS)
    grid = Image.fromarray(random.integers(0, 2, (_CELLS + 1, _CELLS + 1)).astype(np.float32))
    large = grid.resize(((_CELLS + 1) * columns, (_CELLS + 1) * rows), Image.Resampling.BILINEAR)
    top, left = random.integers(0, rows), random.integers(0, columns)
    return np.asarray(large, np.float32)[top : top + height, left : left + width]

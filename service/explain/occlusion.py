"""Occlusion: the effect of each place on a label's logit, measured by hiding random places.

The method is RISE (Petsiuk, Das and Saenko, 2018, "Randomized Input Sampling for Explanation of Black-box
Models"). Masks are small random grids, enlarged smoothly and shifted at random. Here each mask is also used
inverted. A place's value is the mean logit where the place is visible minus the mean logit where it is
hidden. The method needs no knowledge about the network.

The masked images are the same for all labels, and a model call returns the logits of all labels. An
`Occlusion` keeps the logits, so that the map of a second label needs no model call. The masks are not kept:
they follow from the seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from fovea.service.inference.engine import Floats
from fovea.service.inference.pixels import Pixels

_GRID_CELLS: Final = 7
"""Number of cells along a side of a mask's grid, as in the paper."""

MAX_SAMPLES: Final = 8000
"""Maximum number of samples; the paper uses as many for its largest network, of 224 x 224 pixels."""


MAX_SECONDS: Final = 60.0
"""Maximum duration in seconds for any number of samples, because other callers wait."""

MAX_KEPT_BYTES: Final = 16 << 20
"""Limit of the logits that an occlusion keeps: 4,194 masked images of a network with 1,000 labels."""

_REPLAY_STEPS: Final = 32
"""Number of kept batches in one step. They take little time, and each step makes a map for the caller."""


class OcclusionStep(NamedTuple):
    """The state of an occlusion after a batch."""

    progress: float
    """Progress 0 … 1, relative to the time limit or to the requested samples."""
    samples: int
    """Number of masked images that were classified."""
    heatmap: Floats
    """Current map, float32 (height, width) of the model's input; positive values are evidence for the
    label."""


class _Batch(NamedTuple):
    """The result of one model call."""

    logits: Floats
    """float32 (batch, logits)."""
    elapsed: float
    """Seconds that the occlusion had taken after this batch."""


class Occlusion:
    """An occlusion of one image, for any of its labels."""

    def __init__(
        self, compute_logits: Callable[[Pixels], Floats], pixels: Pixels, *, seed: int, batch_size: int
    ) -> None:
        """Prepare the occlusion; no model call is made.

        `compute_logits` returns float32 (n, logits) for images of uint8 (n, height, width, 3); `pixels` are
        (height, width, 3).
        """
        self._compute_logits = compute_logits
        self._pixels = pixels
        self._seed = seed
        self._pairs = max(1, batch_size // 2)
        self._batches: list[_Batch] = []
        self._is_kept = True
        """False once the logits have become too large to keep."""

    def is_about(self, pixels: Pixels, seed: int) -> bool:
        """Return True if the occlusion is of this image and has this seed."""
        return self._seed == seed and np.array_equal(self._pixels, pixels)

    def iterate_steps(
        self, select_values: Callable[[Floats], Floats], *, samples: int, seconds: float
    ) -> Iterator[OcclusionStep]:
        """Yield the progress and the current map of a label after each batch of masked images.

        `select_values` returns the values (n) of the label for the logits (n, logits). The occlusion ends
        after `samples`, rounded up to whole batches, or after `seconds` if `samples` is 0, and after
        `MAX_SECONDS` seconds in any case. The same seed and number of samples give the same map. Kept batches
        count with the time that they took, and an occlusion that was stopped goes on where it ended.
        """
        random = np.random.default_rng(self._seed)
        height, width = self._pixels.shape[:2]
        # Weighted sums of logits: [0] while visible, [1] while hidden.
        logit_sums = np.zeros((2, height, width), np.float64)
        mask_sums = np.zeros((2, height, width), np.float64)
        base = 0.0
        known_count = len(self._batches)
        started_at = 0.0
        for number in count():
            if number == known_count:  # the time of the replay does not count
                started_at = time.monotonic() - (self._batches[-1].elapsed if known_count else 0.0)
            masks = np.stack([_create_mask(random, height, width) for _ in range(self._pairs)])
            masks = np.concatenate([masks, 1 - masks])  # (2 pairs, height, width)
            if number < known_count:
                batch = self._batches[number]
            else:
                batch = self._run_model(masks, started_at)
            values = np.asarray(select_values(batch.logits), np.float64)
            if not number:
                # Subtracting a base value keeps the sums small and reduces rounding errors.
                base = float(values.mean())
            logit_sums += [np.tensordot(values - base, part, axes=1) for part in (masks, 1 - masks)]
            mask_sums += [part.sum(axis=0) for part in (masks, 1 - masks)]
            sample_count = (number + 1) * len(masks)
            budget_share = (
                max(sample_count / samples, batch.elapsed / MAX_SECONDS)
                if samples
                else batch.elapsed / seconds
            )
            progress = min(1.0, max(budget_share, sample_count / MAX_SAMPLES))
            if progress < 1 and number + 1 < known_count and (number + 1) % _REPLAY_STEPS:
                continue
            visible_mean, hidden_mean = logit_sums / np.maximum(mask_sums, 1e-9)
            yield OcclusionStep(progress, sample_count, (visible_mean - hidden_mean).astype(np.float32))
            if progress >= 1:
                return

    def _run_model(self, masks: npt.NDArray[np.float32], started_at: float) -> _Batch:
        """Classify masked images, and keep their logits if they are not too large."""
        mean_colour = self._pixels.mean(axis=(0, 1), dtype=np.float32)  # hidden places get the mean colour
        masked_images = (self._pixels - mean_colour) * masks[..., None] + mean_colour
        logits = self._compute_logits(np.rint(masked_images).astype(np.uint8))
        batch = _Batch(np.asarray(logits, np.float32), time.monotonic() - started_at)
        if (len(self._batches) + 1) * batch.logits.nbytes > MAX_KEPT_BYTES:
            self._is_kept = False
            self._batches.clear()
        if self._is_kept:
            self._batches.append(batch)
        return batch


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

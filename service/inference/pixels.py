"""Types of decoded pixels and of regions of an image, and the brightness of pixels."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""Pixels of an image, (height, width, 3), or of a batch, (n, height, width, 3): RGB."""

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


def brightness_of(batch: Pixels) -> npt.NDArray[np.float32]:
    """Return each image's mean value, float32 (n,), from 0 to 1, for uint8 (n, height, width, 3)."""
    values = batch.reshape(len(batch), -1)
    largest_sum = 255 * values.shape[1]
    # Sums of 32 bits take half as long as those of 64.
    sum_dtype = np.uint32 if largest_sum < 1 << 32 else np.uint64
    means: npt.NDArray[np.float32] = (np.add.reduce(values, axis=1, dtype=sum_dtype) / largest_sum).astype(
        np.float32
    )
    return means

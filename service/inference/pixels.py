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
    means: npt.NDArray[np.float32] = (values.sum(axis=1, dtype=np.uint64) / (255 * values.shape[1])).astype(
        np.float32
    )
    return means

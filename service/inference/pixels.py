"""Types of decoded pixels, and of regions of an image."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""Pixels of an image, (height, width, 3), or of a batch, (n, height, width, 3): RGB."""

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""

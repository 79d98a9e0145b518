"""Grey images for graphs with one channel, computed as Pillow's `convert("L")` does.

Pillow weighs red, green and blue by ITU-R BT.601 in integers: `(R * 19595 + G * 38470 + B * 7471 + 0x8000)
>> 16` (`L24` in its `Convert.c`). The graph computes the same in int32, so that no precision of a processor
changes a level.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from onnx import TensorProto
from PIL import Image

from fovea.export.node_builder import NodeBuilder
from fovea.export.pixel_steps import TO_PLANES
from fovea.service.inference.pixels import Pixels

_WEIGHTS: Final = (19595, 38470, 7471)
"""0.299, 0.587 and 0.114 in units of 1 / 65536; their sum is 65536."""

_UNIT: Final = 1 << 16


def to_grey(pixels: Pixels) -> npt.NDArray[np.uint8]:
    """Return grey levels, uint8 (n, H, W, 1), of pixels (n, H, W, 3), by Pillow itself."""
    levels = [np.asarray(Image.fromarray(image).convert("L"), np.uint8) for image in pixels]
    return np.stack(levels)[..., None]


def add_grey_steps(builder: NodeBuilder, pixels: str) -> str:
    """Add the steps from pixels, uint8 (n, H, W, 3), to grey levels, int32 (n, 1, H, W)."""
    planes = builder.add("Cast", builder.add("Transpose", pixels, perm=TO_PLANES), to=TensorProto.INT32)
    total = ""
    for channel, weight in enumerate(_WEIGHTS):
        plane = builder.add("Gather", planes, np.array([channel], np.int64), axis=1)
        part = builder.add("Mul", plane, np.array(weight, np.int32))
        total = builder.add("Add", total, part) if total else part
    total = builder.add("Add", total, np.array(_UNIT // 2, np.int32))
    return builder.add("Div", total, np.array(_UNIT, np.int32))  # whole numbers, rounded down

"""Warnings about large changes of an image by a geometry."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from fovea.service.artifact.geometry import Geometry
from fovea.service.image_warnings import ImageWarning, WarningCode
from fovea.service.inference.geometry_plan import PLAN_CACHE_SIZE, Size, find_visible_box, plan_steps

_MIN_VISIBLE_SHARE: Final = 0.2
_MAX_STRETCH: Final = 5
_MAX_ENLARGEMENT: Final = 8
"""Limits that photographs do not reach.

The middle 224 x 224 of a photograph of 2.2:1, resized to 256, is a third of it. An image of 32 x 32 for a
model of 256 is enlarged eight times.
"""


@lru_cache(PLAN_CACHE_SIZE)
def find_geometry_warnings(size: Size, geometry: Geometry) -> tuple[ImageWarning, ...]:
    """Return warnings about large changes by the steps to an upright image of this size."""
    width, height = size
    left, top, right, bottom = find_visible_box(plan_steps(size, geometry))
    scale_x, scale_y = geometry.width / (right - left), geometry.height / (bottom - top)
    visible_width, visible_height = min(right, width) - max(left, 0), min(bottom, height) - max(top, 0)
    visible_share = visible_width * visible_height / (width * height)
    enlargement = max(scale_x, scale_y)
    warnings = []
    if visible_share < _MIN_VISIBLE_SHARE:
        text = f"the model sees only the middle {visible_share:.1%} of the {format_size(size)} image"
        warnings.append(ImageWarning(WarningCode.CROPPED, text))
    if enlargement > _MAX_STRETCH * min(scale_x, scale_y):
        target_size = format_size((geometry.width, geometry.height))
        text = f"the image was stretched from {format_size(size)} to {target_size}"
        warnings.append(ImageWarning(WarningCode.STRETCHED, text))
    if enlargement > _MAX_ENLARGEMENT:
        text = f"the image is only {format_size(size)} and was enlarged {enlargement:.0f} times"
        warnings.append(ImageWarning(WarningCode.ENLARGED, text))
    return tuple(warnings)


def format_size(size: Size) -> str:
    """Return width and height for people."""
    return f"{size[0]} x {size[1]}"

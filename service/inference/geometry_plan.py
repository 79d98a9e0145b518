"""Sizes and places of a geometry's steps for one image. This module needs no image library.

Sizes are (width, height), in pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

from fovea.service.artifact.geometry import (
    AspectCropStep,
    AspectPadStep,
    CropStep,
    Fit,
    FractionCropStep,
    Geometry,
    PadStep,
    ResizeStep,
    Rounding,
    Step,
)
from fovea.service.inference.pixels import Box

Size: TypeAlias = tuple[int, int]


class PlannedStep(NamedTuple):
    """One step for an image of a known size."""

    step: Step
    size: Size
    """Size of the image before the step."""
    box: Box
    """Part of that image that the step makes its result from. Parts outside the image are border.

    A resize takes the whole image, so its box is not the size of its result.
    """
    target_size: Size
    """Size of the image after the step; of an aspect crop without rounding, rounded down."""


PLAN_CACHE_SIZE: Final = 256
"""Number of image sizes for which plans are kept.

Thumbnails often have one size. Their decoding takes 0.1 ms, and a plan, its memory and its warnings 0.03 ms.
"""


@lru_cache(PLAN_CACHE_SIZE)
def plan_steps(size: Size, geometry: Geometry) -> tuple[PlannedStep, ...]:
    """Return the steps for an upright image of this size."""
    plan = []
    for step in geometry.steps:
        planned_step = plan_step(step, size)
        plan.append(planned_step)
        size = planned_step.target_size
    return tuple(plan)


def plan_step(step: Step, size: Size) -> PlannedStep:
    """Return one step for an image of this size."""
    if isinstance(step, ResizeStep):
        return PlannedStep(step, size, (0, 0, *size), compute_target_size(step, size))
    box = compute_box(step, size)
    target_size = int(box[2] - box[0]), int(box[3] - box[1])
    return PlannedStep(step, size, box, (max(1, target_size[0]), max(1, target_size[1])))


def find_visible_box(plan: tuple[PlannedStep, ...]) -> Box:
    """Return the region of the upright image that the model's input shows.

    The region is larger than the image where the input has a border.
    """
    left, top, right, bottom = 0.0, 0.0, float(plan[-1].target_size[0]), float(plan[-1].target_size[1])
    for step, size, box, target_size in reversed(plan):
        if isinstance(step, ResizeStep):
            scale_x, scale_y = size[0] / target_size[0], size[1] / target_size[1]
            left, top, right, bottom = left * scale_x, top * scale_y, right * scale_x, bottom * scale_y
            continue
        # An aspect crop without rounding has fractions, which its target size lacks.
        stretch_x, stretch_y = (box[2] - box[0]) / target_size[0], (box[3] - box[1]) / target_size[1]
        left, right = box[0] + left * stretch_x, box[0] + right * stretch_x
        top, bottom = box[1] + top * stretch_y, box[1] + bottom * stretch_y
    return left, top, right, bottom


def compute_target_size(step: ResizeStep, size: Size) -> Size:
    """Return width and height of an image of `size` after the resize."""
    width, height = size
    if step.fit is Fit.STRETCH:
        return step.width, step.height
    is_wider_box = step.width * height >= step.height * width  # the width needs the larger scale
    if is_wider_box == (step.fit is Fit.COVER):
        return step.width, max(1, _divide(step.width * height, width, step.rounding))
    return max(1, _divide(step.height * width, height, step.rounding)), step.height


def compute_box(
    step: CropStep | AspectCropStep | FractionCropStep | PadStep | AspectPadStep, size: Size
) -> Box:
    """Return the box of a crop in an image of `size`, or of the padded image; a border is outside.

    Only an aspect crop without rounding has fractions.
    """
    if isinstance(step, AspectCropStep):
        return compute_aspect_box(step, size)
    return compute_whole_box(step, size)


def compute_whole_box(
    step: CropStep | FractionCropStep | PadStep | AspectPadStep, size: Size
) -> tuple[int, int, int, int]:
    """Return the box of a step in an image of `size`, as `compute_box` does."""
    width, height = size
    if isinstance(step, FractionCropStep):  # in the arithmetic of `tf.image.central_crop`
        left, top = (int((side - side * step.fraction) / 2) for side in size)
        return left, top, width - left, height - top
    if isinstance(step, AspectPadStep):
        padded_width = max(width, height * step.width // step.height)
        padded_height = max(height, width * step.height // step.width)
        across, down = (padded_width - width) // 2, (padded_height - height) // 2
        return -across, -down, width + across, height + down
    left, top = _centre(width - step.width, step), _centre(height - step.height, step)
    return left, top, left + step.width, top + step.height


def compute_aspect_box(step: AspectCropStep, size: Size) -> Box:
    """Return the largest centred box of the step's aspect ratio in an image of `size`."""
    width, height = size
    if step.rounding is Rounding.NONE:  # in the arithmetic of `PIL.ImageOps.fit`
        aspect, own_aspect = step.width / step.height, width / height
        box_width: float = aspect * height if own_aspect > aspect else width
        box_height: float = width / aspect if own_aspect < aspect else height
        left, top = (width - box_width) * 0.5, (height - box_height) * 0.5
        return left, top, left + box_width, top + box_height
    width = max(1, min(width, _divide(height * step.width, step.height, step.rounding)))
    height = max(1, min(height, _divide(size[0] * step.height, step.width, step.rounding)))
    left = _halve(size[0] - width, step.rounding)
    top = _halve(size[1] - height, step.rounding)
    return left, top, left + width, top + height


def _centre(surplus: int, step: CropStep | PadStep) -> int:
    """Return the corner of a centred box in an image that is `surplus` pixels longer than the box."""
    if surplus >= 0 or (isinstance(step, CropStep) and step.rounding is Rounding.FLOOR):
        return _halve(surplus, step.rounding)
    # The border on the left or at the top: a crop by torchvision floors it.
    return -(-surplus // 2 if isinstance(step, CropStep) else _halve(-surplus, step.rounding))


def _halve(length: int, rounding: Rounding) -> int:
    return length // 2 if rounding is Rounding.FLOOR else round(length / 2)


def _divide(length: int, divisor: int, rounding: Rounding) -> int:
    """Return the quotient, computed without floating point; halves are rounded to the even number."""
    quotient, remainder = divmod(length, divisor)
    if rounding is Rounding.FLOOR or 2 * remainder < divisor:
        return quotient
    return quotient + 1 if 2 * remainder > divisor else quotient + quotient % 2

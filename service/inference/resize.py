"""Execution of a geometry's steps on one image.

`exact` runs the steps one by one. `fast` finds the region of the source that the steps keep, and resizes only
that region.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin

from fovea.service.artifact.geometry import (
    AspectCropStep,
    AspectPadStep,
    CropStep,
    Fit,
    Geometry,
    PadStep,
    ResizeStep,
    Rounding,
    Step,
)
from fovea.service.errors import TooManyPixels
from fovea.service.inference.draft_scale import choose_draft_scale
from fovea.service.inference.geometry_plan import (
    Size,
    compute_aspect_box,
    compute_target_size,
    compute_whole_box,
    plan_steps,
)
from fovea.service.inference.pixels import Box, Pixels
from fovea.service.inference.rotation import Rotation
from fovea.service.inference.sampling import sample_bilinear


def draft_jpeg(image: ImageFile.ImageFile, geometry: Geometry) -> Box:
    """Choose the decoding scale; return the box that the full image fills in the decoded image.

    If the scale does not divide a side, the decoder rounds up and the last row or column is only partly
    filled. The box then has fractions.
    """
    if not geometry.is_exact and isinstance(image, JpegImagePlugin.JpegImageFile):
        scale = choose_draft_scale(image.size, geometry)
        if scale > 1 and (draft_result := image.draft(None, (image.width // scale, image.height // scale))):
            return draft_result[1]
    return 0, 0, image.width, image.height


WHOLE_RESIZE_PIXELS: Final = 16_000_000
"""Number of pixels after a resize above which `exact` resizes only the region that the crop keeps.

Otherwise a 1 x 20,000 strip for a model of 224 would become 224 x 4,480,000. Photographs stay far below: a
10:1 panorama for a model of 384 makes 1.5 million.
"""

MAX_PADDED_PIXELS: Final = 200_000_000
"""Number of pixels after a border to an aspect ratio above which an image is refused, 800 MB.

A strip of 1 x 20,000 with a border to a square would have 400 million.
"""

_FILTERS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def apply_geometry(
    image: Image.Image, geometry: Geometry, full_size: Size, box: Box, rotation: Rotation | None
) -> Pixels:
    """Run the steps on an RGB image; return uint8 (height, width, 3).

    The full image, upright of `full_size`, fills `box` of `image`. With a `rotation`, `image` is not upright
    yet. If `geometry.is_exact`, the image is upright and whole.
    """
    if geometry.is_exact:
        return _run_steps(image, geometry.steps)
    return _resize_region(image, geometry, full_size, box, rotation)


# --- exact ---------------------------------------------------------------------------------------


def _run_steps(image: Image.Image, steps: tuple[Step, ...]) -> Pixels:
    source_box: Box | None = None  # that of an aspect crop without rounding
    skipped_crop: CropStep | None = None
    for index, step in enumerate(steps):
        if isinstance(step, ResizeStep):
            following = steps[index + 1] if index + 1 < len(steps) else None
            skipped_crop = following if isinstance(following, CropStep) else None
            image = _resize_and_crop(image, step, skipped_crop, source_box)
            source_box = None
        elif isinstance(step, AspectCropStep):
            box = compute_aspect_box(step, image.size)
            if step.rounding is Rounding.NONE:
                source_box = box
            elif box != (0, 0, *image.size):
                image = image.crop((int(box[0]), int(box[1]), int(box[2]), int(box[3])))
        elif isinstance(step, PadStep | AspectPadStep):
            image = _pad(image, step)
        elif step is not skipped_crop:
            image = image.crop(compute_whole_box(step, image.size))  # black outside the image
    return _to_array(image)


def _resize_and_crop(
    image: Image.Image, step: ResizeStep, crop: CropStep | None, source_box: Box | None
) -> Image.Image:
    """Resize the image, or its `source_box`, and crop the result if there is a crop."""
    size = compute_target_size(step, image.size)
    crop_box = compute_whole_box(crop, size) if crop else (0, 0, *size)
    filter_ = _FILTERS[step.interpolation]
    if source_box is None and step.antialias and size[0] * size[1] <= WHOLE_RESIZE_PIXELS:
        return _resize_whole(image, size, crop_box, step, filter_)
    # The part of the crop inside the image; `Image.crop` then adds the black border.
    left, top, right, bottom = crop_box
    part_box = max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
    if not step.antialias:
        image = Image.fromarray(sample_bilinear(image, size, part_box))
    elif size[0] * size[1] <= WHOLE_RESIZE_PIXELS:
        image = image.resize(size, filter_, box=source_box).crop(part_box)
    else:
        image = _resize_part(image, source_box or (0, 0, *image.size), size, part_box, filter_)
    border_box = left - part_box[0], top - part_box[1], right - part_box[0], bottom - part_box[1]
    return image if border_box == (0, 0, *image.size) else image.crop(border_box)


def _resize_whole(
    image: Image.Image,
    size: Size,
    crop_box: tuple[int, int, int, int],
    step: ResizeStep,
    filter_: Image.Resampling,
) -> Image.Image:
    """Return the image as if it was resized to `size` and then cropped to `crop_box`, with the same values.

    Pillow resizes the rows of an image in landscape format first, and then the columns. The columns that the
    crop drops need not be resized. The rows that it drops need not be computed if the scale is exact in the
    32 bits in which Pillow keeps a box: other scales would change one value in a thousand by 1.
    """
    (width, height), (left, top, right, bottom) = size, crop_box
    crop_size = right - left, bottom - top
    keeps_aspect = step.fit is Fit.COVER and filter_ is not Image.Resampling.NEAREST
    is_inside = 0 <= left < right <= width and 0 <= top < bottom <= height
    if keeps_aspect and image.width >= image.height > height and is_inside:
        image = image.resize((width, image.height), filter_).crop((left, 0, right, image.height))
        left, right = 0, crop_size[0]
        if height.bit_count() == 1:  # dividing by a power of two is exact
            scale = image.height / height
            box = (0, top * scale, right, bottom * scale)
            return image.resize(crop_size, filter_, box=box)
        image = image.resize((crop_size[0], height), filter_)
    elif image.size != size:
        image = image.resize(size, filter_)
    if image.size != crop_size:
        image = image.crop((left, top, right, bottom))
    return image


def _pad(image: Image.Image, step: PadStep | AspectPadStep) -> Image.Image:
    left, top, right, bottom = compute_whole_box(step, image.size)
    if (left, top, right, bottom) == (0, 0, *image.size):
        return image
    width, height = right - left, bottom - top
    if width * height > MAX_PADDED_PIXELS:
        raise TooManyPixels(
            f"a border would make an image of {width} x {height} pixels of one of {image.width} x "
            f"{image.height}; at most {MAX_PADDED_PIXELS} pixels"
        )
    padded_image = Image.new("RGB", (width, height), step.fill)
    padded_image.paste(image, (-left, -top))
    return padded_image


def _to_array(image: Image.Image) -> Pixels:
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)


# --- fast ----------------------------------------------------------------------------------------


def _resize_region(
    image: Image.Image, geometry: Geometry, size: Size, box: Box, rotation: Rotation | None
) -> Pixels:
    """Resize the region that the steps keep, rotate it, and add the border. See `apply_geometry`.

    `Geometry.fast_obstacle` is empty: there may be one aspect crop, one resize, one crop inside the resized
    image, and one border, in this order.
    """
    width, height = size
    crop_box: Box = (0, 0, 0, 0)  # in the resized image
    filter_, pad = Image.Resampling.NEAREST, None
    for step, step_size, step_box, target_size in plan_steps(size, geometry):
        if isinstance(step, ResizeStep):
            width, height = target_size
            crop_box = 0, 0, width, height
            filter_ = _FILTERS[step.interpolation]
        elif isinstance(step, CropStep):
            crop_box = step_box
        elif isinstance(step, AspectCropStep):
            box = _locate_region(step_box, step_size, box, rotation)
        elif isinstance(step, PadStep):
            pad = step
    if rotation:
        stored_size = (height, width) if rotation.swaps_axes else (width, height)
        crop_box = rotation.unrotate_box(crop_box, stored_size)
        width, height = stored_size
    image = _resize_part(image, box, (width, height), crop_box, filter_)
    image = image.transpose(rotation.method) if rotation else image
    return _to_array(_pad(image, pad) if pad else image)


def _locate_region(region: Box, size: Size, box: Box, rotation: Rotation | None) -> Box:
    """Return the place of a region of the upright image, of `size`, in the decoded image.

    The whole upright image fills `box` of the decoded image.
    """
    width, height = size
    if rotation:
        width, height = (height, width) if rotation.swaps_axes else (width, height)
        region = rotation.unrotate_box(region, (width, height))
    scale_x, scale_y = (box[2] - box[0]) / width, (box[3] - box[1]) / height
    return (
        box[0] + region[0] * scale_x,
        box[1] + region[1] * scale_y,
        box[0] + region[2] * scale_x,
        box[1] + region[3] * scale_y,
    )


def _resize_part(
    image: Image.Image, box: Box, size: Size, part_box: Box, filter_: Image.Resampling
) -> Image.Image:
    """Return `part_box` of the image that results when `box` of `image` is resized to `size`."""
    scale_x, scale_y = (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]
    source_box = (
        box[0] + part_box[0] * scale_x,
        box[1] + part_box[1] * scale_y,
        min(box[0] + part_box[2] * scale_x, image.width),  # float rounding may exceed the edge
        min(box[1] + part_box[3] * scale_y, image.height),
    )
    part_size = int(part_box[2] - part_box[0]), int(part_box[3] - part_box[1])
    if (image.size, source_box) != (part_size, (0, 0, *part_size)):
        image = image.resize(part_size, filter_, box=source_box)
    return image

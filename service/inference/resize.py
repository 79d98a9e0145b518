"""Resize and crop of an image to the geometry of a model."""

from __future__ import annotations

from typing import Final

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin

from fovea.service.artifact.contract import Geometry, PixelPath, Resize
from fovea.service.image_warnings import ImageWarning, WarningCode
from fovea.service.inference.draft_scale import choose_draft_scale
from fovea.service.inference.pixels import Box, Pixels
from fovea.service.inference.rotation import Rotation


def draft_jpeg(image: ImageFile.ImageFile, geometry: Geometry) -> Box:
    """Choose the decoding scale; return the box that the full image fills in the decoded image.

    If the scale does not divide a side, the decoder rounds up and the last row or column is only partly
    filled. The box then has fractions.
    """
    if geometry.pixel_path is PixelPath.FAST and isinstance(image, JpegImagePlugin.JpegImageFile):
        scale = choose_draft_scale(image.size, geometry)
        if scale > 1 and (draft_result := image.draft(None, (image.width // scale, image.height // scale))):
            return draft_result[1]
    return 0, 0, image.width, image.height


WHOLE_RESIZE_PIXELS: Final = 16_000_000
"""Number of pixels after the resize above which `exact` resizes only the region that the crop keeps.

Otherwise a 1 x 20,000 strip for a model of 224 would become 224 x 4,480,000. Photographs stay far below: a
10:1 panorama for a model of 384 makes 1.5 million.
"""


def compute_target_size(size: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Return width and height of the whole image after the resize, in pixels.

    The longer side is rounded down, like in torchvision's `Resize`.
    """
    if geometry.resize is Resize.STRETCH:
        return geometry.width, geometry.height
    width, height = size
    shorter = min(size)
    return geometry.resize_to * width // shorter, geometry.resize_to * height // shorter


def compute_crop_corner(size: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Return left and top of the crop in an image of `size`, rounded like torchvision's `CenterCrop`."""
    return round((size[0] - geometry.width) / 2), round((size[1] - geometry.height) / 2)


def resize_and_crop(
    image: Image.Image, geometry: Geometry, full_size: tuple[int, int], box: Box, rotation: Rotation | None
) -> Pixels:
    """Resize, crop, then rotate the image; return uint8 (height, width, 3).

    The full image, upright of `full_size`, fills `box` of `image`.
    """
    width, height = compute_target_size(full_size, geometry)
    left, top = compute_crop_corner((width, height), geometry)
    filter_ = Image.Resampling[geometry.interpolation.upper()]
    if geometry.pixel_path is PixelPath.EXACT and width * height <= WHOLE_RESIZE_PIXELS:
        return _to_array(_resize_whole(image, (width, height), (left, top), geometry, filter_))
    size = geometry.width, geometry.height
    crop_box: Box = left, top, left + geometry.width, top + geometry.height  # in the resized image
    if rotation:
        crop_box = rotation.unrotate_box(
            crop_box, (height, width) if rotation.swaps_axes else (width, height)
        )
        size = (geometry.height, geometry.width) if rotation.swaps_axes else size
        width, height = (height, width) if rotation.swaps_axes else (width, height)
    scale_x, scale_y = (box[2] - box[0]) / width, (box[3] - box[1]) / height
    source_box = (
        box[0] + crop_box[0] * scale_x,
        box[1] + crop_box[1] * scale_y,
        min(box[0] + crop_box[2] * scale_x, image.width),  # float rounding may exceed the edge
        min(box[1] + crop_box[3] * scale_y, image.height),
    )
    if (image.size, source_box) != (size, (0, 0, *size)):
        image = image.resize(size, filter_, box=source_box)
    return _to_array(image.transpose(rotation.method) if rotation else image)


def _resize_whole(
    image: Image.Image,
    size: tuple[int, int],
    corner: tuple[int, int],
    geometry: Geometry,
    filter_: Image.Resampling,
) -> Image.Image:
    """Return the image as if it was resized to `size` and then cropped at `corner`, with the same values.

    Pillow resizes the rows of an image in landscape format first, and then the columns. The columns that the
    crop drops need not be resized. The rows that it drops need not be computed if the scale is exact in the
    32 bits in which Pillow keeps a box: other scales would change one value in a thousand by 1.
    """
    (width, height), (left, top) = size, corner
    right, bottom = left + geometry.width, top + geometry.height
    keeps_aspect = geometry.resize is Resize.SHORTER and filter_ is not Image.Resampling.NEAREST
    if keeps_aspect and image.width >= image.height > height and min(corner) >= 0:
        image = image.resize((width, image.height), filter_).crop((left, 0, right, image.height))
        left, right = 0, geometry.width
        if height.bit_count() == 1:  # dividing by a power of two is exact
            scale = image.height / height
            box = (0, top * scale, right, bottom * scale)
            return image.resize((geometry.width, geometry.height), filter_, box=box)
        image = image.resize((geometry.width, height), filter_)
    elif image.size != size:
        image = image.resize(size, filter_)
    if image.size != (geometry.width, geometry.height):
        image = image.crop((left, top, right, bottom))
    return image


def _to_array(image: Image.Image) -> Pixels:
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)


_MIN_VISIBLE_SHARE: Final = 0.2
_MAX_STRETCH: Final = 5
_MAX_ENLARGEMENT: Final = 8
"""Limits that photographs do not reach.

The middle 224 x 224 of a photograph of 2.2:1, resized to 256, is a third of it. An image of 32 x 32 for a
model of 256 is enlarged eight times.
"""


def find_geometry_warnings(size: tuple[int, int], geometry: Geometry) -> list[ImageWarning]:
    """Return warnings about large changes by resize and crop of an upright image of this size."""
    width, height = size
    warnings = []
    if geometry.resize is Resize.SHORTER:
        shorter = min(size)
        enlargement = geometry.resize_to / shorter
        visible_share = geometry.width * geometry.height / (enlargement * enlargement * width * height)
        if visible_share < _MIN_VISIBLE_SHARE:
            text = f"the model sees only the middle {visible_share:.1%} of the {format_size(size)} image"
            warnings.append(ImageWarning(WarningCode.CROPPED, text))
    else:
        scale_x, scale_y = geometry.width / width, geometry.height / height
        enlargement = max(scale_x, scale_y)
        if enlargement > _MAX_STRETCH * min(scale_x, scale_y):
            target_size = format_size((geometry.width, geometry.height))
            text = f"the image was stretched from {format_size(size)} to {target_size}"
            warnings.append(ImageWarning(WarningCode.STRETCHED, text))
    if enlargement > _MAX_ENLARGEMENT:
        text = f"the image is only {format_size(size)} and was enlarged {enlargement:.0f} times"
        warnings.append(ImageWarning(WarningCode.ENLARGED, text))
    return warnings


def format_size(size: tuple[int, int]) -> str:
    """Return width and height for people."""
    return f"{size[0]} x {size[1]}"

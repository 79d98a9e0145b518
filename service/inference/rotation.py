"""The rotation or reflection that turns an image upright, by its EXIF orientation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageFile, TiffImagePlugin

from fovea.service.inference.pixels import Box


@dataclass(frozen=True)
class Rotation:
    """The rotation or reflection that turns an image upright.

    Its effect on the axes: swap them if `swaps_axes`, then mirror x or y.
    """

    method: Image.Transpose
    swaps_axes: bool
    mirrors_x: bool
    mirrors_y: bool

    def unrotate_box(self, box: Box, size: tuple[int, int]) -> Box:
        """Return the region of the original image, of `size`, that becomes `box` of the upright image."""
        left, top, right, bottom = box
        width, height = (size[1], size[0]) if self.swaps_axes else size
        if self.mirrors_x:
            left, right = width - right, width - left
        if self.mirrors_y:
            top, bottom = height - bottom, height - top
        return (top, left, bottom, right) if self.swaps_axes else (left, top, right, bottom)


ROTATIONS: Final = {
    2: Rotation(Image.Transpose.FLIP_LEFT_RIGHT, False, True, False),
    3: Rotation(Image.Transpose.ROTATE_180, False, True, True),
    4: Rotation(Image.Transpose.FLIP_TOP_BOTTOM, False, False, True),
    5: Rotation(Image.Transpose.TRANSPOSE, True, False, False),
    6: Rotation(Image.Transpose.ROTATE_270, True, True, False),
    7: Rotation(Image.Transpose.TRANSVERSE, True, True, True),
    8: Rotation(Image.Transpose.ROTATE_90, True, False, True),
}
"""Rotations by EXIF orientation (Exif 2.32, tag 0x0112); 1 is upright."""

_ORIENTATION_KEYS: Final = frozenset({"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"})
"""Info keys where Pillow looks for an orientation, besides the tags of a TIFF."""


def find_rotation(image: ImageFile.ImageFile, default_orientation: int = 1) -> Rotation | None:
    """Return the rotation that makes the image upright, or None.

    `default_orientation` is the orientation of an image that has none. Pillow itself rotates a TIFF with an
    orientation when it loads the TIFF, so call this after `load`.
    """
    if _ORIENTATION_KEYS.isdisjoint(image.info) and not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    try:
        return ROTATIONS.get(image.getexif().get(0x0112, default_orientation))
    except Exception:  # a corrupt EXIF block does not make the image unusable
        return None

"""Conversion of a decoded image to 8-bit sRGB, by the rule of its mode."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from fovea.service.errors import BadImage
from fovea.service.image_warnings import ImageWarning, WarningCode
from fovea.service.inference import colour
from fovea.service.inference.colour import Conversion
from fovea.service.inference.pixels import Pixels

_DIRECT_MODES: Final = frozenset({"1", "L", "P", "CMYK", "YCbCr", "HSV"})

_DARK_LIMIT: Final = 4096
"""Limit, of 65535. Grey values that all stay below it probably have a smaller scale, such as 12 bits."""


def to_rgb(image: Image.Image, conversion: Conversion | None, warnings: list[ImageWarning]) -> Image.Image:
    """Convert an image to 8-bit sRGB by the rule of its mode.

    Colours with a profile are converted by the profile. Transparency is composited on white. 16-bit grey is
    scaled, not clipped. Grey, palette, CMYK and YCbCr without a profile are converted like Pillow does. Other
    modes (32-bit integers and floats, whose range is unknown) raise `BadImage`.
    """
    if image.mode.startswith("I;16"):
        grey = np.asarray(image)
        if 0 < (max_value := int(grey.max())) < _DARK_LIMIT:
            text = f"the image has 16 bits but only values up to {max_value} of 65535: it is almost black"
            warnings.append(ImageWarning(WarningCode.SIXTEEN_BITS_DARK, text))
        image = Image.fromarray(_scale_to_8_bits(grey, image.info.get("transparency")))
    if conversion:
        image = colour.convert_to_srgb(image, conversion)
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        if _is_invisible(rgba):
            text = "the image is transparent, and almost nothing of it is visible on white"
            warnings.append(ImageWarning(WarningCode.INVISIBLE, text))
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode in _DIRECT_MODES:
        return image.convert("RGB")
    raise BadImage(f"images of mode {image.mode} cannot be converted to 8-bit RGB")


_SAMPLE_SIDE: Final = 96
"""Longest side in pixels of the sample that decides if an image is invisible."""

_NEAR_WHITE: Final = 16
"""Distance from white, in levels of 255, that cannot be seen."""


def _is_invisible(rgba: Image.Image) -> bool:
    """Return True if at least half the image is transparent and under 1 % differs visibly from white."""
    size = min(rgba.width, _SAMPLE_SIDE), min(rgba.height, _SAMPLE_SIDE)
    sample = rgba.resize(size, Image.Resampling.NEAREST)
    if 2 * sum(sample.getchannel("A").histogram()[:128]) < size[0] * size[1]:
        return False
    values = np.asarray(sample, np.uint16)
    darkest = values[..., 3] * (255 - values[..., :3].min(axis=2)) // 255
    return bool((darkest > _NEAR_WHITE).mean() < 0.01)


def _scale_to_8_bits(grey: npt.NDArray[np.generic], transparent_grey: int | None) -> Pixels:
    """Scale 0 to 65535 to 0 to 255, rounded: 257 is 65535 / 255.

    The transparent grey, if there is one, becomes white.
    """
    levels = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return levels if transparent_grey is None else np.where(grey == transparent_grey, np.uint8(255), levels)

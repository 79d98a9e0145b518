"""An opened image, and its decoding to values of 8 bits.

Pillow keeps only the upper bytes of pixels with several values of 16 bits. This module decodes such an image
twice, once for each half of the values, and rounds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

from PIL import Image, ImageChops, ImageFile, PngImagePlugin, TiffImagePlugin

from fovea.service.errors import BadImage
from fovea.service.image_warnings import ImageWarning, WarningCode
from fovea.service.inference.colour import BadProfile, Profile
from fovea.service.inference.tiff import BITS_PER_SAMPLE, PLANAR_CONFIGURATION


@dataclass
class ImageSource:
    """An image that is opened and not yet decoded."""

    image_file: ImageFile.ImageFile
    encoded_image: bytes
    profile: Profile | BadProfile | None
    """ICC profile of the colours, or the reason why it cannot be used; None for sRGB."""
    has_low_bytes: bool
    """True if pixels have several values of 16 bits, of which Pillow keeps only the upper bytes."""
    orientation: int
    """EXIF orientation to use if the image itself has none."""


def load_image(source: ImageSource) -> Image.Image:
    """Decode an image. Values of 16 bits are rounded to 8 bits.

    Pillow would cut off the lower bytes of pixels with several values.
    """
    image_file = source.image_file
    low_image = None
    if source.has_low_bytes:
        # Pillow can read only one half of each value, so decode the file twice with different raw modes.
        low_image = type(image_file)(BytesIO(source.encoded_image))
        correct_raw_mode(low_image)
        low_image.tile = [_replace_raw_mode(tile, _low_byte_mode(_raw_mode(tile))) for tile in low_image.tile]
        is_grey = _raw_mode(image_file.tile[0]) == _GREY_ALPHA
    image_file.load()
    if low_image is None:
        return image_file
    low_image.load()
    if is_grey:
        grey, grey_low, alpha, alpha_low = low_image.split()
        grey, alpha = _round_to_8_bits(grey, grey_low), _round_to_8_bits(alpha, alpha_low)
        rounded_image = Image.merge("RGBA", (grey, grey, grey, alpha))
    else:
        rounded_image = _round_to_8_bits(image_file, low_image)
        key = image_file.info.get("transparency")
        if isinstance(key, tuple):
            rounded_image.putalpha(ImageChops.invert(_match_mask(image_file, low_image, key)))
    rounded_image.info = {name: value for name, value in image_file.info.items() if name != "transparency"}
    return rounded_image


_OPPOSITE_ORDERS: Final = {
    ";16B": ";16L",
    ";16L": ";16B",
    ";16N": ";16B" if sys.byteorder == "little" else ";16L",
}
"""Raw modes with the opposite byte order.

Pillow reads the upper byte of each value. With the opposite byte order it reads the lower byte instead.
"""

_GREY_ALPHA: Final = "LA;16B"
"""Raw mode without a counterpart. Read as four values of 8 bits, it gives all bytes at once."""


def correct_raw_mode(image_file: ImageFile.ImageFile) -> None:
    """Correct the raw mode of an uncompressed TIFF with 16 bits and separate colour planes.

    Pillow would take each byte of a plane for a value. Raises `BadImage` for CMYK, which Pillow cannot read.
    """
    if type(image_file) is not TiffImagePlugin.TiffImageFile or not _is_planar(image_file):
        return
    if image_file.mode == "CMYK" and image_file.tile[0].codec_name == "raw":
        raise BadImage(
            "a CMYK TIFF image of 16 bits in separate planes is not served; save it with interleaved colours"
        )
    if image_file.tile[0].codec_name == "raw":
        byte_order = ";16L" if image_file.tag_v2.prefix == b"II" else ";16B"
        image_file.tile = [
            _replace_raw_mode(tile, _raw_mode(tile)[:1] + byte_order) for tile in image_file.tile
        ]


def _is_planar(image_file: TiffImagePlugin.TiffImageFile) -> bool:
    """Return True if values of 16 bits are in separate planes, one for each colour."""
    tags = image_file.tag_v2
    bits = tags.get(BITS_PER_SAMPLE, (1,))
    return (
        tags.get(PLANAR_CONFIGURATION) == _SEPARATE_PLANES
        and len(bits) > 1
        and bits[0] == 16
        and bool(image_file.tile)
    )


_SEPARATE_PLANES: Final = 2


def has_low_bytes(image_file: ImageFile.ImageFile, warnings: list[ImageWarning]) -> bool:
    """Return True if pixels have several values of 16 bits, of which Pillow keeps only the upper bytes."""
    if type(image_file) not in (PngImagePlugin.PngImageFile, TiffImagePlugin.TiffImageFile):
        return False
    if (
        image_file.mode.startswith("I")
        or not image_file.tile
        or not _low_byte_mode(_raw_mode(image_file.tile[0]))
    ):
        return False
    by_libtiff = image_file.tile[0].codec_name == "libtiff"
    if by_libtiff and type(image_file) is TiffImagePlugin.TiffImageFile and _is_planar(image_file):
        # libtiff reads the planes by itself and returns only the upper bytes
        text = "the values of 16 bits were cut to 8 bits instead of rounded"
        warnings.append(ImageWarning(WarningCode.SIXTEEN_BITS_CUT, text))
        return False
    return True


def _low_byte_mode(raw_mode: str) -> str:
    """Return the raw mode that gives the lower bytes; empty if there is none."""
    if raw_mode == _GREY_ALPHA:
        return "RGBA"
    return raw_mode[:-4] + _OPPOSITE_ORDERS[raw_mode[-4:]] if raw_mode[-4:] in _OPPOSITE_ORDERS else ""


def _raw_mode(tile: Any) -> str:
    """Return the raw mode of a Pillow tile."""
    arguments = tile.args
    return str(arguments if isinstance(arguments, str) else arguments[0]) if arguments else ""


def _replace_raw_mode(tile: Any, raw_mode: str) -> Any:
    arguments = tile.args
    return tile._replace(args=raw_mode if isinstance(arguments, str) else (raw_mode, *arguments[1:]))


def _round_to_8_bits(high: Image.Image, low: Image.Image) -> Image.Image:
    """Round 256 high + low to 8 bits.

    The result, (256 high + low) / 257 rounded, is `high`, or differs by 1 if `low` is far from `high`.
    """
    increment = ImageChops.subtract(low, high).point(_ROUNDING_TABLE * len(high.getbands()))
    decrement = ImageChops.subtract(high, low).point(_ROUNDING_TABLE * len(high.getbands()))
    return ImageChops.subtract(ImageChops.add(high, increment), decrement)


_ROUNDING_TABLE: Final = [int(difference > 128) for difference in range(256)]
"""Lookup table of the rounding: (257 high + difference) / 257 differs from high for differences above 128."""


def _match_mask(high: Image.Image, low: Image.Image, key: tuple[int, ...]) -> Image.Image:
    """Return a mask with 255 where all values of 16 bits equal those of `key`."""
    mask = Image.new("L", high.size, 255)
    for band, value in zip(high.getbands(), key, strict=True):
        for half, key_byte in ((high, value >> 8), (low, value & 255)):
            band_mask = half.getchannel(band).point([255 * (level == key_byte) for level in range(256)])
            mask = ImageChops.darker(mask, band_mask)
    return mask

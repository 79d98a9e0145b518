"""The colour profile that an image embeds, and the conversion that follows from the profile."""

from __future__ import annotations

from typing import Any, Final

from PIL import AvifImagePlugin, BmpImagePlugin, ImageFile, PngImagePlugin

from fovea.service.image_warnings import ImageWarning, WarningCode
from fovea.service.inference import colour
from fovea.service.inference.colour import BadProfile, Conversion, Profile

_EXIF_ADOBE_RGB: Final = b"R03\0"
"""Interoperability index of DCF's optional colour space (DCF 2.0, 3.3.5).

Cameras declare Adobe RGB with it, and many of them with nothing else.
"""

_AVIF_HEADER_BYTES: Final = 1 << 16
"""Number of bytes to search for the properties of an AVIF, which precede its pixels."""


def find_profile(
    image_file: ImageFile.ImageFile, encoded_image: bytes, warnings: list[ImageWarning]
) -> bytes | None:
    """Return the image's ICC profile, or a profile for its colour description; None for sRGB.

    The most exact description is used, in the order of the PNG specification (third edition, 4.3). Raises
    `BadProfile`.
    """
    info = image_file.info
    kind = type(image_file)  # faster than `isinstance`, which takes a microsecond for each of these classes
    is_png = kind is PngImagePlugin.PngImageFile
    if is_png:
        offset = encoded_image.find(b"\0\0\0\4cICP", 0, image_file.tile[0].offset)
        if offset >= 0:
            return _code_point_profile(encoded_image[offset + 8], encoded_image[offset + 9], warnings)
    if "icc_profile" in info:
        profile: bytes | None = info["icc_profile"]
        if not profile:
            raise BadProfile("it is damaged")
        return profile
    if is_png:
        return None if "srgb" in info else _gamma_profile(info)
    if kind is AvifImagePlugin.AvifImageFile or image_file.format == "HEIC":
        offset = encoded_image.find(b"colrnclx", 0, _AVIF_HEADER_BYTES)
        codes = encoded_image[offset + 8 : offset + 12]
        if offset >= 0 and len(codes) == 4:
            return _code_point_profile(int.from_bytes(codes[:2]), int.from_bytes(codes[2:]), warnings)
    if kind is BmpImagePlugin.BmpImageFile:
        return _read_bmp_profile(encoded_image)
    if _EXIF_ADOBE_RGB in info.get("exif", b"") and image_file.mode == "RGB":
        return colour.build_profile(colour.ADOBE_RGB)
    return None


def _code_point_profile(primaries: int, transfer: int, warnings: list[ImageWarning]) -> bytes | None:
    """Return a profile for two code points of ITU-T H.273; None for sRGB. Add a warning for HDR."""
    if transfer in colour.HDR_TRANSFERS:
        text = "the image has high dynamic range (PQ or HLG); its values were used unchanged"
        warnings.append(ImageWarning(WarningCode.HDR, text))
    tags = colour.find_tags(primaries, transfer)
    return None if tags is None else colour.build_profile(tags)


def _gamma_profile(info: dict[Any, Any]) -> bytes | None:
    """Return a profile for gAMA and cHRM of a PNG. Primaries without a curve are ignored."""
    gamma = info.get("gamma")
    if gamma is None:
        return None
    white_first = info.get("chromaticity", colour.SRGB_PRIMARIES)
    if not gamma:
        raise BadProfile("its gamma is 0")
    tags = colour.ColourTags(white_first, 1 / gamma)
    return None if colour.is_srgb(tags) else colour.build_profile(tags)


_BMP_V5_BYTES: Final = 124


def _read_bmp_profile(encoded_image: bytes) -> bytes | None:
    """Return the profile that a bitmap with a version 5 header embeds, or None. Raises `BadProfile`."""
    header = encoded_image[14 : 14 + _BMP_V5_BYTES]
    if int.from_bytes(header[:4], "little") != _BMP_V5_BYTES or header[56:60] != b"DEBM":
        return None
    start, size = (int.from_bytes(header[offset : offset + 4], "little") for offset in (112, 116))
    profile = encoded_image[14 + start : 14 + start + size]
    if not size or len(profile) < size:
        raise BadProfile("the file does not contain all of it")
    return profile


def find_conversion(
    profile: Profile | BadProfile | None, mode: str, warnings: list[ImageWarning]
) -> Conversion | None:
    """Return the conversion of an image with this mode to sRGB; None if there is none or none is needed.

    Warnings are appended to `warnings`.
    """
    if mode == "LAB":
        return colour.lab_conversion()
    try:
        if isinstance(profile, BadProfile):
            raise profile.with_traceback(None)
        if profile is None:
            if mode == "CMYK":
                text = "the image has CMYK colours without a profile; they were converted by a simple formula"
                warnings.append(ImageWarning(WarningCode.NO_PROFILE, text))
            return None
        conversion = profile.get_conversion()
        if not colour.is_suitable(conversion, "L" if mode.startswith("I;16") else mode):
            raise BadProfile(f"it is for {conversion.mode} and the image is {mode}")
    except BadProfile as error:
        text = f"the colour profile was not used, and the colours may be off: {error}"
        warnings.append(ImageWarning(WarningCode.PROFILE_IGNORED, text))
        return None
    return conversion if conversion.transform else None

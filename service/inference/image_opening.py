"""Opening of an image: the choice of the picture, and limits that the header alone decides.

No pixel is decoded here.
"""

from __future__ import annotations

from contextlib import suppress
from io import BytesIO
from itertools import islice
from typing import Final, Literal

from PIL import (
    AvifImagePlugin,
    GifImagePlugin,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from fovea.service.errors import BadImage, TooManyPixels
from fovea.service.image_warnings import ImageWarning, WarningCode
from fovea.service.inference import jpeg, tiff
from fovea.service.inference.colour import BadProfile, Profile
from fovea.service.inference.embedded_profile import find_profile
from fovea.service.inference.image_format import IMAGE_CLASSES
from fovea.service.inference.image_source import ImageSource, correct_raw_mode, has_low_bytes
from fovea.service.inference.tiff import BITS_PER_SAMPLE, PHOTOMETRIC, TILE_LENGTH, TILE_WIDTH


def open_image(kind: str, encoded_image: bytes, max_pixels: int, warnings: list[ImageWarning]) -> ImageSource:
    """Open the intended picture, and refuse an image that is too expensive to decode.

    Warnings are appended to `warnings`. Raises the same errors as `decode_image`.
    """
    orientation = 1
    if kind == "TIFF":
        encoded_image, page_warnings, picture_orientation = tiff.choose_picture(encoded_image)
        warnings += page_warnings
        orientation = picture_orientation or 1
    image_file = IMAGE_CLASSES[kind](BytesIO(encoded_image))
    check_limits(image_file, max_pixels, encoded_image)
    correct_raw_mode(image_file)
    warnings += _picture_warnings(image_file, encoded_image)
    profile: Profile | BadProfile | None
    try:
        content = find_profile(image_file, encoded_image, warnings)
        profile = None if content is None else Profile(content)
    except BadProfile as error:
        profile = error
    return ImageSource(image_file, encoded_image, profile, has_low_bytes(image_file, warnings), orientation)


def check_limits(image_file: ImageFile.ImageFile, max_pixels: int, encoded_image: bytes) -> None:
    """Refuse an image that is too expensive to decode. Raises `TooManyPixels` and `BadImage`."""
    _check_size(image_file, max_pixels)
    if isinstance(image_file, JpegImagePlugin.JpegImageFile) and has_many_scans(image_file):
        _check_scan_count(encoded_image)


def _check_size(image_file: ImageFile.ImageFile, max_pixels: int) -> None:
    """Refuse an image by its header.

    The tiles of a TIFF may be larger than the image, and are decoded whole. Raises `TooManyPixels` and
    `BadImage`.
    """
    sizes = [image_file.size]
    if isinstance(image_file, TiffImagePlugin.TiffImageFile):
        tags = image_file.tag_v2
        sizes.append((tags.get(TILE_WIDTH, 0), tags.get(TILE_LENGTH, 0)))
        bits, photometric = tags.get(BITS_PER_SAMPLE, (1,))[0], tags.get(PHOTOMETRIC)
        if image_file.mode.startswith("I;16") and (bits != 16 or photometric == _WHITE_IS_ZERO):
            zero = "white" if photometric == _WHITE_IS_ZERO else "black"
            raise BadImage(
                f"a grey TIFF image of {bits} bits where 0 is {zero} is not served; "
                "send 8 bits, or 16 bits where 0 is black"
            )
    for width, height in sizes:
        if width * height > max_pixels:
            raise TooManyPixels(f"image is {width} x {height} px; at most {max_pixels / 1e6:g} MP")


_WHITE_IS_ZERO: Final = 0

_MAX_SCANS: Final = 100
"""Limit of scans in one JPEG.

Encoders make about ten. Each scan costs a pass over all pixels, but may have as little as a hundred bytes.
"""


def _check_scan_count(image: bytes) -> None:
    """Refuse a JPEG with more than `_MAX_SCANS` scans. Raises `BadImage`.

    Scans of thumbnails, and of data after the image, do not count.
    """
    if next(islice(jpeg.read_scans(image), _MAX_SCANS, None), None):
        raise BadImage(f"the JPEG image has more than {_MAX_SCANS} scans")


def has_many_scans(image_file: JpegImagePlugin.JpegImageFile) -> bool:
    """Return True if the decoder keeps all coefficients of a JPEG.

    The decoder keeps the coefficients of a progressive JPEG, and of a JPEG whose first scan lacks a
    component. Pillow has just read the header of the first scan: it ends at the file's position.
    """
    components = len(image_file.layer)
    length = 6 + 2 * components
    header = b"\xff\xda" + length.to_bytes(2) + bytes([components])
    stream = image_file.fp
    if "progressive" in image_file.info or stream is None:
        return True
    end = stream.tell()
    stream.seek(max(end - length - 2, 0))
    scan = stream.read(length + 2)
    return not scan.startswith(header)


def _picture_warnings(image_file: ImageFile.ImageFile, encoded_image: bytes) -> list[ImageWarning]:
    """Return a warning if the file has other pictures. `tiff.choose_picture` reports those of a TIFF."""
    count = 1
    kind = type(image_file)  # faster than `isinstance`, which takes a microsecond for each of these classes
    if kind is JpegImagePlugin.JpegImageFile:
        if "mp" in image_file.info:
            count = _count_pictures(image_file, encoded_image)
    elif isinstance(image_file, GifImagePlugin.GifImageFile):
        with suppress(Exception):  # data after the first frame may be damaged
            if image_file.is_animated:  # counting frames is as slow as decoding them
                return [
                    ImageWarning(
                        WarningCode.SEVERAL_PICTURES, "the image has several frames; only the first was used"
                    )
                ]
    elif isinstance(
        image_file,
        PngImagePlugin.PngImageFile | WebPImagePlugin.WebPImageFile | AvifImagePlugin.AvifImageFile,
    ):
        count = image_file.n_frames
    elif image_file.format == "HEIC":
        count = getattr(image_file, "n_frames", 1)
    if count < 2:
        return []
    return [
        ImageWarning(
            WarningCode.SEVERAL_PICTURES, f"the file has {count} pictures or frames; only the first was used"
        )
    ]


_MP_ENTRIES: Final = 0xB002
"""Tag of the list of pictures in a JPEG (CIPA DC-007, 5.2.3.3)."""

_GAIN_MAPS: Final = (b"hdrgm", b"HDRGainMap", b"urn:iso:std:iso:ts:21496")
"""Marks of a gain map: a picture after a JPEG of Ultra HDR, Apple or ISO 21496-1."""


def _count_pictures(image_file: ImageFile.ImageFile, encoded_image: bytes) -> int:
    """Return the number of pictures in a JPEG, without the previews and gain maps that phones add."""
    with suppress(Exception):  # a damaged index counts as none
        index = TiffImagePlugin.ImageFileDirectory_v2(image_file.info["mp"][:8])
        stream = BytesIO(image_file.info["mp"])
        stream.seek(index.next)
        index.load(stream)
        byte_order: Literal["little", "big"] = "little" if image_file.info["mp"][:2] == b"II" else "big"
        entries: bytes = index[_MP_ENTRIES]
        count = 1
        for start in range(16, min(len(entries), 16 * _MAX_SCANS), 16):
            kind = int.from_bytes(entries[start : start + 4], byte_order) & 0xFFFFFF
            offset = image_file.info["mpoffset"] + int.from_bytes(entries[start + 8 : start + 12], byte_order)
            count += kind >> 16 != 1 and not any(
                mark in encoded_image[offset : offset + 4096] for mark in _GAIN_MAPS
            )
        return count
    return 1

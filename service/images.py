"""Encoded images to pixels: the only pixel code in the project.

Training, export, verification and serving all come through here, so that what a model was trained
on is what it is served. An image takes these steps, always in this order:

    identify    by its first bytes, never by a file name or content type
    admit       format and pixel count, from the header, before anything is decoded
    decode      the first frame; `fast` lets the JPEG decoder scale down by 2, 4 or 8 as it goes
    orient      by EXIF; a corrupt EXIF block counts as none
    convert     to 8-bit RGB, each mode by its rule (`_to_rgb`)
    resize      and crop, by the model's `Geometry`
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from itertools import islice
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from service.contract import Geometry, PixelPath, Resize
from service.errors import BadImage, BadRequest, TooManyPixels, UnsupportedFormat

Pixels: TypeAlias = npt.NDArray[np.uint8]
_Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""


@dataclass(frozen=True)
class Decoded:
    """One image, ready for a batch."""

    pixels: Pixels
    """uint8 (height, width, 3), RGB, C-contiguous, of the model's geometry."""
    format: str
    """Pillow's name of the encoding, such as `JPEG`."""
    width: int
    """Of the image as it is seen, EXIF orientation applied, in pixels."""
    height: int


def decode(image: bytes | memoryview, geometry: Geometry, *, max_pixels: int) -> Decoded:
    """Decode one encoded image into the pixels that the model sees.

    Raises `BadRequest` when it is empty, `UnsupportedFormat` when it is of no served format,
    `TooManyPixels` when its header promises more than `max_pixels`, and `BadImage` when it is
    truncated, corrupt or of a mode without a rule.
    """
    if not image:
        raise BadRequest("the image is empty")
    kind = _identify(bytes(image[:64]))
    if kind == "JPEG":
        _limit_scans(image)
    try:
        return _decode(kind, _OPENERS[kind](BytesIO(image)), geometry, max_pixels)
    except (BadImage, TooManyPixels, MemoryError):
        raise
    except Image.DecompressionBombError:  # Pillow's own limit, inside some formats, comes before the size
        raise TooManyPixels(f"image is larger than {max_pixels / 1e6:g} MP") from None
    except Exception as error:  # a hostile file can make Pillow raise nearly anything
        raise BadImage(f"the {kind} image cannot be decoded: {error}") from error


def _decode(kind: str, opened: ImageFile.ImageFile, geometry: Geometry, max_pixels: int) -> Decoded:
    _admit(opened, max_pixels)
    width, height = opened.size
    box = _draft(opened, geometry)
    opened.load()
    upright, box = _orient(opened, box)
    if upright.size != opened.size:
        width, height = height, width
    del opened  # 50 MP are 200 MB: no step keeps what the one before it made
    rgb = _to_rgb(upright)
    del upright
    return Decoded(_resize(rgb, geometry, (width, height), box), kind, width, height)


def settle_pillow() -> None:
    """Set what Pillow keeps for the whole process; for whoever owns the process to call."""
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the decode threads are ours to count
    warnings.filterwarnings("ignore", module="PIL")  # damaged files are refused, and not also written of
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


# --- identify ------------------------------------------------------------------------------------

_OPENERS: Final[dict[str, Callable[[BytesIO], ImageFile.ImageFile]]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,  # MPO too: it is a JPEG with more of them behind it
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
"""Pillow's classes, called directly: `Image.open` would trust its own process-wide pixel limit."""

_SIGNATURES: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"BM", "BMP"),
    (b"PK\x03\x04", "ZIP"),
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML"),
)

_BRANDS: Final = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), "HEIC"),
}
"""Brands of ISO base media files, in the order in which they decide (ISO/IEC 23008-12)."""


@cache
def served_formats() -> tuple[str, ...]:
    """The formats that this build of Pillow can decode."""
    codecs = {"WEBP": "webp", "AVIF": "avif", "JPEG": "jpg"}
    return tuple(kind for kind in _OPENERS if kind not in codecs or features.check(codecs[kind]))


def _identify(head: bytes) -> str:
    """Name the format by its first 64 bytes. Raises `UnsupportedFormat` unless it is served."""
    kind = _signature(head)
    if kind in served_formats():
        return kind
    served = ", ".join(served_formats())
    if kind:
        raise UnsupportedFormat(f"{kind} is not served; send one of {served}")
    raise UnsupportedFormat(f"the bytes are not an image of a known format; send one of {served}")


def _signature(head: bytes) -> str:
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = head[8 : min(int.from_bytes(head[:4]), len(head))]
        return next((kind for brand, kind in _BRANDS.items() if brand in _chunks(brands)), "")
    return next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), "")


def _chunks(brands: bytes) -> list[bytes]:
    return [brands[start : start + 4] for start in range(0, len(brands), 4)]


# --- admit, decode, orient -----------------------------------------------------------------------


def _admit(image: ImageFile.ImageFile, max_pixels: int) -> None:
    """Refuse by the header. A TIFF's tiles may be larger than the image, and are decoded whole."""
    sizes = [image.size]
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        sizes.append((tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)))
        bits, photometric = tags.get(_BITS_PER_SAMPLE, (1,))[0], tags.get(_PHOTOMETRIC)
        if image.mode.startswith("I;16") and (bits != 16 or photometric == _WHITE_IS_ZERO):
            raise BadImage(f"grey TIFF images of {bits} bits are not served unless 16, and 0 is black")
    for width, height in sizes:
        if width * height > max_pixels:
            raise TooManyPixels(f"image is {width} x {height} px; at most {max_pixels / 1e6:g} MP")


_BITS_PER_SAMPLE, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH = 258, 262, 322, 323  # TIFF 6.0, section 8
_WHITE_IS_ZERO: Final = 0

_MAX_SCANS: Final = 100
"""Scans in one JPEG. Encoders make about ten; each costs a pass over all pixels, but as little as a
hundred bytes."""


def _limit_scans(image: bytes | memoryview) -> None:
    """Refuse a JPEG with absurdly many scans, by the markers that start one (ISO/IEC 10918-1, B.2.3)."""
    if next(islice(re.finditer(b"\xff\xda", image), _MAX_SCANS, None), None):
        raise BadImage(f"the JPEG image has more than {_MAX_SCANS} scans")


def _draft(image: ImageFile.ImageFile, geometry: Geometry) -> _Box:
    """Choose the scale to decode at; return what of the decoded image the full image will fill.

    Where the scale does not divide a side, the decoder rounds up, and the last row or column is only
    partly filled: the box has fractions.
    """
    if geometry.pixel_path is PixelPath.FAST and isinstance(image, JpegImagePlugin.JpegImageFile):
        width, height = _target(image.size, geometry)
        if geometry.resize is Resize.STRETCH:  # which side is which is not known before EXIF is
            width = height = max(width, height)
        drafted = image.draft(None, (2 * width, 2 * height))
        if drafted:
            return drafted[1]
    return 0, 0, image.width, image.height


_UPRIGHT: Final = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, False, True, False),
    3: (Image.Transpose.ROTATE_180, False, True, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, False, True),
    5: (Image.Transpose.TRANSPOSE, True, False, False),
    6: (Image.Transpose.ROTATE_270, True, True, False),
    7: (Image.Transpose.TRANSVERSE, True, True, True),
    8: (Image.Transpose.ROTATE_90, True, False, True),
}
"""What turns an image of each EXIF orientation upright (Exif 2.32, tag 0x0112): Pillow's method, and what it
does to a box: are the axes swapped, and is then x mirrored, is y?"""


def _orient(image: Image.Image, box: _Box) -> tuple[Image.Image, _Box]:
    """Turn the image upright, and a box in it with it."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # a corrupt EXIF block is no reason to refuse the image
        return image, box
    if orientation not in _UPRIGHT:
        return image, box
    method, swapped, mirrored_x, mirrored_y = _UPRIGHT[orientation]
    image = image.transpose(method)
    left, top, right, bottom = (box[1], box[0], box[3], box[2]) if swapped else box
    if mirrored_x:
        left, right = image.width - right, image.width - left
    if mirrored_y:
        top, bottom = image.height - bottom, image.height - top
    return image, (left, top, right, bottom)


# --- convert -------------------------------------------------------------------------------------

_DIRECT_MODES: Final = frozenset({"1", "L", "P", "CMYK", "YCbCr", "HSV"})


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB by the rule of the image's mode.

    Transparency is composited on white. 16-bit grey is scaled, not clipped. Grey, palette, CMYK
    and YCbCr are converted as Pillow does. Other modes (32-bit integers and floats, whose range
    nothing tells, and LAB) raise `BadImage`.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image), image.info.get("transparency"))).convert("RGB")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode in _DIRECT_MODES:
        return image.convert("RGB")
    raise BadImage(f"images of mode {image.mode} cannot be converted to 8-bit RGB")


def _eight_bits(grey: npt.NDArray[np.generic], transparent: int | None) -> Pixels:
    """0 … 65535 to 0 … 255, rounded: 257 is 65535 / 255. The transparent grey, if any, becomes white."""
    eight = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return eight if transparent is None else np.where(grey == transparent, np.uint8(255), eight)


# --- resize --------------------------------------------------------------------------------------

_WHOLE_RESIZE_PIXELS: Final = 16_000_000
"""Above this many pixels after the resize, `exact` resizes only what the crop keeps.

A 1 x 20,000 strip for a model of 224 would otherwise pass through 224 x 4,480,000. No photograph
comes near: a 10:1 panorama for a model of 384 makes 1.5 million.
"""


def _target(size: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Width and height of the whole image after the resize.

    The longer side is rounded down, as torchvision's `Resize` does.
    """
    if geometry.resize is Resize.STRETCH:
        return geometry.width, geometry.height
    width, height = size
    shorter = min(size)
    return geometry.resize_to * width // shorter, geometry.resize_to * height // shorter


def _resize(image: Image.Image, geometry: Geometry, full_size: tuple[int, int], box: _Box) -> Pixels:
    """Resize and crop. The full image, of `full_size`, fills `box` of `image`."""
    width, height = _target(full_size, geometry)
    left = round((width - geometry.width) / 2)  # as torchvision's CenterCrop rounds
    top = round((height - geometry.height) / 2)
    filter_ = Image.Resampling[geometry.interpolation.upper()]
    if geometry.pixel_path is PixelPath.EXACT and width * height <= _WHOLE_RESIZE_PIXELS:
        crop = (left, top, left + geometry.width, top + geometry.height)
        return np.array(image.resize((width, height), filter_).crop(crop))
    across, down = (box[2] - box[0]) / width, (box[3] - box[1]) / height
    kept = (
        box[0] + left * across,
        box[1] + top * down,
        min(box[0] + (left + geometry.width) * across, image.width),  # float rounding may pass the edge
        min(box[1] + (top + geometry.height) * down, image.height),
    )
    return np.array(image.resize((geometry.width, geometry.height), filter_, box=kept))

"""Conversion of encoded images to pixels: the only pixel code in the project.

Training, export, verification and serving all use this module, so a model is served the same pixels that it
was trained on. An image takes these steps, always in this order:

    identify    by its first bytes, never by a file name or content type
    check       format and pixel count, from the header, before anything is decoded
    decode      the first frame; with `fast` the JPEG decoder may scale down by 2, 4 or 8
    orient      by EXIF; a corrupt EXIF block is ignored
    convert     to 8-bit sRGB, by the image's profile (see `colour`) and the rule of its mode (`_to_rgb`)
    resize      and crop, by the model's `Geometry`

`fast` orients last, where the image is smallest. The result is the same except for the order in which the
resize rounds.

A file that fails is tried again without its damage if no pixel needs the damaged part (see `repair`).
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from itertools import islice
from typing import Any, Final, Literal, TypeAlias, TypeVar
from warnings import filterwarnings

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageChops,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    _imaging,
    features,
)

from fovea.service.artifact.contract import Geometry, Interpolation, PixelPath, Resize
from fovea.service.errors import BadImage, BadRequest, RequestError, TooManyPixels, UnsupportedFormat
from fovea.service.image_warnings import ImageWarning, WarningCode
from fovea.service.inference import colour, jpeg, tiff
from fovea.service.inference.colour import BadProfile, Conversion, Profile
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.repair import find_repairs

Pixels: TypeAlias = npt.NDArray[np.uint8]
_Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


@dataclass(frozen=True)
class DecodedImage:
    """One decoded image, ready for a batch."""

    pixels: Pixels
    """Pixels of the model's geometry: uint8 (height, width, 3), RGB, C-contiguous, read-only."""
    format: str
    """Pillow's name of the format, such as `JPEG`."""
    width: int
    """Width of the image in pixels, after EXIF orientation."""
    height: int
    warnings: tuple[ImageWarning, ...] = ()
    """Warnings about the conversion of the image to pixels."""


@dataclass
class DecodeTrace:
    """A record of the steps that `decode_image` applied to one image, for people."""

    steps: list[tuple[str, str]] = field(default_factory=list)
    """Names and descriptions, in order, of the steps that changed something."""
    crop_box: _Box = (0, 0, 0, 0)
    """Region of the upright image that the pixels cover, in pixels of that image."""

    def add_step(self, name: str, description: str) -> None:
        """Append a step."""
        self.steps.append((name, description))


def decode_image(
    image: bytes | memoryview,
    geometry: Geometry,
    *,
    max_pixels: int,
    memory: DecodeMemory | None = None,
    trace: DecodeTrace | None = None,
) -> DecodedImage:
    """Decode one encoded image into the pixels that the model sees.

    With `memory`, block the calling thread until the peak memory that the header predicts is available. The
    steps are appended to `trace`.

    Raises `BadRequest` when the image is empty, `UnsupportedFormat` when its format is not served,
    `TooManyPixels` when its header promises more than `max_pixels` pixels or needs more than the limit of
    `memory`, and `BadImage` when it is truncated, corrupt or of a mode without a rule.
    """
    kind, image = _identify_image(image)

    def decode_once(encoded_image: bytes, warnings: list[ImageWarning]) -> DecodedImage:
        if trace:
            trace.steps.clear()  # an earlier attempt may have failed
        return _decode_pixels(kind, encoded_image, geometry, max_pixels, memory, trace, warnings)

    return _decode_or_repair(kind, image, max_pixels, memory, decode_once)


def identity_geometry(height: int, width: int) -> Geometry:
    """Return a geometry that changes no pixel of an image of this size, in pixels."""
    return Geometry(height, width, Resize.STRETCH, 0, Interpolation.NEAREST, PixelPath.EXACT)


def decode_upright(image: bytes, *, max_pixels: int, memory: DecodeMemory | None = None) -> Image.Image:
    """Return the whole image at its own size as 8-bit RGB, oriented by EXIF.

    The function waits and raises like `decode_image`.
    """
    kind, image = _identify_image(image)
    return _decode_or_repair(
        kind,
        image,
        max_pixels,
        memory,
        lambda encoded_image, _: _decode_upright(kind, encoded_image, max_pixels, memory),
    )


_T = TypeVar("_T")


def _decode_or_repair(
    kind: str,
    image: bytes,
    max_pixels: int,
    memory: DecodeMemory | None,
    decode_once: Callable[[bytes, list[ImageWarning]], _T],
) -> _T:
    """Return the result of `decode_once` for the image, or for the image without its damage if that fails.

    `decode_once` gets the bytes and a list of warnings, to which it may append. It is called in this thread:
    once for an intact image, and once more for each repair until one succeeds. Each call gets a list of its
    own, so that the warnings of a failed attempt are lost with the attempt. Raises the same errors as
    `decode_image`.
    """
    try:
        return decode_once(image, [])
    except Exception as error:
        refusal = _error_for_caller(error, kind, max_pixels)
    if isinstance(refusal, BadImage):
        for repair in find_repairs(kind, image):
            try:
                if repair.altered_image is None or _have_same_pixels(
                    repair.image, repair.altered_image, max_pixels, memory
                ):
                    return decode_once(repair.image, [*repair.warnings])
            except TooManyPixels:
                raise
            except Exception:  # noqa: S112 - the first error describes the damage
                continue
    raise refusal from refusal.__cause__


def _have_same_pixels(
    image: bytes, altered_image: bytes, max_pixels: int, memory: DecodeMemory | None
) -> bool:
    """Return True if two JPEGs have the same complete pixels.

    The pixels are compared at one eighth of the size first, because most different images differ there too.
    """
    components = [layer[0] for layer in JpegImagePlugin.JpegImageFile(BytesIO(image)).layer]
    return jpeg.is_complete(image, components) and all(
        _digest_pixels(image, scale, max_pixels, memory)
        == _digest_pixels(altered_image, scale, max_pixels, memory)
        for scale in (8, 1)
    )


def _digest_pixels(image: bytes, scale: int, max_pixels: int, memory: DecodeMemory | None) -> bytes:
    """Return a digest of the pixels of a JPEG, decoded at 1/`scale` of its size."""
    image_file = JpegImagePlugin.JpegImageFile(BytesIO(image))
    _check_limits(image_file, max_pixels, image)
    size = image_file.size
    image_file.draft(None, (max(1, size[0] // scale), max(1, size[1] // scale)))
    peak_bytes = (
        len(image) + _peak_bytes(image_file, size, identity_geometry(image_file.height, image_file.width))
        if memory
        else 0
    )
    with memory.reserve(peak_bytes) if memory else nullcontext():
        image_file.load()
        return hashlib.blake2b(image_file.tobytes()).digest()


def _identify_image(image: bytes | memoryview) -> tuple[str, bytes]:
    """Return the format and the bytes of an image. Raises `BadRequest` and `UnsupportedFormat`."""
    if not image:
        raise BadRequest("the image is empty")
    image = bytes(image)  # a bytes object is not copied, neither here nor by BytesIO
    return _identify_format(image[:64]), image


def _error_for_caller(error: Exception, kind: str, max_pixels: int) -> Exception:
    """Return the error for the caller. A hostile file can make Pillow raise almost anything."""
    error = error.with_traceback(None)  # frames in a traceback would keep the decoded image alive
    if isinstance(error, RequestError | MemoryError):
        return error
    # Pillow has its own limit, which some formats check before the size is known.
    if isinstance(error, Image.DecompressionBombError):
        return TooManyPixels(f"image is larger than {max_pixels / 1e6:g} MP")
    refusal = BadImage(f"the {kind} image cannot be decoded: {error}")
    refusal.__cause__ = error
    return refusal


def _decode_pixels(
    kind: str,
    encoded_image: bytes,
    geometry: Geometry,
    max_pixels: int,
    memory: DecodeMemory | None,
    trace: DecodeTrace | None,
    warnings: list[ImageWarning],
) -> DecodedImage:
    """Run all steps on one image. `encoded_image` is in the format `kind`."""
    source = _open_image(kind, encoded_image, max_pixels, warnings)
    image_file = source.image_file
    width, height = image_file.size
    box = _draft_jpeg(image_file, geometry)
    if trace:
        _trace_decoding(trace, kind, (width, height), image_file)
    peak_bytes = _source_peak_bytes(source, (width, height), geometry) if memory else 0
    with memory.reserve(peak_bytes) if memory else nullcontext():
        image = _load_image(source)
        rotation = _find_rotation(image_file, source.orientation)
        if rotation and rotation.swaps_axes:
            width, height = height, width
        conversion = _find_conversion(source.profile, image.mode, warnings)
        if trace:
            _trace_conversion(trace, image_file, rotation, conversion)
            _trace_resize(trace, (width, height), geometry)
        del image_file, source  # 50 MP take 200 MB: free the previous step's image
        if rotation and geometry.pixel_path is PixelPath.EXACT:
            image = image.transpose(rotation.method)
            rotation = None  # the box is now the whole image, in any orientation
            box = 0, 0, image.width, image.height
        image = _to_rgb(image, conversion, warnings)
        pixels = _resize_and_crop(image, geometry, (width, height), box, rotation)
    warnings += _geometry_warnings((width, height), geometry)
    return DecodedImage(pixels, kind, width, height, tuple(warnings))


def _decode_upright(
    kind: str, encoded_image: bytes, max_pixels: int, memory: DecodeMemory | None
) -> Image.Image:
    """Run the steps up to the conversion on one image."""
    source = _open_image(kind, encoded_image, max_pixels, [])
    geometry = identity_geometry(source.image_file.height, source.image_file.width)
    peak_bytes = _source_peak_bytes(source, source.image_file.size, geometry) if memory else 0
    with memory.reserve(peak_bytes) if memory else nullcontext():
        image = _load_image(source)
        rotation = _find_rotation(source.image_file, source.orientation)
        conversion = _find_conversion(source.profile, image.mode, [])
        return _to_rgb(image.transpose(rotation.method) if rotation else image, conversion, [])


def configure_pillow() -> None:
    """Configure Pillow for the whole process.

    Only the main module of a process may call this, before the first image is decoded.
    """
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # decode threads are limited by Fovea
    filterwarnings("ignore", module="PIL")  # a damaged file is refused: it must not be logged too
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def release_pillow_memory() -> None:
    """Return the memory that Pillow keeps for further images (`PILLOW_BLOCKS_MAX`) to the system.

    `DecodeMemory` calls this in a decoding thread while it holds its lock. Blocks of images that other
    threads are decoding are not affected.
    """
    _imaging.clear_cache()


# --- identify ------------------------------------------------------------------------------------

_IMAGE_CLASSES: Final[dict[str, Callable[[BytesIO], ImageFile.ImageFile]]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,  # includes MPO: a JPEG followed by further pictures
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
"""Pillow's classes by format.

They are called directly, because `Image.open` would apply Pillow's process-wide pixel limit.
"""

_SIGNATURES: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00\x10\x00\x00\x00CR", "Canon CR2"),
    (b"II\x1a\x00\x00\x00HEAPCCDR", "Canon CRW"),
    (b"IIU\x00", "Panasonic RW2"),
    (b"IIRO", "Olympus ORF"),
    (b"IIRS", "Olympus ORF"),
    (b"MMOR", "Olympus ORF"),
    (b"FUJIFILMCCD-RAW", "Fujifilm RAF"),
    (b"FOVb", "Sigma X3F"),
    (b"\x00MRM", "Minolta MRW"),
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
    b"crx ": "Canon CR3",
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), "HEIC"),
}
"""Brands of ISO base media files in order of precedence (ISO/IEC 23008-12)."""

_RAW_FORMATS: Final = frozenset(
    {"Canon CR2", "Canon CRW", "Canon CR3", "Panasonic RW2", "Olympus ORF", "Fujifilm RAF", "Sigma X3F",
     "Minolta MRW"}
)  # fmt: skip
"""Camera raw formats that the first bytes identify. `tiff` finds raw files that begin like a TIFF."""


@cache
def supported_formats() -> tuple[str, ...]:
    """Return the formats that this build of Pillow can decode."""
    codecs = {"WEBP": "webp", "AVIF": "avif", "JPEG": "jpg"}
    return tuple(kind for kind in _IMAGE_CLASSES if kind not in codecs or features.check(codecs[kind]))


def _identify_format(head: bytes) -> str:
    """Return the format of an image by its first 64 bytes. Raises `UnsupportedFormat` unless it is served."""
    kind = _match_signature(head)
    if kind in supported_formats():
        return kind
    if kind in _RAW_FORMATS:
        raise UnsupportedFormat(tiff.raw_format_message(kind))
    formats = ", ".join(supported_formats())
    if kind:
        raise UnsupportedFormat(f"{kind} is not served; send one of {formats}")
    hint = "; JSON needs `Content-Type: application/json`" if head[:1] == b"{" else ""
    raise UnsupportedFormat(f"the bytes are not an image of a known format; send one of {formats}{hint}")


def _match_signature(head: bytes) -> str:
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = head[8 : min(int.from_bytes(head[:4]), len(head))]
        return next((kind for brand, kind in _BRANDS.items() if brand in _split_brands(brands)), "")
    return next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), "")


def _split_brands(brands: bytes) -> list[bytes]:
    return [brands[start : start + 4] for start in range(0, len(brands), 4)]


# --- open, check, orient -------------------------------------------------------------------------


@dataclass
class _ImageSource:
    """An image that is opened and not yet decoded."""

    image_file: ImageFile.ImageFile
    encoded_image: bytes
    profile: Profile | BadProfile | None
    """ICC profile of the colours, or the reason why it cannot be used; None for sRGB."""
    has_low_bytes: bool
    """True if pixels have several values of 16 bits, of which Pillow keeps only the upper bytes."""
    orientation: int
    """EXIF orientation to use if the image itself has none."""


def _open_image(
    kind: str, encoded_image: bytes, max_pixels: int, warnings: list[ImageWarning]
) -> _ImageSource:
    """Open the intended picture, and refuse an image that is too expensive to decode.

    Warnings are appended to `warnings`. Raises the same errors as `decode_image`.
    """
    orientation = 1
    if kind == "TIFF":
        encoded_image, page_warnings, picture_orientation = tiff.choose_picture(encoded_image)
        warnings += page_warnings
        orientation = picture_orientation or 1
    image_file = _IMAGE_CLASSES[kind](BytesIO(encoded_image))
    _check_limits(image_file, max_pixels, encoded_image)
    _correct_raw_mode(image_file)
    warnings += _picture_warnings(image_file, encoded_image)
    profile: Profile | BadProfile | None
    try:
        content = _find_profile(image_file, encoded_image, warnings)
        profile = None if content is None else Profile(content)
    except BadProfile as error:
        profile = error
    return _ImageSource(image_file, encoded_image, profile, _has_low_bytes(image_file, warnings), orientation)


def _check_limits(image_file: ImageFile.ImageFile, max_pixels: int, encoded_image: bytes) -> None:
    """Refuse an image that is too expensive to decode. Raises `TooManyPixels` and `BadImage`."""
    _check_size(image_file, max_pixels)
    if isinstance(image_file, JpegImagePlugin.JpegImageFile) and _has_many_scans(image_file):
        _check_scan_count(encoded_image)


def _check_size(image_file: ImageFile.ImageFile, max_pixels: int) -> None:
    """Refuse an image by its header.

    The tiles of a TIFF may be larger than the image, and are decoded whole. Raises `TooManyPixels` and
    `BadImage`.
    """
    sizes = [image_file.size]
    if isinstance(image_file, TiffImagePlugin.TiffImageFile):
        tags = image_file.tag_v2
        sizes.append((tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)))
        bits, photometric = tags.get(_BITS_PER_SAMPLE, (1,))[0], tags.get(_PHOTOMETRIC)
        if image_file.mode.startswith("I;16") and (bits != 16 or photometric == _WHITE_IS_ZERO):
            zero = "white" if photometric == _WHITE_IS_ZERO else "black"
            raise BadImage(
                f"a grey TIFF image of {bits} bits where 0 is {zero} is not served; "
                "send 8 bits, or 16 bits where 0 is black"
            )
    for width, height in sizes:
        if width * height > max_pixels:
            raise TooManyPixels(f"image is {width} x {height} px; at most {max_pixels / 1e6:g} MP")


_BITS_PER_SAMPLE, _PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH, _ROWS_PER_STRIP = (
    258,
    262,
    322,
    323,
    278,
)  # TIFF 6.0, section 8
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


_MIN_DRAFT_RATIO: Final = 4
"""Minimum ratio of the sides of the decoded image to those of the resized image.

Photographs decoded at 2.9 times the size differ from `exact` by 0.5 of 255 on average; at 3.9 times by 0.26,
and at 5.9 times by 0.17.
"""

_MIN_DRAFT_SIDE: Final = 256
"""Minimum shorter side of the decoded image in pixels.

For small models, `_MIN_DRAFT_RATIO` alone does not preserve the labels. Decoding so few pixels takes about a
millisecond.
"""


def choose_draft_scale(size: tuple[int, int], geometry: Geometry) -> int:
    """Return the largest divisor (1, 2, 4 or 8) at which `fast` may decode a JPEG of `size`, in pixels."""
    # For `stretch` use the longer side, because EXIF, read later, may swap the sides.
    target = geometry.resize_to or max(geometry.width, geometry.height)
    max_scale = min(size) // max(_MIN_DRAFT_RATIO * target, _MIN_DRAFT_SIDE)
    return next((scale for scale in (8, 4, 2) if scale <= max_scale), 1)


def _draft_jpeg(image: ImageFile.ImageFile, geometry: Geometry) -> _Box:
    """Choose the decoding scale; return the box that the full image fills in the decoded image.

    If the scale does not divide a side, the decoder rounds up and the last row or column is only partly
    filled. The box then has fractions.
    """
    if geometry.pixel_path is PixelPath.FAST and isinstance(image, JpegImagePlugin.JpegImageFile):
        scale = choose_draft_scale(image.size, geometry)
        if scale > 1 and (draft_result := image.draft(None, (image.width // scale, image.height // scale))):
            return draft_result[1]
    return 0, 0, image.width, image.height


@dataclass(frozen=True)
class _Rotation:
    """The rotation or reflection that turns an image upright.

    Its effect on the axes: swap them if `swaps_axes`, then mirror x or y.
    """

    method: Image.Transpose
    swaps_axes: bool
    mirrors_x: bool
    mirrors_y: bool

    def unrotate_box(self, box: _Box, size: tuple[int, int]) -> _Box:
        """Return the region of the original image, of `size`, that becomes `box` of the upright image."""
        left, top, right, bottom = box
        width, height = (size[1], size[0]) if self.swaps_axes else size
        if self.mirrors_x:
            left, right = width - right, width - left
        if self.mirrors_y:
            top, bottom = height - bottom, height - top
        return (top, left, bottom, right) if self.swaps_axes else (left, top, right, bottom)


_ROTATIONS: Final = {
    2: _Rotation(Image.Transpose.FLIP_LEFT_RIGHT, False, True, False),
    3: _Rotation(Image.Transpose.ROTATE_180, False, True, True),
    4: _Rotation(Image.Transpose.FLIP_TOP_BOTTOM, False, False, True),
    5: _Rotation(Image.Transpose.TRANSPOSE, True, False, False),
    6: _Rotation(Image.Transpose.ROTATE_270, True, True, False),
    7: _Rotation(Image.Transpose.TRANSVERSE, True, True, True),
    8: _Rotation(Image.Transpose.ROTATE_90, True, False, True),
}
"""Rotations by EXIF orientation (Exif 2.32, tag 0x0112); 1 is upright."""

_ORIENTATION_KEYS: Final = frozenset({"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"})
"""Info keys where Pillow looks for an orientation, besides the tags of a TIFF."""


def _find_rotation(image: ImageFile.ImageFile, default_orientation: int = 1) -> _Rotation | None:
    """Return the rotation that makes the image upright, or None.

    `default_orientation` is the orientation of an image that has none. Pillow itself rotates a TIFF with an
    orientation when it loads the TIFF, so call this after `load`.
    """
    if _ORIENTATION_KEYS.isdisjoint(image.info) and not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    try:
        return _ROTATIONS.get(image.getexif().get(0x0112, default_orientation))
    except Exception:  # a corrupt EXIF block does not make the image unusable
        return None


# --- colours -------------------------------------------------------------------------------------

_EXIF_ADOBE_RGB: Final = b"R03\0"
"""Interoperability index of DCF's optional colour space (DCF 2.0, 3.3.5).

Cameras declare Adobe RGB with it, and many of them with nothing else.
"""

_AVIF_HEADER_BYTES: Final = 1 << 16
"""Number of bytes to search for the properties of an AVIF, which precede its pixels."""


def _find_profile(
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
    if kind is AvifImagePlugin.AvifImageFile:
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


def _find_conversion(
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


# --- 16 bits -------------------------------------------------------------------------------------

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


def _correct_raw_mode(image_file: ImageFile.ImageFile) -> None:
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
    bits = tags.get(_BITS_PER_SAMPLE, (1,))
    return (
        tags.get(_PLANAR_CONFIGURATION) == _SEPARATE_PLANES
        and len(bits) > 1
        and bits[0] == 16
        and bool(image_file.tile)
    )


_PLANAR_CONFIGURATION: Final = 284
_SEPARATE_PLANES: Final = 2


def _has_low_bytes(image_file: ImageFile.ImageFile, warnings: list[ImageWarning]) -> bool:
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


def _load_image(source: _ImageSource) -> Image.Image:
    """Decode an image. Values of 16 bits are rounded to 8 bits.

    Pillow would cut off the lower bytes of pixels with several values.
    """
    image_file = source.image_file
    low_image = None
    if source.has_low_bytes:
        # Pillow can read only one half of each value, so decode the file twice with different raw modes.
        low_image = type(image_file)(BytesIO(source.encoded_image))
        _correct_raw_mode(low_image)
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


# --- memory --------------------------------------------------------------------------------------

_WORK_BYTES: Final = 1 << 20
"""Bytes that any decode takes beside its pixels: tables, buffers, and the weights of the filter."""

_PIXEL_BYTES: Final = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
"""Bytes per pixel in Pillow's storage, by mode; all other modes take 4."""

_DECODER_BYTES: Final = {"PNG": 0, "GIF": 2, "BMP": 3, "WEBP": 12, "AVIF": 16}
"""Peak bytes per pixel that the decoder holds beside the image.

WebP has two canvases and the frame. AVIF has the planes and two copies of the frame.
"""

_RETAINED_BYTES: Final = {"WEBP": 8, "AVIF": 8}
"""Bytes per pixel that the decoder keeps as long as its image lives."""


_PROFILE_BYTES: Final = 4 << 20
"""Peak bytes that a transform takes beside its profile, while it is built and as long as it is cached."""


def _source_peak_bytes(source: _ImageSource, full_size: tuple[int, int], geometry: Geometry) -> int:
    """Return an upper bound on the peak bytes of decoding, including the encoded image."""
    peak_bytes = len(source.encoded_image) + _peak_bytes(source.image_file, full_size, geometry)
    if source.has_low_bytes:
        peak_bytes += _LOW_BYTES_MEMORY * source.image_file.width * source.image_file.height
    if isinstance(source.profile, Profile) and not source.profile.is_cached:
        peak_bytes += _PROFILE_BYTES + 2 * len(source.profile.content)
    return peak_bytes


_LOW_BYTES_MEMORY: Final = 20
"""Bytes per pixel for the lower bytes, their differences from the upper bytes, and sums."""


def _peak_bytes(image_file: ImageFile.ImageFile, full_size: tuple[int, int], geometry: Geometry) -> int:
    """Return an upper bound, from the header only, on the peak bytes of decoding.

    `image_file` is drafted and not loaded yet. `full_size` is the size in its header, in pixels.
    """
    pixels = image_file.width * image_file.height
    kind = image_file.format or ""
    image_bytes = pixels * _PIXEL_BYTES.get(image_file.mode, 4)
    rotation_bytes = (
        image_bytes if geometry.pixel_path is PixelPath.EXACT or _is_rotated_by_pillow(image_file) else 0
    )
    processing_bytes = max(
        rotation_bytes, pixels * _convert_bytes(image_file) + _resize_bytes(image_file.size, geometry)
    )
    decoder_bytes = _decoder_bytes(image_file, full_size) or pixels * _DECODER_BYTES.get(kind, 0)
    return (
        _WORK_BYTES
        + image_bytes
        + max(decoder_bytes, pixels * _RETAINED_BYTES.get(kind, 0) + processing_bytes)
    )


def _is_rotated_by_pillow(image_file: ImageFile.ImageFile) -> bool:
    """Return True if Pillow rotates the image when it loads the image: a TIFF, with `fast` too."""
    return type(image_file) is TiffImagePlugin.TiffImageFile


def _decoder_bytes(image_file: ImageFile.ImageFile, full_size: tuple[int, int]) -> int:
    """Return the bytes of a decoder that do not depend on the decoded pixels; 0 for other decoders.

    A strip or tile of a TIFF has up to four samples of 16 bits per pixel. For a JPEG with many scans the
    decoder keeps all coefficients, at full size.
    """
    if isinstance(image_file, TiffImagePlugin.TiffImageFile):
        tags = image_file.tag_v2
        tile: int = tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_LENGTH, 0)
        strip: int = image_file.width * min(tags.get(_ROWS_PER_STRIP, image_file.height), image_file.height)
        return 8 * max(tile, strip)
    if isinstance(image_file, JpegImagePlugin.JpegImageFile) and _has_many_scans(image_file):
        samples = sum(across * down for _, across, down, _ in image_file.layer)
        block = max(across for _, across, _, _ in image_file.layer) * max(
            down for _, _, down, _ in image_file.layer
        )
        return 2 * samples * (full_size[0] + 63) * (full_size[1] + 63) // max(block, 1)  # 16 bits each
    return 0


def _has_many_scans(image_file: JpegImagePlugin.JpegImageFile) -> bool:
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


def _convert_bytes(image_file: ImageFile.ImageFile) -> int:
    """Return the bytes per pixel that `_to_rgb` allocates beside its input."""
    if image_file.mode.startswith("I;16"):
        return 12
    if image_file.has_transparency_data:
        return 8 if image_file.mode == "RGBA" else 12
    return 0 if image_file.mode == "RGB" else 4


def _resize_bytes(size: tuple[int, int], geometry: Geometry) -> int:
    """Return the bytes of the result and of the image between the two passes.

    The intermediate image has the width of the result and the height of the source. EXIF, read later, may
    swap the sides, so the larger of both cases counts.
    """
    width, height = _target_size(size, geometry)
    if geometry.pixel_path is PixelPath.EXACT and width * height <= _WHOLE_RESIZE_PIXELS:
        return 4 * (max(width * size[1], height * size[0]) + width * height)
    max_width = max(geometry.width, geometry.height)
    rows = max(size) if geometry.resize is Resize.STRETCH else min(size) + 1  # rows that the crop keeps
    return 4 * max_width * (rows + max_width)


# --- convert -------------------------------------------------------------------------------------

_DIRECT_MODES: Final = frozenset({"1", "L", "P", "CMYK", "YCbCr", "HSV"})

_DARK_LIMIT: Final = 4096
"""Limit, of 65535. Grey values that all stay below it probably have a smaller scale, such as 12 bits."""


def _to_rgb(image: Image.Image, conversion: Conversion | None, warnings: list[ImageWarning]) -> Image.Image:
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


# --- resize --------------------------------------------------------------------------------------

_WHOLE_RESIZE_PIXELS: Final = 16_000_000
"""Number of pixels after the resize above which `exact` resizes only the region that the crop keeps.

Otherwise a 1 x 20,000 strip for a model of 224 would become 224 x 4,480,000. Photographs stay far below: a
10:1 panorama for a model of 384 makes 1.5 million.
"""


def _target_size(size: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Return width and height of the whole image after the resize, in pixels.

    The longer side is rounded down, like in torchvision's `Resize`.
    """
    if geometry.resize is Resize.STRETCH:
        return geometry.width, geometry.height
    width, height = size
    shorter = min(size)
    return geometry.resize_to * width // shorter, geometry.resize_to * height // shorter


def _crop_corner(size: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Return left and top of the crop in an image of `size`, rounded like torchvision's `CenterCrop`."""
    return round((size[0] - geometry.width) / 2), round((size[1] - geometry.height) / 2)


def _resize_and_crop(
    image: Image.Image, geometry: Geometry, full_size: tuple[int, int], box: _Box, rotation: _Rotation | None
) -> Pixels:
    """Resize, crop, then rotate the image; return uint8 (height, width, 3).

    The full image, upright of `full_size`, fills `box` of `image`.
    """
    width, height = _target_size(full_size, geometry)
    left, top = _crop_corner((width, height), geometry)
    filter_ = Image.Resampling[geometry.interpolation.upper()]
    if geometry.pixel_path is PixelPath.EXACT and width * height <= _WHOLE_RESIZE_PIXELS:
        if image.size != (width, height):
            image = image.resize((width, height), filter_)
        if image.size != (geometry.width, geometry.height):
            image = image.crop((left, top, left + geometry.width, top + geometry.height))
        return _to_array(image)
    size = geometry.width, geometry.height
    crop_box: _Box = left, top, left + geometry.width, top + geometry.height  # in the resized image
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


def _to_array(image: Image.Image) -> Pixels:
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)


_MIN_VISIBLE_SHARE: Final = 0.2
_MAX_STRETCH: Final = 5
_MAX_ENLARGEMENT: Final = 8
"""Limits that photographs do not reach.

The middle 224 x 224 of a photograph of 2.2:1, resized to 256, is a third of it. An image of 32 x 32 for a
model of 256 is enlarged eight times.
"""


def _geometry_warnings(size: tuple[int, int], geometry: Geometry) -> list[ImageWarning]:
    """Return warnings about large changes by resize and crop of an upright image of this size."""
    width, height = size
    warnings = []
    if geometry.resize is Resize.SHORTER:
        shorter = min(size)
        enlargement = geometry.resize_to / shorter
        visible_share = geometry.width * geometry.height / (enlargement * enlargement * width * height)
        if visible_share < _MIN_VISIBLE_SHARE:
            text = f"the model sees only the middle {visible_share:.1%} of the {_format_size(size)} image"
            warnings.append(ImageWarning(WarningCode.CROPPED, text))
    else:
        scale_x, scale_y = geometry.width / width, geometry.height / height
        enlargement = max(scale_x, scale_y)
        if enlargement > _MAX_STRETCH * min(scale_x, scale_y):
            target_size = _format_size((geometry.width, geometry.height))
            text = f"the image was stretched from {_format_size(size)} to {target_size}"
            warnings.append(ImageWarning(WarningCode.STRETCHED, text))
    if enlargement > _MAX_ENLARGEMENT:
        text = f"the image is only {_format_size(size)} and was enlarged {enlargement:.0f} times"
        warnings.append(ImageWarning(WarningCode.ENLARGED, text))
    return warnings


# --- trace ---------------------------------------------------------------------------------------


def _trace_decoding(
    trace: DecodeTrace, kind: str, size: tuple[int, int], image_file: ImageFile.ImageFile
) -> None:
    """Record the decoding. `image_file` is drafted, so its size may be below the full `size`."""
    trace.add_step("decode", f"{kind} of {_format_size(size)} pixels")
    if image_file.size != size:
        trace.add_step(
            "scale",
            f"decoded at {_format_size(image_file.size)}: the JPEG decoder leaves out detail",
        )


def _trace_conversion(
    trace: DecodeTrace,
    image_file: ImageFile.ImageFile,
    rotation: _Rotation | None,
    conversion: Conversion | None,
) -> None:
    if rotation:
        orientation = next(number for number, other in _ROTATIONS.items() if other is rotation)
        trace.add_step("orient", f"rotated upright, by EXIF orientation {orientation}")
    if conversion:
        trace.add_step("colours", f"from {conversion.name} to sRGB, by the image's profile")
    if image_file.has_transparency_data:
        trace.add_step("convert", f"from {image_file.mode} to RGB, transparent areas on white")
    elif image_file.mode != "RGB":
        trace.add_step("convert", f"from {image_file.mode} to RGB")


def _trace_resize(trace: DecodeTrace, size: tuple[int, int], geometry: Geometry) -> None:
    """Record resize and crop of an upright image of full `size`.

    The region outside the crop may not have been resized, which the trace does not show.
    """
    target_size = _target_size(size, geometry)
    left, top = _crop_corner(target_size, geometry)
    crop_size = geometry.width, geometry.height
    if target_size != size:
        trace.add_step(
            "resize", f"from {_format_size(size)} to {_format_size(target_size)}, {geometry.interpolation}"
        )
    if target_size != crop_size:
        trace.add_step(
            "crop", f"the middle {_format_size(crop_size)}, {left} from the left and {top} from the top"
        )
    scale_x, scale_y = size[0] / target_size[0], size[1] / target_size[1]
    trace.crop_box = (
        left * scale_x,
        top * scale_y,
        (left + crop_size[0]) * scale_x,
        (top + crop_size[1]) * scale_y,
    )


def _format_size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"

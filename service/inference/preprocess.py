"""Conversion of encoded images to pixels, as a whole.

Training, export, verification and serving all use this module and no other, so a model is served the same
pixels that it was trained on. An image takes these steps, always in this order:

    identify    by its first bytes, never by a file name or content type (`image_format`)
    check       format and pixel count, from the header, before anything is decoded (`image_opening`)
    decode      the first frame (`image_source`); with `fast` the JPEG decoder may scale down by 2, 4 or 8
    orient      by EXIF; a corrupt EXIF block is ignored (`rotation`)
    convert     to 8-bit sRGB, by the image's profile (`embedded_profile`) and its mode (`rgb_conversion`)
    resize      crop and pad, by the steps of the model's `Geometry` (`resize`)

`fast` orients last, where the image is smallest. The result is the same except for the order in which the
resize rounds.

A box (`boxes`) is cut out of the upright image at its own size, between convert and resize, so that its
pixels are those of the same region saved as an image without loss.

A file that fails is tried again without its damage if no pixel needs the damaged part (see `repair`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from typing import Final, TypeVar
from warnings import filterwarnings

from PIL import AvifImagePlugin, Image, JpegImagePlugin, _imaging

from fovea.service.artifact.geometry import Geometry, Interpolation, PixelPath
from fovea.service.errors import BadImage, BadRequest, RequestError, TooManyPixels
from fovea.service.image_warnings import ImageWarning
from fovea.service.inference import jpeg
from fovea.service.inference.boxes import PixelBox
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.decode_trace import DecodeTrace, trace_conversion, trace_decoding, trace_geometry
from fovea.service.inference.embedded_profile import find_conversion
from fovea.service.inference.geometry_warnings import find_geometry_warnings
from fovea.service.inference.image_format import identify_format
from fovea.service.inference.image_opening import check_limits, open_image
from fovea.service.inference.image_source import ImageSource, load_image
from fovea.service.inference.peak_memory import (
    estimate_boxes_peak_bytes,
    estimate_peak_bytes,
    estimate_source_peak_bytes,
)
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.repair import find_repairs
from fovea.service.inference.resize import apply_geometry, draft_jpeg
from fovea.service.inference.rgb_conversion import to_rgb
from fovea.service.inference.rotation import find_rotation


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
    return Geometry.stretched(height, width, Interpolation.NEAREST, PixelPath.EXACT)


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


@dataclass(frozen=True)
class UprightImage:
    """A whole image at its own size, oriented by EXIF, from which boxes are cut."""

    image: Image.Image
    """The image as 8-bit RGB."""
    format: str
    """Pillow's name of the format, such as `JPEG`."""
    warnings: tuple[ImageWarning, ...]
    """Warnings about the conversion of the image, and none about its boxes."""

    def decode_box(self, box: PixelBox, geometry: Geometry) -> DecodedImage:
        """Return the pixels that the model sees of a box inside the image."""
        part = self.image.crop(box)
        pixels = apply_geometry(part, geometry, part.size, (0, 0, *part.size), None)
        return DecodedImage(pixels, "", *part.size, find_geometry_warnings(part.size, geometry))


@contextmanager
def open_upright(
    image: bytes | memoryview,
    geometry: Geometry,
    boxes: Sequence[PixelBox],
    *,
    max_pixels: int,
    memory: DecodeMemory | None = None,
) -> Iterator[UprightImage]:
    """Decode a whole image for its boxes, and keep the memory reserved until the end of the `with` block.

    The memory suffices for cutting one box after another. The function waits and raises like `decode_image`.
    """
    kind, image = _identify_image(image)

    def decode_once(encoded_image: bytes, warnings: list[ImageWarning]) -> tuple[UprightImage, ExitStack]:
        source = open_image(kind, encoded_image, max_pixels, warnings)
        with ExitStack() as stack:
            if memory:
                stack.enter_context(memory.reserve(estimate_boxes_peak_bytes(source, geometry, boxes)))
            upright = _load_upright(source, warnings)
            return UprightImage(upright, kind, tuple(warnings)), stack.pop_all()

    upright_image, reservation = _decode_or_repair(kind, image, max_pixels, memory, decode_once)
    with reservation:
        yield upright_image


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
    check_limits(image_file, max_pixels, image)
    size = image_file.size
    image_file.draft(None, (max(1, size[0] // scale), max(1, size[1] // scale)))
    peak_bytes = len(image) + estimate_peak_bytes(image_file, size, None) if memory else 0
    with memory.reserve(peak_bytes) if memory else nullcontext():
        image_file.load()
        return hashlib.blake2b(image_file.tobytes()).digest()


def _identify_image(image: bytes | memoryview) -> tuple[str, bytes]:
    """Return the format and the bytes of an image. Raises `BadRequest` and `UnsupportedFormat`."""
    if not image:
        raise BadRequest("the image is empty")
    image = bytes(image)  # a bytes object is not copied, neither here nor by BytesIO
    return identify_format(image[:64]), image


def _error_for_caller(error: Exception, kind: str, max_pixels: int) -> Exception:
    """Return the error for the caller. A hostile file can make Pillow raise almost anything."""
    error = error.with_traceback(None)  # frames in a traceback would keep the decoded image alive
    if isinstance(error, RequestError | MemoryError):
        return error
    # Pillow has its own limit, which some formats check before the size is known.
    if isinstance(error, Image.DecompressionBombError):
        return TooManyPixels(f"image is larger than {max_pixels / 1e6:g} MP")
    refusal = BadImage(f"the {kind} image cannot be decoded: {_describe_damage(error)}")
    refusal.__cause__ = error
    return refusal


_CUT_WORDS: Final = ("truncated", "unexpected end", "not enough", "end of file", "eof")
"""Words by which Pillow and its codecs say that a file is too short."""


def _describe_damage(error: Exception) -> str:
    """Return what is wrong with a file, in words for people; a decoder's own words are about its code."""
    text = str(error).lower()
    if isinstance(error, EOFError) or any(word in text for word in _CUT_WORDS):
        return "its end is missing; was it copied or downloaded completely?"
    return "its content is damaged"


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
    source = open_image(kind, encoded_image, max_pixels, warnings)
    image_file = source.image_file
    width, height = image_file.size
    box = draft_jpeg(image_file, geometry)
    if trace:
        trace_decoding(trace, kind, (width, height), image_file)
    peak_bytes = estimate_source_peak_bytes(source, (width, height), geometry) if memory else 0
    with memory.reserve(peak_bytes) if memory else nullcontext():
        image = load_image(source)
        rotation = find_rotation(image_file, source.orientation)
        if rotation and rotation.swaps_axes:
            width, height = height, width
        conversion = find_conversion(source.profile, image.mode, warnings)
        if trace:
            trace_conversion(trace, image_file, rotation, conversion)
            decoded_size = image.size[::-1] if rotation and rotation.swaps_axes else image.size
            trace_geometry(trace, (width, height), decoded_size, geometry)
        del image_file, source  # 50 MP take 200 MB: free the previous step's image
        if rotation and geometry.is_exact:
            image = image.transpose(rotation.method)
            rotation = None  # the box is now the whole image, in any orientation
            box = 0, 0, image.width, image.height
        image = to_rgb(image, conversion, warnings)
        pixels = apply_geometry(image, geometry, (width, height), box, rotation)
    warnings += find_geometry_warnings((width, height), geometry)
    return DecodedImage(pixels, kind, width, height, tuple(warnings))


def _decode_upright(
    kind: str, encoded_image: bytes, max_pixels: int, memory: DecodeMemory | None
) -> Image.Image:
    """Run the steps up to the conversion on one image."""
    source = open_image(kind, encoded_image, max_pixels, [])
    peak_bytes = estimate_source_peak_bytes(source, source.image_file.size, None) if memory else 0
    with memory.reserve(peak_bytes) if memory else nullcontext():
        return _load_upright(source, [])


def _load_upright(source: ImageSource, warnings: list[ImageWarning]) -> Image.Image:
    """Run the steps from decoding up to the conversion."""
    image = load_image(source)
    rotation = find_rotation(source.image_file, source.orientation)
    conversion = find_conversion(source.profile, image.mode, warnings)
    return to_rgb(image.transpose(rotation.method) if rotation else image, conversion, warnings)


def configure_pillow() -> None:
    """Configure Pillow for the whole process.

    Only the main module of a process and `fovea.load` may call this, before the first image is decoded.
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

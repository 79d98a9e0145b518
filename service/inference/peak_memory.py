"""Peak memory of decoding one image: an upper bound, from the header only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from PIL import ImageFile, JpegImagePlugin, TiffImagePlugin

from fovea.service.artifact.geometry import CropStep, Geometry, ResizeStep
from fovea.service.inference.boxes import PixelBox
from fovea.service.inference.colour import Profile
from fovea.service.inference.geometry_plan import PLAN_CACHE_SIZE, PlannedStep, Size, plan_steps
from fovea.service.inference.image_opening import has_many_scans
from fovea.service.inference.image_source import ImageSource
from fovea.service.inference.resize import WHOLE_RESIZE_PIXELS
from fovea.service.inference.sampling import PEAK_BYTES
from fovea.service.inference.tiff import ROWS_PER_STRIP, TILE_LENGTH, TILE_WIDTH

_WORK_BYTES: Final = 1 << 20
"""Bytes that any decode takes beside its pixels: tables, buffers, and the weights of the filter."""

_PIXEL_BYTES: Final = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
"""Bytes per pixel in Pillow's storage, by mode; all other modes take 4."""

_DECODER_BYTES: Final = {"PNG": 0, "GIF": 2, "BMP": 3, "WEBP": 12, "AVIF": 16, "HEIC": 16}
"""Peak bytes per pixel that the decoder holds beside the image.

WebP has two canvases and the frame. AVIF and HEIC have the planes and two copies of the frame.
"""

_RETAINED_BYTES: Final = {"WEBP": 10, "AVIF": 8, "HEIC": 8}
"""Bytes per pixel that the decoder keeps as long as its image lives. WebP has two canvases and alpha."""

_PROFILE_BYTES: Final = 4 << 20
"""Peak bytes that a transform takes beside its profile, while it is built and as long as it is cached."""

_LOW_BYTES_MEMORY: Final = 20
"""Bytes per pixel for the lower bytes, their differences from the upper bytes, and sums."""


def estimate_source_peak_bytes(source: ImageSource, full_size: Size, geometry: Geometry | None) -> int:
    """Return an upper bound on the peak bytes of decoding, including the encoded image."""
    peak_bytes = len(source.encoded_image) + estimate_peak_bytes(source.image_file, full_size, geometry)
    if source.has_low_bytes:
        peak_bytes += _LOW_BYTES_MEMORY * source.image_file.width * source.image_file.height
    if isinstance(source.profile, Profile) and not source.profile.is_cached:
        peak_bytes += _PROFILE_BYTES + 2 * len(source.profile.content)
    return peak_bytes


def estimate_boxes_peak_bytes(source: ImageSource, geometry: Geometry, boxes: Sequence[PixelBox]) -> int:
    """Return an upper bound on the peak bytes of decoding an image and cutting its boxes one by one."""
    shortest_side, longest_side = sorted(source.image_file.size)
    box_bytes = 0
    for left, top, right, bottom in boxes:
        width, height = right - left, bottom - top
        # Any other box is refused once the orientation is known, and takes no memory.
        if (
            min(width, height) > 0
            and min(width, height) <= shortest_side
            and max(width, height) <= longest_side
        ):
            box_bytes = max(box_bytes, 4 * width * height + _geometry_bytes((width, height), geometry))
    return estimate_source_peak_bytes(source, source.image_file.size, None) + box_bytes


def estimate_peak_bytes(image_file: ImageFile.ImageFile, full_size: Size, geometry: Geometry | None) -> int:
    """Return an upper bound, from the header only, on the peak bytes of decoding.

    `image_file` is drafted and not loaded yet. `full_size` is the size in its header, in pixels. Without a
    geometry, the whole upright image is the result.
    """
    pixels = image_file.width * image_file.height
    kind = image_file.format or ""
    image_bytes = pixels * _PIXEL_BYTES.get(image_file.mode, 4)
    rotation_bytes = (
        image_bytes if geometry is None or geometry.is_exact or _is_rotated_by_pillow(image_file) else 0
    )
    processing_bytes = pixels * _convert_bytes(image_file)
    if geometry is None:
        processing_bytes += rotation_bytes  # the image before the rotation is still there
    else:
        processing_bytes = max(rotation_bytes, processing_bytes + _geometry_bytes(image_file.size, geometry))
    decoder_bytes = _decoder_bytes(image_file, full_size) or pixels * _DECODER_BYTES.get(kind, 0)
    return (
        _WORK_BYTES
        + image_bytes
        + max(decoder_bytes, pixels * _RETAINED_BYTES.get(kind, 0) + processing_bytes)
    )


def _is_rotated_by_pillow(image_file: ImageFile.ImageFile) -> bool:
    """Return True if Pillow rotates the image when it loads the image: a TIFF, with `fast` too."""
    return type(image_file) is TiffImagePlugin.TiffImageFile


def _decoder_bytes(image_file: ImageFile.ImageFile, full_size: Size) -> int:
    """Return the bytes of a decoder that do not depend on the decoded pixels; 0 for other decoders.

    A strip or tile of a TIFF has up to four samples of 16 bits per pixel. For a JPEG with many scans the
    decoder keeps all coefficients, at full size.
    """
    if isinstance(image_file, TiffImagePlugin.TiffImageFile):
        tags = image_file.tag_v2
        tile: int = tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0)
        strip: int = image_file.width * min(tags.get(ROWS_PER_STRIP, image_file.height), image_file.height)
        return 8 * max(tile, strip)
    if isinstance(image_file, JpegImagePlugin.JpegImageFile) and has_many_scans(image_file):
        samples = sum(across * down for _, across, down, _ in image_file.layer)
        block = max(across for _, across, _, _ in image_file.layer) * max(
            down for _, _, down, _ in image_file.layer
        )
        return 2 * samples * (full_size[0] + 63) * (full_size[1] + 63) // max(block, 1)  # 16 bits each
    return 0


def _convert_bytes(image_file: ImageFile.ImageFile) -> int:
    """Return the bytes per pixel that `to_rgb` allocates beside its input."""
    if image_file.mode.startswith("I;16"):
        return 12
    if image_file.has_transparency_data:
        return 8 if image_file.mode == "RGBA" else 12
    return 0 if image_file.mode == "RGB" else 4 + _PIXEL_BYTES.get(image_file.mode, 0)


@lru_cache(PLAN_CACHE_SIZE)
def _geometry_bytes(size: Size, geometry: Geometry) -> int:
    """Return the peak bytes that the steps allocate beside the image before them.

    EXIF, read later, may swap the sides, so the larger of both cases counts.
    """
    return max(
        _steps_bytes(plan_steps(one, geometry), is_exact=geometry.is_exact) for one in (size, size[::-1])
    )


def _steps_bytes(plan: tuple[PlannedStep, ...], *, is_exact: bool) -> int:
    """Return the peak bytes of the steps for an image of one size.

    A resize has an image between its two passes, with the width of its result and the height of its source.
    `resize._resize_whole` crops early, and keeps an image of the width of the crop there.
    """
    peak_bytes = held_bytes = 0
    for index, (step, size, _, target_size) in enumerate(plan):
        (width, height), (target_width, target_height) = size, target_size
        if isinstance(step, ResizeStep):
            following = plan[index + 1] if index + 1 < len(plan) else None
            kept_width, kept_height = (
                following.target_size if following and isinstance(following.step, CropStep) else target_size
            )
            if not step.antialias:
                step_bytes = PEAK_BYTES + 30 * width + 7 * kept_width * kept_height
                target_width, target_height = kept_width, kept_height
            elif is_exact and target_width * target_height <= WHOLE_RESIZE_PIXELS:
                step_bytes = 4 * max(
                    target_width * height + target_width * target_height, (target_width + kept_width) * height
                )
            else:
                # The widest filter, lanczos, reads three pixels of the result more on each side.
                rows = min(height, (kept_height + 6) * height // target_height + 8)
                step_bytes = 4 * kept_width * (rows + kept_height)
                target_width, target_height = kept_width, kept_height
        else:
            step_bytes = 4 * target_width * target_height
        peak_bytes = max(peak_bytes, held_bytes + step_bytes)
        held_bytes = 4 * target_width * target_height
    _, _, _, (width, height) = plan[-1]
    return max(peak_bytes, held_bytes + 6 * width * height)  # the pixels as an array, and the parts before

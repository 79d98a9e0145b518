"""Thumbnails of the mistakes, from the sources of the images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from io import BytesIO
from typing import Final

from PIL import Image

from fovea.bulk.comparison.folder_comparison import ConfidentMistake
from fovea.errors import FileError, RequestError, StartError
from fovea.model.evaluation.report_page import to_data_uri
from fovea.service.artifact.geometry import Geometry, Interpolation, PixelPath
from fovea.service.image_files import ImageEntry
from fovea.service.inference.preprocess import decode_image

_THUMBNAIL_SIDE: Final = 232
"""Longer side of a thumbnail in pixels: twice the width at which the report shows it."""

_QUALITY: Final = 82
"""Quality of the thumbnails' JPEG, which then have about 10 kB."""


def make_thumbnails(
    entries: Iterable[ImageEntry], mistakes: Sequence[ConfidentMistake], *, max_bytes: int, max_pixels: int
) -> dict[str, str]:
    """Return thumbnails as data URIs by path, from the entries with the mistakes' names.

    Entries are listed until all mistakes are found; no other image is read. An image that cannot be read
    again has no thumbnail.
    """
    missing = {mistake.path: mistake for mistake in mistakes}
    thumbnails: dict[str, str] = {}
    if not missing:
        return thumbnails
    with suppress(StartError):  # a source may be gone; a report without pictures is better than none
        for entry in entries:
            mistake = missing.pop(entry.name, None)
            if mistake is None:
                continue
            with suppress(FileError, RequestError):
                thumbnails[mistake.path] = _make_thumbnail(entry.read(max_bytes), mistake, max_pixels)
            if not missing:
                break
    return thumbnails


def _make_thumbnail(image: bytes, mistake: ConfidentMistake, max_pixels: int) -> str:
    """Return a thumbnail as a data URI. Raises `RequestError`."""
    scale = min(1.0, _THUMBNAIL_SIDE / max(mistake.width, mistake.height, 1))
    width, height = (max(1, round(side * scale)) for side in (mistake.width, mistake.height))
    geometry = Geometry.stretched(height, width, Interpolation.BILINEAR, PixelPath.FAST)
    decoded_image = decode_image(image, geometry, max_pixels=max_pixels)
    buffer = BytesIO()
    Image.fromarray(decoded_image.pixels).save(buffer, "JPEG", quality=_QUALITY)
    return to_data_uri(buffer.getvalue(), "jpeg")

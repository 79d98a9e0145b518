"""Names of image files."""

from __future__ import annotations

import posixpath
from typing import Final

_IMAGE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif"}
    | {".heic", ".heif", ".hif"}
)


def has_image_suffix(name: str) -> bool:
    """Return whether the name has an image suffix; such a file is an image or is reported as unreadable."""
    return posixpath.splitext(name)[1].lower() in _IMAGE_SUFFIXES

"""Which files are images: by their first bytes, as in serving."""

from __future__ import annotations

import posixpath
from typing import Final

from fovea.service.errors import BadRequest, RequestError, UnsupportedFormat, one_line
from fovea.service.inference.preprocess import as_it_is, decode

HEAD_BYTES: Final = 256
"""The first bytes, by which a format is known. Less than tar's block of 512: to read on from there never goes
back in a compressed stream."""

_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif"}
)


def has_image_suffix(name: str) -> bool:
    """Is the file called like an image? Then it is one, or is reported as one that cannot be read."""
    return posixpath.splitext(name)[1].lower() in _SUFFIXES


def refusal_of(head: bytes) -> str | None:
    """Return why a file that begins like this is no image that is served; None if it is one."""
    try:
        decode(head, as_it_is(1, 1), max_pixels=1)
    except (BadRequest, UnsupportedFormat) as error:
        reason = one_line(error).partition(";")[0]
        return "an archive inside a data set is not read; unpack it" if reason.startswith("ZIP ") else reason
    except RequestError:  # too many pixels, or cut short: the format is known
        return None
    return None

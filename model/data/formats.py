"""Detection of image files by their first bytes, as in the service."""

from __future__ import annotations

from typing import Final

from fovea.service.errors import BadRequest, RequestError, UnsupportedFormat, to_one_line
from fovea.service.inference.image_suffixes import has_image_suffix as has_image_suffix
from fovea.service.inference.preprocess import decode_image, identity_geometry

HEAD_BYTES: Final = 256
"""Number of first bytes by which a format is recognised.

The number is below tar's block of 512 bytes, so that reading on never seeks back in a compressed stream.
"""


def explain_rejection(head: bytes) -> str | None:
    """Return why a file with this head is not a supported image; None if it is one."""
    try:
        decode_image(head, identity_geometry(1, 1), max_pixels=1)
    except (BadRequest, UnsupportedFormat) as error:
        reason = to_one_line(error).partition(";")[0]
        return "an archive inside a data set is not read; unpack it" if reason.startswith("ZIP ") else reason
    except RequestError:  # the format is known, but there are too many pixels or the head ends early
        return None
    return None

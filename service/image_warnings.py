"""Warnings about an answered image: conversions that changed more than the caller may expect.

An everyday photograph causes no warning: converting its colour profile and applying its orientation reproduce
the picture as people see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, NamedTuple


class WarningCode(StrEnum):
    """The stable warning names, which are also the values of the metric's label."""

    PROFILE_IGNORED = "colour_profile_ignored"
    """The colour profile is damaged, too large or for other colours; the pixels are treated as sRGB."""
    NO_PROFILE = "cmyk_without_profile"
    """The CMYK values have no profile; they are converted by a simple formula."""
    HDR = "hdr_taken_as_sdr"
    """The values use PQ or HLG, which extend beyond white; they are used unchanged."""
    SEVERAL_PICTURES = "one_of_several_pictures"
    """The file has other frames, pages or pictures, which are ignored."""
    INVISIBLE = "almost_nothing_visible"
    """Almost nothing of a transparent picture is visible on a white background."""
    SIXTEEN_BITS_DARK = "sixteen_bits_hardly_used"
    """The 16-bit grey values stay below a sixteenth of the range, so that the picture is almost black."""
    SIXTEEN_BITS_CUT = "sixteen_bits_cut"
    """The 16-bit values were cut to 8 bits instead of rounded."""
    END_MISSING = "end_missing"
    """The end of the file is missing, but no pixel is missing."""
    METADATA_IGNORED = "metadata_ignored"
    """Damaged metadata is ignored; it may have specified the orientation or the colours of the picture."""
    CROPPED = "mostly_cropped"
    """The model sees less than a fifth of the picture."""
    STRETCHED = "strongly_stretched"
    """One side of the picture is stretched more than five times as much as the other."""
    ENLARGED = "strongly_enlarged"
    """The picture is enlarged more than eight times."""


class ImageWarning(NamedTuple):
    """A warning: a stable code, and a sentence for people."""

    code: str
    text: str


WARNINGS_HEADER: Final = "X-Fovea-Warnings"
"""Header with the warnings, for protocols whose bodies have no field for them."""


_MAX_POSITIONS: Final = 64
"""Maximum number of image positions per code, so that all codes fit into the 4 KB that some proxies allow for
headers."""


def format_warnings(warnings_by_image: Sequence[Sequence[ImageWarning]]) -> str:
    """Return the warning codes of all images of a request in one line.

    With several images each code is followed by the positions of its images, at most `_MAX_POSITIONS` of
    them. Examples are `end_missing` and `end_missing=0 5, mostly_cropped=2`. The line is empty if there are
    no warnings.
    """
    positions_by_code: dict[str, list[str]] = {}
    for position, warnings in enumerate(warnings_by_image):
        for warning in warnings:
            positions_by_code.setdefault(str(warning.code), []).append(str(position))
    if len(warnings_by_image) == 1:
        return ", ".join(positions_by_code)
    return ", ".join(
        f"{code}={' '.join(positions[:_MAX_POSITIONS])}" for code, positions in positions_by_code.items()
    )


def create_warning_headers(warnings_by_image: Sequence[Sequence[ImageWarning]]) -> dict[str, str]:
    """Return the header with the warnings, or no header if there are none."""
    line = format_warnings(warnings_by_image)
    return {WARNINGS_HEADER: line} if line else {}

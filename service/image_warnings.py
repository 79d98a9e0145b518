"""What may surprise about an answered image: conversions that changed more than the caller may expect.

An everyday photograph has none of these: its profile is converted and its orientation applied, as it is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, NamedTuple


class WarningCode(StrEnum):
    """The stable names, which are also the values of the metric's label."""

    PROFILE_IGNORED = "colour_profile_ignored"
    """The colour profile is damaged, too large or of other colours; the pixels are taken for sRGB."""
    NO_PROFILE = "cmyk_without_profile"
    """The ink amounts have no profile; they are converted by a simple formula."""
    HDR = "hdr_taken_as_sdr"
    """The values are of PQ or HLG, which go beyond white; they are taken as they stand."""
    SEVERAL = "one_of_several_pictures"
    """The file has other frames, pages or pictures, which are not looked at."""
    INVISIBLE = "almost_nothing_visible"
    """On white, almost nothing of a transparent picture can be seen."""
    DARK = "sixteen_bits_hardly_used"
    """Grey values of 16 bits stay below a sixteenth of the range, so that the picture is almost black."""
    CUT = "sixteen_bits_cut"
    """Values of 16 bits were cut to 8 instead of rounded."""
    END_MISSING = "end_missing"
    """The end of the file is missing, though no pixel is."""
    METADATA_IGNORED = "metadata_ignored"
    """Damaged metadata is left out that may say how the picture is turned or which colours it has."""
    CROPPED = "mostly_cropped"
    """The model sees less than a fifth of the picture."""
    STRETCHED = "strongly_stretched"
    """One side of the picture is stretched more than five times as much as the other."""
    ENLARGED = "strongly_enlarged"
    """The picture is enlarged more than eight times."""


class ImageWarning(NamedTuple):
    """One of them: a stable code, and a sentence for people."""

    code: str
    text: str


HEADER: Final = "X-Fovea-Warnings"
"""Where they are told in protocols whose bodies have no place for them."""


_MOST_PLACES: Final = 64
"""Of one code: so that all codes have room in the 4 KB that some proxies give to headers."""


def listed(images: Sequence[Sequence[ImageWarning]]) -> str:
    """Return the codes of all images of a request in one line, with the places of their images unless there
    is one image alone: `end_missing`, or `end_missing=0 5, mostly_cropped=2`. Of a code in many images the
    first ones are named. Empty where there are none."""
    places: dict[str, list[str]] = {}
    for place, warnings in enumerate(images):
        for warning in warnings:
            places.setdefault(str(warning.code), []).append(str(place))
    if len(images) == 1:
        return ", ".join(places)
    return ", ".join(f"{code}={' '.join(where[:_MOST_PLACES])}" for code, where in places.items())


def headers_of(images: Sequence[Sequence[ImageWarning]]) -> dict[str, str]:
    """Return the header that tells them; none where there are none."""
    line = listed(images)
    return {HEADER: line} if line else {}

"""Colour conversion to sRGB, from an image's colour description.

An image may carry an ICC profile, or a few numbers that describe its primaries and transfer curve
(`ColourTags`). Both become an ICC profile, and Little CMS builds a transform from the profile: relative
colorimetric with black point compensation, like browsers. Colours within sRGB stay the same, white stays
white, and the black of a printer's ink becomes black.

Profiles that are equivalent to sRGB are detected once, by the colours of a small cube. After that, such a
profile costs only a digest.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

_Matrix: TypeAlias = npt.NDArray[np.float64]

MAX_PROFILE_BYTES: Final = 4 << 20
"""Size limit of a profile in bytes. Profiles of printing presses have 0.5 to 3 MB."""

_MAX_TRANSFORMS: Final = 16
"""Number of transforms that a process keeps.

A transform of an RGB or grey profile takes up to 0.3 MB, and one of a CMYK profile up to 3 MB.
"""

_SRGB_TOLERANCE: Final = 2
"""Tolerance in levels of 255 for a profile to count as sRGB: the rounding of common sRGB profiles."""

_PROFILE_CLASSES: Final = frozenset({"scnr", "mntr", "prtr", "spac"})
"""Profile classes that describe colours: input, display, output, colour space (ICC.1:2022, 7.2.5)."""

_MODES_BY_SPACE: Final = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
"""Pillow mode for each colour space of a profile."""


class BadProfile(Exception):
    """The error for an unusable profile. The message states the reason."""


@dataclass(frozen=True)
class Conversion:
    """The conversion from one profile to sRGB."""

    name: str
    """Name in the profile, for people."""
    mode: str
    """Pillow mode of suitable images: `RGB`, `L`, `CMYK` or `LAB`."""
    transform: ImageCms.ImageCmsTransform | None
    """Transform to sRGB; None if the profile is equivalent to sRGB."""
    alpha: ImageCms.ImageCmsTransform | None = None
    """Transform for `RGBA`; only for the mode `RGB`."""


# All decoding threads of the process share the transforms. Whoever changes the cache holds the lock.
_cache: OrderedDict[bytes, Conversion | BadProfile] = OrderedDict()
_lock = threading.Lock()


class Profile:
    """An ICC profile from a file."""

    __slots__ = ("_key", "content")

    def __init__(self, content: bytes) -> None:
        self.content = content
        self._key = hashlib.blake2b(content, digest_size=16).digest()

    @property
    def is_cached(self) -> bool:
        """True if the conversion has been built and is still cached.

        Another thread may drop the conversion at any time, so use this for estimates only.
        """
        return self._key in _cache

    def get_conversion(self) -> Conversion:
        """Return the conversion to sRGB. Raises `BadProfile`."""
        with _lock:
            result = _cache.get(self._key)
            if result is not None:
                _cache.move_to_end(self._key)
        if result is None:
            try:
                # Without the lock: a build is slow, and building the same conversion twice is harmless.
                result = _build_conversion(self.content)
            except BadProfile as error:
                result = error.with_traceback(None)
            with _lock:
                _cache[self._key] = result
                while len(_cache) > _MAX_TRANSFORMS:
                    _cache.popitem(last=False)
        if isinstance(result, BadProfile):
            # A new exception each time: threads share the cached one, and its traceback would grow.
            raise BadProfile(str(result))
        return result


def _build_conversion(profile: bytes) -> Conversion:
    """Build the conversion of a profile. Raises `BadProfile`."""
    if len(profile) > MAX_PROFILE_BYTES:
        raise BadProfile(f"it has {len(profile)} bytes; at most {MAX_PROFILE_BYTES} are read")
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space, kind = source.profile.xcolor_space.strip(), source.profile.device_class.strip()
        if kind not in _PROFILE_CLASSES:
            raise BadProfile(f"its class {kind!r} is not for images")
        mode = _MODES_BY_SPACE.get(space)
        if mode is None:
            raise BadProfile(f"its colour space {space!r} is not supported")
        transform = _build_transform(source, mode, "RGB")
        if _is_srgb_transform(transform, mode):
            return Conversion(_profile_name(source), mode, None)
        alpha = _build_transform(source, "RGBA", "RGBA") if mode == "RGB" else None
        return Conversion(_profile_name(source), mode, transform, alpha)
    except BadProfile:
        raise
    except Exception as error:  # damaged profiles make Pillow and Little CMS raise almost anything
        raise BadProfile(" ".join(str(error).split())[:200] or type(error).__name__) from None


def _build_transform(
    source: ImageCms.ImageCmsProfile, mode: str, target_mode: str
) -> ImageCms.ImageCmsTransform:
    return ImageCms.ImageCmsTransform(
        source,
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
        mode,
        target_mode,
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _profile_name(source: ImageCms.ImageCmsProfile) -> str:
    """Return the name of the profile, printable and at most 80 characters long.

    The profile may hold any text of any length.
    """
    name = source.profile.profile_description or "an unnamed profile"
    return "".join(letter for letter in name if letter.isprintable()).strip()[:80] or "an unnamed profile"


def _is_srgb_transform(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return True if the transform changes no colour of a cube, or grey of a ramp, by more than rounding."""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    if mode == "RGB":
        sample = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3))
    elif mode == "L":
        sample = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    else:
        return False
    original = np.asarray(sample.convert("RGB"), np.int16)
    return bool(np.abs(np.asarray(transform.apply(sample), np.int16) - original).max() <= _SRGB_TOLERANCE)


# --- applying ------------------------------------------------------------------------------------


def convert_to_srgb(image: Image.Image, conversion: Conversion) -> Image.Image:
    """Convert an image to sRGB: `RGB`, or `RGBA` for an image with transparency.

    The image may be changed in place. Its mode must be one that `is_suitable` the conversion.
    """
    if conversion.mode == "RGB":
        mode = "RGBA" if image.has_transparency_data else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        transform = conversion.alpha if mode == "RGBA" else conversion.transform
        return image if transform is None else transform.apply_in_place(image)
    if conversion.transform is None:
        return image
    if conversion.mode == "L" and image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        rgb = conversion.transform.apply(image.convert("LA").getchannel("L"))
        rgb.putalpha(alpha)
        return rgb
    image = image if image.mode == conversion.mode else image.convert(conversion.mode)
    return conversion.transform.apply(image)


_SUITABLE_MODES: Final = {
    "RGB": frozenset({"RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "YCbCr", "L", "LA", "1", "HSV"}),
    "L": frozenset({"L", "LA", "La", "1"}),
    "CMYK": frozenset({"CMYK"}),
    "LAB": frozenset({"LAB"}),
}


def is_suitable(conversion: Conversion, mode: str) -> bool:
    """Return True if the profile can describe the colours of images with this mode.

    For an RGB profile, grey images count as equal parts of red, green and blue.
    """
    return mode in _SUITABLE_MODES[conversion.mode]


@lru_cache(maxsize=1)
def lab_conversion() -> Conversion:
    """Return the conversion of CIELAB images without a profile, whose white is D50 (ICC.1:2022, 6.3)."""
    return Conversion(
        "CIELAB",
        "LAB",
        _build_transform(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB", "RGB"),
    )


# --- numbers instead of a profile ----------------------------------------------------------------


class ColourTags(NamedTuple):
    """A colour description in numbers, which some formats have instead of a profile."""

    primaries: tuple[float, float, float, float, float, float, float, float]
    """Chromaticities x, y of white, red, green and blue."""
    gamma: float | None
    """Exponent from the stored value to light; None for the curve of sRGB."""


SRGB_PRIMARIES: Final = (0.3127, 0.3290, 0.6400, 0.3300, 0.3000, 0.6000, 0.1500, 0.0600)
"""Primaries of sRGB (IEC 61966-2-1)."""

ADOBE_RGB: Final = ColourTags((0.3127, 0.3290, 0.6400, 0.3300, 0.2100, 0.7100, 0.1500, 0.0600), 563 / 256)
"""Description of Adobe RGB (Adobe RGB (1998) Color Image Encoding, 4.3.1)."""

_PRIMARIES: Final = {
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (0.3127, 0.3290, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (0.3127, 0.3290, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (0.3127, 0.3290, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    22: (0.3127, 0.3290, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
"""Primaries by the code points of ITU-T H.273, table 2, used by cICP and nclx.

Code points 1 and 2 count as sRGB.
"""

_GAMMAS: Final = {4: 2.2, 5: 2.8, 8: 1.0, 17: 2.6}
"""Exponents by the code points of ITU-T H.273, table 3.

The curves of video (1, 6, 14, 15) are made for the same displays as the curve of sRGB, so they count as sRGB.
"""

HDR_TRANSFERS: Final = frozenset({16, 18})
"""Code points of PQ and HLG, whose values exceed white."""


def find_tags(primaries: int, transfer: int) -> ColourTags | None:
    """Return the description for two code points of ITU-T H.273; None for sRGB or unknown code points."""
    gamma = _GAMMAS.get(transfer)
    if primaries not in _PRIMARIES and gamma is None:
        return None
    return ColourTags(_PRIMARIES.get(primaries, SRGB_PRIMARIES), gamma)


def is_srgb(tags: ColourTags) -> bool:
    """Return True for the primaries of sRGB with a curve that stands for that of sRGB.

    Source: PNG, third edition, 11.3.2.
    """
    is_near = all(abs(one - other) < 0.002 for one, other in zip(tags.primaries, SRGB_PRIMARIES, strict=True))
    return is_near and (tags.gamma is None or abs(1 / tags.gamma - 0.45455) < 0.002)


@lru_cache(maxsize=64)
def build_profile(tags: ColourTags) -> bytes:
    """Return an ICC profile, version 4, for these colours. Raises `BadProfile` for impossible values."""
    curve = _encode_curve(tags.gamma)
    body, table = b"", b""
    start = 128 + 4 + 12 * 8
    columns = _adapt_primaries(tags.primaries).T
    parts = [
        (b"desc", _encode_text("colours by their tags")),
        (b"wtpt", _encode_xyz(_D50)),
        *(
            (name, _encode_xyz(column))
            for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
        ),
        *((name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")),
    ]
    for name, content in parts:
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = start + len(body)
    header = struct.pack(
        ">I4xI4s4s4s12x4s28x12s48x",
        size,
        0x04200000,
        b"mntr",
        b"RGB ",
        b"XYZ ",
        b"acsp",
        _encode_xyz(_D50)[8:],
    )
    return header + struct.pack(">I", len(parts)) + table + body


_D50: Final = np.array([0.9642, 1.0, 0.8249])
"""White of the profile connection space, XYZ."""

_BRADFORD: Final = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def _adapt_primaries(primaries: tuple[float, ...]) -> _Matrix:
    """Return XYZ of red, green and blue as columns, adapted to D50 (ICC.1:2022, annex E).

    Raises `BadProfile` for impossible primaries.
    """
    white, *colours = (
        np.array([x / y, 1.0, (1 - x - y) / y]) if y > 0 else None for x, y in _split_pairs(primaries)
    )
    if white is None or any(colour is None for colour in colours):
        raise BadProfile("its primaries are no possible colours")
    matrix = np.stack([colour for colour in colours if colour is not None], axis=1)
    if abs(np.linalg.det(matrix)) < 1e-6:
        raise BadProfile("its primaries are no possible colours")
    matrix = matrix * np.linalg.solve(matrix, white)
    scale = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    colorants: _Matrix = np.linalg.inv(_BRADFORD) @ (scale[:, None] * (_BRADFORD @ matrix))
    if not np.isfinite(colorants).all() or np.abs(colorants).max() > 10:
        raise BadProfile("its primaries are no possible colours")
    return colorants


def _split_pairs(values: tuple[float, ...]) -> list[tuple[float, float]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _encode_curve(gamma: float | None) -> bytes:
    """Return a parametric curve (ICC.1:2022, 10.18). Raises `BadProfile` for an impossible exponent."""
    if gamma is None:
        return struct.pack(
            ">4s4xH2x5i",
            b"para",
            3,
            *map(_to_fixed_point, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)),
        )
    if not 0.1 <= gamma <= 10:
        raise BadProfile(f"its gamma is {gamma:g}; 0.1 to 10 is possible")
    return struct.pack(">4s4xH2xi", b"para", 0, _to_fixed_point(gamma))


def _to_fixed_point(value: float) -> int:
    """Return the value as an s15Fixed16Number."""
    return round(value * 65536)


def _encode_xyz(values: npt.ArrayLike) -> bytes:
    return struct.pack(">4s4x3i", b"XYZ ", *(_to_fixed_point(float(value)) for value in np.asarray(values)))


def _encode_text(text: str) -> bytes:
    """Return a text in one language (ICC.1:2022, 10.15)."""
    content = text.encode("utf-16-be")
    return struct.pack(">4s4xII2s2sII", b"mluc", 1, 12, b"en", b"US", len(content), 28) + content

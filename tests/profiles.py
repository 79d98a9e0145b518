"""Hand-made ICC profiles for the tests, and the reference conversions of their colours."""

from __future__ import annotations

import struct
from itertools import product

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

SRGB_FROM_P3 = np.array(
    [[1.2249402, -0.2249402, 0.0], [-0.0420570, 1.0420570, 0.0], [-0.0196376, -0.0786361, 1.0982735]]
)
"""Matrix from linear Display P3 to linear sRGB (CSS Color Module Level 4, 10.2)."""

P3_COLORANTS = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
"""XYZ, in Apple's Display P3 profile, of red, green and blue, adapted to D50."""

D50 = (0.9642, 1.0, 0.82491)


def srgb_to_linear(rgb: npt.ArrayLike) -> Array:
    """Decode sRGB values, 0 … 255, to linear light, 0 … 1."""
    values = np.asarray(rgb, float) / 255
    light: Array = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return light


def linear_to_srgb(light: npt.ArrayLike) -> Array:
    """Encode linear light as sRGB values, clipped to 0 … 255."""
    values = np.clip(np.asarray(light, float), 0, 1)
    rgb: Array = 255 * np.where(values <= 0.0031308, 12.92 * values, 1.055 * values ** (1 / 2.4) - 0.055)
    return rgb


def p3_to_srgb(rgb: npt.ArrayLike) -> Array:
    """Convert Display P3 to sRGB, 0 … 255."""
    return linear_to_srgb(srgb_to_linear(rgb) @ SRGB_FROM_P3.T)


def display_p3_profile() -> bytes:
    """Return the profile of most phones' photographs."""
    curve = struct.pack(">4s4xI1024H", b"curv", 1024, *(round(65535 * value) for value in _srgb_curve(1024)))
    colorants = zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(_pack_xyz, P3_COLORANTS), strict=True)
    curves = [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    return build_profile(b"mntr", b"RGB ", b"XYZ ", [(b"wtpt", _pack_xyz(D50)), *colorants, *curves])


def grey_profile(gamma: float) -> bytes:
    """Return a profile for grey images."""
    curve = struct.pack(">4s4xIH", b"curv", 1, round(256 * gamma))
    return build_profile(b"mntr", b"GRAY", b"XYZ ", [(b"wtpt", _pack_xyz(D50)), (b"kTRC", curve)])


def cmyk_profile() -> bytes:
    """Return a CMYK profile in which cyan darkens the paper and the other inks have no effect."""
    grid = bytes(
        value for cyan, *_ in product((0, 1), repeat=4) for value in (255 - 255 * cyan, 128, 128)
    )  # CIELAB, 8 bits
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * (place % 4 == 0) for place in range(9)))
    table = struct.pack(">4s4x4B", b"mft1", 4, 3, 2, 0) + identity + 4 * ramp + grid + 3 * ramp
    return build_profile(
        b"prtr", b"CMYK", b"Lab ", [(b"wtpt", _pack_xyz(D50)), (b"A2B0", table), (b"A2B1", table)]
    )


def build_profile(kind: bytes, space: bytes, connection: bytes, tags: list[tuple[bytes, bytes]]) -> bytes:
    """Return a version 2 profile with these tags."""
    name = b"made for a test"
    text = struct.pack(">4s4xI", b"desc", len(name) + 1) + name + bytes(1 + 4 + 4 + 2 + 1 + 67)
    tags = [(b"desc", text), *tags]
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags:
        table += struct.pack(">4sII", tag, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(
        ">I4xI4s4s4s12x4s28x12s48x",
        start + len(body),
        0x02400000,
        kind,
        space,
        connection,
        b"acsp",
        _pack_xyz(D50)[8:],
    )
    return header + struct.pack(">I", len(tags)) + table + body


def _srgb_curve(count: int) -> Array:
    return srgb_to_linear(np.linspace(0, 255, count))


def _pack_xyz(values: tuple[float, ...]) -> bytes:
    return struct.pack(">4s4x3i", b"XYZ ", *(round(65536 * value) for value in values))

"""The colour scales of heat maps and feature maps: their recipe and their properties.

python -m tests.service.explain.test_colours > service/web/page/colours.json
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[np.float64]

FILE = Path("service/web/page/colours.json")

# Lightness 0 … 1, chroma, and hue in degrees, of OKLCH.
ANCHORS = {
    "heat": [(0.21, 0.06, 285), (0.37, 0.15, 300), (0.54, 0.18, 345), (0.70, 0.17, 40), (0.84, 0.15, 80),
             (0.96, 0.09, 105)],
    "signed": [(0.43, 0.13, 262), (0.67, 0.10, 250), (0.95, 0.0, 250), (0.95, 0.0, 55), (0.72, 0.13, 55),
               (0.48, 0.12, 45)],
    "kernel": [(0.40, 0.17, 312), (0.65, 0.136, 312), (0.95, 0.0, 312), (0.95, 0.0, 150), (0.72, 0.13, 150),
               (0.44, 0.13, 150)],
}  # fmt: skip

# Björn Ottosson, 2020, "A perceptual color space for image processing"
TO_LMS = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)

# Machado, Oliveira and Fernandes, 2009, severity 1.0, on linear RGB
COLOUR_BLINDNESS = {
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def make_scale(name: str) -> list[list[int]]:
    """Return 256 colours, equally far apart along a smooth path through the anchors."""
    lightness, chroma, hue = np.array(ANCHORS[name], float).T
    angle = np.radians(hue)
    anchors = np.stack([lightness, chroma * np.cos(angle), chroma * np.sin(angle)], axis=1)
    smooth_path = _smooth_path(anchors)
    distances = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(smooth_path, axis=0), axis=1))])
    even_distances = np.linspace(0, distances[-1], 256)
    path = np.stack([np.interp(even_distances, distances, axis) for axis in smooth_path.T], axis=1)
    rgb: list[list[int]] = np.rint(255 * _linear_to_srgb(_lab_to_linear(path))).astype(int).tolist()
    return rgb


def _smooth_path(anchors: Array) -> Array:
    """Smooth a path by cutting its corners repeatedly (Chaikin)."""
    path = anchors
    for _ in range(6):
        inner = np.stack([0.75 * path[:-1] + 0.25 * path[1:], 0.25 * path[:-1] + 0.75 * path[1:]], axis=1)
        path = np.concatenate([path[:1], inner.reshape(-1, 3), path[-1:]])
    return path


def _lab_to_linear(lab: Array) -> Array:
    rgb: Array = np.clip((lab @ TO_LMS.T) ** 3 @ TO_RGB.T, 0, 1)
    return rgb


def _linear_to_srgb(linear: Array) -> Array:
    """Convert to sRGB, IEC 61966-2-1."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _srgb_to_linear(rgb: Array) -> Array:
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _linear_to_lab(linear: Array) -> Array:
    lms: Array = np.cbrt(np.clip(linear, 0, 1) @ np.linalg.inv(TO_RGB).T)
    return lms @ np.linalg.inv(TO_LMS).T


def read_scale(name: str) -> Array:
    """Return the colours of a scale as linear RGB, 0 … 1."""
    return _srgb_to_linear(np.array(json.loads(FILE.read_text())[name]) / 255)


@pytest.mark.parametrize("name", ANCHORS)
def test_file_equals_generated_scales(name: str) -> None:
    assert json.loads(FILE.read_text())[name] == make_scale(name)


@pytest.mark.parametrize("name", ANCHORS)
def test_equal_steps_are_perceptually_even(name: str) -> None:
    lab = _linear_to_lab(read_scale(name))[::8]
    steps = np.linalg.norm(np.diff(lab, axis=0), axis=1)
    if name != "heat":
        steps = np.delete(steps, np.argmin(steps))  # where the path turns round
    assert steps.max() < 1.35 * steps.mean()
    assert steps.min() > 0.6 * steps.mean()


@pytest.mark.parametrize("deficiency", COLOUR_BLINDNESS)
def test_colours_stay_distinct_for_colour_blindness(deficiency: str) -> None:
    heat = _linear_to_lab(read_scale("heat") @ COLOUR_BLINDNESS[deficiency].T)
    assert (np.diff(heat[::8, 0]) > 0.01).all()  # from dark to light
    for name in ("signed", "kernel"):
        signed = _linear_to_lab(read_scale(name) @ COLOUR_BLINDNESS[deficiency].T)
        assert np.linalg.norm(signed[0] - signed[-1]) > 0.15
        assert np.linalg.norm(signed[64] - signed[192]) > 0.1


@pytest.mark.parametrize("name", ["signed", "kernel"])
def test_zero_is_lightest_colour_of_scales_with_two_sides(name: str) -> None:
    lightness = _linear_to_lab(read_scale(name))[:, 0]
    assert np.abs(np.argmax(lightness) - 127.5) < 12
    assert lightness[0] < 0.55
    assert lightness[-1] < 0.55


if __name__ == "__main__":
    print(json.dumps({name: make_scale(name) for name in ANCHORS}, separators=(",", ":")))

"""Preprocessing that timm's `config.json` or `pretrained_cfg` states.

The rules are those of `create_transform` for evaluation in timm 1.0 (`timm/data/transforms_factory.py`). timm
takes ImageNet's values for every key that is missing; Fovea asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fovea.export.importer.preprocessing import Normalization
from fovea.export.importer.sources.config_values import (
    ConfigError,
    to_channel_values,
    to_interpolation,
    to_number,
    to_side,
)
from fovea.export.importer.sources.facts import ImageFacts, StatedGeometry
from fovea.service.artifact.geometry import CropStep, Fit, Interpolation, PadStep, ResizeStep, Rounding, Step


def read_timm_config(config: Mapping[str, Any]) -> ImageFacts:
    """Return the preprocessing of a `config.json` in the layout of timm, or of its `pretrained_cfg`."""
    inner = config.get("pretrained_cfg")
    values = inner if isinstance(inner, Mapping) else config
    problems: list[str] = []
    normalization: Normalization | None = None
    geometry: StatedGeometry | None = None
    try:
        normalization = _read_normalization(values)
    except ConfigError as error:
        problems.append(str(error))
    try:
        geometry = _read_geometry(values)
    except ConfigError as error:
        problems.append(str(error))
    return ImageFacts(normalization, geometry, tuple(problems))


def _read_normalization(values: Mapping[str, Any]) -> Normalization:
    std = to_channel_values("std", _require(values, "std"))
    if min(std) <= 0:
        raise ConfigError(f"std is {std}; it must be greater than 0")
    return Normalization(1 / 255, to_channel_values("mean", _require(values, "mean")), std)


def _read_geometry(values: Mapping[str, Any]) -> StatedGeometry:
    input_size = _require(values, "input_size")
    if not isinstance(input_size, list | tuple) or len(input_size) not in (2, 3):
        raise ConfigError(f"input_size is {input_size!r}; it takes channels, height and width")
    if len(input_size) == 3 and input_size[0] != 3:
        raise ConfigError(f"input_size is {input_size!r}; an image in colour has three channels")
    height, width = (to_side("input_size", side) for side in input_size[-2:])
    interpolation = to_interpolation("interpolation", _require(values, "interpolation"))
    crop_pct = to_number("crop_pct", _require(values, "crop_pct"))
    if not 0 < crop_pct <= 1:
        raise ConfigError(f"crop_pct is {crop_pct:g}; it must be greater than 0 and at most 1")
    box = (math.floor(height / crop_pct), math.floor(width / crop_pct))
    return StatedGeometry(height, width, _choose_steps(values, (height, width), box, interpolation))


def _choose_steps(
    values: Mapping[str, Any], size: tuple[int, int], box: tuple[int, int], interpolation: Interpolation
) -> tuple[Step, ...]:
    """Return the steps to `size`, which is cut from an image that was fitted to `box`."""
    mode = values.get("crop_mode", "center")
    crop = CropStep(*size, Rounding.ROUND)
    if mode == "squash":
        resize = ResizeStep(Fit.STRETCH, *box, interpolation)
        return (resize,) if box == size else (resize, crop)
    if mode == "border":
        if box != size:  # timm then crops one side and pads the other, which no steps can say
            raise ConfigError(f"crop_mode is border with crop_pct {values['crop_pct']}; Fovea reproduces 1")
        mean = to_channel_values("mean", _require(values, "mean"))
        red, green, blue = (round(255 * one) for one in mean)
        resize = ResizeStep(Fit.CONTAIN, *box, interpolation, Rounding.ROUND)
        pad = PadStep(*box, (red, green, blue))
        return resize, pad
    if mode != "center":
        raise ConfigError(f"crop_mode is {mode!r}; Fovea reproduces center, squash and border")
    if size[0] == size[1]:  # torchvision's Resize, which rounds down
        return ResizeStep(Fit.COVER, *box, interpolation), crop
    # timm's ResizeKeepRatio, to which the interpolation is not passed on
    return ResizeStep(Fit.COVER, *box, Interpolation.BILINEAR, Rounding.ROUND), crop


def _require(values: Mapping[str, Any], key: str) -> Any:
    value = values.get(key)
    if value is None:
        raise ConfigError(f"it does not state {key}")
    return value

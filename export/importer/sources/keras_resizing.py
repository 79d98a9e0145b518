"""The layer `Resizing` at the start of a `.keras` file, as steps of a geometry.

The graph is then converted for images of the layer's own size, which the layer leaves as they are.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fovea.export.importer.sources.archive import ARCHIVE_ERRORS
from fovea.export.importer.sources.facts import StatedGeometry
from fovea.service.artifact.geometry import (
    AspectCropStep,
    AspectPadStep,
    Fit,
    Interpolation,
    ResizeStep,
    Step,
)
from fovea.service.errors import ContractError

_MAX_CONFIG_BYTES: Final = 32 << 20


def read_resizing(path: Path) -> StatedGeometry | None:
    """Return the steps of a layer `Resizing` that alone reads the input; None if there is no such layer.

    Only bilinear interpolation without antialiasing, the default, is read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("config.json").file_size > _MAX_CONFIG_BYTES:
                return None
            layers = json.loads(archive.read("config.json"))["config"]["layers"]
        input_layer, layer, *others = layers
        if input_layer["class_name"] != "InputLayer" or layer["class_name"] != "Resizing":
            return None
        _, height, width, channels = input_layer["config"]["batch_shape"]
        name = json.dumps(input_layer["config"]["name"])
        is_read_elsewhere = any(name in json.dumps(one.get("inbound_nodes")) for one in others)
        if (height, width, channels) != (None, None, 3) or is_read_elsewhere:
            return None
        return _to_geometry(layer["config"])
    except (*ARCHIVE_ERRORS, KeyError, TypeError, ValueError, RecursionError, ContractError):
        return None


def _to_geometry(config: Mapping[str, Any]) -> StatedGeometry | None:
    is_usual = config.get("interpolation") == "bilinear" and not config.get("antialias")
    if not is_usual or config.get("data_format") not in (None, "channels_last"):
        return None
    height, width = int(config["height"]), int(config["width"])
    steps: list[Step] = []
    if config.get("crop_to_aspect_ratio"):
        steps.append(AspectCropStep(height, width))
    if config.get("pad_to_aspect_ratio"):
        level = float(config.get("fill_value", 0.0))
        if config.get("fill_mode", "constant") != "constant" or not level.is_integer():
            return None
        steps.append(AspectPadStep(height, width, (int(level),) * 3))
    steps.append(ResizeStep(Fit.STRETCH, height, width, Interpolation.BILINEAR, antialias=False))
    return StatedGeometry(height, width, tuple(steps))

"""Geometries of old contracts and checkpoints, in the present layout."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from fovea.service.artifact.geometry import Geometry, Interpolation, PixelPath
from fovea.service.artifact.strict_json import from_plain, require


class _OldResize(StrEnum):
    SHORTER = "shorter"
    STRETCH = "stretch"


@dataclass(frozen=True)
class _OldGeometry:
    """The geometry of contract formats 1 and 2: one resize, and with `shorter` a crop."""

    height: int
    width: int
    resize: _OldResize
    resize_to: int
    """Length of the shorter side before the crop, in pixels; 0 for `stretch`."""
    interpolation: Interpolation
    pixel_path: PixelPath

    def __post_init__(self) -> None:
        require(self.height > 0 and self.width > 0, "input: height and width must be positive")
        if self.resize is _OldResize.SHORTER:
            require(
                self.resize_to >= max(self.height, self.width),
                f"input: resize_to {self.resize_to} is smaller than the crop",
            )
        else:
            require(self.resize_to == 0, "input: resize_to must be 0 with resize 'stretch'")

    def to_steps(self) -> Geometry:
        """Return the same geometry as steps: the longer side is floored, the corner of the crop rounded."""
        if self.resize is _OldResize.STRETCH:
            return Geometry.stretched(self.height, self.width, self.interpolation, self.pixel_path)
        return Geometry.cropped(self.height, self.width, self.resize_to, self.interpolation, self.pixel_path)


def upgrade_geometry(value: Any, path: str) -> Any:
    """Return a parsed geometry of contract format 1 or 2 in the layout of format 3.

    `path` is its place in the document. Raises `ContractError`.
    """
    return to_plain_geometry(from_plain(_OldGeometry, value, path).to_steps())


def to_plain_geometry(geometry: Geometry) -> Any:
    """Return a geometry as parsed JSON, as checkpoints record it."""
    return json.loads(json.dumps(asdict(geometry)))


def read_geometry(value: Any, path: str) -> Geometry:
    """Return the geometry of a checkpoint, which has no format number. Raises `ContractError`."""
    is_old = isinstance(value, dict) and "steps" not in value
    return from_plain(Geometry, upgrade_geometry(value, path) if is_old else value, path)

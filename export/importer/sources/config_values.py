"""Values in the JSON files of a source, checked for type and range."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fovea.export.importer.preprocessing import ChannelValues
from fovea.service.artifact.geometry import MAX_SIDE, Interpolation

_MAX_JSON_BYTES: Final = 16 << 20
"""Maximum size of a JSON file. A configuration with the 21,841 labels of ImageNet-22k has 2 MB."""

_PILLOW_FILTERS: Final = (
    Interpolation.NEAREST,
    Interpolation.LANCZOS,
    Interpolation.BILINEAR,
    Interpolation.BICUBIC,
    Interpolation.BOX,
    Interpolation.HAMMING,
)
"""Filters in the order of Pillow's numbers."""


class ConfigError(ValueError):
    """A configuration has a value that cannot be used; the message names key and value."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises `ConfigError`.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ConfigError(f"{path.name} has more than {_MAX_JSON_BYTES >> 20} MB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path.name} is not valid JSON; copy or download it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} is not a JSON object")
    return value


def to_side(key: str, value: Any) -> int:
    """Return a length in pixels. Raises `ConfigError`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 < value <= MAX_SIDE:
        raise ConfigError(f"{key} is {value!r}, which is not a number of pixels from 1 to {MAX_SIDE}")
    return value


def to_number(key: str, value: Any) -> float:
    """Return a finite number. Raises `ConfigError`."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:  # JSON has integers of any length
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{key} is {repr(value)[:80]}, which is not a number, or is too large")
    return number


def to_channel_values(key: str, value: Any) -> ChannelValues:
    """Return one number for each channel; a single number counts for all three. Raises `ConfigError`."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    if len(values) not in (1, 3):
        raise ConfigError(f"{key} has {len(values)} values; an image in colour has three channels")
    red, green, blue = [to_number(key, one) for one in values] * (3 // len(values))
    return red, green, blue


def to_interpolation(key: str, value: Any) -> Interpolation:
    """Return the filter of Pillow's number or name, such as 3 or `bicubic`. Raises `ConfigError`."""
    if type(value) is int and 0 <= value < len(_PILLOW_FILTERS):
        return _PILLOW_FILTERS[value]
    name = str(value).rpartition(".")[2].lower()
    if name not in list(Interpolation):
        raise ConfigError(f"{key} is {value!r}, which is not a filter of Pillow")
    return Interpolation(name)


def to_mapping(key: str, value: Any) -> Mapping[str, Any]:
    """Return a JSON object. Raises `ConfigError`."""
    if not isinstance(value, dict):
        raise ConfigError(f"{key} is {value!r}, which is not a JSON object")
    return value

"""Values of the import's options, parsed from text."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.preprocessing import PRESETS, ChannelValues, Preset
from fovea.service.artifact.geometry import MAX_SIDE, Step, find_last_size
from fovea.service.artifact.geometry_text import parse_steps
from fovea.service.errors import ContractError

EnumT = TypeVar("EnumT", bound=StrEnum)


def find_preset(name: str) -> Preset:
    """Return the preset with this name.

    Raises `ImportRefused` if there is none.
    """
    if name not in PRESETS:
        raise ImportRefused(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def parse_channel_values(option: str, text: str) -> ChannelValues:
    """Parse three numbers separated by commas, or one number for all three channels."""
    values = [parse_number(option, part) for part in text.split(",")]
    if len(values) not in (1, 3):
        raise ImportRefused(f"{option} is {text!r}; it takes one number or three, such as 0.485,0.456,0.406")
    red, green, blue = values * (3 // len(values))
    return red, green, blue


def parse_number(option: str, text: str) -> float:
    """Parse a number, or a fraction such as 1/255."""
    numerator, _, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise ImportRefused(f"{option} is {text!r}, which is not a number") from None


def parse_size(option: str, text: str) -> tuple[int, int]:
    """Parse height and width in pixels: one number for both, or two such as 224x320."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and 0 < int(part) <= MAX_SIDE for part in parts):
        raise ImportRefused(
            f"{option} is {text!r}; it takes pixels such as 224, or height x width as 224x320"
        )
    return int(parts[0]), int(parts[-1])


def parse_geometry(option: str, text: str) -> tuple[Step, ...]:
    """Parse the steps of a geometry, such as `resize cover 256 x 256 bilinear, crop 224 x 224`."""
    try:
        steps = parse_steps(text)
        find_last_size(steps)
    except ContractError as error:
        raise ImportRefused(f"{option}: {str(error).removeprefix('input: ')}") from None
    return steps


def parse_choice(option: str, enum_class: type[EnumT], text: str) -> EnumT:
    """Parse a member of `enum_class`, in any case."""
    choices = [member.value for member in enum_class]
    if text.lower() not in choices:
        raise ImportRefused(f"{option} is {text!r}; it takes {', '.join(choices)}")
    return enum_class(text.lower())

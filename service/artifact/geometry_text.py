"""The steps of a geometry as text, for people and for options.

    resize cover 256 x 256 bilinear, crop 224 x 224                   torchvision
    resize cover 256 x 256 bilinear, crop 224 x 224 floor             transformers
    resize stretch 256 x 256 bicubic, crop 224 x 224                  DeiT
    resize contain 224 x 224 bilinear round, pad 224 x 224 fill 114/114/114
    crop aspect 224 x 224, resize stretch 224 x 224 bilinear no-antialias
    crop aspect 224 x 224 unrounded, resize stretch 224 x 224 lanczos   PIL.ImageOps.fit
    crop fraction 0.875, resize stretch 224 x 224 bilinear no-antialias   slim
    pad aspect 224 x 224, resize stretch 224 x 224 bilinear no-antialias  Keras' pad_to_aspect_ratio

Sizes are height x width, or one number for a square. Defaults are left out: `floor` for resize, aspect crop
and pad, `round` for crop, black for the fill, antialiasing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from fovea.service.artifact.geometry import (
    MAX_STEPS,
    AspectCropStep,
    AspectPadStep,
    CropStep,
    Fit,
    FractionCropStep,
    Interpolation,
    PadStep,
    ResizeStep,
    Rounding,
    Step,
)
from fovea.service.artifact.strict_json import require
from fovea.service.errors import ContractError

EXAMPLE: Final = "resize cover 256 x 256 bilinear, crop 224 x 224"

_MAX_LENGTH: Final = 1000
"""Maximum number of characters; the longest useful text has about 200."""

_ROUNDINGS: Final = {"floor": Rounding.FLOOR, "round": Rounding.ROUND, "unrounded": Rounding.NONE}
_ROUNDING_WORDS: Final = {rounding: word for word, rounding in _ROUNDINGS.items()}

_SIZE: Final = re.compile(r"(\d+) *[x×] *(\d+)")


def format_steps(steps: tuple[Step, ...]) -> str:
    """Return the steps as text that `parse_steps` reads."""
    return ", ".join(map(format_step, steps))


def format_step(step: Step) -> str:
    """Return one step as text."""
    if isinstance(step, FractionCropStep):
        return f"crop fraction {step.fraction!r}"
    size = f"{step.height} x {step.width}"
    match step:
        case ResizeStep():
            words = ["resize", step.fit, size, step.interpolation]
            words += [] if step.antialias else ["no-antialias"]
            default = Rounding.FLOOR
        case CropStep():
            words, default = ["crop", size], Rounding.ROUND
        case AspectCropStep():
            words, default = ["crop aspect", size], Rounding.FLOOR
        case AspectPadStep():
            return " ".join(["pad aspect", size, *_format_fill(step.fill)])
        case PadStep():
            words, default = ["pad", size, *_format_fill(step.fill)], Rounding.FLOOR
    words += [] if step.rounding is default else [_ROUNDING_WORDS[step.rounding]]
    return " ".join(words)


def _format_fill(fill: tuple[int, int, int]) -> list[str]:
    return ["fill " + "/".join(map(str, fill))] if any(fill) else []


def parse_steps(text: str) -> tuple[Step, ...]:
    """Return the steps that the text describes.

    Raises `ContractError` if the text describes no steps.
    """
    require(len(text) <= _MAX_LENGTH, f"the geometry has {len(text)} characters; at most {_MAX_LENGTH}")
    parts = [part.strip() for part in _SIZE.sub(r"\1x\2", text.lower()).split(",")]
    require(len(parts) <= MAX_STEPS, f"the geometry has {len(parts)} steps; at most {MAX_STEPS}")
    return tuple(_parse_step(part) for part in parts)


def _parse_step(text: str) -> Step:
    words = text.split()
    name = " ".join(words[:2])
    name = name if name in _PARSERS else "".join(words[:1])
    require(
        name in _PARSERS,
        f"a step is {text!r}; steps begin with {', '.join(_PARSERS)}, such as {EXAMPLE!r}",
    )
    remaining_words = words[len(name.split()) :]
    step = _PARSERS[name](remaining_words)
    require(not remaining_words, f"{text!r} has {' '.join(remaining_words)!r}, which {name} does not take")
    return step


# Each parser takes the words after the name of its step, and removes the words that it knows.


def _parse_resize(words: list[str]) -> Step:
    fit = _take_word(words, {one.value: one for one in Fit}, "resize needs")
    height, width = _take_size(words, "resize")
    interpolation = _take_word(words, {one.value: one for one in Interpolation}, "resize needs a filter:")
    antialias = _take_optional_word(words, {"no-antialias": False, "antialias": True}, True)
    return ResizeStep(fit, height, width, interpolation, _take_rounding(words, Rounding.FLOOR), antialias)


def _parse_crop(words: list[str]) -> Step:
    return CropStep(*_take_size(words, "crop"), _take_rounding(words, Rounding.ROUND))


def _parse_aspect_crop(words: list[str]) -> Step:
    return AspectCropStep(*_take_size(words, "crop aspect"), _take_rounding(words, Rounding.FLOOR))


def _parse_fraction_crop(words: list[str]) -> Step:
    if not words or not re.fullmatch(r"0?\.\d{1,20}", words[0]):
        raise ContractError("crop fraction needs the fraction of each side, such as crop fraction 0.875")
    return FractionCropStep(float(words.pop(0)))


def _parse_pad(words: list[str]) -> Step:
    height, width = _take_size(words, "pad")
    return PadStep(height, width, _take_fill(words), _take_rounding(words, Rounding.FLOOR))


def _parse_aspect_pad(words: list[str]) -> Step:
    return AspectPadStep(*_take_size(words, "pad aspect"), _take_fill(words))


_PARSERS: Final[dict[str, Callable[[list[str]], Step]]] = {
    "resize": _parse_resize,
    "crop": _parse_crop,
    "crop aspect": _parse_aspect_crop,
    "crop fraction": _parse_fraction_crop,
    "pad": _parse_pad,
    "pad aspect": _parse_aspect_pad,
}


def _take_size(words: list[str], name: str) -> tuple[int, int]:
    size = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", words[0]) if words else None
    if size is None:
        raise ContractError(f"{name} needs a size, height x width in pixels, such as {name} 224 x 224")
    del words[0]
    return int(size[1]), int(size[2] or size[1])


def _take_fill(words: list[str]) -> tuple[int, int, int]:
    if words[:1] != ["fill"]:
        return 0, 0, 0
    colour = re.fullmatch(r"(\d{1,3})/(\d{1,3})/(\d{1,3})", "".join(words[1:2]))
    if colour is None:
        raise ContractError("fill needs red, green and blue from 0 to 255, such as fill 114/114/114")
    del words[:2]
    return int(colour[1]), int(colour[2]), int(colour[3])


def _take_word(words: list[str], choices: dict[str, Any], need: str) -> Any:
    if not words or words[0] not in choices:
        value = f", not {words[0]!r}" if words else ""
        raise ContractError(f"{need} one of {', '.join(choices)}{value}")
    return choices[words.pop(0)]


def _take_optional_word(words: list[str], choices: dict[str, Any], default: Any) -> Any:
    return choices[words.pop(0)] if words and words[0] in choices else default


def _take_rounding(words: list[str], default: Rounding) -> Rounding:
    rounding: Rounding = _take_optional_word(words, _ROUNDINGS, default)
    return rounding

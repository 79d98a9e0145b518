"""Boxes: regions of one image, each of which is classified as an image of its own.

A box is left, top, right and bottom in pixels of the upright image. The right column and the bottom row do
not belong to the box, as in Python's slices and in Pillow's `crop`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, TypeAlias

import orjson

from fovea.service.errors import BadBox

PixelBox: TypeAlias = tuple[int, int, int, int]
"""Left, top, right and bottom, in whole pixels."""

Boxes: TypeAlias = tuple[PixelBox, ...]

MAX_BOXES: Final = 64
"""Maximum number of boxes in one image."""

_COORDINATE_LIMIT: Final = 1 << 31
"""Limit of a coordinate. No image is as large."""

_MAX_QUOTE_LENGTH: Final = 80
"""Number of characters of a wrong box that a message quotes."""


def check_boxes(value: Any) -> Boxes:
    """Return a list of boxes as tuples of integers; whether they lie in the image is checked later.

    Integers of NumPy are integers too. Raises `ValueError` that says what is wrong with the first wrong box.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"it must be a list of boxes, {_FORM}")
    boxes = list(islice(value, MAX_BOXES + 1))
    if len(boxes) > MAX_BOXES:
        raise ValueError(f"there are more than {MAX_BOXES} boxes; send the others in further requests")
    return tuple(_check_box(index, box) for index, box in enumerate(boxes))


def parse_boxes(text: str) -> Boxes:
    """Return the boxes in a text, which is a JSON list of lists. Raises `ValueError` like `check_boxes`."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise ValueError("it must be JSON, such as [[0, 0, 100, 100], [50, 20, 150, 120]]") from None
    return check_boxes(value)


_FORM: Final = "each four integers: [[left, top, right, bottom], ...]"


def _check_box(index: int, box: Any) -> PixelBox:
    try:
        left, top, right, bottom = map(_to_integer, box)
    except (TypeError, ValueError):
        raise ValueError(f"box {index} is {_quote(box)}; boxes are {_FORM}") from None
    return left, top, right, bottom


def _to_integer(value: Any) -> int:
    """Return an integer below the limit. Raises `TypeError` or `ValueError`."""
    if isinstance(value, bool):
        raise TypeError
    number = operator.index(value)
    if abs(number) >= _COORDINATE_LIMIT:
        raise ValueError
    return number


def _quote(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # deep lists, or an integer with more digits than Python writes
        return f"a value of the type {type(value).__name__}"
    return text if len(text) <= _MAX_QUOTE_LENGTH else f"{text[:_MAX_QUOTE_LENGTH]}…"


def check_inside(boxes: Sequence[PixelBox], size: tuple[int, int]) -> None:
    """Raise `BadBox` for the first box that is empty or not inside an upright image of this size."""
    width, height = size
    for index, box in enumerate(boxes):
        left, top, right, bottom = box
        if left >= right or top >= bottom:
            reason = "is empty; right must be more than left, and bottom more than top"
        elif left < 0 or top < 0 or right > width or bottom > height:
            reason = "is not inside the image; cut off what is outside"
        else:
            continue
        raise BadBox(f"box {index}, {list(box)}, {reason} (the image is {width} x {height} px)")

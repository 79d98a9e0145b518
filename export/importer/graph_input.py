"""The input of a foreign graph: layout, type, size and batch size, as far as the file states them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto

from fovea.export.importer.foreign_model import ImportRefused, NotTold, Values


class Layout(StrEnum):
    """The order of the input's axes."""

    NCHW = "nchw"
    NHWC = "nhwc"

    @property
    def spatial(self) -> tuple[int, int]:
        """Axes of height and width."""
        return (2, 3) if self is Layout.NCHW else (1, 2)

    @property
    def channels(self) -> int:
        """Axis of the channels."""
        return 1 if self is Layout.NCHW else 3


MAX_SIDE: Final = 2800
"""Maximum side of the input and of the resized image, in pixels.

Golden images for a larger side would exceed their own limit.
"""

TYPES: Final[dict[int, np.dtype[Any]]] = {
    int(TensorProto.FLOAT): np.dtype(np.float32),
    int(TensorProto.FLOAT16): np.dtype(np.float16),
    int(TensorProto.UINT8): np.dtype(np.uint8),
}
"""Supported input types, by ONNX element type."""


@dataclass(frozen=True)
class Taken:
    """The graph's input."""

    name: str
    dtype: np.dtype[Any]
    layout: Layout
    height: int
    width: int
    batch: int | None
    """Fixed batch size according to the file; None for any batch size."""
    said: tuple[tuple[str, str], ...]
    """Each of these facts with its origin."""

    def of(self, values: Values) -> Values:
        """Convert values (n, H, W, 3) to the layout and type of the graph's input."""
        # (n, 3, H, W) or (n, H, W, 3)
        turned = values.transpose(0, 3, 1, 2) if self.layout is Layout.NCHW else values
        return np.ascontiguousarray(turned, dtype=self.dtype)


def taken_by(model: ModelProto, layout: Layout | None, size: tuple[int, int] | None) -> Taken:
    """Return the graph's input; `layout` and `size` (height, width) supply facts that the file lacks.

    Raises `ImportRefused`.
    """
    value = _only_input(model)
    dtype = TYPES.get(int(value.type.tensor_type.elem_type))
    if dtype is None:
        kind = TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
        raise ImportRefused(
            f"the input {value.name!r} is of {kind}; float32, float16 and uint8 can be imported"
        )
    sides = _sides(value)
    found = layout or _layout_of(value.name, sides)
    channels = sides[found.channels]
    if channels not in (None, 3):
        raise ImportRefused(
            f"the input {value.name!r}, {_shown(sides)}, has {channels} channels in layout {found}; "
            "images have three: grey ones cannot be imported yet, nor those with more"
        )
    (height, tall), (width, _) = (
        _length(sides[axis], size and size[place], value.name, sides)
        for place, axis in enumerate(found.spatial)
    )
    if max(height, width) > MAX_SIDE:
        raise ImportRefused(
            f"the input {value.name!r} is {height} x {width} pixels; at most {MAX_SIDE} a side are taken"
        )
    told = "as told by --layout" if layout else f"three channels on axis {found.channels}"
    said = (
        ("input", f"{value.name}: {dtype.name}, {_shown(sides)}"),
        ("layout", f"{found} ({told})"),
        ("size", f"{height} x {width} ({tall})"),
    )
    return Taken(value.name, dtype, found, height, width, sides[0], said)


def _only_input(model: ModelProto) -> ValueInfoProto:
    inputs = list(model.graph.input)
    if len(inputs) != 1:
        names = ", ".join(repr(value.name) for value in inputs[:4]) or "nothing"
        raise ImportRefused(f"the graph takes {len(inputs)} inputs ({names}); an image classifier takes one")
    value: ValueInfoProto = inputs[0]
    if not value.type.HasField("tensor_type"):
        raise ImportRefused(f"the input {value.name!r} is not a tensor; an image classifier takes one")
    return value


def _sides(value: ValueInfoProto) -> tuple[int | None, ...]:
    """Return the input's shape; None for a length that is dynamic or not stated."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return (None,) * 4
    sides = tuple(side.dim_value if side.dim_value > 0 else None for side in kind.shape.dim)
    if len(sides) != 4:
        raise ImportRefused(
            f"the input {value.name!r} has {len(sides)} axes, {_shown(sides)}; images in a batch have four"
        )
    return sides


def _layout_of(name: str, sides: tuple[int | None, ...]) -> Layout:
    fits = [layout for layout in Layout if sides[layout.channels] == 3]
    if not fits:
        fits = [layout for layout in Layout if sides[layout.channels] == 1 or _may_be(layout, sides)]
    if len(fits) != 1:
        raise NotTold(
            f"the shape of the input {name!r}, {_shown(sides)}, does not tell where the channels are: "
            "give --layout nchw or --layout nhwc"
        )
    return fits[0]


def _may_be(layout: Layout, sides: tuple[int | None, ...]) -> bool:
    """Return whether the layout fits an input without 1 or 3 channels: the channel axis is the shortest."""
    known = [side for side in sides[1:] if side]
    return len(known) == 3 and sides[layout.channels] == min(known) < max(known)


def _length(
    known: int | None, asked: int | None, name: str, sides: tuple[int | None, ...]
) -> tuple[int, str]:
    """Return a side of the image and its origin."""
    if known and asked and known != asked:
        raise ImportRefused(f"--size is {asked}, but the graph takes {_shown(sides)} and nothing else")
    if known:
        return known, "the graph's own"
    if asked:
        return asked, "as told by --size; the graph takes any"
    raise NotTold(
        f"the input {name!r}, {_shown(sides)}, takes images of any size: give the one that it is to be "
        "served at as --size, such as --size 224"
    )


def _shown(sides: tuple[int | None, ...]) -> str:
    return " x ".join("any" if side is None else str(side) for side in sides)

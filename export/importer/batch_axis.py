"""The batch axis in each tensor of a graph that is run with one image.

With one image, the batch axis has length 1 or is part of another axis: `(tokens, images * heads, width)` has
12 where there are 12 heads. The position follows from the operators and the shapes of a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import NodeProto, helper

from fovea.export.importer.foreign_model import Values

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """The position of the images on an axis."""

    axis: int
    inner: bool = False
    """Flag for images that vary fastest on their axis, as in `(tokens * images, width)`."""

    def outside(self, shape: Shape) -> int:
        """Return the number of values outside the images."""
        return math.prod(shape[: self.axis + self.inner])

    def inside(self, shape: Shape) -> Shape:
        """Return the axes inside the images."""
        own = shape[self.axis]
        return shape[self.axis + 1 :] if self.inner or own == 1 else shape[self.axis :]


def places(
    nodes: Sequence[NodeProto], name: str, shapes: Mapping[str, Shape], constants: Mapping[str, Values]
) -> dict[str, Place]:
    """Return the place of the images in every tensor that depends on the input `name`, as far as known."""
    found = {name: Place(0)}
    for node in nodes:
        sources = [one for one in node.input if one in found and one in shapes]
        for output in node.output if sources else ():
            if output in shapes:
                source = max(sources, key=lambda one: len(shapes[one]))
                place = _behind(node, found[source], shapes[source], shapes[output], constants)
                if place is not None:
                    found[output] = place
    return found


def _behind(
    node: NodeProto, place: Place, shape: Shape, result: Shape, constants: Mapping[str, Values]
) -> Place | None:
    kind, options = node.op_type, {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if kind == "Transpose":
        order = list(options.get("perm", reversed(range(len(shape)))))
        return Place(order.index(place.axis), place.inner)
    if kind in ("Reshape", "Flatten"):
        return reshaped(place, shape, result)
    if kind == "Unsqueeze":
        new = {axis % len(result) for axis in _axes(node, options, constants)}
        kept = [axis for axis in range(len(result)) if axis not in new]
        return Place(kept[place.axis], place.inner)
    gone = {options.get("axis", 0)} if kind == "Gather" else set(_axes(node, options, constants))
    if len(result) < len(shape) and len(gone) == len(shape) - len(result):
        gone = {axis % len(shape) for axis in gone}
        if place.axis in gone:
            return None
        return Place(place.axis - sum(axis < place.axis for axis in gone), place.inner)
    return Place(place.axis + len(result) - len(shape), place.inner) if len(result) >= len(shape) else None


def _axes(node: NodeProto, options: Mapping[str, Any], constants: Mapping[str, Values]) -> list[int]:
    if "axes" in options:
        return list(options["axes"])
    value = constants.get(node.input[1]) if len(node.input) > 1 else None
    return [] if value is None else [int(axis) for axis in value.ravel()]


def reshaped(place: Place, shape: Shape, result: Shape) -> Place | None:
    """Return the place after a `Reshape`: the number of values outside the images stays the same."""
    outside = place.outside(shape)
    starts = [axis for axis in range(len(result)) if math.prod(result[:axis]) == outside]
    own = [axis for axis in starts if result[axis] == 1]
    if own:
        return Place(own[0])
    if not starts:
        return Place(len(result) - 1, inner=True) if math.prod(result) == outside else None
    (axis,) = starts[-1:]
    splits = len(result[axis:]) > len(place.inside(shape))  # the width is split into heads, for every image
    return Place(axis) if splits or not axis else Place(axis - 1, inner=True)

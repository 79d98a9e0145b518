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

from fovea.export.importer.foreign_model import Array

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BatchPosition:
    """The position of the images on an axis."""

    axis: int
    inner: bool = False
    """Flag for images that vary fastest on their axis, as in `(tokens * images, width)`."""

    def outer_size(self, shape: Shape) -> int:
        """Return the number of values outside the images."""
        return math.prod(shape[: self.axis + self.inner])

    def inner_shape(self, shape: Shape) -> Shape:
        """Return the axes inside the images."""
        axis_size = shape[self.axis]
        return shape[self.axis + 1 :] if self.inner or axis_size == 1 else shape[self.axis :]


def find_batch_positions(
    nodes: Sequence[NodeProto], input_name: str, shapes: Mapping[str, Shape], constants: Mapping[str, Array]
) -> dict[str, BatchPosition]:
    """Return the position of the images in each tensor that depends on the input `input_name`.

    Tensors whose position is not known are left out.
    """
    positions = {input_name: BatchPosition(0)}
    for node in nodes:
        sources = [one for one in node.input if one in positions and one in shapes]
        for output in node.output if sources else ():
            if output in shapes:
                source = max(sources, key=lambda one: len(shapes[one]))
                position = _propagate_position(
                    node, positions[source], shapes[source], shapes[output], constants
                )
                if position is not None:
                    positions[output] = position
    return positions


def _propagate_position(
    node: NodeProto, position: BatchPosition, shape: Shape, new_shape: Shape, constants: Mapping[str, Array]
) -> BatchPosition | None:
    kind, options = node.op_type, {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if kind == "Transpose":
        order = list(options.get("perm", reversed(range(len(shape)))))
        return BatchPosition(order.index(position.axis), position.inner)
    if kind in ("Reshape", "Flatten"):
        return reshape_position(position, shape, new_shape)
    if kind == "Unsqueeze":
        new_axes = {axis % len(new_shape) for axis in _read_axes(node, options, constants)}
        old_axes = [axis for axis in range(len(new_shape)) if axis not in new_axes]
        return BatchPosition(old_axes[position.axis], position.inner)
    removed_axes = {options.get("axis", 0)} if kind == "Gather" else set(_read_axes(node, options, constants))
    if len(new_shape) < len(shape) and len(removed_axes) == len(shape) - len(new_shape):
        removed_axes = {axis % len(shape) for axis in removed_axes}
        if position.axis in removed_axes:
            return None
        return BatchPosition(
            position.axis - sum(axis < position.axis for axis in removed_axes), position.inner
        )
    return (
        BatchPosition(position.axis + len(new_shape) - len(shape), position.inner)
        if len(new_shape) >= len(shape)
        else None
    )


def _read_axes(node: NodeProto, options: Mapping[str, Any], constants: Mapping[str, Array]) -> list[int]:
    if "axes" in options:
        return list(options["axes"])
    value = constants.get(node.input[1]) if len(node.input) > 1 else None
    return [] if value is None else [int(axis) for axis in value.ravel()]


def reshape_position(position: BatchPosition, shape: Shape, new_shape: Shape) -> BatchPosition | None:
    """Return the position after a `Reshape`: the number of values outside the images stays the same."""
    outer_size = position.outer_size(shape)
    start_axes = [axis for axis in range(len(new_shape)) if math.prod(new_shape[:axis]) == outer_size]
    unit_axes = [axis for axis in start_axes if new_shape[axis] == 1]
    if unit_axes:
        return BatchPosition(unit_axes[0])
    if not start_axes:
        return BatchPosition(len(new_shape) - 1, inner=True) if math.prod(new_shape) == outer_size else None
    (axis,) = start_axes[-1:]
    is_split = len(new_shape[axis:]) > len(
        position.inner_shape(shape)
    )  # the width is split into heads, for every image
    return BatchPosition(axis) if is_split or not axis else BatchPosition(axis - 1, inner=True)

"""The input of a foreign graph: layout, type, size and batch size, as far as the file states them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto

from fovea.export.importer.foreign_model import Array, ImportRefused, MissingInformation
from fovea.service.artifact.geometry import MAX_SIDE


class Layout(StrEnum):
    """The order of the input's axes."""

    NCHW = "nchw"
    NHWC = "nhwc"

    @property
    def spatial_axes(self) -> tuple[int, int]:
        """Axes of height and width."""
        return (2, 3) if self is Layout.NCHW else (1, 2)

    @property
    def channel_axis(self) -> int:
        """Axis of the channels."""
        return 1 if self is Layout.NCHW else 3


LAYOUT_OPTION: Final = "from --layout"
"""Origin of a layout that the file does not state."""

SIZE_OPTION: Final = "from --crop"
"""Origin of a size that the file does not state."""

SUPPORTED_TYPES: Final[dict[int, np.dtype[Any]]] = {
    int(TensorProto.FLOAT): np.dtype(np.float32),
    int(TensorProto.FLOAT16): np.dtype(np.float16),
    int(TensorProto.UINT8): np.dtype(np.uint8),
}
"""Supported input types, by ONNX element type."""


@dataclass(frozen=True)
class GraphInput:
    """The graph's input."""

    name: str
    dtype: np.dtype[Any]
    layout: Layout
    height: int
    width: int
    batch_size: int | None
    """Fixed batch size according to the file; None for any batch size."""
    facts: tuple[tuple[str, str], ...]
    """Each of these facts with its origin."""
    channels: int = 3
    """Number of channels: 3 for RGB or BGR, 1 for grey."""

    def from_pixel_values(self, values: Array) -> Array:
        """Convert values (n, H, W, channels) to the layout and type of the graph's input."""
        # (n, channels, H, W) or (n, H, W, channels)
        transposed_values = values.transpose(0, 3, 1, 2) if self.layout is Layout.NCHW else values
        return np.ascontiguousarray(transposed_values, dtype=self.dtype)


_MAX_BATCH: Final = 1024
"""Maximum size of a batch that the file fixes. The import runs batches of the same image."""


def read_graph_input(
    model: ModelProto,
    layout: Layout | None,
    size: tuple[int, int] | None,
    geometry_size: tuple[int, int] | None = None,
    notes: Sequence[str] = (),
) -> GraphInput:
    """Return the graph's input; `layout` and `size` (height, width) supply facts that the file lacks.

    `geometry_size` is the size that the steps of `--geometry` end with. It counts if nothing else does.
    `notes` are those of `prepare_input`. Raises `ImportRefused`.
    """
    value = _require_single_input(model)
    dtype = SUPPORTED_TYPES.get(int(value.type.tensor_type.elem_type))
    if dtype is None:
        type_number = value.type.tensor_type.elem_type
        is_known = type_number in TensorProto.DataType.values()
        kind = TensorProto.DataType.Name(type_number).lower() if is_known else f"number {type_number}"
        raise ImportRefused(
            f"the input {value.name!r} has type {kind}; supported types are float32, float16 and uint8"
        )
    shape = _read_shape(value)
    if shape[0] is not None and shape[0] > _MAX_BATCH:
        raise ImportRefused(
            f"the input {value.name!r} takes batches of {shape[0]} images; at most {_MAX_BATCH} are supported"
        )
    input_layout = layout or _detect_layout(value.name, shape, has_size=size is not None)
    channels = shape[input_layout.channel_axis]
    if channels not in (None, 1, 3):
        raise ImportRefused(
            f"the input {value.name!r}, {format_shape(shape)}, has {channels} channels in layout "
            f"{input_layout}; 3 channels (RGB) or 1 (grey) are needed, others are not supported"
        )
    (height, size_origin), (width, _) = (
        _choose_length(
            shape[axis], size and size[index], geometry_size and geometry_size[index], value.name, shape
        )
        for index, axis in enumerate(input_layout.spatial_axes)
    )
    if max(height, width) > MAX_SIDE:
        raise ImportRefused(
            f"the input {value.name!r} is {height} x {width} pixels; the maximum side is {MAX_SIDE}"
        )
    number = "one channel" if channels == 1 else "three channels"
    layout_origin = LAYOUT_OPTION if layout else f"{number} on axis {input_layout.channel_axis}"
    facts = (
        ("input", "; ".join([f"{value.name}: {dtype.name}, {format_shape(shape)}", *notes])),
        ("layout", f"{input_layout} ({layout_origin})"),
        ("size", f"{height} x {width} ({size_origin})"),
    )
    return GraphInput(value.name, dtype, input_layout, height, width, shape[0], facts, channels or 3)


def _require_single_input(model: ModelProto) -> ValueInfoProto:
    inputs = list(model.graph.input)
    if len(inputs) != 1:
        names = ", ".join(repr(value.name) for value in inputs[:4]) or "nothing"
        raise ImportRefused(f"the graph takes {len(inputs)} inputs ({names}); an image classifier takes one")
    value: ValueInfoProto = inputs[0]
    if not value.type.HasField("tensor_type"):
        raise ImportRefused(f"the input {value.name!r} is not a tensor; an image classifier takes one")
    return value


def _read_shape(value: ValueInfoProto) -> tuple[int | None, ...]:
    """Return the input's shape; None for a length that is dynamic or not stated."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return (None,) * 4
    shape = tuple(side.dim_value if side.dim_value > 0 else None for side in kind.shape.dim)
    if len(shape) != 4:
        raise ImportRefused(
            f"the input {value.name!r} has {len(shape)} axes, {format_shape(shape)}; "
            "images in a batch have four"
        )
    return shape


def _detect_layout(name: str, shape: tuple[int | None, ...], *, has_size: bool) -> Layout:
    candidates = [layout for layout in Layout if shape[layout.channel_axis] == 3]
    if not candidates:
        candidates = [
            layout for layout in Layout if shape[layout.channel_axis] == 1 or _is_plausible(layout, shape)
        ]
    if len(candidates) != 1:
        message = (
            f"the shape of the input {name!r}, {format_shape(shape)}, does not tell where the channels are: "
            "give --layout nchw or --layout nhwc"
        )
        if has_size or len([side for side in shape[1:] if side]) > 1:
            raise MissingInformation(message, "--layout nchw")
        raise MissingInformation(
            f"{message}; and set the size to serve with --crop, such as --crop 224",
            "--layout nchw --crop 224",
        )
    return candidates[0]


def _is_plausible(layout: Layout, shape: tuple[int | None, ...]) -> bool:
    """Return whether the layout fits an input whose channels are not 1 or 3: they are the shortest axis."""
    lengths = [side for side in shape[1:] if side]
    return len(lengths) == 3 and shape[layout.channel_axis] == min(lengths) < max(lengths)


def _choose_length(
    graph_length: int | None,
    requested_length: int | None,
    geometry_length: int | None,
    name: str,
    shape: tuple[int | None, ...],
) -> tuple[int, str]:
    """Return a side of the image and its origin."""
    if graph_length and requested_length and graph_length != requested_length:
        raise ImportRefused(f"--crop is {requested_length}, but the graph takes only {format_shape(shape)}")
    if graph_length:
        return graph_length, "the graph's own"
    if requested_length:
        return requested_length, f"{SIZE_OPTION}; the graph takes any"
    if geometry_length:
        return geometry_length, "the last step of --geometry; the graph takes any"
    raise MissingInformation(
        f"the input {name!r}, {format_shape(shape)}, takes images of any size: set the size to serve "
        "with --crop, such as --crop 224",
        "--crop 224",
    )


def format_shape(shape: tuple[int | None, ...]) -> str:
    """Return a shape as text, such as "any x 3 x 224 x 224"."""
    return " x ".join("any" if side is None else str(side) for side in shape)

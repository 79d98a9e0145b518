"""Detection of graphs that take images of any size and resize them themselves."""

from __future__ import annotations

from typing import Final

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from fovea.export.importer.graph_input import GraphInput

_PIXEL_OPERATORS: Final = frozenset(
    {"Add", "Cast", "Clip", "Concat", "Div", "Gather", "Identity", "Mul", "Split", "Sub", "Transpose"}
)
"""ONNX operators that may stand between the pixels and the resize."""

_RESIZE_OPERATORS: Final = frozenset({"Resize", "Upsample"})

_FILTERS: Final = {"nearest": "nearest", "linear": "bilinear", "cubic": "bicubic"}
"""Fovea's words for ONNX's interpolation modes."""


def describe_own_resize(model: ModelProto, graph_input: GraphInput) -> tuple[tuple[str, str], ...]:
    """Return a fact if the graph takes any height and width, and resizes its input before anything else."""
    node = _find_input_resize(model.graph, graph_input)
    if node is None:
        return ()
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    mode = attributes.get("mode", b"nearest").decode()
    antialias = bool(attributes.get("antialias", 0))
    target_size = _find_target_size(model.graph, node)
    if target_size is None:
        return (("own resize", f"the graph resizes its input itself ({mode}): images are resized twice"),)
    size = f"{target_size[0]} x {target_size[1]}"
    text = f"the graph resizes its input itself, to {size} ({mode}{', antialiased' if antialias else ''})"
    if target_size != (graph_input.height, graph_input.width):
        words = ["resize stretch", size, _FILTERS.get(mode, "bilinear")]
        words += ["no-antialias"] if mode == "linear" and not antialias else []
        text += (
            f": images are resized twice, first to {graph_input.height} x {graph_input.width}; "
            f"--geometry '{' '.join(words)}' resizes them once"
        )
    return (("own resize", text),)


def _find_input_resize(graph: GraphProto, graph_input: GraphInput) -> NodeProto | None:
    """Return the resize that is fed by an input of any height and width, or None."""
    value = next(one for one in graph.input if one.name == graph_input.name)
    sides = value.type.tensor_type.shape.dim
    axes = graph_input.layout.spatial_axes
    if sides and any(sides[axis].dim_value > 0 for axis in axes):
        return None
    tensors = {graph_input.name}
    node: NodeProto
    for node in graph.node:
        if node.input and node.input[0] in tensors and node.op_type in _RESIZE_OPERATORS:
            return node
        if node.op_type in _PIXEL_OPERATORS and tensors & set(node.input):
            tensors |= set(node.output)
    return None


def _find_target_size(graph: GraphProto, node: NodeProto) -> tuple[int, int] | None:
    """Return height and width after the resize if the graph states them as constants, else None."""
    if len(node.input) < 4:
        return None  # scales, which multiply the input's own size
    constants = {one.name: one for one in graph.initializer}
    constants |= {
        one.output[0]: one.attribute[0].t
        for one in graph.node
        if one.op_type == "Constant" and one.attribute[0].name == "value"
    }
    nodes = {name: one for one in graph.node for name in one.output}
    values: list[int | None] = []
    for name in _list_parts(nodes, node.input[3]):
        values += np.ravel(numpy_helper.to_array(constants[name])).tolist() if name in constants else [None]
    if values[-1] in (None, 3):
        values.pop()  # the channels, in layout nhwc
    height, width = values[-2:] if len(values) >= 2 else (None, None)
    return (int(height), int(width)) if height and width else None


def _list_parts(nodes: dict[str, NodeProto], name: str) -> list[str]:
    """Return the tensors that a list of sizes is put together from."""
    node = nodes.get(name)
    return list(node.input) if node is not None and node.op_type == "Concat" else [name]

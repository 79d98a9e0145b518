"""Steps from pixels, uint8 (n, H, W, 3), to the tensor that a network takes: layout, colours, arithmetic.

The arithmetic has constants of three values, one for each channel. Channels first, (n, 3, H, W), such a
constant is spread over whole planes. Channels last, ONNX Runtime takes three values at a time, and a step
costs ten times as much. So the arithmetic has two forms:

    planes      (n, 3, H, W); the bytes are transposed first
    rows        (n * H, W * 3) with a constant for each place of a row; the result is transposed, if at all

ONNX Runtime moves a Transpose through arithmetic until the Transpose meets its inverse and both vanish, which
leaves planes channels last. It moves no Transpose through a Reshape or a BatchNormalization. One
BatchNormalization is faster than several steps, and takes their place where that changes no answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fovea.export.node_builder import Array, NodeBuilder

TO_PLANES: Final = (0, 3, 1, 2)
"""Permutation from channels last to channels first."""

_FROM_PLANES: Final = (0, 2, 3, 1)

_REVERSED: Final = np.array([2, 1, 0], np.int64)
"""Order of the channels from RGB to BGR."""

_ARITHMETIC: Final[dict[str, Callable[[Array, Array], Array]]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
}

_MOVED_OPERATORS: Final = frozenset(
    {*_ARITHMETIC, "Identity", "Cast", "Clip", "QuantizeLinear", "DequantizeLinear"}
)
"""Operators through which ONNX Runtime moves a Transpose."""

Rounding: TypeAlias = Callable[[Array], Array]
"""Function that rounds float32 values to coarser ones."""


@dataclass(frozen=True)
class PixelSteps:
    """The steps from pixels to the tensor that a network takes."""

    height: int
    width: int
    arithmetic: tuple[tuple[str, Array], ...]
    """Operators with their constants: float32, one value () or one for each channel (3,)."""
    is_bgr: bool
    """Flag that reverses the channels before the arithmetic."""
    has_planes: bool
    """Flag for a result with channels first."""
    is_merged: bool = False
    """Flag for arithmetic in one BatchNormalization, which may round the last bits differently."""

    def merge(self, rounding: Rounding | None) -> PixelSteps:
        """Return the steps with merged arithmetic, unless the next step would round a value differently.

        `rounding` is that step, if there is one. The check covers all values, since a channel has 256.
        """
        if len(self.arithmetic) < 2:
            return self
        if rounding is not None:
            pixels = np.repeat(np.arange(256, dtype=np.float32)[:, None], 3, axis=1)  # (256, 3)
            factor, offset = self._derive_factor_and_offset()
            expected = rounding(self._compute(pixels))
            # Some processors round the product, others only the sum.
            sums = pixels * factor + offset, (pixels.astype(np.float64) * factor + offset).astype(np.float32)
            if not all(np.array_equal(rounding(values), expected) for values in sums):
                return self
        return replace(self, is_merged=True)

    def add_to(self, builder: NodeBuilder, pixels: str, *, as_planes: bool) -> str:
        """Add the steps from the tensor `pixels`; return the result, float32.

        `as_planes` is the form of the arithmetic, see `prefers_planes`.
        """
        tensor = pixels
        if as_planes or self.is_bgr:  # a Gather from the last axis would copy byte by byte
            tensor = builder.add("Transpose", tensor, perm=TO_PLANES)
        if self.is_bgr:
            tensor = builder.add("Gather", tensor, _REVERSED, axis=1)
        if as_planes:
            tensor = self._add_arithmetic(builder, tensor, 1, (1, 3, 1, 1))
            return tensor if self.has_planes else builder.add("Transpose", tensor, perm=_FROM_PLANES)
        if self.is_bgr:
            tensor = builder.add("Transpose", tensor, perm=_FROM_PLANES)
        size = self.width * 3
        tensor = builder.add("Reshape", tensor, np.array([-1, size], np.int64))
        tensor = self._add_arithmetic(builder, tensor, self.width, (1, size))
        tensor = builder.add("Reshape", tensor, np.array([-1, self.height, self.width, 3], np.int64))
        return builder.add("Transpose", tensor, perm=TO_PLANES) if self.has_planes else tensor

    def _add_arithmetic(self, builder: NodeBuilder, tensor: str, repeats: int, shape: tuple[int, ...]) -> str:
        """Add the arithmetic; constants for the channels are repeated, and reshaped to `shape`."""
        tensor = builder.add("Cast", tensor, to=TensorProto.FLOAT)
        if self.is_merged:
            factor, offset = (np.tile(one, repeats) for one in self._derive_factor_and_offset())
            mean, variance = np.zeros_like(factor), np.ones_like(factor)
            return builder.add("BatchNormalization", tensor, factor, offset, mean, variance, epsilon=0.0)
        for op_type, values in self.arithmetic:
            constant = np.tile(values, repeats).reshape(shape) if values.ndim else values
            tensor = builder.add(op_type, tensor, constant)
        return tensor

    def _derive_factor_and_offset(self) -> tuple[Array, Array]:
        """Return the factor and the offset of each channel, float32 (3,), that equal the arithmetic."""
        offset, end = (self._compute(np.full(3, pixel, np.float64)) for pixel in (0, 1))
        return (end - offset).astype(np.float32), offset.astype(np.float32)

    def _compute(self, values: Array) -> Array:
        """Return the arithmetic of values (…, 3) in NumPy, in their type."""
        for op_type, constant in self.arithmetic:
            values = _ARITHMETIC[op_type](values, constant)
        return values


def prefers_planes(graph: GraphProto, name: str, steps: PixelSteps) -> bool:
    """Return whether planes are the faster form for the steps that compute the tensor `name`.

    ONNX Runtime computes convolutions of floats channels first, and those of int8 channels last. So the first
    convolution decides, and without one the layout in which the graph goes on.
    """
    is_dequantized, has_planes = False, steps.has_planes
    while node := _find_only_reader(graph, name):
        if node.op_type in _MOVED_OPERATORS:
            is_dequantized = node.op_type == "DequantizeLinear"
        elif (
            node.op_type == "Transpose" and not has_planes and _read_attributes(node).get("perm") == TO_PLANES
        ):
            has_planes = True
        else:
            is_int8 = node.op_type == "QLinearConv" or (node.op_type == "Conv" and is_dequantized)
            has_planes = has_planes and not is_int8 and node.op_type != "Transpose"
            break
        name = node.output[0]
    return has_planes and (steps.has_planes or steps.is_merged)


def find_rounding(graph: GraphProto, name: str) -> Rounding | None:
    """Return how the graph rounds the tensor `name`: to float16, to levels, or not before its first layer."""
    while (node := _find_only_reader(graph, name)) and node.op_type in ("Identity", "Transpose"):
        name = node.output[0]
    if node is None:
        return None
    if node.op_type == "Cast" and _read_attributes(node).get("to") == TensorProto.FLOAT16:
        return round_to_half
    if node.op_type != "QuantizeLinear":
        return None
    constants = [one for key in node.input[1:] for one in graph.initializer if one.name == key]
    values = [numpy_helper.to_array(constant) for constant in constants]
    if [value.size for value in values] != [1, 1]:
        return None
    scale, zero_point = values

    def round_to_level(values: Array) -> Array:
        limits = np.iinfo(zero_point.dtype)
        levels: Array = np.clip(np.rint(values / scale) + zero_point, limits.min, limits.max)
        return levels

    return round_to_level


def round_to_half(values: Array) -> Array:
    """Return the values as float16."""
    return values.astype(np.float16)


def arrange_pixel_steps(model: ModelProto) -> None:
    """Bring the steps of a Fovea model into the form that is fastest for its network.

    This is for an exported network, for a network that was changed, such as one that is quantised, and for
    imports of Fovea 0.1.
    """
    graph = model.graph
    reader = _StepsReader(graph)
    steps, rounding = reader.read_steps(), find_rounding(graph, reader.tensor)
    # Of the usual arithmetic of an import, it is only known here whether merging changes a level.
    if rounding is not None or [op_type for op_type, _ in steps.arithmetic] == ["Mul", "Add"]:
        steps = steps.merge(rounding)
    as_planes = prefers_planes(graph, reader.tensor, steps)
    is_arranged = reader.is_planes and as_planes and reader.is_merged == steps.is_merged
    if is_arranged or not steps.arithmetic:
        return
    builder = NodeBuilder("fovea/arranged/")  # other steps of an import keep their names
    steps.add_to(builder, graph.input[0].name, as_planes=as_planes)
    nodes = builder.pop_nodes()
    nodes[-1].output[0] = reader.tensor
    for node in nodes:  # torch records the module there, which names the layer
        node.metadata_props.extend(reader.nodes[-1].metadata_props)
    _replace_nodes(graph, reader.nodes, nodes)
    graph.initializer.extend(builder.constants)


def _replace_nodes(graph: GraphProto, old_nodes: list[NodeProto], new_nodes: list[NodeProto]) -> None:
    """Put new nodes at the start of a graph, without the old nodes, their constants and their shapes."""
    old_outputs = {node.output[0] for node in old_nodes}
    other_nodes = [node for node in graph.node if node.output[0] not in old_outputs]
    unused_names = {name for node in old_nodes for name in node.input}.difference(
        *(node.input for node in other_nodes)
    )
    initializers = [tensor for tensor in graph.initializer if tensor.name not in unused_names]
    shapes = [value for value in graph.value_info if value.name not in old_outputs]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend([*new_nodes, *other_nodes])
    graph.initializer.extend(initializers)
    graph.value_info.extend(shapes)


class _StepsReader:
    """A reader of the steps at the start of a graph, channels first or last, but not in rows."""

    def __init__(self, graph: GraphProto) -> None:
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self.tensor = graph.input[0].name
        """Result of the steps that were read."""
        self.nodes: list[NodeProto] = []
        """Nodes of these steps."""
        self.is_planes = False
        """Flag for arithmetic in the form of planes."""
        self.is_merged = False
        """Flag for arithmetic in one step."""

    def read_steps(self) -> PixelSteps:
        """Return the steps; their arithmetic is empty if the graph does not begin as Fovea writes it."""
        arithmetic: list[tuple[str, Array]] = []
        self.is_planes = self._take("Transpose", perm=TO_PLANES)
        is_bgr = self._take("Gather", axis=1 if self.is_planes else 3)
        order = self._read_constant(self.nodes[-1], 1) if is_bgr else _REVERSED
        is_known = order is not None and np.array_equal(order, _REVERSED)
        if is_known and self._take("Cast", to=TensorProto.FLOAT):
            self.is_merged = self.is_planes and self._take("BatchNormalization", epsilon=0.0)
            if self.is_merged:
                arithmetic += self._read_batch_normalization()
            while (values := self._take_arithmetic()) is not None:
                arithmetic.append((self.nodes[-1].op_type, values))
        has_planes = self.is_planes and not self._take("Transpose", perm=_FROM_PLANES)
        height, width = (side.dim_value for side in self._graph.input[0].type.tensor_type.shape.dim[1:3])
        return PixelSteps(height, width, tuple(arithmetic), is_bgr, has_planes)

    def _read_batch_normalization(self) -> list[tuple[str, Array]]:
        """Return the last node as a product and a sum; nothing if it has another mean or variance."""
        factor, offset, mean, variance = (
            self._read_constant(self.nodes[-1], position) for position in range(1, 5)
        )
        if factor is None or offset is None or not (np.all(mean == 0) and np.all(variance == 1)):
            return []
        return [("Mul", factor), ("Add", offset)]

    def _take(self, op_type: str, **attributes: Any) -> bool:
        """Take the next node if it is of this kind, with these attributes."""
        node = _find_only_reader(self._graph, self.tensor)
        if node is None or node.op_type != op_type:
            return False
        if not attributes.items() <= _read_attributes(node).items():
            return False
        self._append(node)
        return True

    def _take_arithmetic(self) -> Array | None:
        """Take the next node if it is arithmetic with a constant for all or for each channel.

        Return the constant, () or (3,).
        """
        node = _find_only_reader(self._graph, self.tensor)
        values = self._read_constant(node, 1) if node and node.op_type in _ARITHMETIC else None
        shape = (3, 1, 1) if self.is_planes else (3,)
        if node is None or values is None or not (values.size == 1 or values.shape[-len(shape) :] == shape):
            return None
        self._append(node)
        return values.reshape(() if values.size == 1 else (3,))

    def _read_constant(self, node: NodeProto, position: int) -> Array | None:
        """Return an input of a node, or None if it is not a constant."""
        tensor = self._constants.get(node.input[position])
        if tensor is None:
            return None
        values: Array = numpy_helper.to_array(tensor)
        return values

    def _append(self, node: NodeProto) -> None:
        self.nodes.append(node)
        self.tensor = node.output[0]


def _find_only_reader(graph: GraphProto, name: str) -> NodeProto | None:
    """Return the node that reads a tensor as its first input, if no other node reads the tensor."""
    readers = [node for node in graph.node if name in node.input]
    return readers[0] if len(readers) == 1 and readers[0].input[0] == name else None


def _read_attributes(node: NodeProto) -> dict[str, Any]:
    """Return the attributes by name; lists as tuples."""
    values = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

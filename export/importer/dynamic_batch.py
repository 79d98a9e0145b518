"""Conversion of a graph with a fixed batch size to any batch size, if the result can be verified."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from fovea.export.importer.batch_axis import BatchPosition, find_batch_positions
from fovea.export.importer.foreign_model import Array, ImportRefused
from fovea.export.importer.graph_input import GraphInput

BATCH_AXIS = "batch"
"""Name of the dynamic axis."""


def with_input_size(model: ModelProto, graph_input: GraphInput, batch: int | str) -> ModelProto:
    """Return a copy with this image size and batch size, without stored shapes of inner tensors."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    (value,) = copy.graph.input
    shape: list[int | str] = [batch, 0, 0, 0]
    shape[graph_input.layout.channel_axis] = graph_input.channels
    for axis, side in zip(
        graph_input.layout.spatial_axes, (graph_input.height, graph_input.width), strict=True
    ):
        shape[axis] = side
    kind = value.type.tensor_type.elem_type
    value.CopyFrom(helper.make_tensor_value_info(value.name, kind, shape))
    for output in copy.graph.output:
        dimensions = output.type.tensor_type.shape.dim
        if dimensions and isinstance(batch, str):
            dimensions[0].Clear()
    return copy


ReadTensors = Callable[[Iterable[str]], dict[str, Array]]
"""Function that runs the unchanged file and returns the named tensors."""


def make_batch_dynamic(
    model: ModelProto,
    graph_input: GraphInput,
    read_tensors: ReadTensors,
    is_valid: Callable[[ModelProto], bool],
) -> ModelProto | None:
    """Return the model for any batch size, unchanged or repaired; None if neither is `is_valid`."""
    dynamic_model = with_input_size(model, graph_input, BATCH_AXIS)
    if is_valid(dynamic_model):
        return dynamic_model
    try:
        repaired_model = _repair_model(dynamic_model, read_tensors, graph_input.batch_size or 1)
    except ImportRefused:  # a tensor that the repair needs cannot be read
        return None
    return repaired_model if is_valid(repaired_model) else None


def _repair_model(dynamic_model: ModelProto, read_tensors: ReadTensors, batch_size: int) -> ModelProto:
    """Remove the batch size `batch_size` from the constants of the graph."""
    rewriter = _BatchRewriter(dynamic_model, read_tensors, batch_size)
    nodes = [new_node for node in dynamic_model.graph.node for new_node in rewriter(node)]
    nodes = [*rewriter.build_first_nodes(), *nodes]
    del dynamic_model.graph.node[:]
    dynamic_model.graph.node.extend(nodes)
    return dynamic_model


def find_constants(model: ModelProto) -> set[str]:
    """Return the tensors that do not depend on an input: weights and values computed from weights alone."""
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if all(name in constants or not name for name in node.input):
            constants.update(node.output)
    return constants


def _find_required_tensors(model: ModelProto, constants: set[str]) -> set[str]:
    """Return the tensors that the repair needs: everything computed from an image, and relevant constants."""
    names = set()
    for node in model.graph.node:
        if not constants.issuperset(node.output):
            names.update(node.output)
            if node.op_type in ("Reshape", "Expand", "Squeeze", "Unsqueeze") or "Reduce" in node.op_type:
                names |= constants.intersection(node.input[1:])
            elif node.op_type == "Concat":
                names |= constants.intersection(node.input)
    return names - {""}


def _read_axis(node: NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)


class _BatchRewriter:
    """A rewriter of nodes that makes the batch size dynamic.

    The targets of `Reshape` and `Expand` become dynamic, and `Concat` constants such as class tokens are
    repeated per image. New constants and nodes have names under `fovea/`.
    """

    def __init__(self, dynamic_model: ModelProto, read_tensors: ReadTensors, batch_size: int) -> None:
        self._graph = dynamic_model.graph
        self._batch_size = batch_size
        self._constants = find_constants(dynamic_model)
        self._tensors = read_tensors(_find_required_tensors(dynamic_model, self._constants))
        (value,) = self._graph.input
        shapes = {name: one.shape for name, one in self._tensors.items()}
        shapes[value.name] = tuple(side.dim_value or batch_size for side in value.type.tensor_type.shape.dim)
        self._positions = (
            find_batch_positions(self._graph.node, value.name, shapes, self._tensors)
            if batch_size == 1
            else {}
        )
        self._name_count = 0
        self._needs_batch_node = False

    def __call__(self, node: NodeProto) -> list[NodeProto]:
        """Return the rewritten node, after the new nodes that it needs."""
        new_nodes: list[NodeProto] = []
        if node.op_type in ("Reshape", "Expand") and node.input[1] in self._constants:
            target: list[int] = (
                self._tensors[node.input[1]].ravel().tolist() if node.input[1] in self._tensors else []
            )
            if node.op_type == "Reshape" and node.output[0] in self._tensors:
                node.input[1] = self._add_constant(self._dynamic_target(node.output[0]))
            elif len(target) > 1 and target[0] in (1, self._batch_size):
                node.input[1] = self._add_batch_shape(target[1:], new_nodes)
        elif node.op_type == "Concat" and _read_axis(node) and not self._constants.issuperset(node.input):
            for index, name in enumerate(node.input):
                value = self._tensors[name] if name in self._constants else None
                if value is not None and value.ndim > 1 and self._is_same_for_images(value):
                    node.input[index] = self._add_expand(value[:1], new_nodes)
        return [*new_nodes, node]

    def build_first_nodes(self) -> Iterator[NodeProto]:
        """Yield the nodes that must come first: they compute the number of images."""
        if self._needs_batch_node:
            (value,) = self._graph.input
            zero = self._add_constant([0])
            yield helper.make_node("Shape", [value.name], ["fovea/input_shape"], "fovea/input_shape")
            yield helper.make_node(
                "Gather", ["fovea/input_shape", zero], ["fovea/batch"], "fovea/batch", axis=0
            )

    def _dynamic_target(self, name: str) -> list[int]:
        """Return the target shape of the `Reshape` that makes this tensor, with -1 for the batch axis."""
        shape: list[int] = list(self._tensors[name].shape)
        position = self._positions.get(name, BatchPosition(0))
        if shape:
            shape[position.axis] = -1
        return shape

    def _is_same_for_images(self, value: Array) -> bool:
        """Return whether the constant is the same for every image."""
        return len(value) in (1, self._batch_size) and bool((value == value[:1]).all())

    def _add_constant(self, values: Array | list[int]) -> str:
        """Add a constant tensor and return its name; a list becomes int64."""
        name = self._new_name("constant")
        array = np.array(values, np.int64) if isinstance(values, list) else values
        self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def _add_batch_shape(self, sides: list[int], nodes: list[NodeProto]) -> str:
        """Add nodes that compute the shape [batch, *sides] and return its name."""
        self._needs_batch_node = True
        name = self._new_name("shape")
        nodes.append(
            helper.make_node("Concat", ["fovea/batch", self._add_constant(sides)], [name], name, axis=0)
        )
        return name

    def _add_expand(self, value: Array, nodes: list[NodeProto]) -> str:
        """Add nodes that repeat a constant of shape [1, …] for each image, and return the name."""
        shape, result = self._add_batch_shape(list(value.shape[1:]), nodes), self._new_name("expanded")
        nodes.append(helper.make_node("Expand", [self._add_constant(value), shape], [result], result))
        return result

    def _new_name(self, kind: str) -> str:
        self._name_count += 1
        return f"fovea/{kind}_{self._name_count}"

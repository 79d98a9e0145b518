"""The nodes, tensors and constants of a graph, including those of its inner graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

Array: TypeAlias = npt.NDArray[Any]


def walk_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield the nodes of a graph and of its inner graphs."""
    for node in graph.node:
        yield node
        for inner in inner_graphs(node.attribute):
            yield from walk_nodes(inner)


def inner_graphs(attributes: Iterable[AttributeProto]) -> Iterator[GraphProto]:
    """Yield the graphs that a node holds in its attributes."""
    for attribute in attributes:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def walk_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield all tensors with values: weights and constants, also in inner graphs and functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for inner in inner_graphs(node.attribute):
            yield from _graph_tensors(inner)


def read_constant(model: ModelProto, name: str) -> Array | None:
    """Return the value of a weight inside the model or of a Constant node; None for other tensors."""
    for tensor in model.graph.initializer:
        if tensor.name == name and tensor.data_location != TensorProto.EXTERNAL:
            return np.asarray(numpy_helper.to_array(tensor))
    for node in model.graph.node:
        if node.op_type == "Constant" and name in node.output:
            value = helper.get_attribute_value(node.attribute[0])
            return np.asarray(numpy_helper.to_array(value) if isinstance(value, TensorProto) else value)
    return None


def tensor_names(graph: GraphProto) -> set[str]:
    """Return the names of all tensors, including those in inner graphs."""
    names = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    for node in walk_nodes(graph):
        names.update(node.input, node.output)
        for inner in inner_graphs(node.attribute):
            names.update(value.name for value in (*inner.input, *inner.initializer))
    return names


def find_input_names(node: NodeProto) -> set[str]:
    """Return the names that a node reads: its inputs, and the names that its inner graphs may capture."""
    names = set(node.input)
    for inner in inner_graphs(node.attribute):
        names.update(name for nested in walk_nodes(inner) for name in nested.input)
        names.update(value.name for value in inner.output)
    return names

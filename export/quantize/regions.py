"""The nodes of a graph that can compute in int8: layers with weights, and the operators between them.

The steps before the first layer with weights (layout, normalisation) and after the logits (softmax) always
stay in float.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Final

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from fovea.export.quantize.refusal import QuantizeRefused

_WEIGHTED_OPERATORS: Final = frozenset({"Conv", "Gemm", "MatMul"})
"""Operators with weights that have int8 kernels on CPUs."""

MATRIX_OPERATORS: Final = frozenset({"Gemm", "MatMul"})

_MAP_OPERATORS: Final = frozenset(
    {"Add", "Mul", "Concat", "Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool", "AveragePool",
     "GlobalAveragePool"}
)  # fmt: skip
"""Operators on maps (batch, channels, height, width) that have int8 kernels on CPUs."""

_SHAPE_OPERATORS: Final = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"})
"""Operators that pass quantized values on, of any rank."""

_MAP_RANK: Final = 4


@dataclass(frozen=True)
class Region:
    """The nodes that can be quantized, by name in the order of computation."""

    weighted: tuple[str, ...]
    """Layers with weights."""
    between: tuple[str, ...]
    """Operators between these layers."""
    outside: tuple[str, ...]
    """Nodes before the first layer with weights, and nodes on which the logits do not depend."""
    activations: tuple[str, ...]
    """Float tensors that depend on the image and that these nodes read or write."""
    parameters: dict[str, int]
    """Number of weights by weighted layer."""
    matrices: tuple[str, ...]
    """Weighted layers that are matrix products, without the last layer."""

    @property
    def is_mostly_matrices(self) -> bool:
        """Flag for a graph whose weights are mainly in matrix products, such as a transformer's."""
        matrix_weights = sum(self.parameters[name] for name in self.matrices)
        inner_weights = sum(self.parameters[name] for name in self.weighted[:-1])
        return 2 * matrix_weights > inner_weights


def find_region(graph: ModelProto, pixels: str, logits: str) -> Region:
    """Return the nodes that can be quantized.

    Raises `QuantizeRefused` if no layer can be quantized.
    """
    weights = {
        tensor.name: math.prod(tensor.dims)
        for tensor in graph.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
    }
    ranks = _find_ranks(graph)
    nodes = _select_nodes_to(graph, logits)
    image_tensors = {pixels}
    inner_tensors: set[str] = set()  # the outputs of weighted layers, and what is computed from them
    weighted, between, inner_names = [], [], set()
    for node in nodes:
        if image_tensors.isdisjoint(node.input) or node.op_type in ("Shape", "Size"):
            continue
        is_weighted = _is_weighted(node, weights, image_tensors)
        if is_weighted:
            weighted.append(node)
        elif not inner_tensors.isdisjoint(node.input) and (
            node.op_type in _SHAPE_OPERATORS
            or (node.op_type in _MAP_OPERATORS and ranks.get(node.output[0]) == _MAP_RANK)
        ):
            between.append(node)
        if is_weighted or not inner_tensors.isdisjoint(node.input):
            inner_tensors.update(filter(None, node.output))
            inner_names.add(node.name)
        image_tensors.update(filter(None, node.output))
    if not weighted:
        raise QuantizeRefused(_describe_unsuitable(graph))
    activations = {
        name
        for node in (*weighted, *between)
        for name in (*node.input, *node.output)
        if name in image_tensors and name in ranks
    }
    return Region(
        weighted=tuple(node.name for node in weighted),
        between=tuple(node.name for node in between),
        outside=tuple(node.name for node in graph.graph.node if node.name not in inner_names),
        activations=tuple(sorted(activations)),
        parameters={node.name: weights[node.input[1]] for node in weighted},
        matrices=tuple(node.name for node in weighted[:-1] if node.op_type in MATRIX_OPERATORS),
    )


def _is_weighted(node: NodeProto, weights: dict[str, int], image_tensors: set[str]) -> bool:
    return (
        node.op_type in _WEIGHTED_OPERATORS
        and node.domain in ("", "ai.onnx")
        and len(node.input) > 1
        and node.input[0] in image_tensors
        and node.input[1] in weights
        # a bias that is no constant cannot be quantized with the layer
        and all(name in weights for name in node.input[2:])
    )


def _select_nodes_to(graph: ModelProto, output: str) -> list[NodeProto]:
    """Return the nodes on which the tensor depends, in the order of computation."""
    needed_names = {output}
    nodes = []
    for node in reversed(graph.graph.node):
        if not needed_names.isdisjoint(node.output):
            needed_names.update(node.input)
            nodes.append(node)
    return nodes[::-1]


def _find_ranks(graph: ModelProto) -> dict[str, int]:
    """Return the number of axes of each float tensor."""
    inferred_graph = onnx.shape_inference.infer_shapes(graph).graph
    return {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*inferred_graph.value_info, *inferred_graph.input, *inferred_graph.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }


def _describe_unsuitable(graph: ModelProto) -> str:
    counts = Counter(node.op_type for node in graph.graph.node if node.op_type in _WEIGHTED_OPERATORS)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
    return (
        "no layer of the graph can be quantized: int8 needs a Conv, Gemm or MatMul whose weights are float32 "
        f"constants of the file (of these operators the graph has {kinds}); serve the float model"
    )

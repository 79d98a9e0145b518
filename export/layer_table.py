"""The layer table: the nodes of a graph and their connections, read with `onnx`.

The service does not have `onnx`. It knows the structure of the graph from this table in the contract.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import onnx

from fovea.service.artifact.contract import Layer

Shape: TypeAlias = tuple[int | None, ...]
"""Shape of a tensor without its first axis; None for a length that is known only at run time."""

_CONVOLUTIONS: Final = frozenset({"Conv", "ConvTranspose", "ConvInteger", "QLinearConv"})
"""Operators that produce feature maps from any input."""

_NON_MAP_OPERATORS: Final = frozenset(
    {"Transpose", "Reshape", "MatMul", "Gemm", "Einsum", "Squeeze", "Flatten", "Shape", "Attention"}
)
"""Operators whose output is no feature map: tokens of transformers and channels-last maps."""

_SCOPES_KEY: Final = "pkg.torch.onnx.name_scopes"
"""Metadata key under which torch's exporter records the enclosing modules and the operation of a node."""


def build_layer_table(
    model: onnx.ModelProto, measured_shapes: Mapping[str, Shape] | None = None
) -> tuple[Layer, ...]:
    """Return one `Layer` for each node, in the order of computation.

    `measured_shapes` are those of outputs whose shape does not follow from the graph.
    """
    # A Reshape for any batch has a shape that the graph computes, and that `data_prop` follows.
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {value.name: _shape_of(value) for value in [*graph.value_info, *graph.input, *graph.output]}
    shapes |= measured_shapes or {}
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    return tuple(
        Layer(
            name=_name_of(node),
            kind=node.op_type,
            inputs=tuple(node.input),
            outputs=tuple(node.output),
            shape=shapes.get(node.output[0], ()),
            attributes={
                key: value for key, value in map(_parse_attribute, node.attribute) if value is not None
            },
            parameters=sum(sizes.get(name, 0) for name in node.input),
        )
        for node in graph.node
    )


def find_feature_maps(layers: tuple[Layer, ...]) -> tuple[str, ...]:
    """Return the names of all feature maps (channels, height, width).

    Feature maps are the outputs of convolutions and the tensors computed from these outputs.
    """
    maps: list[str] = []
    map_set: set[str] = set()
    for layer in layers:
        is_derived = layer.kind not in _NON_MAP_OPERATORS and not map_set.isdisjoint(layer.inputs)
        if len(layer.shape) == 3 and (layer.kind in _CONVOLUTIONS or is_derived):
            maps.append(layer.outputs[0])
            map_set.add(layer.outputs[0])
    return tuple(maps)


def _shape_of(value: onnx.ValueInfoProto) -> Shape:
    """Return the shape without the batch axis; a size that is known only at run time is None."""
    dimensions = value.type.tensor_type.shape.dim
    return tuple(size.dim_value if size.HasField("dim_value") else None for size in dimensions[1:])


def _name_of(node: onnx.NodeProto) -> str:
    """Return the torch module of a node, such as `features.3.first.0`, or else the node's own name.

    A convolution that is fused with its batch normalisation has the latter's scope, but its weight still
    names its own module. The rule is not valid for other nodes: layers with equal weights share one weight.
    """
    for entry in node.metadata_props:
        if entry.key == _SCOPES_KEY:
            *modules, operation = _parse_scopes(entry.value) or [node.name]
            weights = node.input if node.op_type == "Conv" else ()
            owners = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
            module = str(["", *modules, *owners][-1])
            return module.removeprefix("net").removeprefix(".") or str(operation)
    return node.name


def _parse_scopes(text: str) -> list[str]:
    """Return the scopes that torch recorded; empty if another tool wrote the text."""
    try:
        return list(map(str, ast.literal_eval(text)))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return []


def _parse_attribute(attribute: onnx.AttributeProto) -> tuple[str, Any]:
    """Return the name and the value of a numeric or text attribute; None for values such as tensors."""
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, float) and not math.isfinite(value):
        return attribute.name, None  # JSON cannot represent it
    if isinstance(value, bytes):
        return attribute.name, value.decode(errors="replace")
    if isinstance(value, list) and all(
        isinstance(item, int | float) and math.isfinite(item) for item in value
    ):
        return attribute.name, tuple(value)
    return attribute.name, value if isinstance(value, int | float) else None

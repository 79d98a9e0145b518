"""The layer table: what the nodes of a graph are and how they are joined, read with `onnx`.

The service has no `onnx`; this table in the contract is how it knows what is inside the graph.
"""

from __future__ import annotations

import ast
import math
from typing import Any, Final

import onnx

from fovea.service.artifact.contract import Layer

_FIRST_MAPS: Final = frozenset({"Conv", "ConvTranspose", "ConvInteger", "QLinearConv"})
"""What makes maps of whatever it is given."""

_NO_MAPS: Final = frozenset(
    {"Transpose", "Reshape", "MatMul", "Gemm", "Einsum", "Squeeze", "Flatten", "Shape", "Attention"}
)
"""What makes no maps even of maps: tokens of transformers, and maps whose channels come last."""

_SCOPES: Final = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter notes, for each node, the modules around it and then the operation."""


def layer_table(model: onnx.ModelProto) -> tuple[Layer, ...]:
    """One `Layer` for each node, in the order of computation."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {value.name: _shape(value) for value in [*graph.value_info, *graph.input, *graph.output]}
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    return tuple(
        Layer(
            name=_name(node),
            kind=node.op_type,
            inputs=tuple(node.input),
            outputs=tuple(node.output),
            shape=shapes.get(node.output[0], ()),
            attributes={key: value for key, value in map(_item, node.attribute) if value is not None},
            parameters=sum(sizes.get(name, 0) for name in node.input),
        )
        for node in graph.node
    )


def feature_maps(layers: tuple[Layer, ...]) -> tuple[str, ...]:
    """Names of all (channels, height, width) tensors: what convolutions make, and what is made of that."""
    maps: list[str] = []
    seen: set[str] = set()
    for layer in layers:
        goes_on = layer.kind not in _NO_MAPS and not seen.isdisjoint(layer.inputs)
        if len(layer.shape) == 3 and (layer.kind in _FIRST_MAPS or goes_on):
            maps.append(layer.outputs[0])
            seen.add(layer.outputs[0])
    return tuple(maps)


def _shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    """Without the batch axis; sizes that only a run can tell are None."""
    dimensions = value.type.tensor_type.shape.dim
    return tuple(size.dim_value if size.HasField("dim_value") else None for size in dimensions[1:])


def _name(node: onnx.NodeProto) -> str:
    """The torch module that a node came from, such as `features.3.first.0`; else the node's own name.

    A convolution that has taken in its batch normalisation has the latter's scope; its weight still
    names its own module. Of others it may not: layers with equal weights share one.
    """
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            *modules, operation = _scopes(entry.value) or [node.name]
            weights = node.input if node.op_type == "Conv" else ()
            owners = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
            module = str(["", *modules, *owners][-1])
            return module.removeprefix("net").removeprefix(".") or str(operation)
    return node.name


def _scopes(text: str) -> list[str]:
    """What torch noted; nothing of what another tool wrote under the same key."""
    try:
        return list(map(str, ast.literal_eval(text)))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return []


def _item(attribute: onnx.AttributeProto) -> tuple[str, Any]:
    """Name and value where it is numbers or a word; None for what no table can show, such as a tensor."""
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, float) and not math.isfinite(value):
        return attribute.name, None  # JSON has no word for it
    if isinstance(value, bytes):
        return attribute.name, value.decode(errors="replace")
    if isinstance(value, list) and all(
        isinstance(item, int | float) and math.isfinite(item) for item in value
    ):
        return attribute.name, tuple(value)
    return attribute.name, value if isinstance(value, int | float) else None

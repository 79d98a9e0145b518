"""The layer table: what the nodes of a graph are and how they are joined, read with `onnx`.

The service has no `onnx`; this table in the contract is how it knows what is inside the graph.
"""

from __future__ import annotations

import ast
import math
from typing import Any, Final

import onnx

from service.contract import Layer

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
    """Names of all (channels, height, width) tensors, from the first convolution on."""
    kinds = [layer.kind for layer in layers]
    start = kinds.index("Conv") if "Conv" in kinds else len(layers)
    return tuple(layer.outputs[0] for layer in layers[start:] if len(layer.shape) == 3)


def _shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    """Without the batch axis; sizes that only a run can tell are None."""
    dimensions = value.type.tensor_type.shape.dim
    return tuple(size.dim_value if size.HasField("dim_value") else None for size in dimensions[1:])


def _name(node: onnx.NodeProto) -> str:
    """The torch module that a node came from, such as `features.3.first.0`; else the node's own name.

    A convolution that has taken in its batch normalisation has the latter's scope; its weight still
    names its own module.
    """
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            *modules, operation = ast.literal_eval(entry.value)
            owners = [name.removesuffix(".weight") for name in node.input if name.endswith(".weight")]
            module = str(["", *modules, *owners][-1])
            return module.removeprefix("net").removeprefix(".") or str(operation)
    return node.name


def _item(attribute: onnx.AttributeProto) -> tuple[str, Any]:
    """Name and value where it is numbers or a word; None for tensors and graphs, which no table can show."""
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return attribute.name, value.decode(errors="replace")
    if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        return attribute.name, tuple(value)
    return attribute.name, value if isinstance(value, int | float) else None

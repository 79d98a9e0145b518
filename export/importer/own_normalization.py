"""The normalisation with which a graph itself begins, such as the Rescaling layer of Keras' EfficientNet."""

from __future__ import annotations

from typing import Final

from onnx import ModelProto, NodeProto

from fovea.export.importer.dynamic_batch import ReadTensors, find_constants
from fovea.export.importer.foreign_model import Array
from fovea.export.importer.graph_contents import read_constant

_PASSED_OPERATORS: Final = frozenset(
    {"Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Resize", "Upsample", "Gather"}
    | {"Slice", "Pad", "Clip", "QuantizeLinear", "DequantizeLinear"}
)
"""Operators before a normalisation that change types, axes, sizes or the order of channels."""

_SYMBOLS: Final = {"Add": "+", "Sub": "-", "Mul": "*", "Div": "/"}
"""Operators of a normalisation, with their signs."""


def find_own_normalization(model: ModelProto, name: str, read_tensors: ReadTensors) -> str | None:
    """Return the arithmetic with which the graph begins after the tensor `name`, such as "/ 255, - 0.5".

    It has constants for all or for each channel; `read_tensors` reads those that the graph computes. Returns
    None for a graph that begins otherwise.
    """
    constants = find_constants(model)

    def read_value(name: str) -> Array:
        value = read_constant(model, name)
        return read_tensors([name])[name] if value is None else value

    steps: list[str] = []
    while (node := _find_only_reader(model, name, constants)) is not None:
        others = [one for one in node.input if one and one != name]
        if node.op_type in _SYMBOLS and len(others) == 1:
            value = read_value(others[0])
            if value.size not in (1, 3) or value.dtype.kind not in "fiu":
                break
            if (value != (0 if node.op_type in ("Add", "Sub") else 1)).any():
                steps.append(_describe_step(node, name, value))
        elif node.op_type == "BatchNormalization" and read_value(node.input[1]).size in (1, 3):
            steps.append("a BatchNormalization")
        elif node.op_type not in _PASSED_OPERATORS:
            break
        name = node.output[0]
    return ", ".join(steps) or None


def _find_only_reader(model: ModelProto, name: str, constants: set[str]) -> NodeProto | None:
    """Return the node that reads the tensor, if no other node does and its other inputs are constants."""
    readers = [node for node in model.graph.node if name in node.input and node.op_type != "Shape"]
    if len(readers) != 1:
        return None
    others = [one for one in readers[0].input if one and one != name]
    return readers[0] if constants.issuperset(others) else None


def _describe_step(node: NodeProto, name: str, value: Array) -> str:
    numbers = [f"{number:.4g}" for number in value.ravel().tolist()]
    text = numbers[0] if len(set(numbers)) == 1 else f"({', '.join(numbers)})"
    is_first = node.input[0] == name
    sign = _SYMBOLS[node.op_type]
    return f"{sign} {text}" if is_first or sign in "+*" else f"{text} {sign} x"

"""The last step of a graph, such as its softmax; steps after it only shift, scale or round values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from onnx import ModelProto, NodeProto

from fovea.export.importer.dynamic_batch import find_constants

_IDENTITY_OPERATORS: Final = frozenset(
    {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"}
)
"""Operators that do not change values."""

_ROUNDING_OPERATORS: Final = frozenset({"QuantizeLinear", "DequantizeLinear", "Round", "Floor", "Ceil"})
"""Operators that round values and change nothing else, if their two scales are equal."""

_SCALING_OPERATORS: Final = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Clip", "Min", "Max"})
"""Operators that shift and scale values, if all but one of their inputs are constants."""


@dataclass(frozen=True)
class LastStep:
    """The last step of a graph that is more than shifting, scaling or rounding."""

    op_type: str
    """Operator of the step; empty if there is none."""
    source: str
    """Input tensor of the step."""
    is_scaled: bool
    is_rounded: bool

    @property
    def is_changed(self) -> bool:
        """Flag for values that are scaled or rounded after the step."""
        return self.is_scaled or self.is_rounded


def find_last_step(model: ModelProto, name: str) -> LastStep:
    """Return the last step before the tensor `name` that does more than shift, scale or round values."""
    producers: dict[str, NodeProto] = {output: node for node in model.graph.node for output in node.output}
    constants = find_constants(model)
    is_scaled = is_rounded = False
    while name in producers:
        node = producers[name]
        variable_inputs = [one for one in node.input if one and one not in constants]
        if node.op_type in _SCALING_OPERATORS and len(variable_inputs) == 1:
            is_scaled, name = True, variable_inputs[0]
        elif node.op_type in _ROUNDING_OPERATORS:
            is_rounded, name = True, node.input[0]
        elif node.op_type in _IDENTITY_OPERATORS:
            name = node.input[0]
        else:
            return LastStep(node.op_type, node.input[0] if node.input else "", is_scaled, is_rounded)
    return LastStep("", "", is_scaled, is_rounded)

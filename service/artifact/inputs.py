"""Additional inputs and outputs of a model, beside encoded images, pixels, logits and probabilities.

An imported model also accepts the tensor that the original file took, and can return the original output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, Literal, TypeAlias

from fovea.service.artifact.contract import Contract, Layer, Task

_NODE_PREFIX: Final = "fovea/"
"""Name prefix of the nodes that the import adds around a foreign graph (`export.importer.wrap`)."""

DataType: TypeAlias = Literal["uint8", "float16", "float32"]
"""Type of a tensor's values, by NumPy's name. The service's event loop works without NumPy."""

_ITEM_BYTES: Final[dict[DataType, int]] = {"uint8": 1, "float16": 2, "float32": 4}

_CAST_TYPES: Final[dict[int, DataType]] = {1: "float32", 10: "float16"}
"""Types by the type number in a Cast node (onnx.proto, `TensorProto.DataType`)."""


@dataclass(frozen=True)
class InputTensor:
    """One possible input of a model. The shape is that of one image, without the batch axis."""

    name: str
    dtype: DataType
    shape: tuple[int, ...]
    preprocessing: tuple[Layer, ...] = ()
    """Nodes that compute the tensor from the pixels; empty for the pixels themselves."""

    @property
    def size(self) -> int:
        """Size of one image's tensor in bytes."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        """True for floating-point values."""
        return self.dtype != "uint8"


def input_tensors_of(contract: Contract) -> tuple[InputTensor, ...]:
    """Return the possible inputs of a model, the pixels first.

    The layer table reveals the second input. The import connects the pixels to this input by nodes of its
    own. Each node takes the output of the node before, and an Identity is the last.
    """
    shape = (contract.input.height, contract.input.width, 3)
    pixels = InputTensor(contract.input_name, "uint8", shape)
    steps: list[Layer] = []
    last, dtype = pixels.name, pixels.dtype
    for layer in contract.layers:
        if last not in layer.inputs or not layer.name.startswith(_NODE_PREFIX):
            break
        steps.append(layer)
        last = layer.outputs[0]
        if layer.kind == "Cast" and isinstance(kind := layer.attributes.get("to"), int):
            dtype = _CAST_TYPES.get(kind, dtype)
        if layer.kind == "Identity":
            sides = tuple(side for side in layer.shape if side is not None)
            return (pixels, InputTensor(last, dtype, sides, tuple(steps))) if len(sides) == 3 else (pixels,)
    return (pixels,)


def find_original_output(contract: Contract) -> tuple[str, str] | None:
    """Return the name of an imported file's original output, and the name of our output with the same values.

    Return None if none of our outputs has these values. If the original output was a softmax, the returned
    name is that of its input.

    The nodes after the original output identify it: the import takes the logarithm of probabilities, divides
    percentages by 100 (a Mul), computes one logit from two, and divides independent probabilities of which
    one is meant by their sum (a Softmax of logarithms).
    """
    steps = list(takewhile(lambda layer: layer.name.startswith(_NODE_PREFIX), reversed(contract.layers)))
    kinds = {step.kind for step in steps}
    if not steps or kinds & {"MatMul", "Mul"} or ("Log" in kinds and contract.task is Task.BINARY):
        return None
    if {"Log", "Softmax"} <= kinds:
        return None
    our_output = contract.probabilities_name if "Log" in kinds else contract.logits_name
    return steps[-1].inputs[0], our_output

"""What a model can be given besides encoded images, pixels and what an imported file took by itself; and what
that file gave."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

import numpy as np

from fovea.service.artifact.contract import Contract, Layer, Task

_OURS: Final = "fovea/"
"""What the import calls the steps that it puts around a foreign graph (`export.importer.wrap`)."""

_TYPES: Final[dict[int, np.dtype[Any]]] = {1: np.dtype(np.float32), 10: np.dtype(np.float16)}
"""By the number that a Cast has for it (onnx.proto, `TensorProto.DataType`)."""


@dataclass(frozen=True)
class Tensor:
    """One of the inputs that a model can have; of one image, without the batch axis."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    steps: tuple[Layer, ...] = ()
    """What makes it of the pixels; none for the pixels themselves."""

    @property
    def size(self) -> int:
        """Of one image, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensors_of(contract: Contract) -> tuple[Tensor, ...]:
    """The pixels first. The other one is known by the layer table: the import leads from the pixels to it by
    steps of its own, each made of the last, and an Identity at the end."""
    shape = (contract.input.height, contract.input.width, 3)
    pixels = Tensor(contract.input_name, np.dtype(np.uint8), shape)
    steps: list[Layer] = []
    last, dtype = pixels.name, pixels.dtype
    for layer in contract.layers:
        if last not in layer.inputs or not layer.name.startswith(_OURS):
            break
        steps.append(layer)
        last = layer.outputs[0]
        if layer.kind == "Cast" and isinstance(kind := layer.attributes.get("to"), int):
            dtype = _TYPES.get(kind, dtype)
        if layer.kind == "Identity":
            sides = tuple(side for side in layer.shape if side is not None)
            return (pixels, Tensor(last, dtype, sides, tuple(steps))) if len(sides) == 3 else (pixels,)
    return (pixels,)


def own_output(contract: Contract) -> tuple[str, str] | None:
    """What an imported file gave, by its name there, and which of ours has its values; None where none has.
    Of a softmax at its end it is what went in.

    Known by the steps behind it: the import takes the logarithm of probabilities, divides percentages by 100
    (a Mul), and makes one logit of two.
    """
    steps = list(takewhile(lambda layer: layer.name.startswith(_OURS), reversed(contract.layers)))
    kinds = {step.kind for step in steps}
    if not steps or kinds & {"MatMul", "Mul"} or ("Log" in kinds and contract.task is Task.BINARY):
        return None
    ours = contract.probabilities_name if "Log" in kinds else contract.logits_name
    return steps[-1].inputs[0], ours

"""The embedding of a model: the tensor that its last linear layer reads."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from fovea.service.artifact.contract import Contract, Layer

_LINEAR_KINDS: Final = frozenset({"Conv", "Gemm", "MatMul"})

_PASSED_KINDS: Final = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Cast", "Identity", "Clip"),
        *("Flatten", "Reshape", "Squeeze", "Unsqueeze", "QuantizeLinear", "DequantizeLinear"),
        *("Softmax", "LogSoftmax", "Log", "Sigmoid"),
    }
)
"""Kinds of layers that may lie between the last linear layer and the logits."""


class Embedding(NamedTuple):
    """The tensor with the embedding."""

    tensor: str
    dimension: int
    """Number of values for one image."""


def find_embedding(contract: Contract) -> Embedding | None:
    """Return the tensor that the last linear layer before the logits reads.

    In a quantized model this is the tensor after quantization, the one that the layer computes with. Return
    None if the logits do not come from one linear layer, or if this layer reads a map with several places or
    nothing that another linear layer has computed.
    """
    producers: dict[str, Layer] = {}
    varying = {contract.input_name}
    """Tensors that depend on the image."""
    learned: set[str] = set()
    """Tensors that depend on the image through a linear layer."""
    for layer in contract.layers:
        if varying.isdisjoint(layer.inputs):
            continue
        is_learned = layer.kind in _LINEAR_KINDS or not learned.isdisjoint(layer.inputs)
        for output in layer.outputs:
            producers[output] = layer
            varying.add(output)
            if is_learned:
                learned.add(output)
    tensor = contract.logits_name
    while producer := producers.get(tensor):
        sources = varying.intersection(producer.inputs)
        if len(sources) != 1:
            return None
        (source,) = sources
        if producer.kind in _LINEAR_KINDS:
            return _as_embedding(source, producers.get(source)) if source in learned else None
        if producer.kind not in _PASSED_KINDS:
            return None
        tensor = source
    return None


def _as_embedding(tensor: str, producer: Layer | None) -> Embedding | None:
    """Return the tensor as an embedding if it is one vector for each image."""
    if producer is None or tensor != producer.outputs[0]:
        return None  # the layer table has the shape of first outputs only
    sides = [side for side in producer.shape if side is not None]
    if not sides or len(sides) != len(producer.shape) or math.prod(sides) != max(sides):
        return None
    return Embedding(tensor, math.prod(sides))

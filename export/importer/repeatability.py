"""The check that a graph gives the same answer to the same image twice."""

from __future__ import annotations

from typing import Final

import numpy as np
from onnx import ModelProto, NodeProto

from fovea.export.importer.foreign_model import Array, ImportRefused, ReferenceModel
from fovea.export.importer.graph_contents import walk_nodes

_RANDOM_OPERATORS: Final = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
"""Operators that draw random numbers."""

_REPEAT_TOLERANCE: Final = 1e-6
"""Tolerance between two runs, relative to the largest value; the same sums in the same order are equal."""

_MAX_NAMES: Final = 3
"""Number of random nodes that a message names."""


def require_repeatable(model: ModelProto, reference: ReferenceModel, name: str, images: Array) -> None:
    """Raise `ImportRefused` if the output `name` differs between two runs on the same images."""
    first, second = (reference(images)[name].astype(np.float64) for _ in range(2))
    both = np.isfinite(first) & np.isfinite(second)
    difference = float(np.abs(np.where(both, first - second, 0)).max())
    if difference <= _REPEAT_TOLERANCE * max(1.0, float(np.abs(np.where(both, first, 0)).max())):
        return
    nodes = [f"{node.op_type} {node.name or node.output[0]}" for node in _find_random_nodes(model)]
    names = ", ".join(nodes[:_MAX_NAMES]) + (
        f" and {len(nodes) - _MAX_NAMES} more" * (len(nodes) > _MAX_NAMES)
    )
    cause = f"it draws random numbers ({names})" if nodes else "an operator of it is not deterministic"
    raise ImportRefused(
        f"the output {name!r} answers the same image differently twice, by up to {difference:.2g}: {cause}; "
        "export the model for inference, without dropout and noise (model.eval() in PyTorch)"
    )


def _find_random_nodes(model: ModelProto) -> list[NodeProto]:
    return [
        node for node in walk_nodes(model.graph) if node.op_type in _RANDOM_OPERATORS or _is_dropout(node)
    ]


def _is_dropout(node: NodeProto) -> bool:
    """Return whether a node is a dropout that may be in training mode, which is its third input."""
    return node.op_type == "Dropout" and len(node.input) == 3

"""Fusion of operators into layers, and of layers into blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Final

from fovea.service.explain.layer_view import LayerView
from fovea.service.explain.structural_blocks import MAX_BLOCK_LAYERS, find_structural_blocks

_COMPOSITE_LAYERS: Final = (
    ({"Erf", "Mul"}, {"Div", "Add", "Pow"}, "Gelu"),
    ({"Softplus", "Tanh", "Mul"}, set[str](), "Mish"),
    ({"HardSigmoid", "Mul"}, set[str](), "HardSwish"),
    ({"Sigmoid", "Mul"}, set[str](), "Silu"),
    ({"ReduceMean", "Sub", "Sqrt", "Div"}, {"Pow", "Mul", "Add", "Cast"}, "LayerNormalization"),
)
"""Layers that export tools write as several operators: required operators, optional operators, and the layer.

If there are no optional operators, each required operator occurs exactly once.
"""


def is_bias(layer: LayerView, product: LayerView) -> bool:
    """Return True if a layer only adds the bias of a matrix product."""
    return (
        product.kind == "MatMul"
        and layer.kind == "Add"
        and layer.is_direct
        and layer.sources == (product.tensor,)
        and "bias" in layer.weights
        and layer.shape == product.shape
    )


def merge_bias(product: LayerView, addition: LayerView) -> LayerView:
    """Merge a matrix product and the addition of its bias into one linear layer."""
    return replace(
        product,
        tensor=addition.tensor,
        weights={**product.weights, **addition.weights},
        parameters=product.parameters + addition.parameters,
    )


def merge_composites(layers: Sequence[LayerView]) -> list[LayerView]:
    """Merge the operators of activations and norms that export tools write as several operators."""
    result: list[LayerView] = []
    for _, group in groupby(layers, key=lambda layer: _find_module(layer.name)):
        run = list(group)
        merged_layer = _merge_run(run, layers)
        result += [merged_layer] if merged_layer else run
    return result


def _merge_run(run: Sequence[LayerView], layers: Sequence[LayerView]) -> LayerView | None:
    """Merge the layers of a module if they form a known layer and no other layer reads their inner values."""
    kind = _find_composite_kind(run) if _find_module(run[0].name) else None
    run_tensors = {layer.tensor for layer in run}
    sources = {source for layer in run for source in layer.sources} - run_tensors
    if not kind or len(sources) != 1:
        return None
    inner_tensors = run_tensors - {run[-1].tensor}
    if any(
        not inner_tensors.isdisjoint(layer.sources) for layer in layers if layer.tensor not in run_tensors
    ):
        return None
    return replace(
        run[-1],
        kind=kind,
        sources=tuple(sources),
        is_direct=all(layer.is_direct for layer in run),
        parameters=sum(layer.parameters for layer in run),
        constants={},
        attributes={},
        weights={},
    )


def _find_composite_kind(run: Sequence[LayerView]) -> str | None:
    kinds = {layer.kind for layer in run}
    means = [layer.shape for layer in run if layer.kind == "ReduceMean"]
    # The mean is over places, or over some of the channels.
    if any(shape != (1, *run[-1].shape[1:]) for shape in means):
        return None
    matching_kinds = (
        kind
        for required_kinds, optional_kinds, kind in _COMPOSITE_LAYERS
        if required_kinds <= kinds <= required_kinds | optional_kinds
        and (optional_kinds or len(run) == len(required_kinds))
    )
    return next(matching_kinds, None)


def _find_module(name: str) -> str:
    """Return the module of a node.

    A name from torch's newer exporter is the module; a name from the older one is the node in the module.
    """
    return name.rpartition("/")[0] if name.startswith("/") else name


def _split_name(name: str) -> list[str]:
    return [part for part in re.split(r"[./]", name) if part]


def assign_blocks(layers: Sequence[LayerView]) -> list[LayerView]:
    """Assign each layer its block, by the names, or by the structure if the names give few blocks."""
    names = _find_named_blocks(layers)
    if sum(name is not None for name in names) < len(layers) / 2:
        names = find_structural_blocks(layers)
    return [replace(layer, block=name) for layer, name in zip(layers, names, strict=True)]


def _find_named_blocks(layers: Sequence[LayerView]) -> list[str | None]:
    """Return the name of each layer's block, or None.

    A block is the shortest module path whose layers are adjacent and at most `MAX_BLOCK_LAYERS` in number.
    """
    positions: dict[str, list[int]] = {}
    for position, layer in enumerate(layers):
        path = _split_name(layer.name)
        for length in range(1, len(path) + 1):
            positions.setdefault(".".join(path[:length]), []).append(position)
    block_names = {
        name
        for name, layer_positions in positions.items()
        if 2 <= len(layer_positions) <= MAX_BLOCK_LAYERS
        and layer_positions[-1] - layer_positions[0] == len(layer_positions) - 1
    }
    return [_find_block(layer, block_names) for layer in layers]


def _find_block(layer: LayerView, block_names: set[str]) -> str | None:
    path = _split_name(layer.name)
    names = (".".join(path[:length]) for length in range(1, len(path) + 1))
    return next((name for name in names if name in block_names), None)

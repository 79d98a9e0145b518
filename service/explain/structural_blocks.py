"""Blocks by the structure of the graph, for networks whose layers have no telling names.

A bottleneck is a layer whose output is all that later layers read of the layers up to it. Several ways
between two bottlenecks that meet in a merge point are a block: a residual block, or an Inception module. The
layers between two blocks are divided into stages, where the resolution changes. The head is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final, TypeAlias

from fovea.service.explain.layer_view import LayerView

MAX_BLOCK_LAYERS: Final = 16
"""Number of layers above which a block is divided if possible; a block of a ResNet-50 has 10."""

_MERGE_KINDS: Final = frozenset({"Add", "Sum", "Concat"})
"""Operators in which ways meet. A product is a gate, which belongs to its way."""

_ACTIVATION_KINDS: Final = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Clip", "Elu", "Gelu", "Silu", "HardSwish", "Mish"}
)
"""Operators that belong to the block before them."""

_POOLING_KINDS: Final = frozenset({"MaxPool", "AveragePool", "LpPool"})
"""Operators that end a stage, although their output has the resolution of the next one."""

_RESOLUTION_RATIO: Final = 1.5
"""Ratio of heights that is a change of resolution. A convolution without padding shrinks maps by less."""

_Range: TypeAlias = tuple[int, int]
"""First layer and end of neighbouring layers."""


def find_structural_blocks(layers: Sequence[LayerView]) -> list[str | None]:
    """Return the name of each layer's block, such as `block 2` or `stage 1`; None for a layer by itself.

    `layers` are in the order of computation; the first one is the input of the network.
    """
    names: list[str | None] = [None] * len(layers)
    sections = _find_sections(layers)
    blocks = _find_blocks(layers, sections)
    parts = [part for block in blocks for part in _divide_block(layers, *block)]
    stages = [
        stage
        for (_, start), (end, _) in pairwise([(0, 1), *blocks, (len(layers), len(layers))])
        for stage in _divide_into_stages(layers, [one for one in sections if start <= one[0] < end])
    ]
    for kind, ranges in (("block", parts), ("stage", stages)):
        folded_ranges = ((start, end) for start, end in ranges if end - start > 1)
        for number, (start, end) in enumerate(folded_ranges, 1):
            names[start:end] = [f"{kind} {number}"] * (end - start)
    return names


def _find_sections(layers: Sequence[LayerView]) -> list[_Range]:
    """Return the ranges that end in a bottleneck; most of them have one layer."""
    positions = {layer.tensor: position for position, layer in enumerate(layers)}
    last_uses = list(range(len(layers)))
    for position, layer in enumerate(layers):
        for source in layer.sources:
            last_uses[positions[source]] = position
    sections: list[_Range] = []
    start = last_use = 0
    for position in range(len(layers)):
        if last_use <= position:  # no layer behind it reads a layer before it
            sections.append((start, position + 1))
            start = position + 1
        last_use = max(last_use, last_uses[position])
    return sections


def _find_blocks(layers: Sequence[LayerView], sections: Sequence[_Range]) -> list[_Range]:
    """Return the sections that end in a merge point, each with the activation behind it."""
    blocks: list[_Range] = []
    for start, end in sections:
        kind, previous_kind = layers[end - 1].kind, layers[start - 1].kind
        if end - start > 1 and kind in _MERGE_KINDS:
            blocks.append((start, end))
        elif (
            blocks and blocks[-1][1] == start and kind in _ACTIVATION_KINDS and previous_kind in _MERGE_KINDS
        ):
            blocks[-1] = (blocks[-1][0], end)
    return blocks


def _divide_block(layers: Sequence[LayerView], start: int, end: int) -> Iterator[_Range]:
    """Yield a block, or if it is large, its parts up to each merge point, such as in a DenseNet."""
    if end - start > MAX_BLOCK_LAYERS:
        for position in range(start, end - 2):
            if layers[position].kind in _MERGE_KINDS:
                yield start, position + 1
                start = position + 1
    yield start, end


def _divide_into_stages(layers: Sequence[LayerView], sections: Sequence[_Range]) -> Iterator[_Range]:
    """Yield the ranges of sections with maps of one resolution, each with the pooling at its end."""
    if not sections:
        return
    stage_start = sections[0][0]
    previous_height = _find_height(layers[stage_start - 1])
    for start, end in sections:
        height = _find_height(layers[end - 1])
        if not height:
            yield stage_start, start
            stage_start = end
        elif previous_height and max(height, previous_height) >= _RESOLUTION_RATIO * min(
            height, previous_height
        ):
            boundary = end if layers[end - 1].kind in _POOLING_KINDS else start
            yield stage_start, boundary
            stage_start = boundary
        previous_height = height
    yield stage_start, sections[-1][1]


def _find_height(layer: LayerView) -> int:
    """Return the height of a layer's maps, or 0 if the layer has no maps of more than one pixel."""
    height, width = layer.shape[1:] if len(layer.shape) == 3 else (None, None)
    return height if height and width and height * width > 1 else 0

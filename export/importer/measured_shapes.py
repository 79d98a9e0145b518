"""Shapes of tensors that do not follow from the graph, such as those of padding that the graph computes."""

from __future__ import annotations

from fovea.export.importer.inspect import ForeignModel, draw_noise
from fovea.export.importer.wrap import WrappedModel
from fovea.export.layer_table import Shape, build_layer_table

_IMAGE_COUNT = 2
"""Number of images: an axis whose length depends on it has no length of its own."""


def measure_shapes(foreign: ForeignModel, wrapped_model: WrappedModel) -> dict[str, Shape]:
    """Return the shapes of all outputs of nodes that have unknown lengths, by running the graph."""
    unknown_names = [
        layer.outputs[0]
        for layer in build_layer_table(wrapped_model.model)
        if not layer.shape or None in layer.shape
    ]
    if not unknown_names:
        return {}
    reference = foreign.open_wrapped(wrapped_model).with_outputs(*unknown_names)
    pixels = draw_noise(_IMAGE_COUNT, foreign.graph_input)
    counts = (1, _IMAGE_COUNT) if foreign.has_dynamic_batch else (1,)
    first, *others = (
        {name: value.shape for name, value in reference.run_batch(pixels[:count]).items()} for count in counts
    )
    shapes: dict[str, Shape] = {}
    for name in unknown_names:
        if all(len(run[name]) == len(first[name]) for run in others):
            sides = zip(first[name][1:], *(run[name][1:] for run in others), strict=True)
            shapes[name] = tuple(one[0] if len(set(one)) == 1 else None for one in sides)
    return shapes

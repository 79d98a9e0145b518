"""Conversion of a graph with a fixed batch size to any batch size, if the result can be proven."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from fovea.export.importer.batch_axis import Place, places
from fovea.export.importer.foreign_model import ImportRefused, Values
from fovea.export.importer.graph_input import Taken

BATCH = "batch"
"""Name of the dynamic axis."""


def sized(model: ModelProto, taken: Taken, batch: int | str) -> ModelProto:
    """Return a copy with this image size and batch size, without stored shapes of inner tensors."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    (value,) = copy.graph.input
    shape: list[int | str] = [batch, 0, 0, 0]
    shape[taken.layout.channels] = 3
    for axis, side in zip(taken.layout.spatial, (taken.height, taken.width), strict=True):
        shape[axis] = side
    kind = value.type.tensor_type.elem_type
    value.CopyFrom(helper.make_tensor_value_info(value.name, kind, shape))
    for output in copy.graph.output:
        dimensions = output.type.tensor_type.shape.dim
        if dimensions and isinstance(batch, str):
            dimensions[0].Clear()
    return copy


See = Callable[[Iterable[str]], dict[str, Values]]
"""Function that runs the unchanged file and returns the named tensors."""


def any_batch(
    model: ModelProto, taken: Taken, see: See, proven: Callable[[ModelProto], bool]
) -> ModelProto | None:
    """Return the model for any batch size, unchanged or repaired; None if neither is `proven`."""
    free = sized(model, taken, BATCH)
    if proven(free):
        return free
    try:
        mended = _mended(free, see, taken.batch or 1)
    except ImportRefused:  # a tensor that the repair needs cannot be read
        return None
    return mended if proven(mended) else None


def _mended(free: ModelProto, see: See, batch: int) -> ModelProto:
    """Remove the batch size `batch` from the constants of the graph."""
    mender = _Mender(free, see, batch)
    nodes = [mended for node in free.graph.node for mended in mender(node)]
    nodes = [*mender.first(), *nodes]
    del free.graph.node[:]
    free.graph.node.extend(nodes)
    return free


def constants_of(model: ModelProto) -> set[str]:
    """Return the tensors that do not depend on an input: weights and values computed from weights alone."""
    found = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if all(name in found or not name for name in node.input):
            found.update(node.output)
    return found


def _asked(model: ModelProto, constants: set[str]) -> set[str]:
    """Return the tensors that the repair needs: everything computed from an image, and relevant constants."""
    asked = set()
    for node in model.graph.node:
        if not constants.issuperset(node.output):
            asked.update(node.output)
            if node.op_type in ("Reshape", "Expand", "Squeeze", "Unsqueeze") or "Reduce" in node.op_type:
                asked |= constants.intersection(node.input[1:])
            elif node.op_type == "Concat":
                asked |= constants.intersection(node.input)
    return asked - {""}


def _axis(node: NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)


class _Mender:
    """A rewriter of nodes that makes the batch size dynamic.

    The targets of `Reshape` and `Expand` become dynamic, and `Concat` constants such as class tokens are
    repeated per image. New constants and nodes have names under `fovea/`.
    """

    def __init__(self, free: ModelProto, see: See, batch: int) -> None:
        self._graph = free.graph
        self._batch = batch
        self._constants = constants_of(free)
        self._seen = see(_asked(free, self._constants))
        (value,) = self._graph.input
        shapes = {name: one.shape for name, one in self._seen.items()}
        shapes[value.name] = tuple(side.dim_value or batch for side in value.type.tensor_type.shape.dim)
        self._places = places(self._graph.node, value.name, shapes, self._seen) if batch == 1 else {}
        self._count = 0
        self._counts_images = False

    def __call__(self, node: NodeProto) -> list[NodeProto]:
        """Return the rewritten node, after the new nodes that it needs."""
        before: list[NodeProto] = []
        if node.op_type in ("Reshape", "Expand") and node.input[1] in self._constants:
            target: list[int] = (
                self._seen[node.input[1]].ravel().tolist() if node.input[1] in self._seen else []
            )
            if node.op_type == "Reshape" and node.output[0] in self._seen:
                node.input[1] = self._constant(self._open_target(node.output[0]))
            elif len(target) > 1 and target[0] in (1, self._batch):
                node.input[1] = self._per_image(target[1:], before)
        elif node.op_type == "Concat" and _axis(node) and not self._constants.issuperset(node.input):
            for place, name in enumerate(node.input):
                value = self._seen[name] if name in self._constants else None
                if value is not None and value.ndim > 1 and self._is_for_each(value):
                    node.input[place] = self._expanded(value[:1], before)
        return [*before, node]

    def first(self) -> Iterator[NodeProto]:
        """Yield the nodes that must come first: they compute the number of images."""
        if self._counts_images:
            (value,) = self._graph.input
            zero = self._constant([0])
            yield helper.make_node("Shape", [value.name], ["fovea/input_shape"], "fovea/input_shape")
            yield helper.make_node(
                "Gather", ["fovea/input_shape", zero], ["fovea/batch"], "fovea/batch", axis=0
            )

    def _open_target(self, name: str) -> list[int]:
        """Return the target shape of the `Reshape` that makes this tensor, with -1 for the batch axis."""
        shape: list[int] = list(self._seen[name].shape)
        place = self._places.get(name, Place(0))
        if shape:
            shape[place.axis] = -1
        return shape

    def _is_for_each(self, value: Values) -> bool:
        """Return whether the constant is the same for every image."""
        return len(value) in (1, self._batch) and bool((value == value[:1]).all())

    def _constant(self, values: Values | list[int]) -> str:
        """Add a constant tensor and return its name; a list becomes int64."""
        name = self._name("constant")
        array = np.array(values, np.int64) if isinstance(values, list) else values
        self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def _per_image(self, sides: list[int], nodes: list[NodeProto]) -> str:
        """Add nodes that compute the shape [batch, *sides] and return its name."""
        self._counts_images = True
        name = self._name("shape")
        nodes.append(helper.make_node("Concat", ["fovea/batch", self._constant(sides)], [name], name, axis=0))
        return name

    def _expanded(self, value: Values, nodes: list[NodeProto]) -> str:
        """Add nodes that repeat a constant of shape [1, …] for each image, and return the name."""
        shape, result = self._per_image(list(value.shape[1:]), nodes), self._name("expanded")
        nodes.append(helper.make_node("Expand", [self._constant(value), shape], [result], result))
        return result

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"fovea/{kind}_{self._count}"

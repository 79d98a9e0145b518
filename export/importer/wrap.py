"""Pre- and postprocessing steps around a foreign graph, from pixels to probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fovea.export.importer.dynamic_batch import BATCH
from fovea.export.importer.foreign_model import Values, names_needed, tensor_names
from fovea.export.importer.graph_input import Layout, Taken
from fovea.export.importer.graph_output import Given, Kind
from fovea.export.importer.preprocessing import Normalization
from fovea.service.artifact.contract import Task

_LEAST: Final = 1e-4
"""Minimum distance of a probability from 0 and 1 before its logit is computed.

Closer to 0 or 1, rounding changes the logit too much.
"""


@dataclass(frozen=True)
class Wrapped:
    """A graph from uint8 pixels (batch, H, W, 3) to float32 logits and probabilities, with their names."""

    model: ModelProto
    pixels: str
    logits: str
    probabilities: str


def wrap(
    model: ModelProto,
    taken: Taken,
    normalization: Normalization | None,
    given: Given,
    task: Task,
    *,
    free: bool,
) -> Wrapped:
    """Return a copy of `model` with first and last steps; `free` means that it accepts any batch size.

    Without `normalization`, the graph takes the pixels unchanged.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    names = tensor_names(graph)
    pixels, logits, probabilities = (_free(name, names) for name in ("pixels", "logits", "probabilities"))
    added = _Steps()
    _first_steps(added, pixels, taken, normalization)
    first = added.take()
    _last_steps(added, given, task, logits, probabilities)
    nodes = _needed([*first, *graph.node, *added.take()], (logits, probabilities))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(added.constants)
    _keep_used(graph)
    labels = 2 if task is Task.BINARY else given.count
    batch: str | int = BATCH if free else 1
    del graph.input[:], graph.output[:], graph.value_info[:], graph.quantization_annotation[:]
    shape = [batch, taken.height, taken.width, 3]
    graph.input.append(helper.make_tensor_value_info(pixels, TensorProto.UINT8, shape))
    for name, count in ((logits, 1 if task is Task.BINARY else given.count), (probabilities, labels)):
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, count]))
    return Wrapped(copy, pixels, logits, probabilities)


def _free(name: str, names: set[str]) -> str:
    """Return the name, prefixed until it is unused in the graph."""
    while name in names:
        name = f"fovea/{name}"
    return name


class _Steps:
    """A sequence of new nodes and their constants."""

    def __init__(self) -> None:
        self.constants: list[TensorProto] = []
        self._nodes: list[NodeProto] = []
        self._count = 0

    def take(self) -> list[NodeProto]:
        """Return the nodes so far and start a new sequence."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def add(self, kind: str, *inputs: str | Values, into: str | None = None, **attributes: Any) -> str:
        """Add a node with these tensors and constants as inputs; return the name of its output."""
        self._count += 1
        name = f"fovea/{kind.lower()}_{self._count}"
        tensors = [self._constant(name, one) if isinstance(one, np.ndarray) else one for one in inputs]
        self._nodes.append(helper.make_node(kind, tensors, [into or name], name, **attributes))
        return into or name

    def _constant(self, name: str, value: Values) -> str:
        constant = f"{name}/{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, constant))
        return constant


# --- steps before the graph ----------------------------------------------------------------------


def _first_steps(steps: _Steps, pixels: str, taken: Taken, normalization: Normalization | None) -> None:
    """Add the steps before the graph.

    Layout and channel order are changed on bytes, where that is cheapest; the arithmetic follows.
    """
    last = pixels
    if taken.layout is Layout.NCHW:
        last = steps.add("Transpose", last, perm=[0, 3, 1, 2])
    if normalization is not None:
        if normalization.bgr:
            turned = np.array([2, 1, 0], np.int64)
            last = steps.add("Gather", last, turned, axis=taken.layout.channels)
        last = steps.add("Cast", last, to=TensorProto.FLOAT)
        for kind, value in _arithmetic(normalization, taken.layout):
            last = steps.add(kind, last, value)
        if taken.dtype == np.float16:
            last = steps.add("Cast", last, to=TensorProto.FLOAT16)
    steps.add("Identity", last, into=taken.name)


def _arithmetic(normalization: Normalization, layout: Layout) -> Iterator[tuple[str, Values]]:
    """Yield the arithmetic of `Normalization` without steps that change nothing."""
    shape = (1, 3, 1, 1) if layout is Layout.NCHW else (1, 1, 1, 3)
    mean, std = (np.array(one, np.float32) for one in (normalization.mean, normalization.std))
    if normalization.divisor:
        yield "Div", np.array(normalization.divisor, np.float32)
    elif normalization.scale != 1:
        yield "Mul", np.array(normalization.scale, np.float32)
    if mean.any():
        yield "Sub", mean.reshape(shape)
    if (std != 1).any():
        yield "Div", std.reshape(shape)


# --- steps after the graph -----------------------------------------------------------------------


def _last_steps(steps: _Steps, given: Given, task: Task, logits: str, probabilities: str) -> None:
    """Add logits, then probabilities; the graph's own probabilities are kept if it has no matching logits."""
    rows = steps.add("Reshape", given.before or given.name, np.array([-1, given.count], np.int64))
    rows = steps.add("Cast", rows, to=TensorProto.FLOAT)
    if given.total != 1:
        rows = steps.add("Mul", rows, np.array(1 / given.total, np.float32))
    own = None
    if given.before is None and given.kind in (Kind.PROBABILITIES, Kind.EACH):
        own = rows
        rows = (_logarithm if given.kind is Kind.PROBABILITIES else _logit)(steps, own)
    if task is Task.BINARY and given.count == 2:
        rows = steps.add("MatMul", rows, np.array([[-1], [1]], np.float32))
    steps.add("Identity", rows, into=logits)
    if own and given.count > 1:
        steps.add("Identity", own, into=probabilities)
    elif task is Task.MULTICLASS:
        steps.add("Softmax", logits, into=probabilities, axis=1)
    elif task is Task.MULTILABEL:
        steps.add("Sigmoid", logits, into=probabilities)
    else:
        positive = own or steps.add("Sigmoid", logits)
        negative = steps.add("Sub", np.array(1, np.float32), positive)
        steps.add("Concat", negative, positive, into=probabilities, axis=1)


def _logarithm(steps: _Steps, probabilities: str) -> str:
    return steps.add("Log", steps.add("Max", probabilities, np.array(np.finfo(np.float32).tiny, np.float32)))


def _logit(steps: _Steps, probabilities: str) -> str:
    one = np.array(1, np.float32)
    inside = steps.add("Max", probabilities, np.array(_LEAST, np.float32))
    inside = steps.add("Min", inside, np.array(1 - _LEAST, np.float32))
    return steps.add("Log", steps.add("Div", inside, steps.add("Sub", one, inside)))


# --- pruning -------------------------------------------------------------------------------------


def _needed(nodes: Sequence[NodeProto], outputs: Sequence[str]) -> list[NodeProto]:
    """Return the nodes on which the outputs depend, in order."""
    wanted = set(outputs)
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted |= names_needed(node)
    return kept[::-1]


def _keep_used(graph: Any) -> None:
    """Remove the weights that no node reads any more."""
    wanted = {name for node in graph.node for name in names_needed(node)}
    for field in (graph.initializer, graph.sparse_initializer):
        for place in reversed(range(len(field))):
            one = field[place]
            if (one.name if isinstance(one, TensorProto) else one.values.name) not in wanted:
                del field[place]

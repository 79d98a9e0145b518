"""Pre- and postprocessing steps around a foreign graph, from pixels to probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from fovea.export.importer.dynamic_batch import BATCH_AXIS
from fovea.export.importer.graph_contents import find_input_names, tensor_names
from fovea.export.importer.graph_input import GraphInput, Layout
from fovea.export.importer.graph_output import GraphOutput, ValueKind
from fovea.export.importer.grey import add_grey_steps
from fovea.export.importer.preprocessing import Normalization
from fovea.export.node_builder import NodeBuilder
from fovea.export.pixel_steps import TO_PLANES, PixelSteps, find_rounding, prefers_planes, round_to_half
from fovea.service.artifact.contract import Task

_MIN_DISTANCE: Final = 1e-4
"""Minimum distance of a probability from 0 and 1 before its logit is computed.

Closer to 0 or 1, rounding changes the logit too much.
"""


@dataclass(frozen=True)
class WrappedModel:
    """A graph from uint8 pixels (batch, H, W, 3) to float32 logits and probabilities, with their names."""

    model: ModelProto
    pixels: str
    logits: str
    probabilities: str
    parameters: int
    """Number of values in the graph's own weights."""


def wrap_model(
    model: ModelProto,
    graph_input: GraphInput,
    normalization: Normalization | None,
    graph_output: GraphOutput,
    task: Task,
    *,
    dynamic_batch: bool,
    merges: bool = True,
) -> WrappedModel:
    """Return a copy of `model` with the steps before and after the graph.

    Without `normalization`, the graph takes the pixels unchanged. `dynamic_batch` means that the graph
    accepts any batch size. `merges` allows one step in place of the usual arithmetic, see
    `PixelSteps.merge`.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    names = tensor_names(graph)
    pixels, logits, probabilities = (
        _find_unused_name(name, names) for name in ("pixels", "logits", "probabilities")
    )
    builder = NodeBuilder()
    _add_preprocessing(builder, pixels, graph_input, normalization, graph, merges=merges)
    first_nodes = builder.pop_nodes()
    _add_postprocessing(builder, graph_output, task, logits, probabilities)
    nodes = _select_required_nodes([*first_nodes, *graph.node, *builder.pop_nodes()], (logits, probabilities))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(builder.constants)
    _remove_unused_weights(graph)
    labels = 2 if task is Task.BINARY else graph_output.count
    batch: str | int = BATCH_AXIS if dynamic_batch else 1
    del graph.input[:], graph.output[:], graph.value_info[:], graph.quantization_annotation[:]
    shape = [batch, graph_input.height, graph_input.width, 3]
    graph.input.append(helper.make_tensor_value_info(pixels, TensorProto.UINT8, shape))
    for name, count in ((logits, 1 if task is Task.BINARY else graph_output.count), (probabilities, labels)):
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, count]))
    new_names = {constant.name for constant in builder.constants}
    parameters = sum(math.prod(one.dims) for one in graph.initializer if one.name not in new_names)
    return WrappedModel(copy, pixels, logits, probabilities, parameters)


def _find_unused_name(name: str, names: set[str]) -> str:
    """Return the name, prefixed until it is unused in the graph."""
    while name in names:
        name = f"fovea/{name}"
    return name


# --- steps before the graph ----------------------------------------------------------------------


def _add_preprocessing(
    builder: NodeBuilder,
    pixels: str,
    graph_input: GraphInput,
    normalization: Normalization | None,
    graph: GraphProto,
    *,
    merges: bool,
) -> None:
    """Add the steps from `pixels` to the input of `graph`."""
    has_planes = graph_input.layout is Layout.NCHW
    if graph_input.channels == 1:
        tensor = _add_grey_preprocessing(builder, pixels, graph_input, normalization)
    elif normalization is None:
        tensor = builder.add("Transpose", pixels, perm=TO_PLANES) if has_planes else pixels
    else:
        steps = PixelSteps(
            graph_input.height,
            graph_input.width,
            normalization.operations,
            is_bgr=normalization.bgr,
            has_planes=has_planes,
        )
        is_half = graph_input.dtype == np.float16
        if merges:
            steps = steps.merge(round_to_half if is_half else find_rounding(graph, graph_input.name))
        as_planes = prefers_planes(graph, graph_input.name, steps)
        tensor = steps.add_to(builder, pixels, as_planes=as_planes)
        if is_half:
            tensor = builder.add("Cast", tensor, to=TensorProto.FLOAT16)
    builder.add("Identity", tensor, output_name=graph_input.name)


def _add_grey_preprocessing(
    builder: NodeBuilder, pixels: str, graph_input: GraphInput, normalization: Normalization | None
) -> str:
    """Add the steps from `pixels` to grey values in the layout and type of the graph's input."""
    tensor = add_grey_steps(builder, pixels)
    if normalization is not None:
        tensor = builder.add("Cast", tensor, to=TensorProto.FLOAT)
        for op_type, values in normalization.operations:
            tensor = builder.add(op_type, tensor, values.ravel()[:1].reshape(()))
    if normalization is None or graph_input.dtype != np.float32:
        tensor = builder.add("Cast", tensor, to=helper.np_dtype_to_tensor_dtype(graph_input.dtype))
    if graph_input.layout is Layout.NHWC:  # the order of one channel's values is the same
        shape = np.array([-1, graph_input.height, graph_input.width, 1], np.int64)
        tensor = builder.add("Reshape", tensor, shape)
    return tensor


# --- steps after the graph -----------------------------------------------------------------------


def _add_postprocessing(
    builder: NodeBuilder, graph_output: GraphOutput, task: Task, logits: str, probabilities: str
) -> None:
    """Add logits, then probabilities; the graph's own probabilities are kept if it has no matching logits."""
    rows = builder.add(
        "Reshape",
        graph_output.logits_tensor or graph_output.name,
        np.array([-1, graph_output.count], np.int64),
    )
    rows = builder.add("Cast", rows, to=TensorProto.FLOAT)
    if graph_output.total != 1:
        rows = builder.add("Mul", rows, np.array(1 / graph_output.total, np.float32))
    own_probabilities = None
    if graph_output.kind is ValueKind.INDEPENDENT and graph_output.count > 1 and task is not Task.MULTILABEL:
        # One of the labels is meant: the softmax of the logarithms divides each probability by their sum.
        if graph_output.logits_tensor is not None:
            rows = builder.add("Sigmoid", rows)
        rows = _add_logarithm(builder, rows)
    elif graph_output.logits_tensor is None and graph_output.kind in (
        ValueKind.PROBABILITIES,
        ValueKind.INDEPENDENT,
    ):
        own_probabilities = rows
        rows = (_add_logarithm if graph_output.kind is ValueKind.PROBABILITIES else _add_logit)(
            builder, own_probabilities
        )
    if task is Task.BINARY and graph_output.count == 2:
        rows = builder.add("MatMul", rows, np.array([[-1], [1]], np.float32))
    builder.add("Identity", rows, output_name=logits)
    if own_probabilities and graph_output.count > 1:
        builder.add("Identity", own_probabilities, output_name=probabilities)
    elif task is Task.MULTICLASS:
        builder.add("Softmax", logits, output_name=probabilities, axis=1)
    elif task is Task.MULTILABEL:
        builder.add("Sigmoid", logits, output_name=probabilities)
    else:
        positive = own_probabilities or builder.add("Sigmoid", logits)
        negative = builder.add("Sub", np.array(1, np.float32), positive)
        builder.add("Concat", negative, positive, output_name=probabilities, axis=1)


def _add_logarithm(builder: NodeBuilder, probabilities: str) -> str:
    return builder.add(
        "Log", builder.add("Max", probabilities, np.array(np.finfo(np.float32).tiny, np.float32))
    )


def _add_logit(builder: NodeBuilder, probabilities: str) -> str:
    one = np.array(1, np.float32)
    clamped_probabilities = builder.add("Max", probabilities, np.array(_MIN_DISTANCE, np.float32))
    clamped_probabilities = builder.add("Min", clamped_probabilities, np.array(1 - _MIN_DISTANCE, np.float32))
    return builder.add(
        "Log", builder.add("Div", clamped_probabilities, builder.add("Sub", one, clamped_probabilities))
    )


# --- pruning -------------------------------------------------------------------------------------


def _select_required_nodes(nodes: Sequence[NodeProto], outputs: Sequence[str]) -> list[NodeProto]:
    """Return the nodes on which the outputs depend, in order."""
    required_names = set(outputs)
    required_nodes = []
    for node in reversed(nodes):
        if required_names.intersection(node.output):
            required_nodes.append(node)
            required_names |= find_input_names(node)
    return required_nodes[::-1]


def _remove_unused_weights(graph: Any) -> None:
    """Remove the weights that no node reads any more."""
    used_names = {name for node in graph.node for name in find_input_names(node)}
    for field in (graph.initializer, graph.sparse_initializer):
        for index in reversed(range(len(field))):
            weight = field[index]
            if (weight.name if isinstance(weight, TensorProto) else weight.values.name) not in used_names:
                del field[index]

"""Removal of the background class, which TensorFlow's ImageNet models have before the 1,000 others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from fovea.export.importer.foreign_model import Array, ImportRefused, opset_of, read_model
from fovea.export.importer.graph_contents import tensor_names
from fovea.export.importer.label_file import read_labels
from fovea.export.importer.sources.facts import (
    NetworkAnswers,
    ReferenceAnswers,
    ReferenceNetwork,
    ReferencePipeline,
    Source,
)
from fovea.export.importer.sources.model_config import write_labels

_NAMES: Final = ("background", "dummy", "__background__")
"""Names of the class."""

_MIN_OPSET: Final = 10
"""Lowest operator set version in which `Slice` takes its axes as inputs."""


def drop_background(source: Source) -> Source:
    """Return the source with a graph that has no first label. Raises `ImportRefused`."""
    model = read_model(source.file)
    remove_first_label(model)
    file = source.work / "without-background.onnx"
    file.write_bytes(model.SerializeToString())
    reference = source.reference and _drop_first_output(source.reference)
    network = source.network and _drop_first_network_output(source.network)
    return replace(source, file=file, reference=reference, network=network)


def _drop_first_output(pipeline: ReferencePipeline) -> ReferencePipeline:
    """Return the pipeline without the first logit of its network."""

    def run(images: Sequence[Path]) -> ReferenceAnswers:
        answers = pipeline.run(images)
        return answers if answers.outputs is None else replace(answers, outputs=answers.outputs[:, 1:])

    return replace(pipeline, run=run)


def _drop_first_network_output(network: ReferenceNetwork) -> ReferenceNetwork:
    """Return the network without its first logit."""

    def run(inputs: Array) -> NetworkAnswers:
        answers = network.run(inputs)
        return replace(answers, outputs=answers.outputs[:, 1:])

    return replace(network, run=run)


def drop_background_label(path: Path, source: Source) -> Path:
    """Return a file of the labels without the background class, if it is the first of them."""
    labels = read_labels(path)
    if labels.names[0].casefold() not in _NAMES:
        return path
    file = source.work / "labels-without-background.json"
    write_labels(labels.names[1:], file)
    return file


def remove_first_label(model: ModelProto) -> None:
    """Remove the first value of each output; before a softmax if the output is one.

    Raises `ImportRefused` if the outputs have no axis of labels.
    """
    if opset_of(model) < _MIN_OPSET:
        raise ImportRefused(
            f"--drop-background needs operators of version {_MIN_OPSET}; the file has {opset_of(model)}"
        )
    graph = model.graph
    for index, output in enumerate(list(graph.output)):
        axis = _find_label_axis(output)
        node = next((one for one in graph.node if output.name in one.output), None)
        if node is None:
            raise ImportRefused(f"--drop-background found no operator that computes {output.name!r}")
        position = list(graph.node).index(node)
        if node.op_type == "Softmax":
            name = f"{output.name}_without_background"
            _add_slice(model, position, node.input[0], name, axis, index)
            node.input[0] = name
        else:
            name = f"{output.name}_with_background"
            _rename(model, output.name, name)
            _add_slice(model, position + 1, name, output.name, axis, index)
        side = output.type.tensor_type.shape.dim[axis]
        if side.dim_value:
            side.dim_value -= 1
    names = {output.name for output in graph.output}
    kept = [value for value in graph.value_info if value.name not in names]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _find_label_axis(output: ValueInfoProto) -> int:
    """Return the axis with the labels: the longest, or the last of a shape that is not stated."""
    sides = [side.dim_value for side in output.type.tensor_type.shape.dim]
    if len(sides) < 2:
        raise ImportRefused(f"--drop-background: the output {output.name!r} has no axis of labels")
    return sides.index(max(sides[1:]), 1) if max(sides[1:]) else len(sides) - 1


def _rename(model: ModelProto, name: str, new_name: str) -> None:
    """Rename a tensor in all operators of the main graph."""
    if new_name in tensor_names(model.graph):
        raise ImportRefused(f"--drop-background: the graph has a tensor {new_name!r} already")
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, one in enumerate(names):
                if one == name:
                    names[index] = new_name


def _add_slice(model: ModelProto, position: int, data: str, result: str, axis: int, index: int) -> None:
    """Insert a `Slice` from the second value on."""
    bounds = {"start": 1, "end": np.iinfo(np.int64).max, "axis": axis}
    names = [f"background_{key}_{index}" for key in bounds]
    for name, value in zip(names, bounds.values(), strict=True):
        model.graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    node: NodeProto = helper.make_node("Slice", [data, *names], [result], f"drop_background_{index}")
    model.graph.node.insert(position, node)

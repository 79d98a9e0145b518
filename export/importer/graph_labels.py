"""Labels that a graph holds itself, and the tensors behind its maps from labels to probabilities.

skl2onnx, Azure Custom Vision and AutoML end their graphs in a ZipMap, whose output is a list with one map
from label to probability for each image. The tensor before the ZipMap has the same values, in the order of
the ZipMap's labels.
"""

from __future__ import annotations

import onnx
from onnx import ModelProto, NodeProto, helper

from fovea.export.importer.foreign_model import ImportRefused
from fovea.export.importer.label_file import Labels, build_labels


def replace_map_outputs(model: ModelProto) -> None:
    """Replace each output that is a list of maps by the tensor with its values.

    `read_graph_labels` finds no labels afterwards.
    """
    zip_maps = _find_zip_maps(model)
    outputs = list(model.graph.output)
    del model.graph.output[:]
    names: set[str] = set()
    for output in outputs:
        node = zip_maps.get(output.name)
        value = onnx.ValueInfoProto(name=node.input[0]) if node else output
        if value.name not in names:
            names.add(value.name)
            model.graph.output.append(value)
    nodes = [node for node in model.graph.node if node.op_type != "ZipMap"]  # ONNX Runtime would run them
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def add_output(model: ModelProto, name: str | None) -> None:
    """Make an inner tensor an output of the graph, if there is one of this name."""
    is_inner = any(name in node.output for node in model.graph.node)
    if name and is_inner and all(output.name != name for output in model.graph.output):
        model.graph.output.append(onnx.ValueInfoProto(name=name))


def read_graph_labels(model: ModelProto) -> Labels | None:
    """Return the labels of the graph's ZipMap, in the order of its values.

    Return None without a ZipMap, and for several with different labels: which of them is meant must be said.
    """
    names = {tuple(_read_zip_map(node)) for node in _find_zip_maps(model).values()}
    if len(names) != 1:
        return None
    return build_labels("the graph's own list of labels", [("", name) for name in next(iter(names))])


def require_same_order(given: Labels, own: Labels | None) -> None:
    """Raise `ImportRefused` if labels are given in another order than the graph's own labels."""
    if own and given.names != own.names and sorted(given.names) == sorted(own.names):
        position = next(
            index for index, pair in enumerate(zip(given.names, own.names, strict=True)) if pair[0] != pair[1]
        )
        raise ImportRefused(
            f"--labels has the graph's own labels in another order: label {position} is "
            f"{given.names[position]!r} there and {own.names[position]!r} in the graph (ZipMap); leave out "
            "--labels"
        )


def _find_zip_maps(model: ModelProto) -> dict[str, NodeProto]:
    return {node.output[0]: node for node in model.graph.node if node.op_type == "ZipMap"}


def _read_zip_map(node: NodeProto) -> list[str]:
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if attributes.get("classlabels_strings"):
        return [text.decode(errors="replace") for text in attributes["classlabels_strings"]]
    return [str(number) for number in attributes.get("classlabels_int64s", [])]

"""Inputs in forms that the service does not feed, brought into the usual form inside the graph.

The usual form is one tensor of images with a batch axis, in float32, float16 or uint8. Further inputs become
constants (`--set training=false`), a missing batch axis is added, and float64 and bfloat16 become float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from fovea.export.importer.foreign_model import ImportRefused, MissingInformation, opset_of
from fovea.export.importer.graph_contents import inner_graphs, read_constant, walk_nodes, walk_tensors
from fovea.export.importer.graph_input import Layout, format_shape

_IMAGE_TYPES: Final = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16, TensorProto.UINT8}
)
"""Types of inputs that may hold images."""

_TYPE_ATTRIBUTES: Final = frozenset({"to", "dtype", "output_dtype", "stash_type", "softmax_precision"})
"""Attributes whose value is an element type."""

_MAX_VALUES: Final = 1 << 20
"""Maximum number of values of an input that `--set` makes a constant."""

_WORDS: Final = {"true": 1.0, "false": 0.0}


def prepare_input(model: ModelProto, settings: Mapping[str, str], layout: Layout | None) -> tuple[str, ...]:
    """Bring the inputs of `model` into the usual form; return a note on each change.

    `settings` are values of further inputs, by name. Raises `ImportRefused`, and `MissingInformation` for
    an input without a value.
    """
    notes = [*_set_inputs(model, settings), *_convert_to_float32(model)]
    return (*notes, *_add_batch_axis(model, layout))


# --- further inputs ------------------------------------------------------------------------------


def _set_inputs(model: ModelProto, settings: Mapping[str, str]) -> list[str]:
    """Replace the inputs that have a setting by constants."""
    inputs = {value.name: value for value in model.graph.input}
    for name in settings:
        if name not in inputs:
            raise ImportRefused(
                f"--set {name}: the graph has no input {name!r}; it has {', '.join(map(repr, inputs))}"
            )
    rest = [value for name, value in inputs.items() if name not in settings]
    _require_one_image_input(rest)
    for name, text in settings.items():
        value = _parse_setting(inputs[name], text)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    del model.graph.input[:]
    model.graph.input.extend(rest)
    return [f"{name}={text} (from --set)" for name, text in settings.items()]


def _require_one_image_input(inputs: Sequence[ValueInfoProto]) -> None:
    images = [value for value in inputs if _may_hold_images(value)]
    others = [value for value in inputs if value not in images]
    if len(images) == 1 and others:
        names = ", ".join(f"{value.name!r} ({_describe_type(value)})" for value in others)
        options = " ".join(f"--set {value.name}={_suggest_value(value)}" for value in others)
        raise MissingInformation(
            f"the graph takes {names} besides the image {images[0].name!r}: give each a value with --set, "
            f"such as {options}",
            options,
        )


def _may_hold_images(value: ValueInfoProto) -> bool:
    tensor_type = value.type.tensor_type
    if not value.type.HasField("tensor_type") or tensor_type.elem_type not in _IMAGE_TYPES:
        return False
    return not tensor_type.HasField("shape") or len(tensor_type.shape.dim) in (3, 4)


def _describe_type(value: ValueInfoProto) -> str:
    tensor_type = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return "not a tensor"
    kind = TensorProto.DataType.Name(tensor_type.elem_type).lower()
    shape = format_shape(_read_sides(value))
    return f"{kind}, {shape}" if shape else kind


def _suggest_value(value: ValueInfoProto) -> str:
    kind = value.type.tensor_type.elem_type
    return "false" if kind == TensorProto.BOOL else "0"


def _read_sides(value: ValueInfoProto) -> tuple[int | None, ...]:
    return tuple(side.dim_value or None for side in value.type.tensor_type.shape.dim)


def _parse_setting(value: ValueInfoProto, text: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Return the value of an input as an array of its type and shape; axes of any length have length 1."""
    kind, shape = value.type.tensor_type.elem_type, [side or 1 for side in _read_sides(value)]
    problem = f"--set {value.name}={text}: the input {value.name!r} takes {_describe_type(value)}"
    if not value.type.HasField("tensor_type") or kind in (TensorProto.STRING, TensorProto.UNDEFINED):
        raise ImportRefused(f"{problem}; only numbers and true or false can be set")
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    try:
        number = _WORDS[text.lower()] if text.lower() in _WORDS else float(text)
    except ValueError:
        raise ImportRefused(f"{problem}, which {text!r} is not") from None
    if dtype.kind in "iub" and not number.is_integer():
        raise ImportRefused(f"{problem}, which {text!r} is not")
    if math.prod(shape) > _MAX_VALUES:
        raise ImportRefused(f"{problem}; more than {_MAX_VALUES} values cannot be set")
    limits = np.iinfo(dtype) if dtype.kind in "iu" else None
    if not math.isfinite(number) or (limits and not limits.min <= number <= limits.max):
        raise ImportRefused(f"{problem}, which {text!r} is not")
    return np.full(shape, int(number) if limits else number).astype(dtype)


# --- types ---------------------------------------------------------------------------------------


def _convert_to_float32(model: ModelProto) -> list[str]:
    """Convert float64, if the images have it, and all bfloat16 to float32.

    ONNX Runtime has no convolutions in these types on CPUs. Every value of bfloat16 is one of float32.
    """
    kinds = {
        value.type.tensor_type.elem_type for value in model.graph.input if value.type.HasField("tensor_type")
    }
    replaced = {TensorProto.DOUBLE} & kinds
    if TensorProto.BFLOAT16 in kinds or any(
        tensor.data_type == TensorProto.BFLOAT16 for tensor in walk_tensors(model)
    ):
        replaced.add(TensorProto.BFLOAT16)
    if not replaced:
        return []
    for tensor in walk_tensors(model):
        if tensor.data_type in replaced:
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
            )
    for node in walk_nodes(model.graph):
        for attribute in node.attribute:
            is_type = attribute.type == AttributeProto.INT and attribute.name in _TYPE_ATTRIBUTES
            if is_type and attribute.i in replaced:
                attribute.i = TensorProto.FLOAT
    for value in _walk_values(model.graph):
        if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type in replaced:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    names = " and ".join("float64" if kind == TensorProto.DOUBLE else "bfloat16" for kind in sorted(replaced))
    return [f"{names} in the file, computed in float32"]


def _walk_values(graph: GraphProto) -> list[ValueInfoProto]:
    values = [*graph.input, *graph.output, *graph.value_info]
    for node in graph.node:
        for inner in inner_graphs(node.attribute):
            values += _walk_values(inner)
    return values


# --- axes ----------------------------------------------------------------------------------------


def _add_batch_axis(model: ModelProto, layout: Layout | None) -> list[str]:
    """Give an input of three axes the missing fourth axis: that of the batch or of the channels."""
    if len(model.graph.input) != 1:
        return []
    (value,) = model.graph.input
    tensor_type = value.type.tensor_type
    if len(tensor_type.shape.dim) != 3:
        return []
    sides = _read_sides(value)
    axis = _find_missing_axis(value.name, sides, layout)
    shape: list[int | None] = list(sides)
    shape.insert(axis, 1)
    if axis == 0 and _remove_own_batch_axis(model, value.name):
        pass
    else:
        inner_name = f"fovea/{value.name}"
        _rename_input(model, value.name, inner_name)
        model.graph.node.insert(0, _make_squeeze(model, value.name, inner_name, axis))
    value.CopyFrom(helper.make_tensor_value_info(value.name, tensor_type.elem_type, shape))
    del model.graph.value_info[:]
    kind = "a batch axis" if axis == 0 else "an axis of channels"
    return [f"{format_shape(sides)} in the file, without {kind}"]


def _find_missing_axis(name: str, sides: tuple[int | None, ...], layout: Layout | None) -> int:
    """Return the position of the missing axis: 0 for the batch, 1 for the channel of grey images."""
    has_channels = {Layout.NCHW: sides[0] in (1, 3), Layout.NHWC: sides[2] in (1, 3)}
    candidates = [one for one in Layout if has_channels[one] and layout in (None, one)]
    if len(candidates) > 1:
        raise MissingInformation(
            f"the shape of the input {name!r}, {format_shape(sides)}, does not tell where the channels are: "
            "give --layout nchw or --layout nhwc",
            "--layout nchw",
        )
    if candidates:
        return 0
    if sides[0] is None and sides[1] and sides[2]:  # any number of grey images
        return 1
    raise ImportRefused(
        f"the input {name!r} has 3 axes, {format_shape(sides)}; images have three channels, or one, on the "
        "first or the last axis"
    )


def _remove_own_batch_axis(model: ModelProto, name: str) -> bool:
    """Remove an Unsqueeze that begins the graph and adds the batch axis; return whether there was one.

    A Squeeze or Gather that removes this axis from an output goes with it.
    """
    readers = [node for node in walk_nodes(model.graph) if name in node.input]
    if not readers or not all(
        node.op_type == "Unsqueeze" and _read_axes(model, node) == [0] for node in readers
    ):
        return False
    for node in readers:
        _replace_by_identity(node)
    output_names = {output.name for output in model.graph.output}
    for node in model.graph.node:
        if output_names.issuperset(node.output) and _removes_first_axis(model, node):
            _replace_by_identity(node)
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    return True


def _replace_by_identity(node: NodeProto) -> None:
    node.op_type = "Identity"
    del node.input[1:], node.attribute[:]


def _removes_first_axis(model: ModelProto, node: NodeProto) -> bool:
    if node.op_type == "Squeeze":
        return _read_axes(model, node) == [0]
    axis = next((one.i for one in node.attribute if one.name == "axis"), 0)
    return node.op_type == "Gather" and axis == 0 and read_constant(model, node.input[1]) == 0


def _read_axes(model: ModelProto, node: NodeProto) -> list[int]:
    for attribute in node.attribute:
        if attribute.name == "axes":
            return list(attribute.ints)
    value = read_constant(model, node.input[1]) if len(node.input) > 1 else None
    return [] if value is None else np.atleast_1d(value).tolist()


def _rename_input(model: ModelProto, name: str, new_name: str) -> None:
    for node in walk_nodes(model.graph):
        for index, one in enumerate(node.input):
            if one == name:
                node.input[index] = new_name


def _make_squeeze(model: ModelProto, name: str, new_name: str, axis: int) -> NodeProto:
    if opset_of(model) < 13:  # the axes are an attribute there
        return helper.make_node("Squeeze", [name], [new_name], new_name, axes=[axis])
    axes_name = f"{new_name}/axes"
    model.graph.initializer.append(numpy_helper.from_array(np.array([axis], np.int64), axes_name))
    return helper.make_node("Squeeze", [name, axes_name], [new_name], new_name)

"""Edit an ONNX file without the `onnx` package: add outputs, or cut the graph in two.

ONNX Runtime returns only tensors that are outputs, and takes input only at the start of a graph.

An ONNX file is a protobuf message. This module removes fields, and adds fields by appending a second message:
concatenated messages are merged into one message. Field numbers are those of onnx.proto (ONNX 1.18, IR
version 11). The encoding is described at https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any, Final, NamedTuple

import numpy as np

from fovea.service.artifact.inputs import Tensor
from fovea.service.errors import ModelError

_GRAPH: Final = 7  # in ModelProto
_NODE, _INITIALIZER, _INPUT, _OUTPUT = 1, 5, 11, 12  # in GraphProto
_NODE_OUTPUT: Final = 2  # in NodeProto
_TENSOR_NAME: Final = 8  # in TensorProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types

_TYPES: Final = {np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.float16): 10}
"""Type numbers of `TensorProto.DataType`."""


def with_outputs(model: bytes, names: Iterable[str]) -> bytes:
    """Return the model with these tensors as additional outputs after its own outputs.

    ONNX Runtime infers their types and shapes. Initializers can become outputs too.
    """
    outputs = (_message(_OUTPUT, _message(1, name.encode())) for name in names)
    return model + _message(_GRAPH, b"".join(outputs))


def without_steps(model: bytes, tensor: Tensor) -> bytes:
    """Return the model with `tensor` as its input in place of the pixels.

    Raises `ModelError` when the model is not a protobuf message.
    """
    made = {step.outputs[0].encode() for step in tensor.steps}

    def is_kept(field: _Field) -> bool:
        return field.number != _INPUT and not (field.number == _NODE and _has(field, _NODE_OUTPUT, made))

    return _edited(model, is_kept) + _message(_GRAPH, _message(_INPUT, _value(tensor)))


def steps_alone(model: bytes, tensor: Tensor) -> bytes:
    """Return only the part of the model that computes `tensor` from the pixels.

    Raises `ModelError` when the model is not a protobuf message.
    """
    made = {step.outputs[0].encode() for step in tensor.steps}
    read = {name.encode() for step in tensor.steps for name in step.inputs}

    def is_kept(field: _Field) -> bool:
        if field.number == _NODE:
            return _has(field, _NODE_OUTPUT, made)
        if field.number == _INITIALIZER:
            return _has(field, _TENSOR_NAME, read)
        return field.number != _OUTPUT

    return _edited(model, is_kept) + _message(_GRAPH, _message(_OUTPUT, _value(tensor)))


def _has(field: _Field, number: int, values: Set[bytes]) -> bool:
    """Return True if the message in `field` has one of these values in a field with this number."""
    return any(one.number == number and bytes(one.content) in values for one in _fields(field.content))


def _edited(model: bytes, is_kept: Callable[[_Field], bool]) -> bytes:
    """Return the model without the graph fields that `is_kept` rejects."""
    parts: list[Any] = []
    for field in _fields(memoryview(model)):
        if field.number == _GRAPH:
            kept = [one.whole for one in _fields(field.content) if is_kept(one)]
            parts += [_key(_GRAPH, _BYTES), _varint(sum(map(len, kept))), *kept]
        else:
            parts.append(field.whole)
    return b"".join(parts)


def _value(tensor: Tensor) -> bytes:
    """Return a `ValueInfoProto` for the tensor, with a batch axis of any size."""
    sides = [_message(1, _message(2, b"batch")), *(_message(1, _number(1, side)) for side in tensor.shape)]
    kind = _number(1, _TYPES[tensor.dtype]) + _message(2, b"".join(sides))
    return _message(1, tensor.name.encode()) + _message(2, _message(1, kind))


# --- protobuf ------------------------------------------------------------------------------------


class _Field(NamedTuple):
    """One field of a message. `content` is empty unless the field holds a string, bytes or a message."""

    number: int
    content: memoryview
    whole: memoryview


def _fields(message: memoryview) -> Iterator[_Field]:
    start = 0
    while start < len(message):
        key, place = _read_varint(message, start)
        kind, size = key & 7, 0
        if kind == _BYTES:
            size, place = _read_varint(message, place)
        elif kind == _VARINT:
            _, place = _read_varint(message, place)
        elif kind in (_FIXED32, _FIXED64):
            place += 4 if kind == _FIXED32 else 8
        else:
            raise ModelError("the file is no ONNX model")
        end = place + size
        if end > len(message):
            raise ModelError("the file is no whole ONNX model")
        yield _Field(key >> 3, message[place:end], message[start:end])
        start = end


def _read_varint(message: memoryview, start: int) -> tuple[int, int]:
    """Return the number at `start`, and the offset after the number. Raises `ModelError` at the end."""
    value = 0
    for place in range(start, min(start + 10, len(message))):
        value |= (message[place] & 127) << 7 * (place - start)
        if message[place] < 128:
            return value, place + 1
    raise ModelError("the file is no whole ONNX model")


def _varint(value: int) -> bytes:
    content = bytearray()
    while value > 127:
        content.append(value & 127 | 128)
        value >>= 7
    content.append(value)
    return bytes(content)


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _message(number: int, content: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _key(number, _VARINT) + _varint(value)

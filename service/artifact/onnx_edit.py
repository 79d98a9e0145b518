"""Edit and read an ONNX file without the `onnx` package.

The edits add outputs or cut the graph in two. The readers list the weights and the metadata.

ONNX Runtime returns only tensors that are outputs, and takes input only at the start of a graph.

An ONNX file is a protobuf message. This module removes fields, and adds fields by appending a second message:
concatenated messages are merged into one message. Field numbers are those of onnx.proto (ONNX 1.18, IR
version 11). The encoding is described at https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any, BinaryIO, Final, NamedTuple

from fovea.service.artifact.inputs import InputTensor
from fovea.service.errors import ModelError

_GRAPH, _METADATA = 7, 14  # in ModelProto
_NODE, _INITIALIZER, _INPUT, _OUTPUT = 1, 5, 11, 12  # in GraphProto
_NODE_OUTPUT: Final = 2  # in NodeProto
_DIMENSION, _DATA_TYPE, _TENSOR_NAME, _EXTERNAL_DATA = 1, 2, 8, 13  # in TensorProto
_ENTRY_KEY, _ENTRY_VALUE = 1, 2  # in StringStringEntryProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types

_MAX_MODEL_FIELDS: Final = 100_000
"""Number of fields of a `ModelProto` from which a file counts as no model: reading more takes seconds."""

_MAX_HEADER_BYTES: Final = 20
"""Size of a field's key and length in bytes: two numbers of at most ten bytes."""

_TYPE_NUMBERS: Final = {"float32": 1, "uint8": 2, "float16": 10}
"""Type numbers of `TensorProto.DataType`."""


def add_outputs(model: bytes, names: Iterable[str]) -> bytes:
    """Return the model with these tensors as additional outputs after its own outputs.

    ONNX Runtime infers their types and shapes. Initializers can become outputs too.
    """
    outputs = (_encode_message(_OUTPUT, _encode_message(1, name.encode())) for name in names)
    return model + _encode_message(_GRAPH, b"".join(outputs))


def replace_input(model: bytes, tensor: InputTensor) -> bytes:
    """Return the model with `tensor` as its input in place of the pixels.

    Raises `ModelError` when the model is not a protobuf message.
    """
    output_names = {step.outputs[0].encode() for step in tensor.preprocessing}

    def is_kept(field: _Field) -> bool:
        return field.number != _INPUT and not (
            field.number == _NODE and _has_value(field, _NODE_OUTPUT, output_names)
        )

    return _filter_graph(model, is_kept) + _encode_message(
        _GRAPH, _encode_message(_INPUT, _encode_value_info(tensor))
    )


def extract_preprocessing(model: bytes, tensor: InputTensor) -> bytes:
    """Return only the part of the model that computes `tensor` from the pixels.

    Raises `ModelError` when the model is not a protobuf message.
    """
    output_names = {step.outputs[0].encode() for step in tensor.preprocessing}
    input_names = {name.encode() for step in tensor.preprocessing for name in step.inputs}

    def is_kept(field: _Field) -> bool:
        if field.number == _NODE:
            return _has_value(field, _NODE_OUTPUT, output_names)
        if field.number == _INITIALIZER:
            return _has_value(field, _TENSOR_NAME, input_names)
        return field.number != _OUTPUT

    return _filter_graph(model, is_kept) + _encode_message(
        _GRAPH, _encode_message(_OUTPUT, _encode_value_info(tensor))
    )


class ExternalWeight(NamedTuple):
    """A weight whose values are in another file."""

    name: str
    type_number: int
    """Number of the type of its values (`TensorProto.DataType`)."""
    shape: tuple[int, ...]
    offset: int
    """Start of its values in the file, in bytes."""


def list_external_weights(model: bytes) -> list[ExternalWeight]:
    """Return the weights of the main graph whose values are in another file.

    Raises `ModelError` when the model is not a protobuf message.
    """
    return [
        weight
        for field in _parse_fields(memoryview(model))
        if field.number == _GRAPH
        for one in _parse_fields(field.content)
        if one.number == _INITIALIZER and (weight := _parse_external_weight(one.content))
    ]


def replace_metadata(model: memoryview, metadata: Mapping[str, str]) -> Iterator[memoryview | bytes]:
    """Yield the parts of the model with `metadata` in place of its own, without a copy of the graph.

    Raises `ModelError` when the model is not a protobuf message.
    """
    for field in _parse_fields(model):
        if field.number != _METADATA:
            yield field.encoded_field
    for key, value in metadata.items():
        entry = _encode_message(_ENTRY_KEY, key.encode()) + _encode_message(_ENTRY_VALUE, value.encode())
        yield _encode_message(_METADATA, entry)


def read_metadata(file: BinaryIO) -> dict[str, str]:
    """Return the metadata (`metadata_props`) of the model in an open file. The graph is skipped, not read.

    Raises `OSError`, and `ModelError` when the file is not a protobuf message.
    """
    metadata: dict[str, str] = {}
    size = file.seek(0, os.SEEK_END)
    start = 0
    for _ in range(_MAX_MODEL_FIELDS):
        file.seek(start)
        header = memoryview(file.read(_MAX_HEADER_BYTES))
        if not header:
            if not size:
                raise ModelError("the file is empty")
            return metadata
        number, content_start, content_size = _parse_field_header(header)
        end = start + content_start + content_size
        if end > size:
            raise ModelError("the ONNX model is cut short")
        if number == _METADATA:
            file.seek(start + content_start)
            entry = memoryview(file.read(content_size))
            parts = {one.number: _read_text(one) for one in _parse_fields(entry)}
            metadata[parts.get(_ENTRY_KEY, "")] = parts.get(_ENTRY_VALUE, "")
        start = end
    raise ModelError("the file is not an ONNX model")


def _parse_external_weight(tensor: memoryview) -> ExternalWeight | None:
    """Return the weight that a `TensorProto` describes; None if it holds its values itself."""
    name, type_number = "", 0
    shape: list[int] = []
    entries: dict[str, str] = {}
    for field in _parse_fields(tensor):
        if field.number == _TENSOR_NAME:
            name = _read_text(field)
        elif field.number == _DATA_TYPE:
            type_number = (_read_numbers(field) or [0])[-1]
        elif field.number == _DIMENSION:
            shape += _read_numbers(field)
        elif field.number == _EXTERNAL_DATA:
            parts = {one.number: _read_text(one) for one in _parse_fields(field.content)}
            entries[parts.get(_ENTRY_KEY, "")] = parts.get(_ENTRY_VALUE, "")
    if not entries:
        return None
    offset = entries.get("offset", "0")
    if not (offset.isascii() and offset.isdigit() and len(offset) <= _MAX_OFFSET_DIGITS):
        raise ModelError(f"the weight {name!r} of the ONNX model has the offset {offset[:20]!r}")
    return ExternalWeight(name, type_number, tuple(shape), int(offset))


_MAX_OFFSET_DIGITS: Final = 19
"""Number of digits of 2**63."""


def _has_value(field: _Field, number: int, values: Set[bytes]) -> bool:
    """Return True if the message in `field` has one of these values in a field with this number."""
    return any(one.number == number and bytes(one.content) in values for one in _parse_fields(field.content))


def _filter_graph(model: bytes, is_kept: Callable[[_Field], bool]) -> bytes:
    """Return the model without the graph fields that `is_kept` rejects."""
    parts: list[Any] = []
    for field in _parse_fields(memoryview(model)):
        if field.number == _GRAPH:
            graph_fields = [one.encoded_field for one in _parse_fields(field.content) if is_kept(one)]
            parts += [_encode_key(_GRAPH, _BYTES), _encode_varint(sum(map(len, graph_fields))), *graph_fields]
        else:
            parts.append(field.encoded_field)
    return b"".join(parts)


def _encode_value_info(tensor: InputTensor) -> bytes:
    """Return a `ValueInfoProto` for the tensor, with a batch axis of any size."""
    dimensions = [
        _encode_message(1, _encode_message(2, b"batch")),
        *(_encode_message(1, _encode_number(1, side)) for side in tensor.shape),
    ]
    kind = _encode_number(1, _TYPE_NUMBERS[tensor.dtype]) + _encode_message(2, b"".join(dimensions))
    return _encode_message(1, tensor.name.encode()) + _encode_message(2, _encode_message(1, kind))


# --- protobuf ------------------------------------------------------------------------------------


class _Field(NamedTuple):
    """One field of a message. `content` is empty unless the field holds a string, bytes or a message."""

    number: int
    content: memoryview
    encoded_field: memoryview


def _parse_fields(message: memoryview) -> Iterator[_Field]:
    start = 0
    while start < len(message):
        number, offset, size = _parse_field_header(message, start)
        end = offset + size
        if end > len(message):
            raise ModelError("the ONNX model is cut short")
        yield _Field(number, message[offset:end], message[start:end])
        start = end


def _parse_field_header(message: memoryview, start: int = 0) -> tuple[int, int, int]:
    """Return the number of the field at `start`, and the offset and the size in bytes of its content.

    A number has no content: the offset is behind it. Raises `ModelError`.
    """
    key, offset = _read_varint(message, start)
    wire_type, size = key & 7, 0
    if not key >> 3:
        raise ModelError("the file is not an ONNX model")
    if wire_type == _BYTES:
        size, offset = _read_varint(message, offset)
    elif wire_type == _VARINT:
        _, offset = _read_varint(message, offset)
    elif wire_type in (_FIXED32, _FIXED64):
        offset += 4 if wire_type == _FIXED32 else 8
    else:
        raise ModelError("the file is not an ONNX model")
    return key >> 3, offset, size


def _read_text(field: _Field) -> str:
    """Return the text in a field. Raises `ModelError`."""
    try:
        return str(field.content, "utf-8")
    except UnicodeDecodeError:
        raise ModelError("a text of the ONNX model is not UTF-8") from None


def _read_numbers(field: _Field) -> list[int]:
    """Return the number in a field, or all numbers in a packed field."""
    key, start = _read_varint(field.encoded_field, 0)
    content = field.content if key & 7 == _BYTES else field.encoded_field[start:]
    numbers, start = [], 0
    while start < len(content):
        number, start = _read_varint(content, start)
        numbers.append(number)
    return numbers


def _read_varint(message: memoryview, start: int) -> tuple[int, int]:
    """Return the number at `start`, and the offset after the number. Raises `ModelError` at the end."""
    value = 0
    for offset in range(start, min(start + 10, len(message))):
        value |= (message[offset] & 127) << 7 * (offset - start)
        if message[offset] < 128:
            return value, offset + 1
    raise ModelError("the ONNX model is cut short")


def _encode_varint(value: int) -> bytes:
    content = bytearray()
    while value > 127:
        content.append(value & 127 | 128)
        value >>= 7
    content.append(value)
    return bytes(content)


def _encode_key(number: int, wire_type: int) -> bytes:
    return _encode_varint(number << 3 | wire_type)


def _encode_message(number: int, content: bytes) -> bytes:
    return _encode_key(number, _BYTES) + _encode_varint(len(content)) + content


def _encode_number(number: int, value: int) -> bytes:
    return _encode_key(number, _VARINT) + _encode_varint(value)

"""The bytes of an inference request over gRPC: images stay where they are, and the rest becomes a message.

Protocol Buffers would copy every image, and two bytes of a hostile message can become a hundred bytes of
memory. So the images are cut out first, as views of the received bytes. What is left is small: it has a limit
on its size (FOVEA_JSON_BYTES, like the JSON over HTTP) and on the number of its fields. Protocol Buffers then
parse it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from fovea.service.errors import BadRequest, BodyTooLarge
from fovea.service.grpc import inference_pb2 as pb
from fovea.service.settings import MAX_REQUEST_IMAGES

MAX_FIELDS: Final = 2 * MAX_REQUEST_IMAGES
"""Maximum number of fields in a message, in its inputs and in its outputs together. Walking over a field
takes 1 us."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
"""Wire types of Protocol Buffers. Groups (3 and 4) are not part of proto3."""

_MAX_VARINT_BYTES: Final = 10

_INPUTS: Final = pb.ModelInferRequest.INPUTS_FIELD_NUMBER
_OUTPUTS: Final = pb.ModelInferRequest.OUTPUTS_FIELD_NUMBER
_RAW: Final = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
_CONTENTS: Final = pb.ModelInferRequest.InferInputTensor.CONTENTS_FIELD_NUMBER
_FLOATS: Final = pb.InferTensorContents.FP32_CONTENTS_FIELD_NUMBER
_ELEMENTS: Final = pb.InferTensorContents.BYTES_CONTENTS_FIELD_NUMBER


@dataclass
class Contents:
    """The values of one input that were cut out of its `contents`."""

    floats: list[memoryview] = field(default_factory=list)
    """Packed pieces of `fp32_contents`: little-endian float32."""
    elements: list[memoryview] = field(default_factory=list)
    """Elements of `bytes_contents`."""


@dataclass(frozen=True)
class InferMessage:
    """An inference request. Its views refer to the received bytes."""

    head: pb.ModelInferRequest
    """Message without the parts in the other attributes."""
    raw_contents: list[memoryview]
    contents: list[Contents]
    """Cut out values by input."""


class _Field(NamedTuple):
    """One field on the wire."""

    number: int
    wire_type: int
    start: int
    """Offset of the tag."""
    value_start: int
    """Offset of the value, after the length if there is one."""
    end: int


class _FieldBudget:
    """The number of fields that a message may still have."""

    def __init__(self) -> None:
        self._remaining = MAX_FIELDS

    def count_field(self) -> None:
        """Count a field. Raises `BadRequest` if there are too many."""
        self._remaining -= 1
        if self._remaining < 0:
            raise BadRequest(f"the message has more than {MAX_FIELDS} fields")


def split_message(message: bytes, max_head_bytes: int) -> InferMessage:
    """Split the bytes of a `ModelInferRequest` into its images and the rest.

    `max_head_bytes` limits the size of the rest. Raises `BadRequest` or `BodyTooLarge`.
    """
    view, budget = memoryview(message), _FieldBudget()
    pieces: list[bytes | memoryview] = []
    raw_contents: list[memoryview] = []
    contents: list[Contents] = []
    for one in _walk(view, budget):
        value = view[one.value_start : one.end]
        if one.wire_type == _LENGTH and one.number == _RAW:
            raw_contents.append(value)
        elif one.wire_type == _LENGTH and one.number == _INPUTS:
            contents.append(Contents())
            _append_field(pieces, _INPUTS, _split_input(value, contents[-1], budget))
        else:
            if one.wire_type == _LENGTH and one.number == _OUTPUTS:
                for _ in _walk(value, budget):  # counts the fields
                    pass
            pieces.append(view[one.start : one.end])
    size = sum(map(len, pieces))
    if size > max_head_bytes:
        raise BodyTooLarge(
            f"the message has {size} bytes beside raw_input_contents, bytes_contents and packed "
            f"fp32_contents; at most {max_head_bytes} (FOVEA_JSON_BYTES)"
        )
    try:
        head = pb.ModelInferRequest.FromString(b"".join(pieces))
    except DecodeError as error:
        raise _make_error(str(error)) from None
    return InferMessage(head, raw_contents, contents)


def _split_input(view: memoryview, contents: Contents, budget: _FieldBudget) -> list[bytes | memoryview]:
    """Move the large values of an input to `contents`, and return the bytes of the rest."""
    pieces: list[bytes | memoryview] = []
    for one in _walk(view, budget):
        if one.wire_type == _LENGTH and one.number == _CONTENTS:
            _append_field(
                pieces, _CONTENTS, _split_contents(view[one.value_start : one.end], contents, budget)
            )
        else:
            pieces.append(view[one.start : one.end])
    return pieces


def _split_contents(view: memoryview, contents: Contents, budget: _FieldBudget) -> list[bytes | memoryview]:
    pieces: list[bytes | memoryview] = []
    for one in _walk(view, budget):
        value = view[one.value_start : one.end]
        if one.wire_type == _LENGTH and one.number == _ELEMENTS:
            contents.elements.append(value)
        elif one.wire_type == _LENGTH and one.number == _FLOATS:
            if len(value) % 4:
                raise _make_error("packed fp32_contents end within a value")
            contents.floats.append(value)
        else:
            pieces.append(view[one.start : one.end])
    return pieces


def _append_field(pieces: list[bytes | memoryview], number: int, content: list[bytes | memoryview]) -> None:
    """Append a field whose value is made of several pieces."""
    pieces.append(_encode_varint(number << 3 | _LENGTH) + _encode_varint(sum(map(len, content))))
    pieces += content


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _walk(view: memoryview, budget: _FieldBudget) -> Iterator[_Field]:
    """Yield the fields of a message. Raises `BadRequest` if the bytes are no message."""
    place, size = 0, len(view)
    while place < size:
        budget.count_field()
        start = place
        tag, place = _read_varint(view, place)
        number, wire_type = tag >> 3, tag & 7
        length = 0
        if wire_type == _LENGTH:
            length, place = _read_varint(view, place)
        value_start = place
        if wire_type == _VARINT:
            _, place = _read_varint(view, place)
        elif wire_type == _LENGTH:
            place += length
        elif wire_type == _FIXED64:
            place += 8
        elif wire_type == _FIXED32:
            place += 4
        else:
            raise _make_error(f"wire type {wire_type}")
        if place > size:
            raise _make_error("it is truncated")
        if not number:
            raise _make_error("a field has the number 0")
        yield _Field(number, wire_type, start, value_start, place)


def _read_varint(view: memoryview, place: int) -> tuple[int, int]:
    """Return the number at `place`, and the place after it."""
    value = shift = 0
    for byte in view[place : place + _MAX_VARINT_BYTES]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, place + shift // 7
    raise _make_error("it is truncated, or a number is too long")


def _make_error(reason: str) -> BadRequest:
    return BadRequest(f"the message is not a ModelInferRequest: {reason}")

"""Tensors of Open Inference Protocol, as values or as binary data, split into images.

Memory is never allocated from sizes that a request claims. Shapes and sizes are compared with the received
data, and binary rows stay in the body without a copy.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from fovea.service.api import bodies
from fovea.service.api.base64_text import from_base64
from fovea.service.artifact.inputs import DataType, InputTensor
from fovea.service.errors import BadRequest
from fovea.service.runners.batch_messages import Image
from fovea.service.settings import Settings

ENCODED_DATATYPE: Final = "BYTES"
"""Datatype of encoded images, as in OpenVINO Model Server; each element is one image."""

DATATYPES: Final = {"uint8": "UINT8", "float16": "FP16", "float32": "FP32"}

MAX_PARTS: Final = 64
"""Maximum number of inputs, outputs or axes, more than any sensible request has. pydantic reports each
invalid part, and needs a kilobyte for each."""

_LENGTH_PREFIX: Final = struct.Struct("<I")
"""Length before each element of a `BYTES` tensor, in bytes."""

_MAX_QUOTE_LENGTH: Final = 80
"""Maximum number of characters of a caller's value that a message quotes."""


class InferInput(BaseModel):
    """One tensor of a request; its values are `data`, or `binary_data_size` bytes after the JSON."""

    model_config = ConfigDict(strict=True)

    name: str
    shape: list[int] = Field(min_length=1, max_length=MAX_PARTS)
    datatype: str
    parameters: dict[str, Any] | None = None
    data: Any = Field(None, description="Flat, row-major, or nested; encoded images are base64.")
    # Over gRPC, encoded images are not base64 but views of the message, which JSON cannot contain.


_T = TypeVar("_T", int, bool)


def read_parameter(parameters: Mapping[str, Any], name: str, default: _T) -> _T:
    """Return a parameter of the default's type.

    Raises `BadRequest` if the value has another type or is negative.
    """
    value = parameters.get(name, default)
    if type(value) is not type(default) or value < 0:
        expectation = "true or false" if isinstance(default, bool) else "a number of at least 0"
        raise BadRequest(f"{name} is {shorten_value(value)}; it must be {expectation}")
    return value


def check_parameters(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the parameters of an input or output.

    Raises `BadRequest` if the parameters refer to shared memory.
    """
    if parameters and "shared_memory_region" in parameters:
        raise BadRequest(
            "shared_memory_region is not supported; send values in the request, and read them from the reply"
        )
    return parameters or {}


class Row(NamedTuple):
    """One image of a tensor."""

    content: Image
    tensor_name: str | None
    """Name of the tensor; None for an encoded image."""


@dataclass(frozen=True)
class BinaryData:
    """The binary data of a request: the bytes after the JSON of a body, or a field of a gRPC message."""

    view: memoryview
    """Binary data."""
    get_image: Callable[[int, int], Image]
    """Function that returns the bytes from start to stop in the form that runners take."""
    field: str = ""
    """Name of the field of a gRPC message; empty for the bytes after the JSON."""

    def describe_size(self, declared_size: int) -> str:
        """Return the size as part of a message; `declared_size` is the parameter `binary_data_size`."""
        if self.field:
            return f"{self.field} has {len(self.view)} bytes"
        return f"binary_data_size is {declared_size}, and {len(self.view)} bytes follow the JSON"


NO_BINARY_DATA: Final = BinaryData(memoryview(b""), lambda _start, _stop: b"")


@dataclass(frozen=True)
class ModelInputs:
    """The inputs that a model takes."""

    tensors: Sequence[InputTensor]

    @property
    def encoded_name(self) -> str:
        """Name of the input for encoded images: `image`, unless a tensor has this name."""
        return "encoded_image" if any(one.name == "image" for one in self.tensors) else "image"

    def split_rows(
        self, inputs: Sequence[InferInput], binary_data: BinaryData, settings: Settings
    ) -> list[Row]:
        """Split the inputs of a request into images.

        Raises `BadRequest` if names, types, shapes and sizes do not fit together.
        """
        if len(inputs) != 1:
            raise BadRequest(f"the request has {len(inputs)} inputs; send one of {self}")
        (infer_input,) = inputs
        tensor, parameters = self._find_tensor(infer_input), check_parameters(infer_input.parameters)
        count = _count_images(infer_input, tensor)
        bodies.check_image_count(count, settings)
        if infer_input.data is not None:
            if len(binary_data.view) or "binary_data_size" in parameters:
                quoted_name = shorten_value(infer_input.name)
                raise BadRequest(
                    f"input {quoted_name} has data and also binary data after the JSON; send one"
                )
            return _parse_json_rows(infer_input, tensor, count)
        size = read_parameter(parameters, "binary_data_size", len(binary_data.view))
        ranges = _locate_images(infer_input, tensor, count, size, binary_data)
        name = tensor.name if tensor else None
        return [Row(binary_data.get_image(start, stop), name) for start, stop in ranges]

    def _find_tensor(self, infer_input: InferInput) -> InputTensor | None:
        """Return the tensor of an input, or None for encoded images.

        Encoded images may use any of the model's input names.
        """
        if infer_input.datatype == ENCODED_DATATYPE and infer_input.name in {
            self.encoded_name,
            *(tensor.name for tensor in self.tensors),
        }:
            return None
        for tensor in self.tensors:
            if (tensor.name, DATATYPES[tensor.dtype]) == (infer_input.name, infer_input.datatype):
                return tensor
        name, datatype = shorten_value(infer_input.name), shorten_value(infer_input.datatype)
        raise BadRequest(f"the model has no input {name} of datatype {datatype}; it takes {self}")

    def __str__(self) -> str:
        descriptions = [f"{tensor.name!r} ({DATATYPES[tensor.dtype]})" for tensor in self.tensors]
        return " or ".join([*descriptions, f"{self.encoded_name!r} ({ENCODED_DATATYPE})"])


def _count_images(infer_input: InferInput, tensor: InputTensor | None) -> int:
    """Return the number of images according to the shape."""
    count, *sides = infer_input.shape
    expected_sides = list(tensor.shape) if tensor else []
    if count < 1 or (sides != expected_sides and (tensor or sides != [1])):
        name, shape = shorten_value(infer_input.name), shorten_value(infer_input.shape)
        expected_shape = ", ".join(map(str, ["N", *expected_sides]))
        raise BadRequest(f"the shape of {name} is {shape}; it must be [{expected_shape}]")
    return count


def shorten_value(value: Any) -> str:
    """Shorten a caller's value for a message.

    Nested values are not shown, because they may be nested deeper than Python's recursion limit.
    """
    if isinstance(value, list):
        text = f"[{', '.join(map(_shorten_part, value[:_MAX_QUOTE_LENGTH]))}]"
    else:
        text = _shorten_part(value)
    return text if len(text) <= _MAX_QUOTE_LENGTH else f"{text[:_MAX_QUOTE_LENGTH]}…"


def _shorten_part(value: Any) -> str:
    match value:
        case list():
            return "[…]"
        case dict():
            return "{…}"
        case str():
            return repr(value[:_MAX_QUOTE_LENGTH])
    return repr(value)


# --- binary data after the JSON ------------------------------------------------------------------


def parse_json_size(header: bytes | None, size: int) -> int:
    """Return the number of bytes of a body of `size` bytes that are JSON.

    The header is `Inference-Header-Content-Length`; without it the whole body is JSON. Raises `BadRequest`.
    """
    if header is None:
        return size
    header = header.strip()
    if not header.isdigit() or len(header) > 20 or int(header) > size:
        quoted_header = shorten_value(header.decode("latin-1"))
        raise BadRequest(
            f"Inference-Header-Content-Length is {quoted_header}; it must be a number of at most {size}, "
            "the size of the body in bytes"
        )
    return int(header)


def _locate_images(
    infer_input: InferInput, tensor: InputTensor | None, count: int, size: int, binary_data: BinaryData
) -> list[tuple[int, int]]:
    """Return the start and end of each image in the binary data.

    `size` is the declared size of the tensor in bytes.
    """
    if tensor is None:
        return _locate_elements(infer_input, count, size, binary_data)
    if (expected_size := count * tensor.size) != size or size != len(binary_data.view):
        name, shape = shorten_value(infer_input.name), shorten_value(infer_input.shape)
        raise BadRequest(
            f"{name} of shape {shape} and {infer_input.datatype} has {expected_size} bytes; "
            f"{binary_data.describe_size(size)}"
        )
    return [(start, start + tensor.size) for start in range(0, size, tensor.size)]


def _locate_elements(
    infer_input: InferInput, count: int, size: int, binary_data: BinaryData
) -> list[tuple[int, int]]:
    """Return the start and end of each element of a `BYTES` tensor, using the length before each element.

    OVMS omits the lengths from `binary_data_size`, and it sends a single image without any length.
    """
    ranges, start, view = [], 0, binary_data.view
    for _ in range(count):
        if start + _LENGTH_PREFIX.size > len(view):
            break
        (length,) = _LENGTH_PREFIX.unpack_from(view, start)
        start += _LENGTH_PREFIX.size
        ranges.append((start, start + length))
        start += length
    if len(ranges) == count and start == len(view) and size in (start, start - _LENGTH_PREFIX.size * count):
        return ranges
    if count == 1 and size == len(view):
        return [(0, size)]
    raise BadRequest(
        f"{shorten_value(infer_input.name)} has {count} elements, whose lengths do not fit: "
        f"{binary_data.describe_size(size)}"
    )


def pack_elements(values: Sequence[bytes]) -> bytes:
    """Return the binary data of a `BYTES` tensor with these elements."""
    return b"".join(part for value in values for part in (_LENGTH_PREFIX.pack(len(value)), value))


# --- values in the JSON --------------------------------------------------------------------------


def _parse_json_rows(infer_input: InferInput, tensor: InputTensor | None, count: int) -> list[Row]:
    shape = (count, *tensor.shape) if tensor else tuple(infer_input.shape)
    values = _flatten_values(infer_input, shape)
    if tensor is None:
        _require_types(infer_input, values, {str, memoryview})
        return [
            Row(from_base64(value, f"{infer_input.name}.{place}") if isinstance(value, str) else value, None)
            for place, value in enumerate(values)
        ]
    _require_types(infer_input, values, {int, float} if tensor.is_float else {int})
    size = len(values) // count
    rows = (values[start : start + size] for start in range(0, len(values), size))
    return [Row(_pack_row(infer_input, tensor, row), tensor.name) for row in rows]


def _flatten_values(infer_input: InferInput, shape: tuple[int, ...]) -> list[Any]:
    """Return the values as a flat list; they may be flat or nested as the shape says."""
    values, expected_count = infer_input.data, math.prod(shape)
    if not isinstance(values, list):
        raise BadRequest(
            f"data of {shorten_value(infer_input.name)} is not a list; send the values as a list"
        )
    if len(values) == expected_count and not isinstance(values[0], list):
        return values
    fits = len(values) == shape[0]
    for side in shape[1:]:
        fits = fits and all(isinstance(value, list) and len(value) == side for value in values)
        values = list(chain.from_iterable(values)) if fits else values
    if not fits:
        name = shorten_value(infer_input.name)
        raise BadRequest(f"data of {name} must be {expected_count} values, flat or nested as the shape says")
    return values


def _require_types(infer_input: InferInput, values: list[Any], allowed_types: set[type]) -> None:
    if not (types := set(map(type, values))) <= allowed_types:
        (wrong_type, *_) = types - allowed_types
        name = shorten_value(infer_input.name)
        raise BadRequest(
            f"data of {name} has a value of type {wrong_type.__name__}, which is not {infer_input.datatype}"
        )


def _pack_row(infer_input: InferInput, tensor: InputTensor, values: list[Any]) -> memoryview:
    """Convert one row to bytes.

    Only one row at a time is converted, because the conversion blocks all other threads.
    """
    try:
        return _pack_values(values, tensor.dtype)
    except OverflowError:
        name = shorten_value(infer_input.name)
        raise BadRequest(f"data of {name} has a value out of the range of {infer_input.datatype}") from None


def _pack_values(values: list[Any], dtype: DataType) -> memoryview:
    """Return numbers as the bytes of a type, rounded to the nearest value.

    Raises `OverflowError` for an integer that is out of range. A float becomes infinite instead, which is
    detected later.
    """
    if dtype != "float16":
        return memoryview(array(_TYPE_CODES[dtype], values)).cast("B")
    try:
        return memoryview(struct.pack(f"{len(values)}e", *values))
    except OverflowError:
        limited = [math.copysign(math.inf, one) if abs(one) >= _FLOAT16_LIMIT else one for one in values]
        return memoryview(struct.pack(f"{len(limited)}e", *limited))


_TYPE_CODES: Final = {"uint8": "B", "float32": "f"}
"""Type codes of the module `array`, which has none for float16."""

_FLOAT16_LIMIT: Final = 65520.0
"""Smallest number that is rounded to infinity as float16 (IEEE 754)."""

"""Tensors of Open Inference Protocol, in JSON or as binary data behind the JSON, split into images.

Memory is never allocated from sizes that a request claims. Shapes and sizes are compared with the received
data, and binary rows stay in the body without a copy.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fovea.service.api import bodies
from fovea.service.artifact.inputs import InputTensor
from fovea.service.errors import BadRequest
from fovea.service.runners.messages import Image
from fovea.service.settings import Settings

ENCODED: Final = "BYTES"
"""Datatype of encoded images, as in OpenVINO Model Server; each element is one image."""

DATATYPES: Final = {np.dtype(np.uint8): "UINT8", np.dtype(np.float16): "FP16", np.dtype(np.float32): "FP32"}

MOST_PARTS: Final = 64
"""Maximum number of inputs, outputs or axes, more than any sensible request has. pydantic reports each
invalid part, and needs a kilobyte for each."""

_PREFIX: Final = struct.Struct("<I")
"""Length prefix of each element of `MAX_BYTES`."""

_SHOWN: Final = 80
"""Maximum number of characters of a caller's value that a message quotes."""


class InferInput(BaseModel):
    """One tensor of a request; its values are `data`, or behind the JSON as `binary_data_size` bytes."""

    model_config = ConfigDict(strict=True)

    name: str
    shape: list[int] = Field(min_length=1, max_length=MOST_PARTS)
    datatype: str
    parameters: dict[str, Any] | None = None
    data: Any = Field(None, description="Flat, row-major, or nested; encoded images are base64.")


_T = TypeVar("_T", int, bool)


def parameter(parameters: Mapping[str, Any], name: str, default: _T) -> _T:
    """Return a parameter of the default's type.

    Raises `BadRequest` if the value has another type or is negative.
    """
    value = parameters.get(name, default)
    if type(value) is not type(default) or value < 0:
        kind = "true or false" if isinstance(default, bool) else "a number, and not negative"
        raise BadRequest(f"{name} is {short(value)}; it must be {kind}")
    return value


def of_tensor(parameters: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the parameters of an input or output.

    Raises `BadRequest` if the parameters refer to shared memory.
    """
    if parameters and "shared_memory_region" in parameters:
        raise BadRequest("there is no shared memory; send the values, or have them sent")
    return parameters or {}


class Row(NamedTuple):
    """One image of a tensor."""

    content: Image
    tensor: str | None
    """Name of the tensor; None for an encoded image."""


@dataclass(frozen=True)
class Behind:
    """The binary data after the JSON of a body."""

    view: memoryview
    """Binary data."""
    place: Callable[[int, int], Image]
    """Function that returns the bytes from start to stop in the form that runners take."""


NOTHING_BEHIND: Final = Behind(memoryview(b""), lambda _start, _stop: b"")


@dataclass(frozen=True)
class Inputs:
    """The inputs that a model takes."""

    tensors: Sequence[InputTensor]

    @property
    def encoded(self) -> str:
        """Name of the input for encoded images: `image`, unless a tensor has this name."""
        return "encoded_image" if any(one.name == "image" for one in self.tensors) else "image"

    def rows(self, given: Sequence[InferInput], behind: Behind, settings: Settings) -> list[Row]:
        """Split the inputs of a request into images.

        Raises `BadRequest` if names, types, shapes and sizes do not fit together.
        """
        if len(given) != 1:
            raise BadRequest(f"the request has {len(given)} inputs; send one of {self}")
        (one,) = given
        tensor, parameters = self._find(one), of_tensor(one.parameters)
        count = _count(one, tensor)
        bodies.check_number(count, settings)
        if one.data is not None:
            if len(behind.view) or "binary_data_size" in parameters:
                raise BadRequest(f"input {short(one.name)} has data, and there are bytes behind the JSON")
            return _listed(one, tensor, count)
        size = parameter(parameters, "binary_data_size", len(behind.view))
        places = _places(one, tensor, count, size, behind.view)
        name = tensor.name if tensor else None
        return [Row(behind.place(start, stop), name) for start, stop in places]

    def _find(self, one: InferInput) -> InputTensor | None:
        """Return the tensor of an input, or None for encoded images.

        Encoded images may use any of the model's input names.
        """
        if one.datatype == ENCODED and one.name in {self.encoded, *(tensor.name for tensor in self.tensors)}:
            return None
        for tensor in self.tensors:
            if (tensor.name, DATATYPES[tensor.dtype]) == (one.name, one.datatype):
                return tensor
        raise BadRequest(f"the model takes {self}, and no {short(one.name)} of {short(one.datatype)}")

    def __str__(self) -> str:
        named = [f"{tensor.name!r} ({DATATYPES[tensor.dtype]})" for tensor in self.tensors]
        return " or ".join([*named, f"{self.encoded!r} ({ENCODED})"])


def _count(one: InferInput, tensor: InputTensor | None) -> int:
    """Return the number of images according to the shape."""
    count, *sides = one.shape
    wanted = list(tensor.shape) if tensor else []
    if count < 1 or (sides != wanted and (tensor or sides != [1])):
        shape = ", ".join(map(str, ["N", *wanted]))
        raise BadRequest(f"the shape of {short(one.name)} is {short(one.shape)}; it must be [{shape}]")
    return count


def short(value: Any) -> str:
    """Shorten a caller's value for a message.

    Nested values are not shown, because they may be nested deeper than Python's recursion limit.
    """
    if isinstance(value, list):
        shown = f"[{', '.join(map(_part, value[:_SHOWN]))}]"
    else:
        shown = _part(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def _part(value: Any) -> str:
    match value:
        case list():
            return "[…]"
        case dict():
            return "{…}"
        case str():
            return repr(value[:_SHOWN])
    return repr(value)


# --- binary data behind the JSON -----------------------------------------------------------------


def header_size(header: bytes | None, size: int) -> int:
    """Return the number of bytes of a body of `size` bytes that are JSON.

    The header is `Inference-Header-Content-Length`; without it the whole body is JSON. Raises `BadRequest`.
    """
    if header is None:
        return size
    header = header.strip()
    if not header.isdigit() or len(header) > 20 or int(header) > size:
        said = short(header.decode("latin-1"))
        raise BadRequest(f"Inference-Header-Content-Length is {said}, and the body has {size} bytes")
    return int(header)


def _places(
    one: InferInput, tensor: InputTensor | None, count: int, size: int, view: memoryview
) -> list[tuple[int, int]]:
    """Return the start and end of each image in the binary data.

    `size` is the declared size of the tensor in bytes.
    """
    if tensor is None:
        return _elements(one, count, size, view)
    if (wanted := count * tensor.size) != size or size != len(view):
        raise BadRequest(
            f"{short(one.name)} of shape {short(one.shape)} and {one.datatype} has {wanted} bytes; "
            f"binary_data_size is {size}, and {len(view)} bytes are behind the JSON"
        )
    return [(start, start + tensor.size) for start in range(0, size, tensor.size)]


def _elements(one: InferInput, count: int, size: int, view: memoryview) -> list[tuple[int, int]]:
    """Return the start and end of each element of a `MAX_BYTES` tensor, using the length before each element.

    OVMS omits the lengths from `binary_data_size`, and it sends a single image without any length.
    """
    places, start = [], 0
    for _ in range(count):
        if start + _PREFIX.size > len(view):
            break
        (length,) = _PREFIX.unpack_from(view, start)
        start += _PREFIX.size
        places.append((start, start + length))
        start += length
    if len(places) == count and start == len(view) and size in (start, start - _PREFIX.size * count):
        return places
    if count == 1 and size == len(view):
        return [(0, size)]
    raise BadRequest(
        f"{short(one.name)} has {count} elements; their lengths and binary_data_size do not fit the "
        f"{len(view)} bytes behind the JSON"
    )


def elements(values: Sequence[bytes]) -> bytes:
    """Return a tensor of type `MAX_BYTES` with these elements."""
    return b"".join(part for value in values for part in (_PREFIX.pack(len(value)), value))


# --- values in the JSON --------------------------------------------------------------------------


def _listed(one: InferInput, tensor: InputTensor | None, count: int) -> list[Row]:
    shape = (count, *tensor.shape) if tensor else tuple(one.shape)
    values = _flat(one, shape)
    if tensor is None:
        _require_kinds(one, values, {str})
        return [
            Row(bodies.from_base64(text, f"{one.name}.{place}"), None) for place, text in enumerate(values)
        ]
    is_float = np.issubdtype(tensor.dtype, np.floating)
    _require_kinds(one, values, {int, float} if is_float else {int})
    size = len(values) // count
    rows = (values[start : start + size] for start in range(0, len(values), size))
    return [Row(_packed(one, tensor, row), tensor.name) for row in rows]


def _flat(one: InferInput, shape: tuple[int, ...]) -> list[Any]:
    """Return the values as a flat list; they may be flat or nested as the shape says."""
    values, wanted = one.data, math.prod(shape)
    if not isinstance(values, list):
        raise BadRequest(f"data of {short(one.name)} is not a list")
    if len(values) == wanted and not isinstance(values[0], list):
        return values
    fits = len(values) == shape[0]
    for side in shape[1:]:
        fits = fits and all(isinstance(value, list) and len(value) == side for value in values)
        values = list(chain.from_iterable(values)) if fits else values
    if not fits:
        raise BadRequest(f"data of {short(one.name)} is not {wanted} values, nor nested as its shape says")
    return values


def _require_kinds(one: InferInput, values: list[Any], kinds: set[type]) -> None:
    if not (found := set(map(type, values))) <= kinds:
        (wrong, *_) = found - kinds
        raise BadRequest(
            f"data of {short(one.name)} has a value of type {wrong.__name__}, and is {one.datatype}"
        )


def _packed(one: InferInput, tensor: InputTensor, values: list[Any]) -> memoryview:
    """Convert one row to bytes.

    Only one row at a time is converted, because the conversion blocks all other threads.
    """
    try:
        with np.errstate(over="ignore"):  # the value becomes infinite, which is detected later
            array = np.array(values, tensor.dtype)
    except OverflowError:
        raise BadRequest(f"data of {short(one.name)} has a value that {one.datatype} has not") from None
    return array.data.cast("B")

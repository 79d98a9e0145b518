"""Large weights outside of the message of a model, shared by all copies of the message and all sessions.

An import makes a dozen copies of a graph: with another batch size, with other steps around it, for each
recipe. With the weights inside, each copy of a ViT-B had 344 MB, and so had each text of it for ONNX Runtime.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx import ModelProto, TensorProto, helper

_MIN_BYTES: Final = 1 << 16
"""Size from which a weight is kept outside, in bytes; a rewriting of the graph reads smaller constants."""

_TYPES: Final = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT8, TensorProto.UINT8}
    | {TensorProto.INT32, TensorProto.INT64}
)
"""Types of weights that NumPy and ONNX Runtime share."""

_LOCATION: Final = "kept by the import"
"""Name of the file in which a message without its large weights claims to have them."""

_GRAPH_FIELD: Final = 7  # in ModelProto
_INITIALIZER_FIELD: Final = 5  # in GraphProto
_RAW_DATA_FIELD: Final = 9  # in TensorProto


@dataclass(frozen=True)
class LargeWeights:
    """The large weights of a model, by name."""

    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    _values: dict[str, Any] = field(default_factory=dict)
    """The same arrays as values of ONNX Runtime, which must live as long as the sessions that use them."""

    def add_to(self, options: Any, model: ModelProto) -> None:
        """Give a session of `model` its large weights.

        The session does not arrange them anew for its kernels, which would be a copy of them. That makes it
        slower by up to a third.
        """
        names = [tensor.name for tensor in model.graph.initializer if tensor.name in self.arrays]
        if names:
            for name in names:
                if name not in self._values:
                    self._values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(self.arrays[name])
            values = [self._values[name] for name in names]
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.add_external_initializers(names, values)
            for name, value in zip(names, values, strict=True):  # otherwise the session copies them
                options.add_initializer(name, value)

    def clear(self) -> None:
        """Free the weights, after the last session that uses them."""
        self._values.clear()
        self.arrays.clear()

    def write(self, model: ModelProto, file: BinaryIO) -> None:
        """Write `model` with its large weights inside, without a copy of them. Raises `OSError`."""
        if not any(tensor.name in self.arrays for tensor in model.graph.initializer):
            file.write(model.SerializeToString())
            return
        rest = ModelProto()
        rest.CopyFrom(model)
        rest.ClearField("graph")
        graph = model.graph.__class__()
        graph.CopyFrom(model.graph)
        del graph.initializer[:]
        parts = [graph.SerializeToString()]
        for tensor in model.graph.initializer:
            parts += self._encode_weight(tensor)
        size = sum(map(len, parts))
        file.writelines([rest.SerializeToString(), *_encode_header(_GRAPH_FIELD, size), *parts])

    def _encode_weight(self, tensor: TensorProto) -> Iterator[bytes | memoryview]:
        values = self.arrays.get(tensor.name)
        header = TensorProto()
        header.CopyFrom(tensor)
        content: list[bytes | memoryview] = []
        if values is not None:
            header.ClearField("data_location")
            header.ClearField("external_data")
            raw_data = values.data.cast("B") if values.size else memoryview(b"")
            content = [*_encode_header(_RAW_DATA_FIELD, len(raw_data)), raw_data]
        start = header.SerializeToString()
        yield from _encode_header(_INITIALIZER_FIELD, len(start) + sum(map(len, content)))
        yield start
        yield from content


NO_WEIGHTS: Final = LargeWeights()
"""No weights, for a model that has all of its own inside."""


def take_large_weights(model: ModelProto) -> tuple[ModelProto, LargeWeights]:
    """Return a copy of `model` without its large weights, and the weights.

    The caller must drop `model`, whose memory is freed as a whole.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    for tensor in model.graph.initializer:
        size = math.prod(tensor.dims) * _item_bytes(tensor)
        # A weight with more or fewer bytes than its shape needs stays inside, for ONNX Runtime to refuse.
        if size >= _MIN_BYTES and tensor.data_type in _TYPES and len(tensor.raw_data) == size:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            arrays[tensor.name] = np.frombuffer(tensor.raw_data, dtype).reshape(tuple(tensor.dims))
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", _LOCATION), ("offset", "0"), ("length", str(size))):
                tensor.external_data.add(key=key, value=value)
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy, LargeWeights(arrays)


def _item_bytes(tensor: TensorProto) -> int:
    return helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize if tensor.data_type in _TYPES else 0


def _encode_header(number: int, size: int) -> Iterator[bytes]:
    """Yield key and length of a field with bytes, as protobuf encodes them."""
    for value in (number << 3 | 2, size):
        encoded = bytearray()
        while value > 0x7F:
            encoded.append(value & 0x7F | 0x80)
            value >>= 7
        encoded.append(value)
        yield bytes(encoded)

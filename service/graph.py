"""A model file with more outputs than it was made with, without the `onnx` package.

Protobuf messages concatenate: what follows a `ModelProto` is merged into it, and repeated fields grow
(protobuf.dev, "Last One Wins"). So `model + ModelProto{graph{output{name}}}` is the same model with one
output more, for which ONNX Runtime works out type and shape. Initializers can be had that way too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

# Field numbers of onnx.proto3 (onnx.ai), each with wire type 2: what follows has a length.
_MODEL_GRAPH: Final = 7
_GRAPH_OUTPUT: Final = 12
_VALUE_NAME: Final = 1


def with_outputs(model: bytes, names: Iterable[str]) -> bytes:
    """The model, an ONNX file's bytes, with these tensors as outputs behind its own."""
    outputs = (_field(_GRAPH_OUTPUT, _field(_VALUE_NAME, name.encode())) for name in names)
    return model + _field(_MODEL_GRAPH, b"".join(outputs))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the high bit set."""
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])

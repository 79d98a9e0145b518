"""ONNX files: the readers and edits without the `onnx` package take any bytes as a model, or refuse them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from io import BytesIO
from typing import Final

from fovea.service.artifact.inputs import InputTensor
from fovea.service.artifact.onnx_edit import (
    add_outputs,
    extract_preprocessing,
    list_external_weights,
    read_metadata,
    replace_input,
    replace_metadata,
)
from fovea.service.errors import ModelError
from tests.fuzz.target import Target, require

_TENSOR: Final = InputTensor("input", "float32", (3, 8, 8))


def check_model(model: bytes) -> bool:
    """Read and edit a model."""
    try:
        metadata = read_metadata(BytesIO(model))
        rewritten = b"".join(replace_metadata(memoryview(model), {"a": "é" * 100}))
        require(read_metadata(BytesIO(rewritten)) == {"a": "é" * 100}, "the metadata were not replaced")
        require(
            read_metadata(BytesIO(add_outputs(model, ["x"]))) == metadata, "new outputs change the metadata"
        )
        replace_input(model, _TENSOR)
        extract_preprocessing(model, _TENSOR)
        for weight in list_external_weights(model):
            require(weight.offset >= 0, f"a weight lies at {weight.offset}")
    except ModelError as error:
        str(error).encode()
        return False
    return True


def _encode(number: int, content: bytes) -> bytes:
    """Return a field of a protobuf message that holds bytes, of which there are less than 16384."""
    size = (len(content) & 127 | 128, len(content) >> 7)
    return bytes((number << 3 | 2, *size)) + content


def _make_seeds() -> list[bytes]:
    external = b"".join(
        _encode(13, _encode(1, key) + _encode(2, value))
        for key, value in ((b"location", b"weights"), (b"offset", b"64"), (b"length", b"16"))
    )
    weight = _encode(8, b"kernel") + b"\x08\x04\x08\x04" + b"\x10\x01" + external
    packed = _encode(8, b"bias") + _encode(1, b"\x04\x80\x01") + b"\x10\x0a" + _encode(9, bytes(16))
    node = _encode(1, b"pixels") + _encode(2, b"input") + _encode(4, b"Cast")
    graph = _encode(1, node) + _encode(5, weight) + _encode(5, packed) + _encode(11, _encode(1, b"pixels"))
    metadata = _encode(14, _encode(1, b"fovea.contract") + _encode(2, b"{}"))
    return [
        b"\x08\x0a" + _encode(7, graph) + metadata,
        b"\x08\x0a" + metadata * 2,
        _encode(7, b"") + metadata,
    ]


def change_field(model: bytes, choice: random.Random, numbers: Sequence[int]) -> bytes:
    """Wrap a piece as a field, or put a number in its place, so that lengths stay right more often."""
    start = choice.randrange(len(model) + 1)
    end = min(len(model), start + choice.choice((0, 1, 2, 8, 40)))
    piece = model[start:end]
    number = choice.choice(numbers)
    changes = (
        _encode(number, piece),
        bytes((number << 3, choice.choice((0, 1, 127)))),
        bytes((number << 3, *([255] * choice.choice((1, 8, 9))), choice.choice((0, 1, 127)))),
        bytes((number << 3 | choice.choice((1, 5)), *bytes(choice.choice((4, 8))))),
        b"\xff",
        b"",
    )
    return model[:start] + choice.choice(changes) + model[end:]


def _mutate(model: bytes, choice: random.Random) -> bytes:
    return change_field(model, choice, (1, 2, 5, 7, 8, 11, 12, 13, 14))


TARGET = Target(check_model, _make_seeds, _mutate, words=(b"offset", b"location", b"length", b"-1", b"input"))

"""The split of a message into images and the rest."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fovea.service.errors import BadRequest, BodyTooLarge
from fovea.service.grpc import inference_pb2 as pb
from fovea.service.grpc.infer_message import MAX_FIELDS, split_message

TEXT = st.text(max_size=5)
PARAMETERS = st.dictionaries(
    TEXT,
    st.one_of(
        st.builds(pb.InferParameter, bool_param=st.booleans()),
        st.builds(pb.InferParameter, int64_param=st.integers(-(1 << 63), (1 << 63) - 1)),
        st.builds(pb.InferParameter, string_param=TEXT),
        st.builds(pb.InferParameter, double_param=st.floats(allow_nan=False)),
    ),
    max_size=3,
)
CONTENTS = st.builds(
    pb.InferTensorContents,
    bool_contents=st.lists(st.booleans(), max_size=3),
    uint_contents=st.lists(st.integers(0, (1 << 32) - 1), max_size=3),
    fp32_contents=st.lists(st.floats(width=32, allow_nan=False), max_size=3),
    bytes_contents=st.lists(st.binary(max_size=300), max_size=3),
)
INPUTS = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=TEXT,
    datatype=TEXT,
    shape=st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=3),
    parameters=PARAMETERS,
    contents=CONTENTS,
)
OUTPUTS = st.builds(pb.ModelInferRequest.InferRequestedOutputTensor, name=TEXT, parameters=PARAMETERS)
REQUESTS = st.builds(
    pb.ModelInferRequest,
    model_name=TEXT,
    model_version=TEXT,
    id=TEXT,
    parameters=PARAMETERS,
    inputs=st.lists(INPUTS, max_size=3),
    outputs=st.lists(OUTPUTS, max_size=3),
    raw_input_contents=st.lists(st.binary(max_size=300), max_size=3),
)


@settings(max_examples=40)
@given(REQUESTS)
def test_parts_make_the_whole_message(request: pb.ModelInferRequest) -> None:
    message = split_message(request.SerializeToString(), 1 << 20)
    assert not message.head.raw_input_contents and len(message.contents) == len(request.inputs)
    head = message.head
    head.raw_input_contents.extend(map(bytes, message.raw_contents))
    for tensor, contents in zip(head.inputs, message.contents, strict=True):
        assert not tensor.contents.fp32_contents and not tensor.contents.bytes_contents
        tensor.contents.bytes_contents.extend(map(bytes, contents.elements))
        floats = b"".join(contents.floats)
        tensor.contents.fp32_contents.extend(struct.unpack(f"<{len(floats) // 4}f", floats))
    assert head == request


@given(st.binary(max_size=200))
def test_noise_is_refused_or_parsed(content: bytes) -> None:
    try:
        split_message(content, 1 << 20)
    except BadRequest as error:
        assert "message" in str(error)


@settings(max_examples=40)
@given(REQUESTS, st.data())
def test_damaged_message_is_refused_or_parsed(request: pb.ModelInferRequest, data: st.DataObject) -> None:
    content = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        split_message(bytes(content), 1 << 20)
    except BadRequest as error:
        assert "message" in str(error)


def test_number_of_fields_is_limited_at_every_level() -> None:
    def nest(number: int, content: bytes) -> bytes:
        message: bytes = pb.InferTensorContents(bytes_contents=[content]).SerializeToString()
        return bytes([number << 3 | 2]) + message[1:]  # the same length, under another number

    many = MAX_FIELDS + 1
    for content in (
        b"\x22\x00" * many,
        nest(5, b"\x22\x00" * many),
        nest(5, nest(5, b"\x42\x00" * many)),
        nest(6, b"\x12\x00" * many),
    ):
        with pytest.raises(BadRequest, match="fields"):
            split_message(content, 1 << 20)


def test_images_do_not_count_towards_the_limit_of_the_rest() -> None:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x")
    tensor.contents.bytes_contents.append(bytes(10_000))
    request = pb.ModelInferRequest(inputs=[tensor], raw_input_contents=[bytes(10_000)])
    split_message(request.SerializeToString(), 100)
    request.model_name = "x" * 101
    with pytest.raises(BodyTooLarge, match=r"at most 100 \(FOVEA_JSON_BYTES\)"):
        split_message(request.SerializeToString(), 100)

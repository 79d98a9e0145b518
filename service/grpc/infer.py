"""Inference requests over gRPC: from the message to images, and from results to the reply.

The checks and the outputs are those of the protocol over HTTP (`service.api.oip.infer`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

from fovea.service.api.adapter import InferenceRequest, ParsedRequest, Reply
from fovea.service.api.bodies import MAX_INLINE_BYTES
from fovea.service.api.oip.infer import InferAdapter, Output, parse_infer_value
from fovea.service.api.tensors import (
    ENCODED_DATATYPE,
    MAX_PARTS,
    NO_BINARY_DATA,
    BinaryData,
    shorten_value,
)
from fovea.service.errors import BadRequest
from fovea.service.grpc import inference_pb2 as pb
from fovea.service.grpc.infer_message import Contents, InferMessage
from fovea.service.http.request_record import RequestRecord
from fovea.service.image_warnings import format_warnings
from fovea.service.serving.classifier import Classification
from fovea.service.serving.live_model import LiveModel

_MEDIA_TYPE: Final = "application/grpc"

_CONTENTS_FIELDS: Final = {
    "UINT8": "uint_contents",
    "FP32": "fp32_contents",
    ENCODED_DATATYPE: "bytes_contents",
}
"""Fields of `contents` by datatype. The protocol has none for FP16."""


class GrpcInferAdapter(InferAdapter):
    """The parser of inference requests whose `InferMessage` is in the options of the request."""

    async def parse_request(self, request: InferenceRequest) -> ParsedRequest:
        """Parse a request, in a thread if it has many values."""
        await self._import_numpy()
        message: InferMessage = request.options
        if message.head.ByteSize() <= MAX_INLINE_BYTES:
            return _parse_message(message, request)
        return await asyncio.to_thread(_parse_message, message, request)


def _parse_message(message: InferMessage, request: InferenceRequest) -> ParsedRequest:
    head = message.head
    inputs = [
        {
            "name": one.name,
            "datatype": one.datatype,
            "shape": list(one.shape[: MAX_PARTS + 1]),
            "parameters": _read_parameters(one.parameters),
        }
        for one in head.inputs
    ]
    binary_data = NO_BINARY_DATA
    if len(inputs) == 1:  # the shared checks refuse any other number
        values, binary_data = _find_values(message)
        inputs[0]["data"] = values
    value = {
        "id": head.id or None,
        "parameters": _read_parameters(head.parameters),
        "inputs": inputs,
        "outputs": [
            {"name": one.name, "parameters": _read_parameters(one.parameters)} for one in head.outputs
        ]
        or None,
    }
    return parse_infer_value(value, request, binary_data, _create_format, is_binary=True)


def _find_values(message: InferMessage) -> tuple[list[Any] | None, BinaryData]:
    """Return the values of the only input, as a list or as binary data. Raises `BadRequest`."""
    (infer_input,), (contents,) = message.head.inputs, message.contents
    name = shorten_value(infer_input.name)
    typed_fields = {field.name for field, _ in infer_input.contents.ListFields()}
    typed_fields |= {"fp32_contents"} if contents.floats else set()
    typed_fields |= {"bytes_contents"} if contents.elements else set()
    if message.raw_contents:
        if typed_fields:
            raise BadRequest(f"input {name} has contents and also raw_input_contents; send one")
        if len(message.raw_contents) > 1:
            raise BadRequest(
                f"raw_input_contents has {len(message.raw_contents)} elements; send one for each input"
            )
        return None, _to_binary_data(message.raw_contents[0], "raw_input_contents")
    expected_field = _CONTENTS_FIELDS.get(infer_input.datatype)
    if expected_field is None or typed_fields != {expected_field}:
        sent = ", ".join(sorted(typed_fields)) or "no values"
        expectation = f"{expected_field} or raw_input_contents" if expected_field else "raw_input_contents"
        raise BadRequest(
            f"input {name} of datatype {shorten_value(infer_input.datatype)} has {sent}; send {expectation}"
        )
    if infer_input.datatype == ENCODED_DATATYPE:
        return list(contents.elements), NO_BINARY_DATA
    if not contents.floats:
        # small, or encoded by hand: one value at a time
        return list(getattr(infer_input.contents, expected_field)), NO_BINARY_DATA
    return None, _to_binary_data(_join_floats(infer_input, contents), expected_field)


def _join_floats(infer_input: pb.ModelInferRequest.InferInputTensor, contents: Contents) -> memoryview:
    """Return the packed values of an input, which a client may send in several pieces."""
    if infer_input.contents.fp32_contents:
        raise BadRequest(
            f"fp32_contents of input {shorten_value(infer_input.name)} are packed and also not packed; send "
            "them packed"
        )
    return contents.floats[0] if len(contents.floats) == 1 else memoryview(b"".join(contents.floats))


def _to_binary_data(view: memoryview, field: str) -> BinaryData:
    return BinaryData(view, lambda start, stop: view[start:stop], field)


def _read_parameters(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    """Return parameters as plain values; None for a parameter without a value."""
    values = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        values[name] = getattr(parameter, choice) if choice else None
    return values


def _create_format(labels: int, request_id: str | None, outputs: Sequence[Output]) -> _GrpcInferFormat:
    """Return the format of a reply.

    The protocol wants raw contents for all outputs or for none, so one output that asks for typed contents
    decides for all.
    """
    is_raw = all(output.is_binary for output in outputs)
    return _GrpcInferFormat(
        labels, request_id, is_raw, [replace(output, is_binary=is_raw) for output in outputs]
    )


class _GrpcInferFormat(NamedTuple):
    """The content of a reply: the requested outputs."""

    labels_per_image: int
    request_id: str | None
    is_raw: bool
    outputs: Sequence[Output]

    def render(self, results: Sequence[Classification], model: LiveModel, record: RequestRecord) -> Reply:
        """Render the results (`service.api.adapter.ReplyFormat`)."""
        reply = pb.ModelInferResponse(
            model_name=model.name, model_version=model.version, id=self.request_id or ""
        )
        if warnings := format_warnings([one.answer.warnings for one in results]):
            reply.parameters["warnings"].string_param = warnings
        for output in self.outputs:
            head, content = output.render(results)
            tensor = reply.outputs.add(name=head["name"], datatype=head["datatype"], shape=head["shape"])
            if self.is_raw:
                reply.raw_output_contents.append(content)
            elif head["datatype"] == ENCODED_DATATYPE:
                tensor.contents.bytes_contents.extend(text.encode() for text in head["data"])
            else:
                tensor.contents.fp32_contents.extend(head["data"].tolist())
        return Reply(reply.SerializeToString(), media_type=_MEDIA_TYPE)

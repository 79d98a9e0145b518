"""gRPC messages: the bytes of an inference request become images, or an error, without many objects."""

from __future__ import annotations

import random
from typing import Any, Final

from fovea.service.api.adapter import InferenceRequest
from fovea.service.api.bodies import RawBody
from fovea.service.api.tensors import pack_elements
from fovea.service.errors import RequestError
from fovea.service.grpc import inference_pb2 as pb
from fovea.service.grpc.infer import GrpcInferAdapter
from fovea.service.grpc.infer_message import split_message
from fovea.service.http.request_record import RequestRecord
from tests.fuzz.json_bodies import make_loop
from tests.fuzz.onnx_files import change_field
from tests.fuzz.target import Target, require
from tests.service.api.infer_bodies import SETTINGS, check_infer_request, make_model

_MODEL: Final = make_model()
_ADAPTER: Final = GrpcInferAdapter()
_LOOP: Final = make_loop()


def check_message(data: bytes) -> bool:
    """Split a message and parse it as a request."""
    try:
        message = split_message(data, 2000)
        views = [*message.raw_contents, *(one for each in message.contents for one in each.elements)]
        require(sum(map(len, views)) <= len(data), "more images than there was")
        require(message.head.ByteSize() <= 2 * len(data) + 64, "the rest is larger than the message")
        request = InferenceRequest(RawBody(b"", 0), {}, message, _MODEL, SETTINGS, RequestRecord("POST", {}))
        parsed = _LOOP.run_until_complete(_ADAPTER.parse_request(request))
    except RequestError as error:
        require(len(str(error).encode()) < 1000, "the error quotes the message")
        return False
    check_infer_request(_MODEL, parsed, len(data))
    return True


def _make_message(name: str, shape: list[int], datatype: str, **more: Any) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name=name, shape=shape, datatype=datatype)
    return pb.ModelInferRequest(model_name="small", id="1", inputs=[tensor], **more)


def _make_seeds() -> list[bytes]:
    image = b"\xff\xd8\xff\xe0"
    raw = _make_message("pixels", [1, 2, 2, 3], "UINT8", raw_input_contents=[bytes(12)])
    raw.parameters["timeout"].int64_param = 1000
    floats = _make_message("input", [1, 3, 2, 2], "FP32")
    floats.inputs[0].contents.fp32_contents.extend([0.5] * 12)
    numbers = _make_message("pixels", [1, 2, 2, 3], "UINT8")
    numbers.inputs[0].contents.uint_contents.extend(range(12))
    elements = _make_message("image", [2], "BYTES")
    elements.inputs[0].contents.bytes_contents.extend([image, image])
    output = pb.ModelInferRequest.InferRequestedOutputTensor(name="probabilities")
    output.parameters["classification"].int64_param = 2
    packed = _make_message(
        "image", [1, 1], "BYTES", raw_input_contents=[pack_elements([image])], outputs=[output]
    )
    return [one.SerializeToString() for one in (raw, floats, numbers, elements, packed)]


def _mutate(data: bytes, choice: random.Random) -> bytes:
    return change_field(data, choice, numbers=range(1, 10))


TARGET: Final = Target(
    check_message,
    _make_seeds,
    _mutate,
    words=(
        b"pixels",
        b"input",
        b"image",
        b"BYTES",
        b"UINT8",
        b"FP32",
        b"FP16",
        b"classification",
        b"timeout",
    ),
    max_size=2000,
)

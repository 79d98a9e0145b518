"""Bodies of infer requests, read as the service reads them, without a server: for fuzzing (`tests/fuzz`)."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fovea.service.api.adapter import InferenceRequest, ParsedRequest
from fovea.service.api.bodies import RawBody
from fovea.service.api.oip.infer import InferAdapter
from fovea.service.artifact.inputs import InputTensor
from fovea.service.artifact.repository import ModelVersion
from fovea.service.http.request_record import RequestRecord
from fovea.service.runners.batch_messages import ImageRequest
from fovea.service.runners.load_messages import LoadCommand, LoadedModel, ProcessPlan
from fovea.service.serving.live_model import LiveModel
from fovea.service.settings import Settings
from tests.graphs import build_model, read_contract

_PLAN = ProcessPlan("cpu", 4, 1, 0, 1, 1_000_000, 1 << 28, 1)

SETTINGS = Settings(json_bytes=100_000, request_images=8)


def make_model() -> LiveModel:
    """Return a model that takes two kinds of small tensors."""
    load_reply = LoadedModel(read_contract(build_model()).to_json(), "cpu", 4, 1e6, 0.0, {})
    live_model = LiveModel.from_load_result(
        ModelVersion(Path("model.onnx"), None, None, ()),
        LoadCommand(0, "", "", (), _PLAN),
        load_reply,
        SETTINGS,
    )
    live_model.tensors = (
        InputTensor("pixels", "uint8", (2, 2, 3)),
        InputTensor("input", "float32", (3, 2, 2)),
    )
    return live_model


_ADAPTER = InferAdapter()


def parse_infer_body(model: LiveModel, header: bytes | None, body: bytes) -> ParsedRequest:
    """Return the parsed request. Raises `RequestError`."""
    return asyncio.run(_ADAPTER.parse_request(make_infer_request(model, header, body)))


def make_infer_request(model: LiveModel, header: bytes | None, body: bytes) -> InferenceRequest:
    """Return a request as the service passes it to the adapter."""
    headers = {} if header is None else {b"inference-header-content-length": header}
    return InferenceRequest(
        RawBody(body, len(body)), headers, None, model, SETTINGS, RequestRecord("POST", headers)
    )


def check_infer_request(model: LiveModel, request: ParsedRequest, size: int) -> None:
    """Check that an accepted request has images, not too many, all within the body and with whole rows.

    Raises `ValueError`.
    """
    sizes = {tensor.name: tensor.size for tensor in model.tensors}
    if not 0 < len(request.images) <= SETTINGS.request_images:
        raise ValueError(f"{len(request.images)} images")
    for image in request.images:
        if (
            isinstance(image, ImageRequest)
            and image.tensor_name
            and len(image.content) != sizes[image.tensor_name]
        ):
            raise ValueError(f"a row of {len(image.content)} bytes")
    contents = [image.content if isinstance(image, ImageRequest) else image for image in request.images]
    if sum(map(len, contents)) > 4 * size:  # a number of JSON may become a float32
        raise ValueError("more than there was")

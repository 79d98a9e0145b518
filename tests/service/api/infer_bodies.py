"""Bodies of infer requests, read as the service reads them, without a server: for fuzzing.

`python -m tests.service.api.infer_bodies` lets atheris look for bodies that the parser does not expect.
`test_infer_bodies.py` has the bodies that it found.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import orjson

from fovea.service.api.adapter import InferenceRequest, ParsedRequest
from fovea.service.api.bodies import RawBody
from fovea.service.api.oip.infer import InferAdapter
from fovea.service.artifact.inputs import InputTensor
from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import RequestError
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


def main() -> None:
    """Fuzz until stopped, or as libFuzzer's arguments say."""
    import atheris

    live_model = make_model()

    def fuzz_one(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        header, body = _draw_request(provider)
        try:
            check_infer_request(live_model, parse_infer_body(live_model, header, body), len(body))
        except RequestError as error:
            str(error).encode()

    atheris.instrument_all()
    atheris.Setup(sys.argv, fuzz_one)
    atheris.Fuzz()


def _draw_request(provider: Any) -> tuple[bytes, bytes]:
    """Return the header and the body of a nearly valid request, so that its binary data is reached."""
    tensor: dict[str, Any] = {
        "name": provider.PickValueInList(["pixels", "input", "image"]),
        "datatype": provider.PickValueInList(["UINT8", "FP32", "BYTES"]),
        "shape": provider.PickValueInList([[1], [2], [3, 1], [1, 2, 2, 3], [2, 3, 2, 2], [2**40]]),
    }
    if provider.ConsumeBool():
        tensor["parameters"] = {"binary_data_size": provider.ConsumeIntInRange(-8, 200)}
    if provider.ConsumeProbability() < _JSON_DATA_SHARE:
        tensor["data"] = provider.ConsumeIntListInRange(provider.ConsumeIntInRange(0, 40), -1, 256)
    header_json = orjson.dumps({"inputs": [tensor]})
    header = len(header_json) + (provider.ConsumeIntInRange(-3, 3) if provider.ConsumeBool() else 0)
    return str(header).encode(), header_json + provider.ConsumeBytes(provider.remaining_bytes())


_JSON_DATA_SHARE = 0.1
"""Share of the requests that have their values in JSON."""


if __name__ == "__main__":
    main()

"""Open Inference Protocol v2 over HTTP, as in KServe, Triton, OpenVINO Model Server and MLServer.

    GET  /v2, /v2/health/live, /v2/health/ready
    GET  /v2/models/{name}[/versions/{version}][/ready | /config | /stats]
    POST /v2/models/{name}[/versions/{version}]/infer

It has the extensions binary_tensor_data, classification, model_configuration and statistics. The extension
model_repository is in `service.api.oip.repository`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from fovea.service import __version__
from fovea.service.api import bodies
from fovea.service.api.endpoint import (
    RAW_IMAGE_CONTENT,
    InferenceRequest,
    ParsedRequest,
    ProtocolAdapter,
    ProtocolRoutes,
    Reply,
)
from fovea.service.api.json_bodies import parse_json, validate_json
from fovea.service.api.options import check_spelling
from fovea.service.api.schemas import FlatError, build_error_responses
from fovea.service.api.services import Services
from fovea.service.api.tensors import (
    DATATYPES,
    ENCODED_DATATYPE,
    MAX_PARTS,
    BinaryData,
    InferInput,
    ModelInputs,
    check_parameters,
    pack_elements,
    parse_json_size,
    read_parameter,
    shorten_value,
)  # fmt: skip
from fovea.service.artifact.inputs import find_original_output
from fovea.service.errors import BadRequest
from fovea.service.http.api_protocol import ApiProtocol, render_flat_error
from fovea.service.http.fast_path import Headers
from fovea.service.image_warnings import format_warnings
from fovea.service.runners.messages import Image, ImageRequest, Item
from fovea.service.runners.shared_memory import SharedBuffer
from fovea.service.serving.classifier import Classification
from fovea.service.serving.registry import LiveModel
from fovea.service.serving.statistics import DurationSum
from fovea.service.settings import Settings

PROTOCOL: Final = ApiProtocol("oip", render_flat_error, path_prefix="/v2")

_EXTENSIONS: Final = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "statistics",
)

_PLATFORM: Final = "onnxruntime_onnx"

_JSON_LENGTH_HEADER: Final = "inference-header-content-length"

_FLOAT_DATATYPE: Final = DATATYPES[np.dtype(np.float32)]


# --- requests ------------------------------------------------------------------------------------


class InferOutput(BaseModel):
    """One tensor that is asked for. `classification` in its `parameters` gives so many labels instead, each
    as `value:index:label`; `binary_data` sends it behind the JSON."""

    model_config = ConfigDict(strict=True)

    name: str
    parameters: dict[str, Any] | None = None


class InferRequest(BaseModel):
    """Images as one tensor. Of `parameters`, `binary_data_output` and `timeout`, in microseconds, count."""

    model_config = ConfigDict(strict=True)

    id: str | None = None
    parameters: dict[str, Any] | None = None
    inputs: list[InferInput] = Field(min_length=1, max_length=MAX_PARTS)
    outputs: list[InferOutput] | None = Field(
        None, max_length=MAX_PARTS, description="The probabilities unless given."
    )


# --- replies -------------------------------------------------------------------------------------


class ServerLive(BaseModel):
    """The service answers."""

    live: bool


class ServerReady(BaseModel):
    """Answers are given."""

    ready: bool


class ModelReady(BaseModel):
    """Answers of this model are given."""

    name: str
    ready: bool


class ServerMetadata(BaseModel):
    """What answers, and the protocol's extensions that it speaks."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """A tensor; -1 is any number of images."""

    name: str
    datatype: str
    shape: list[int]


class Alternatives(BaseModel):
    """What may be sent, and asked for, in place of the rest or beside it."""

    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelMetadata(BaseModel):
    """A model. A request has one input; encoded images may have any input's name."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    alternatives: Alternatives


class InferTensor(BaseModel):
    """One tensor of an answer; its values are `data`, or behind the JSON."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[float] | list[str] | None = None


class InferReply(BaseModel):
    """What the model says of all images."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, str] | None = Field(
        None, description="`warnings`: what may surprise about how the pixels came about, by code."
    )
    outputs: list[InferTensor]


def add_routes(app: FastAPI, services: Services) -> None:
    """Add the routes of this protocol."""
    _add_server_routes(app, services)
    _add_model_routes(app, services)
    routes = ProtocolRoutes(app, services, PROTOCOL, FlatError)
    for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        routes.add_endpoint(
            path,
            InferAdapter(),
            summary="Classify images",
            reply_type=InferReply,
            body_type=InferRequest,
            content=RAW_IMAGE_CONTENT,
            make_example=lambda image: {
                "inputs": [{"name": "image", "shape": [1], "datatype": ENCODED_DATATYPE, "data": [image]}]
            },
        )


def _add_server_routes(app: FastAPI, services: Services) -> None:
    @app.get("/v2", tags=[PROTOCOL.name])
    async def server() -> ServerMetadata:
        """What answers here."""
        return ServerMetadata(name="fovea", version=__version__, extensions=list(_EXTENSIONS))

    @app.get("/v2/health/live", tags=[PROTOCOL.name], responses={503: build_error_responses(FlatError)[503]})
    async def live() -> ServerLive:
        """The process answers, and has not been without a runner for too long."""
        services.classifier.require_alive()
        return ServerLive(live=True)

    @app.get("/v2/health/ready", tags=[PROTOCOL.name], responses={503: build_error_responses(FlatError)[503]})
    async def ready() -> ServerReady:
        """The models are ready."""
        services.require_ready()
        return ServerReady(ready=True)


def _add_model_routes(app: FastAPI, services: Services) -> None:
    registry = services.classifier.registry
    error_responses = build_error_responses(FlatError)
    route_options: dict[str, Any] = {
        "tags": [PROTOCOL.name],
        "responses": {one: error_responses[one] for one in (404, 503)},
    }

    @app.get("/v2/models/stats", tags=[PROTOCOL.name])
    async def all_statistics() -> dict[str, Any]:
        """What all models that are loaded have done."""
        return {"model_stats": [_render_statistics(model) for model in registry.models]}

    def add_route(
        path: str, get_reply: Callable[[str, str | None], Any], reply_type: Any, summary: str
    ) -> None:
        async def of_model(name: str) -> Any:
            return await get_reply(name, None)

        async def of_version(name: str, version: str) -> Any:
            return await get_reply(name, version)

        for model_path, handler in (("{name}", of_model), ("{name}/versions/{version}", of_version)):
            suffix = handler.__name__
            app.get(
                f"/v2/models/{model_path}{path}",
                response_model=reply_type,
                summary=summary,
                operation_id=f"{PROTOCOL.name}_{path.strip('/') or 'metadata'}_{suffix}",
                **route_options,
            )(handler)

    async def get_metadata(name: str, version: str | None) -> ModelMetadata:
        return _render_metadata(
            await services.get_model(name, version),
            [one.version or "" for one in registry.list_versions(name)],
        )

    async def check_ready(name: str, version: str | None) -> ModelReady:
        registry.get(name, version)  # the model may not be loaded; it is loaded when a request needs it
        services.require_ready()
        return ModelReady(name=name, ready=True)

    async def get_statistics(name: str, version: str | None) -> dict[str, Any]:
        return {"model_stats": [_render_statistics(await services.get_model(name, version))]}

    async def get_configuration(name: str, version: str | None) -> dict[str, Any]:
        return _render_configuration(
            await services.get_model(name, version), services.settings.request_images
        )

    add_route("", get_metadata, ModelMetadata, "What a model takes and gives")
    add_route("/config", get_configuration, dict[str, Any], "The same as Triton's clients read it")
    add_route("/ready", check_ready, ModelReady, "Whether a model answers")
    add_route("/stats", get_statistics, dict[str, Any], "What a model has done since it was loaded")


def _render_metadata(model: LiveModel, versions: list[str]) -> ModelMetadata:
    """Return the metadata with one input and one output.

    Clients send every input that the metadata names, and many clients refuse more than one. The others are in
    `alternatives`.
    """
    *others, default_input = [
        TensorMetadata(name=one.name, datatype=DATATYPES[one.dtype], shape=[-1, *one.shape])
        for one in model.tensors
    ]
    encoded = TensorMetadata(
        name=ModelInputs(model.tensors).encoded_name, datatype=ENCODED_DATATYPE, shape=[-1]
    )
    first, *further = [
        TensorMetadata(name=name, datatype=_FLOAT_DATATYPE, shape=[-1, kind.width])
        for name, kind in _list_outputs(model).items()
    ]
    return ModelMetadata(
        name=model.name,
        versions=versions,
        platform=_PLATFORM,
        inputs=[default_input],
        outputs=[first],
        alternatives=Alternatives(inputs=[*others, encoded], outputs=further),
    )


def _render_configuration(model: LiveModel, max_batch_size: int) -> dict[str, Any]:
    """Return the configuration in Triton's form.

    Clients read the largest batch from it, and the sizes and layout of one image.
    """
    default_input, name = model.tensors[-1], model.contract.probabilities_name
    layout = "FORMAT_NHWC" if default_input.shape[-1] == _CHANNELS else "FORMAT_NCHW"
    data_type = f"TYPE_{DATATYPES[default_input.dtype]}"
    return {
        "name": model.name,
        "platform": _PLATFORM,
        "backend": "onnxruntime",
        "max_batch_size": max_batch_size,
        "input": [
            {
                "name": default_input.name,
                "data_type": data_type,
                "format": layout,
                "dims": list(default_input.shape),
            }
        ],
        "output": [
            {"name": name, "data_type": f"TYPE_{_FLOAT_DATATYPE}", "dims": [_list_outputs(model)[name].width]}
        ],
    }


_CHANNELS: Final = 3


class _OutputKind(NamedTuple):
    """The type of an output."""

    width: int
    """Number of values for each image."""
    is_logits: bool


def _list_outputs(model: LiveModel) -> dict[str, _OutputKind]:
    """Return the outputs of a model by name; an output of an imported file also keeps its original name."""
    contract = model.contract
    kinds = {
        contract.probabilities_name: _OutputKind(len(contract.labels), is_logits=False),
        contract.logits_name: _OutputKind(contract.logit_count, is_logits=True),
    }
    if own := find_original_output(contract):
        name, ours = own
        kinds.setdefault(name, kinds[ours])
    return kinds


# --- inference -----------------------------------------------------------------------------------


class InferAdapter(ProtocolAdapter):
    """The parser of inference requests, in JSON alone or with binary tensors behind the JSON."""

    def body_limit(self, headers: Headers, settings: Settings) -> bodies.BodyLimit:
        """Return the size limit; without the binary extension the whole body is JSON."""
        is_binary = _JSON_LENGTH_HEADER.encode() in headers
        return bodies.body_limit(settings) if is_binary else bodies.json_limit(settings)

    async def parse_request(self, request: InferenceRequest) -> ParsedRequest:
        body, size = request.body.take_content(), request.body.size
        json_size = parse_json_size(request.headers.get(_JSON_LENGTH_HEADER.encode()), size)
        bodies.json_limit(request.settings).check(json_size)
        view = body.view(0, size) if isinstance(body, SharedBuffer) else memoryview(body)

        def get_image(start: int, stop: int) -> Image:
            start, stop = start + json_size, stop + json_size
            return body.to_ref(start, stop) if isinstance(body, SharedBuffer) else view[start:stop]

        binary_data = BinaryData(view[json_size:], get_image)
        json_body = bodies.RawBody(body if isinstance(body, SharedBuffer) else body[:json_size], json_size)
        return await parse_json(json_body, lambda value: _parse_infer_request(value, request, binary_data))


@dataclass(frozen=True)
class _Output:
    """One tensor of a reply."""

    name: str
    width: int
    """Number of values for each image."""
    is_logits: bool
    top_k: int
    """Number of labels for each image that replace the values; 0 means values."""
    is_binary: bool

    def render(self, results: Sequence[Classification]) -> tuple[dict[str, Any], bytes]:
        """Return the tensor as plain values, and its binary data for after the JSON."""
        rows = [one.answer.logits if self.is_logits else one.answer.probabilities for one in results]
        values = np.frombuffer(b"".join(row for row in rows if row is not None), np.float32)
        values = values.reshape(len(results), self.width)
        head: dict[str, Any] = {"name": self.name, "datatype": _FLOAT_DATATYPE, "shape": list(values.shape)}
        content: bytes = b""
        if self.top_k:
            texts = [
                text for row in values for text in self._rank_labels(row, results[0].model.contract.labels)
            ]
            head |= {"datatype": ENCODED_DATATYPE, "shape": [len(results), self.top_k]}
            if self.is_binary:
                content = pack_elements([text.encode() for text in texts])
            else:
                head["data"] = texts
        elif self.is_binary:
            content = values.tobytes()
        else:
            head["data"] = values.ravel()
        if self.is_binary:
            head["parameters"] = {"binary_data_size": len(content)}
        return head, content

    def _rank_labels(self, row: npt.NDArray[np.float32], labels: Sequence[str]) -> list[str]:
        """Return `value:index:label`, the highest value first.

        Nine digits distinguish every float32 from its neighbours. The single logit of a binary model has no
        label.
        """
        best = np.argsort(-row, kind="stable")[: self.top_k].tolist()
        suffixes = [f":{labels[index]}" if len(labels) == len(row) else "" for index in best]
        return [f"{row[index]:.9g}:{index}{name}" for index, name in zip(best, suffixes, strict=True)]


def _parse_infer_request(value: Any, request: InferenceRequest, binary_data: BinaryData) -> ParsedRequest:
    infer_request = validate_json(InferRequest, value)
    parameters = infer_request.parameters or {}
    _check_spelling(value)
    outputs = _resolve_outputs(
        infer_request.outputs, read_parameter(parameters, "binary_data_output", False), request.model
    )
    rows = ModelInputs(request.model.tensors).split_rows(infer_request.inputs, binary_data, request.settings)
    needs_logits = any(output.is_logits for output in outputs)
    images: list[Item] = [
        ImageRequest(row.content, row.tensor_name, needs_logits)
        if row.tensor_name or needs_logits
        else row.content
        for row in rows
    ]

    def render_reply(results: Sequence[Classification]) -> Reply:
        warnings = format_warnings([one.answer.warnings for one in results])
        return _build_reply(
            infer_request.id, request.model, [output.render(results) for output in outputs], warnings
        )

    labels = sum(output.top_k or output.width // _VALUES_PER_LABEL for output in outputs)
    microseconds = read_parameter(parameters, "timeout", 0)  # 0 means no limit, as in Triton
    return ParsedRequest(images, render_reply, labels, microseconds / 1e6 or None)


def _check_spelling(value: dict[str, Any]) -> None:
    """Raise `BadRequest` for a misspelt name.

    Other unknown names are ignored, as the protocol requires: clients send parameters of other servers, such
    as `priority`.
    """
    check_spelling(value, InferRequest.model_fields, "the request's key")
    check_spelling(value.get("parameters") or (), _REQUEST_PARAMETERS, "the request's parameter")
    for kind, model, parameters in (
        ("inputs", InferInput, _INPUT_PARAMETERS),
        ("outputs", InferOutput, _OUTPUT_PARAMETERS),
    ):
        for one in value.get(kind) or ():
            check_spelling(one, model.model_fields, f"in {kind} the key")
            check_spelling(one.get("parameters") or (), parameters, f"in {kind} the parameter")


_REQUEST_PARAMETERS: Final = ("binary_data_output", "timeout")

_INPUT_PARAMETERS: Final = ("binary_data_size",)

_OUTPUT_PARAMETERS: Final = ("classification", "binary_data")
"""Supported parameters of a request, of each of its inputs, and of each of its outputs."""

_VALUES_PER_LABEL: Final = 50
"""Number of tensor values that take as long to write as one label."""


def _resolve_outputs(
    requested_outputs: Sequence[InferOutput] | None, is_binary: bool, model: LiveModel
) -> list[_Output]:
    """Return the requested outputs; `is_binary` is the default for outputs that do not set `binary_data`.

    Raises `BadRequest` for an unknown output, or an output that is requested twice.
    """
    kinds = _list_outputs(model)
    infer_outputs = requested_outputs or [InferOutput(name=model.contract.probabilities_name)]
    if len({one.name for one in infer_outputs}) < len(infer_outputs):
        raise BadRequest("an output is asked for twice")
    outputs = []
    for one in infer_outputs:
        if one.name not in kinds:
            raise BadRequest(
                f"the model gives {', '.join(map(repr, kinds))}, and no {shorten_value(one.name)}"
            )
        parameters, (width, is_logits) = check_parameters(one.parameters), kinds[one.name]
        outputs.append(
            _Output(
                one.name,
                width,
                is_logits,
                top_k=min(read_parameter(parameters, "classification", 0), width),
                is_binary=read_parameter(parameters, "binary_data", is_binary),
            )
        )
    return outputs


def _build_reply(
    request_id: str | None, model: LiveModel, outputs: Sequence[tuple[dict[str, Any], bytes]], warnings: str
) -> Reply:
    value: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
    if request_id is not None:
        value["id"] = request_id
    if warnings:
        value["parameters"] = {"warnings": warnings}
    value["outputs"] = [head for head, _ in outputs]
    json_content = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    if not any("parameters" in head for head, _ in outputs):
        return Reply(json_content)
    content = b"".join([json_content, *(content for _, content in outputs)])
    return Reply(content, {_JSON_LENGTH_HEADER: str(len(json_content))}, "application/octet-stream")


# --- statistics ----------------------------------------------------------------------------------


def _render_statistics(model: LiveModel) -> dict[str, Any]:
    """Return the statistics in Triton's form.

    `success` and `fail` count requests, the other entries count images. The numbers are those of the worker
    that answers, since it loaded the model.
    """
    statistics = model.statistics
    calls = sum(call.count for call in statistics.model_calls.values())
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": round((time.time() - time.monotonic() + statistics.last_answer_at) * 1000)
        if statistics.last_answer_at
        else 0,
        "inference_count": round(statistics.inference.count),
        "execution_count": round(calls),
        "inference_stats": {
            "success": _render_sum(statistics.succeeded_requests),
            "fail": _render_sum(statistics.failed_requests),
            "queue": _render_sum(statistics.queue),
            "compute_input": _render_sum(statistics.decode),
            "compute_infer": _render_sum(statistics.inference),
            "compute_output": _render_sum(DurationSum()),
            "cache_hit": _render_sum(DurationSum()),
            "cache_miss": _render_sum(DurationSum()),
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": _render_sum(DurationSum()),
                "compute_infer": _render_sum(call),
                "compute_output": _render_sum(DurationSum()),
            }
            for size, call in sorted(statistics.model_calls.items())
        ],
    }


def _render_sum(total: DurationSum) -> dict[str, int]:
    return {"count": round(total.count), "ns": round(total.seconds * 1e9)}

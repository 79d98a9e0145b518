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
from fovea.service.api.endpoint import RAW, Asked, Heard, Reply, Routes, Translation
from fovea.service.api.schemas import FlatError, failures
from fovea.service.api.services import Desk
from fovea.service.api.tensors import (
    DATATYPES,
    ENCODED,
    MOST_PARTS,
    Behind,
    InferInput,
    Inputs,
    elements,
    header_size,
    of_tensor,
    parameter,
    short,
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

DIALECT: Final = ApiProtocol("oip", render_flat_error, path_prefix="/v2")

_EXTENSIONS: Final = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "statistics",
)

_PLATFORM: Final = "onnxruntime_onnx"

_HEADER: Final = "inference-header-content-length"

_FLOAT: Final = DATATYPES[np.dtype(np.float32)]


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
    inputs: list[InferInput] = Field(min_length=1, max_length=MOST_PARTS)
    outputs: list[InferOutput] | None = Field(
        None, max_length=MOST_PARTS, description="The probabilities unless given."
    )


# --- replies -------------------------------------------------------------------------------------


class Live(BaseModel):
    """The service answers."""

    live: bool


class Ready(BaseModel):
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


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Add the routes of this protocol."""
    _add_server(app, desk)
    _add_models(app, desk)
    routes = Routes(app, desk, DIALECT, FlatError)
    for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        routes.ask(
            path,
            Infer(),
            summary="Classify images",
            reply=InferReply,
            body=InferRequest,
            content=RAW,
            example=lambda image: {
                "inputs": [{"name": "image", "shape": [1], "datatype": ENCODED, "data": [image]}]
            },
        )


def _add_server(app: FastAPI, desk: Desk) -> None:
    @app.get("/v2", tags=[DIALECT.name])
    async def server() -> ServerMetadata:
        """What answers here."""
        return ServerMetadata(name="fovea", version=__version__, extensions=list(_EXTENSIONS))

    @app.get("/v2/health/live", tags=[DIALECT.name], responses={503: failures(FlatError)[503]})
    async def live() -> Live:
        """The process answers, and has not been without a runner for too long."""
        desk.classifier.require_alive()
        return Live(live=True)

    @app.get("/v2/health/ready", tags=[DIALECT.name], responses={503: failures(FlatError)[503]})
    async def ready() -> Ready:
        """The models are ready."""
        desk.require_ready()
        return Ready(ready=True)


def _add_models(app: FastAPI, desk: Desk) -> None:
    repository = desk.classifier.registry
    said = failures(FlatError)
    documented: dict[str, Any] = {"tags": [DIALECT.name], "responses": {one: said[one] for one in (404, 503)}}

    @app.get("/v2/models/stats", tags=[DIALECT.name])
    async def all_statistics() -> dict[str, Any]:
        """What all models that are loaded have done."""
        return {"model_stats": [_statistics(model) for model in repository.models]}

    def add(path: str, call: Callable[[str, str | None], Any], reply: Any, summary: str) -> None:
        async def of_model(name: str) -> Any:
            return await call(name, None)

        async def of_version(name: str, version: str) -> Any:
            return await call(name, version)

        for place, answer in (("{name}", of_model), ("{name}/versions/{version}", of_version)):
            of = answer.__name__
            app.get(
                f"/v2/models/{place}{path}",
                response_model=reply,
                summary=summary,
                operation_id=f"{DIALECT.name}_{path.strip('/') or 'metadata'}_{of}",
                **documented,
            )(answer)

    async def metadata(name: str, version: str | None) -> ModelMetadata:
        return _metadata(
            await desk.model(name, version), [one.version or "" for one in repository.list_versions(name)]
        )

    async def ready(name: str, version: str | None) -> ModelReady:
        repository.get(name, version)  # the model may not be loaded; it is loaded when a request needs it
        desk.require_ready()
        return ModelReady(name=name, ready=True)

    async def statistics(name: str, version: str | None) -> dict[str, Any]:
        return {"model_stats": [_statistics(await desk.model(name, version))]}

    async def configuration(name: str, version: str | None) -> dict[str, Any]:
        return _configuration(await desk.model(name, version), desk.settings.request_images)

    add("", metadata, ModelMetadata, "What a model takes and gives")
    add("/config", configuration, dict[str, Any], "The same as Triton's clients read it")
    add("/ready", ready, ModelReady, "Whether a model answers")
    add("/stats", statistics, dict[str, Any], "What a model has done since it was loaded")


def _metadata(model: LiveModel, versions: list[str]) -> ModelMetadata:
    """Return the metadata with one input and one output.

    Clients send every input that the metadata names, and many clients refuse more than one. The others are in
    `alternatives`.
    """
    *others, own = [
        TensorMetadata(name=one.name, datatype=DATATYPES[one.dtype], shape=[-1, *one.shape])
        for one in model.tensors
    ]
    encoded = TensorMetadata(name=Inputs(model.tensors).encoded, datatype=ENCODED, shape=[-1])
    first, *further = [
        TensorMetadata(name=name, datatype=_FLOAT, shape=[-1, kind.width])
        for name, kind in _outputs(model).items()
    ]
    return ModelMetadata(
        name=model.name,
        versions=versions,
        platform=_PLATFORM,
        inputs=[own],
        outputs=[first],
        alternatives=Alternatives(inputs=[*others, encoded], outputs=further),
    )


def _configuration(model: LiveModel, most: int) -> dict[str, Any]:
    """Return the configuration in Triton's form.

    Clients read the largest batch from it, and the sizes and layout of one image.
    """
    own, name = model.tensors[-1], model.contract.probabilities_name
    layout = "FORMAT_NHWC" if own.shape[-1] == _CHANNELS else "FORMAT_NCHW"
    kind = f"TYPE_{DATATYPES[own.dtype]}"
    return {
        "name": model.name,
        "platform": _PLATFORM,
        "backend": "onnxruntime",
        "max_batch_size": most,
        "input": [{"name": own.name, "data_type": kind, "format": layout, "dims": list(own.shape)}],
        "output": [{"name": name, "data_type": f"TYPE_{_FLOAT}", "dims": [_outputs(model)[name].width]}],
    }


_CHANNELS: Final = 3


class _Kind(NamedTuple):
    """The type of an output."""

    width: int
    """Number of values for each image."""
    is_logits: bool


def _outputs(model: LiveModel) -> dict[str, _Kind]:
    """Return the outputs of a model by name; an output of an imported file also keeps its original name."""
    contract = model.contract
    known = {
        contract.probabilities_name: _Kind(len(contract.labels), is_logits=False),
        contract.logits_name: _Kind(contract.logit_count, is_logits=True),
    }
    if own := find_original_output(contract):
        name, ours = own
        known.setdefault(name, known[ours])
    return known


# --- inference -----------------------------------------------------------------------------------


class Infer(Translation):
    """The parser of inference requests, in JSON alone or with binary tensors behind the JSON."""

    def limit(self, headers: Headers, settings: Settings) -> bodies.Limit:
        """Return the size limit; without the binary extension the whole body is JSON."""
        is_binary = _HEADER.encode() in headers
        return bodies.body_limit(settings) if is_binary else bodies.json_limit(settings)

    async def read(self, heard: Heard) -> Asked:
        body, size = heard.body.take(), heard.body.size
        json_size = header_size(heard.headers.get(_HEADER.encode()), size)
        bodies.json_limit(heard.settings).check(json_size)
        view = body.view(0, size) if isinstance(body, SharedBuffer) else memoryview(body)

        def place(start: int, stop: int) -> Image:
            start, stop = start + json_size, stop + json_size
            return body.to_ref(start, stop) if isinstance(body, SharedBuffer) else view[start:stop]

        behind = Behind(view[json_size:], place)
        written = bodies.Received(body if isinstance(body, SharedBuffer) else body[:json_size], json_size)
        return await bodies.parse_json(written, lambda value: _asked(value, heard, behind))


@dataclass(frozen=True)
class _Output:
    """One tensor of a reply."""

    name: str
    width: int
    """Number of values for each image."""
    is_logits: bool
    top: int
    """Number of labels for each image that replace the values; 0 means values."""
    is_binary: bool

    def write(self, found: Sequence[Classification]) -> tuple[dict[str, Any], bytes]:
        """Return the tensor as plain values, and its binary data for after the JSON."""
        rows = [one.answer.logits if self.is_logits else one.answer.probabilities for one in found]
        values = np.frombuffer(b"".join(row for row in rows if row is not None), np.float32)
        values = values.reshape(len(found), self.width)
        head: dict[str, Any] = {"name": self.name, "datatype": _FLOAT, "shape": list(values.shape)}
        content: bytes = b""
        if self.top:
            texts = [text for row in values for text in self._ranked(row, found[0].model.contract.labels)]
            head |= {"datatype": ENCODED, "shape": [len(found), self.top]}
            if self.is_binary:
                content = elements([text.encode() for text in texts])
            else:
                head["data"] = texts
        elif self.is_binary:
            content = values.tobytes()
        else:
            head["data"] = values.ravel()
        if self.is_binary:
            head["parameters"] = {"binary_data_size": len(content)}
        return head, content

    def _ranked(self, row: npt.NDArray[np.float32], labels: Sequence[str]) -> list[str]:
        """Return `value:index:label`, the highest value first.

        Nine digits distinguish every float32 from its neighbours. The single logit of a binary model has no
        label.
        """
        best = np.argsort(-row, kind="stable")[: self.top].tolist()
        named = [f":{labels[index]}" if len(labels) == len(row) else "" for index in best]
        return [f"{row[index]:.9g}:{index}{name}" for index, name in zip(best, named, strict=True)]


def _asked(value: Any, heard: Heard, behind: Behind) -> Asked:
    request = bodies.validate(InferRequest, value)
    parameters = request.parameters or {}
    _check_spelling(value)
    outputs = _wanted(request.outputs, parameter(parameters, "binary_data_output", False), heard.model)
    rows = Inputs(heard.model.tensors).rows(request.inputs, behind, heard.settings)
    logits = any(output.is_logits for output in outputs)
    images: list[Item] = [
        ImageRequest(row.content, row.tensor, logits) if row.tensor or logits else row.content for row in rows
    ]

    def reply(found: Sequence[Classification]) -> Reply:
        warnings = format_warnings([one.answer.warnings for one in found])
        return _reply(request.id, heard.model, [output.write(found) for output in outputs], warnings)

    labels = sum(output.top or output.width // _VALUES for output in outputs)
    microseconds = parameter(parameters, "timeout", 0)  # 0 means no limit, as in Triton
    return Asked(images, reply, labels, microseconds / 1e6 or None)


def _check_spelling(value: dict[str, Any]) -> None:
    """Raise `BadRequest` for a misspelt name.

    Other unknown names are ignored, as the protocol requires: clients send parameters of other servers, such
    as `priority`.
    """
    bodies.check_spelling(value, InferRequest.model_fields, "the request's key")
    bodies.check_spelling(value.get("parameters") or (), _PARAMETERS, "the request's parameter")
    for kind, model, parameters in (
        ("inputs", InferInput, _OF_INPUTS),
        ("outputs", InferOutput, _OF_OUTPUTS),
    ):
        for one in value.get(kind) or ():
            bodies.check_spelling(one, model.model_fields, f"in {kind} the key")
            bodies.check_spelling(one.get("parameters") or (), parameters, f"in {kind} the parameter")


_PARAMETERS: Final = ("binary_data_output", "timeout")

_OF_INPUTS: Final = ("binary_data_size",)

_OF_OUTPUTS: Final = ("classification", "binary_data")
"""Supported parameters of a request, of each of its inputs, and of each of its outputs."""

_VALUES: Final = 50
"""Number of tensor values that take as long to write as one label."""


def _wanted(given: Sequence[InferOutput] | None, is_binary: bool, model: LiveModel) -> list[_Output]:
    """Return the requested outputs; `is_binary` is the default for outputs that do not set `binary_data`.

    Raises `BadRequest` for an unknown output, or an output that is requested twice.
    """
    known = _outputs(model)
    asked = given or [InferOutput(name=model.contract.probabilities_name)]
    if len({one.name for one in asked}) < len(asked):
        raise BadRequest("an output is asked for twice")
    wanted = []
    for one in asked:
        if one.name not in known:
            raise BadRequest(f"the model gives {', '.join(map(repr, known))}, and no {short(one.name)}")
        parameters, (width, is_logits) = of_tensor(one.parameters), known[one.name]
        wanted.append(
            _Output(
                one.name,
                width,
                is_logits,
                top=min(parameter(parameters, "classification", 0), width),
                is_binary=parameter(parameters, "binary_data", is_binary),
            )
        )
    return wanted


def _reply(
    request_id: str | None, model: LiveModel, outputs: Sequence[tuple[dict[str, Any], bytes]], warnings: str
) -> Reply:
    value: dict[str, Any] = {"model_name": model.name, "model_version": model.version}
    if request_id is not None:
        value["id"] = request_id
    if warnings:
        value["parameters"] = {"warnings": warnings}
    value["outputs"] = [head for head, _ in outputs]
    written = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    if not any("parameters" in head for head, _ in outputs):
        return Reply(written)
    content = b"".join([written, *(content for _, content in outputs)])
    return Reply(content, {_HEADER: str(len(written))}, "application/octet-stream")


# --- statistics ----------------------------------------------------------------------------------


def _statistics(model: LiveModel) -> dict[str, Any]:
    """Return the statistics in Triton's form.

    `success` and `fail` count requests, the other entries count images. The numbers are those of the worker
    that answers, since it loaded the model.
    """
    tally = model.statistics
    calls = sum(call.count for call in tally.model_calls.values())
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": round((time.time() - time.monotonic() + tally.last_answer_at) * 1000)
        if tally.last_answer_at
        else 0,
        "inference_count": round(tally.inference.count),
        "execution_count": round(calls),
        "inference_stats": {
            "success": _sum(tally.succeeded_requests),
            "fail": _sum(tally.failed_requests),
            "queue": _sum(tally.queue),
            "compute_input": _sum(tally.decode),
            "compute_infer": _sum(tally.inference),
            "compute_output": _sum(DurationSum()),
            "cache_hit": _sum(DurationSum()),
            "cache_miss": _sum(DurationSum()),
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": _sum(DurationSum()),
                "compute_infer": _sum(call),
                "compute_output": _sum(DurationSum()),
            }
            for size, call in sorted(tally.model_calls.items())
        ],
    }


def _sum(one: DurationSum) -> dict[str, int]:
    return {"count": round(one.count), "ns": round(one.seconds * 1e9)}

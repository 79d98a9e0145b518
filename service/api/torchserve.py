"""TorchServe's inference API, and the read-only part of its management API.

POST, PUT /predictions/{name}[/{version}]    a raw image (`curl -T`), a form with files, or JSON
                                             → {label: probability, …} of five labels; a list for several
GET  /ping                                   → {"status": "Healthy"}
GET  /models, /models/{name}[/{version}|/all]
OPTIONS /                                    → the OpenAPI document
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

import orjson
from fastapi import FastAPI, Query
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import Send

from fovea.service.api import bodies
from fovea.service.api.adapter import InferenceRequest, ParsedRequest, ProtocolAdapter, Reply
from fovea.service.api.base64_text import from_base64
from fovea.service.api.body_parser import needs_parsing, parse_body
from fovea.service.api.json_bodies import parse_json
from fovea.service.api.native import explain
from fovea.service.api.options import refuse_options
from fovea.service.api.protocol_routes import (
    RAW_IMAGE_CONTENT,
    ProtocolRoutes,
    add_endpoint_route,
    build_form_content,
)
from fovea.service.api.reply_schemas import build_error_responses
from fovea.service.api.request_schemas import ExplainOptions
from fovea.service.api.services import Services
from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import BadRequest, Forbidden, ModelNotFound, RequestError
from fovea.service.http.api_protocol import ApiProtocol
from fovea.service.http.fast_path import Headers
from fovea.service.http.request_record import RequestRecord
from fovea.service.image_warnings import create_warning_headers
from fovea.service.providers import PROVIDERS
from fovea.service.runners.batch_messages import Image, Item
from fovea.service.serving.classifier import Classification
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.ranking import rank_labels
from fovea.service.settings import Settings

_EXCEPTION_NAMES: Final = {
    403: "ForbiddenException",
    404: "ResourceNotFoundException",
    405: "MethodNotAllowedException",
    408: "RequestTimeoutException",
    429: "TooManyRequestsException",
    500: "InternalServerException",
    503: "ServiceUnavailableException",
    504: "RequestTimeoutException",
}
"""TorchServe's exception names by status, which clients may check; `BadRequestException` for all others."""


def _render_error(error: RequestError, request_id: str) -> dict[str, Any]:
    kind = _EXCEPTION_NAMES.get(error.status, "BadRequestException")
    if isinstance(error, ModelNotFound):
        kind = "ModelNotFoundException"
    return {
        "code": error.status,
        "type": kind,
        "message": str(error),
        "reason": error.code,
        "request_id": request_id,
    }


PROTOCOL: Final = ApiProtocol("torchserve", _render_error)


class TorchServeError(BaseModel):
    """An error. `code` is the status and `type` the exception of TorchServe; `reason` is Fovea's own code."""

    code: int
    type: str
    message: str
    reason: str
    request_id: str


class PingReply(BaseModel):
    """The health of the service."""

    status: str


class ModelEntry(BaseModel):
    """A model, and its file in the repository."""

    modelName: str
    modelUrl: str


class ModelPage(BaseModel):
    """A page of the list of models; `nextPageToken` is null on the last page."""

    models: list[ModelEntry]
    nextPageToken: str | None = None


class Worker(BaseModel):
    """A runner process."""

    id: str
    status: str
    gpu: bool


class QueueStatus(BaseModel):
    """The number of images that are still accepted, and the number of this model's images in flight."""

    remainingCapacity: int
    pendingRequests: int


class ModelDescription(BaseModel):
    """One version of a model; a resting version has no workers until the first request loads it."""

    modelName: str
    modelVersion: str
    modelUrl: str
    runtime: str
    minWorkers: int
    maxWorkers: int
    batchSize: int | None
    maxBatchDelay: float
    workers: list[Worker]
    jobQueueStatus: QueueStatus


class EnvelopeReply(BaseModel):
    """The reply to `instances`."""

    predictions: list[dict[str, float]]


class AnyQuery(BaseModel):
    """A query without options; all parameters are ignored."""


Attributions: TypeAlias = list[list[list[float]]]
"""Channels, rows and columns of a heat map; each value 0 … 1 is the evidence for the label at a place."""

_JSON_CONTENT: Final = {
    "application/json": {
        "schema": {"description": 'Base64, `{"data": "…"}`, or `{"instances": […]}` of these.'}
    }
}

_TOP_K: Final = 5
"""Number of labels in a reply, as in TorchServe's image classifier."""

_DEFAULT_PAGE_SIZE: Final = 100
"""Number of models in a list if the request does not set it."""


def add_routes(app: FastAPI, services: Services) -> None:
    """Add the routes of this protocol."""
    routes = ProtocolRoutes(app, services, PROTOCOL, TorchServeError)
    for path in ("/predictions/{name}", "/predictions/{name}/{version}"):
        routes.add_endpoint(
            path,
            _PredictAdapter(),
            summary="Classify images",
            reply_type=dict[str, float] | list[dict[str, float]] | EnvelopeReply,
            content={**RAW_IMAGE_CONTENT, **build_form_content("data"), **_JSON_CONTENT},
            methods=("POST", "PUT"),
        )
    errors = build_error_responses(TorchServeError)
    _add_explain_routes(app, services, errors)
    catalog = services.classifier.catalog
    route_options: dict[str, Any] = {"tags": [PROTOCOL.name], "responses": {404: errors[404]}}

    @app.get("/ping", tags=[PROTOCOL.name], responses={503: errors[503]})
    async def ping() -> PingReply:
        """Check that the models are ready."""
        services.require_ready()
        return PingReply(status="Healthy")

    @app.get("/models", tags=[PROTOCOL.name], responses={400: errors[400]}, response_model_exclude_none=True)
    async def models(
        limit: Annotated[
            int, Query(ge=1, description="Maximum number of models on a page.")
        ] = _DEFAULT_PAGE_SIZE,
        next_page_token: Annotated[
            int, Query(ge=0, description="`nextPageToken` of the page before; 0 for the first page.")
        ] = 0,
    ) -> ModelPage:
        """List the latest version of each model, page by page."""
        all_models: list[LiveModel | ModelVersion] = [*catalog.models, *catalog.on_demand_versions]
        names = sorted({one.name or "" for one in all_models})
        end = next_page_token + limit
        latest = [catalog.list_versions(name)[-1] for name in names[next_page_token:end]]
        next_token = str(end) if end < len(names) else None
        return ModelPage(models=[_render_entry(one, services) for one in latest], nextPageToken=next_token)

    @app.post(
        "/models",
        tags=[PROTOCOL.name],
        responses={403: {"model": TorchServeError, "description": "Every request is refused."}},
    )
    async def register() -> None:
        """Refuse the request: models come from the repository, never from a URL in a request."""
        raise Forbidden(
            "models cannot be registered by URL; put the file into the repository (fovea publish)"
        )

    @app.get("/models/{name}", **route_options)
    async def describe(name: str) -> list[ModelDescription]:
        """Describe the latest version of a model."""
        return [_render_description(catalog.list_versions(name)[-1], services)]

    @app.get("/models/{name}/all", **route_options)
    async def describe_all(name: str) -> list[ModelDescription]:
        """Describe all versions of a model."""
        return [_render_description(one, services) for one in catalog.list_versions(name)]

    @app.get("/models/{name}/{version}", **route_options)
    async def describe_version(name: str, version: str) -> list[ModelDescription]:
        """Describe one version of a model."""
        return [_render_description(catalog.get(name, version), services)]

    @app.options("/", tags=[PROTOCOL.name], response_model=dict[str, Any])
    async def description() -> Response:
        """Return this OpenAPI document."""
        content = await asyncio.to_thread(lambda: orjson.dumps(app.openapi()))
        return Response(content, media_type="application/json")


def _add_explain_routes(app: FastAPI, services: Services, errors: dict[int | str, dict[str, Any]]) -> None:
    async def explain_image(model: LiveModel, _query: Any, image: bytes, _send: Send) -> Response:
        answer = await explain.explain_label(services, model, ExplainOptions(), image)
        content = orjson.dumps([answer.result.heatmap.values], option=orjson.OPT_APPEND_NEWLINE)
        headers = create_warning_headers([answer.result.input.warnings])
        return Response(content, headers=headers, media_type="application/json")

    forbidden = {"description": "Explanations are switched off.", "model": TorchServeError}
    success = {
        "description": "The heat map of the most probable label, as one channel.",
        "model": Attributions,
    }
    for path in ("/explanations/{name}", "/explanations/{name}/{version}"):
        add_endpoint_route(
            app,
            path,
            explain.ImageEndpoint(services, PROTOCOL, AnyQuery, explain_image, _parse_explain_body),
            content={**RAW_IMAGE_CONTENT, **build_form_content("data"), **_JSON_CONTENT},
            query_type=AnyQuery,
            response_model=None,
            tags=[PROTOCOL.name],
            summary="Explain an answer",
            responses={200: success, **errors, 403: forbidden},
        )


class _PredictAdapter(ProtocolAdapter):
    def choose_raw_format(self, options: None, headers: Headers, model: LiveModel) -> _LabelsFormat | None:
        return None if needs_parsing(headers.get(b"content-type", b"")) else _LabelsFormat()

    async def parse_request(self, request: InferenceRequest) -> ParsedRequest:
        images, is_enveloped = await _parse_images(request.content_type, request.body, request.settings)
        return ParsedRequest(list[Item](images), _LabelsFormat(is_enveloped=is_enveloped))


class _LabelsFormat(NamedTuple):
    """The content of a reply: the probability of the best labels of each image."""

    labels_per_image: int = _TOP_K
    is_enveloped: bool = False
    """True if the results are in TorchServe's JSON envelope."""

    def render(self, results: Sequence[Classification], model: LiveModel, record: RequestRecord) -> Reply:
        """Render the results (`service.api.adapter.ReplyFormat`)."""
        probabilities = [
            {one.label: one.probability for one in rank_labels(image, top_k=_TOP_K)} for image in results
        ]
        if self.is_enveloped:
            return Reply.from_value({"predictions": probabilities})
        return Reply.from_value(probabilities[0] if len(probabilities) == 1 else probabilities)


async def _parse_images(
    content_type: bytes, raw_body: bodies.RawBody, settings: Settings
) -> tuple[list[Image], bool]:
    """Return the images of a body, and a flag for TorchServe's JSON envelope.

    Raises `BadRequest`.
    """
    if bodies.is_json(content_type):
        return await parse_json(raw_body, lambda value: _images_from_json(value, settings))
    parsed_body = await parse_body(content_type, raw_body, settings)
    refuse_options(parsed_body.options)
    return parsed_body.images, False


async def _parse_explain_body(
    content_type: bytes, raw_body: bodies.RawBody, settings: Settings
) -> bodies.ParsedBody:
    if bodies.is_json(content_type):
        bodies.json_limit(settings).check(raw_body.size)
    images, _ = await _parse_images(content_type, raw_body, settings)
    return bodies.ParsedBody(images)


def _images_from_json(value: Any, settings: Settings) -> tuple[list[Image], bool]:
    """Return the images of a JSON body, and a flag for TorchServe's envelope.

    An image is base64, by itself or under one of the names that TorchServe's handlers read. The envelope is a
    list of such images under `instances`.
    """
    if not isinstance(value, dict) or "instances" not in value:
        return [_image_from_value(value, "the body")], False
    instances = value["instances"]
    if len(value) > 1 or not isinstance(instances, list) or not instances:
        raise BadRequest('the body must be {"instances": […]}, with one image or more')
    bodies.check_image_count(len(instances), settings)
    return [_image_from_value(one, f"instances.{place}") for place, one in enumerate(instances)], True


def _image_from_value(value: Any, location: str) -> bytes:
    while isinstance(value, dict) and len(value) == 1:
        ((name, value),) = value.items()
        if name not in _IMAGE_KEYS:
            break
        location = name if location == "the body" else f"{location}.{name}"
    else:
        if isinstance(value, str):
            return from_base64(value, location)
    raise BadRequest(f'{location} is not an image; send base64, as {{"data": "…"}}')


_IMAGE_KEYS: Final = ("data", "body", "b64")
"""Keys under which an image may stand."""


def _render_entry(model: LiveModel | ModelVersion, services: Services) -> ModelEntry:
    return ModelEntry(modelName=model.name or "", modelUrl=_get_model_url(model, services))


def _get_model_url(model: LiveModel | ModelVersion, services: Services) -> str:
    version = model.model_version if isinstance(model, LiveModel) else model
    return (
        version.path.name if version.name is None else str(version.path.relative_to(services.settings.models))
    )


def _render_description(model: LiveModel | ModelVersion, services: Services) -> ModelDescription:
    runners = services.classifier.runners.alive_count if isinstance(model, LiveModel) else 0
    gpu = isinstance(model, LiveModel) and PROVIDERS[model.load_result.provider].is_gpu
    limit = services.settings.queue_images
    return ModelDescription(
        modelName=model.name or "",
        modelVersion=model.version or "",
        modelUrl=_get_model_url(model, services),
        runtime="onnxruntime",
        minWorkers=runners,
        maxWorkers=runners,
        batchSize=model.load_result.batch_max if isinstance(model, LiveModel) else None,
        maxBatchDelay=services.settings.batch_wait_ms,
        workers=[Worker(id=str(number), status="READY", gpu=gpu) for number in range(runners)],
        jobQueueStatus=QueueStatus(
            remainingCapacity=max(0, limit - services.classifier.images_in_flight),
            pendingRequests=model.images_in_flight if isinstance(model, LiveModel) else 0,
        ),
    )

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
from typing import Annotated, Any, Final, TypeAlias

import orjson
from fastapi import FastAPI, Query
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import Send

from fovea.service.api import bodies
from fovea.service.api.endpoint import RAW, Asked, Heard, Reply, Routes, Translation, form
from fovea.service.api.native import explain
from fovea.service.api.schemas import ExplainOptions, failures
from fovea.service.api.services import Desk
from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import BadRequest, Forbidden, ModelNotFound, RequestError
from fovea.service.http.api_protocol import ApiProtocol
from fovea.service.http.fast_path import Headers
from fovea.service.image_warnings import create_warning_headers
from fovea.service.runners.messages import Image, Item
from fovea.service.serving.classifier import Classification, rank_labels
from fovea.service.serving.registry import LiveModel
from fovea.service.settings import Settings

_TYPES: Final = {
    403: "ForbiddenException",
    404: "ResourceNotFoundException",
    405: "MethodNotAllowedException",
    408: "RequestTimeoutException",
    500: "InternalServerException",
    503: "ServiceUnavailableException",
    504: "RequestTimeoutException",
}
"""TorchServe's exception names by status, which clients may check; `BadRequestException` for all others."""


def _write(error: RequestError, request_id: str) -> dict[str, Any]:
    kind = _TYPES.get(error.status, "BadRequestException")
    if isinstance(error, ModelNotFound):
        kind = "ModelNotFoundException"
    return {
        "code": error.status,
        "type": kind,
        "message": str(error),
        "reason": error.code,
        "request_id": request_id,
    }


DIALECT: Final = ApiProtocol("torchserve", _write)


class Failed(BaseModel):
    """An error. `code` is the status and `type` the exception of TorchServe; `reason` is our own code."""

    code: int
    type: str
    message: str
    reason: str
    request_id: str


class Ping(BaseModel):
    """Whether requests are answered."""

    status: str


class Listed(BaseModel):
    """A model, and its file in the repository."""

    modelName: str
    modelUrl: str


class Page(BaseModel):
    """Some of the models; there are more where there is a token for them."""

    models: list[Listed]
    nextPageToken: str | None = None


class Worker(BaseModel):
    """A runner process."""

    id: str
    status: str
    gpu: bool


class Jobs(BaseModel):
    """How many images more are accepted, and how many of this model are."""

    remainingCapacity: int
    pendingRequests: int


class Described(BaseModel):
    """One version of a model. One that rests has no workers until somebody asks for it."""

    modelName: str
    modelVersion: str
    modelUrl: str
    runtime: str
    minWorkers: int
    maxWorkers: int
    batchSize: int | None
    maxBatchDelay: float
    workers: list[Worker]
    jobQueueStatus: Jobs


class Enveloped(BaseModel):
    """The answer to `instances`."""

    predictions: list[dict[str, float]]


class AnyQuery(BaseModel):
    """None that counts."""


Attributions: TypeAlias = list[list[list[float]]]
"""Channels, rows and columns of a heat map; each value 0 … 1 is the evidence for the label at a place."""

_JSON: Final = {
    "application/json": {
        "schema": {"description": 'Base64, `{"data": "…"}`, or `{"instances": […]}` of these.'}
    }
}

_TOP: Final = 5
"""Number of labels in a reply, as in TorchServe's image classifier."""

_PAGE: Final = 100
"""Number of models in a list if the request does not set it."""


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Add the routes of this protocol."""
    routes = Routes(app, desk, DIALECT, Failed)
    for path in ("/predictions/{name}", "/predictions/{name}/{version}"):
        routes.ask(
            path,
            _Prediction(),
            summary="Classify images",
            reply=dict[str, float] | list[dict[str, float]] | Enveloped,
            content={**RAW, **form("data"), **_JSON},
            methods=("POST", "PUT"),
        )
    errors = failures(Failed)
    _add_explanations(app, desk, errors)
    repository = desk.classifier.registry
    documented: dict[str, Any] = {"tags": [DIALECT.name], "responses": {404: errors[404]}}

    @app.get("/ping", tags=[DIALECT.name], responses={503: errors[503]})
    async def ping() -> Ping:
        """The models are ready."""
        desk.require_ready()
        return Ping(status="Healthy")

    @app.get("/models", tags=[DIALECT.name], responses={400: errors[400]}, response_model_exclude_none=True)
    async def models(
        limit: Annotated[int, Query(ge=1)] = _PAGE, next_page_token: Annotated[int, Query(ge=0)] = 0
    ) -> Page:
        """The latest version of each model, a page of them."""
        every: list[LiveModel | ModelVersion] = [*repository.models, *repository.on_demand_versions]
        names = sorted({one.name or "" for one in every})
        end = next_page_token + limit
        latest = [repository.list_versions(name)[-1] for name in names[next_page_token:end]]
        more = str(end) if end < len(names) else None
        return Page(models=[_listed(one, desk) for one in latest], nextPageToken=more)

    @app.post("/models", tags=[DIALECT.name], responses={403: {"model": Failed, "description": "Always."}})
    async def register() -> None:
        """Never: a model comes from the repository, and from no address that a request names."""
        raise Forbidden("models are not loaded by address; put the file into the repository (fovea publish)")

    @app.get("/models/{name}", **documented)
    async def describe(name: str) -> list[Described]:
        """The latest version of a model."""
        return [_described(repository.list_versions(name)[-1], desk)]

    @app.get("/models/{name}/all", **documented)
    async def describe_all(name: str) -> list[Described]:
        """All versions of a model."""
        return [_described(one, desk) for one in repository.list_versions(name)]

    @app.get("/models/{name}/{version}", **documented)
    async def describe_version(name: str, version: str) -> list[Described]:
        """One version of a model."""
        return [_described(repository.get(name, version), desk)]

    @app.options("/", tags=[DIALECT.name], response_model=dict[str, Any])
    async def description() -> Response:
        """This document."""
        content = await asyncio.to_thread(lambda: orjson.dumps(app.openapi()))
        return Response(content, media_type="application/json")


def _add_explanations(app: FastAPI, desk: Desk, errors: dict[int | str, dict[str, Any]]) -> None:
    async def heat(model: LiveModel, _query: Any, image: bytes, _send: Send) -> Response:
        said = await explain.explained(desk, model, ExplainOptions(), image)
        content = orjson.dumps([said.values["heatmap"]["values"]], option=orjson.OPT_APPEND_NEWLINE)
        headers = create_warning_headers([explain.warnings_of(said.values)])
        return Response(content, headers=headers, media_type="application/json")

    off = {"description": "Explanations are switched off.", "model": Failed}
    good = {"description": "The heat map of the most probable label, as one channel.", "model": Attributions}
    for path in ("/explanations/{name}", "/explanations/{name}/{version}"):
        explain.add_question(
            app,
            desk,
            path,
            AnyQuery,
            heat,
            dialect=DIALECT.name,
            parse=_explained,
            content={**RAW, **form("data"), **_JSON},
            tags=[DIALECT.name],
            summary="Explain an answer",
            responses={200: good, 403: off, **errors},
        )


class _Prediction(Translation):
    def limit(self, headers: Headers, settings: Settings) -> bodies.Limit:
        is_json = bodies.is_json(headers.get(b"content-type", b""))
        return bodies.json_limit(settings) if is_json else bodies.body_limit(settings)

    async def read(self, heard: Heard) -> Asked:
        images, is_enveloped = await _parse(heard.content_type, heard.body, heard.settings)

        def reply(found: Sequence[Classification]) -> Reply:
            maps = [{one.label: one.probability for one in rank_labels(image, top_k=_TOP)} for image in found]
            if is_enveloped:
                return Reply.json({"predictions": maps})
            return Reply.json(maps[0] if len(maps) == 1 else maps)

        return Asked(list[Item](images), reply, _TOP)


async def _parse(
    content_type: bytes, received: bodies.Received, settings: Settings
) -> tuple[list[Image], bool]:
    """Return the images of a body, and a flag for TorchServe's JSON envelope.

    Raises `BadRequest`.
    """
    if bodies.is_json(content_type):
        return await bodies.parse_json(received, lambda value: _from_json(value, settings))
    if not bodies.is_form(content_type):
        return [received.image()], False
    parsed = await bodies.parse(content_type, received, settings)
    bodies.refuse_options(parsed.options)
    return parsed.images, False


async def _explained(content_type: bytes, received: bodies.Received, settings: Settings) -> bodies.Body:
    if bodies.is_json(content_type):
        bodies.json_limit(settings).check(received.size)
    images, _ = await _parse(content_type, received, settings)
    return bodies.Body(images)


def _from_json(value: Any, settings: Settings) -> tuple[list[Image], bool]:
    """Return the images of a JSON body, and a flag for TorchServe's envelope.

    An image is base64, by itself or under one of the names that TorchServe's handlers read. The envelope is a
    list of such images under `instances`.
    """
    if not isinstance(value, dict) or "instances" not in value:
        return [_from_value(value, "the body")], False
    instances = value["instances"]
    if len(value) > 1 or not isinstance(instances, list) or not instances:
        raise BadRequest('the body must be {"instances": […]}, with one image or more')
    bodies.check_count(instances, settings)
    return [_from_value(one, f"instances.{place}") for place, one in enumerate(instances)], True


def _from_value(value: Any, place: str) -> bytes:
    while isinstance(value, dict) and len(value) == 1:
        ((name, value),) = value.items()
        if name not in _NAMES:
            break
        place = name if place == "the body" else f"{place}.{name}"
    else:
        if isinstance(value, str):
            return bodies.from_base64(value, place)
    raise BadRequest(f'{place} is no image; send one as {{"data": "…"}}, base64')


_NAMES: Final = ("data", "body", "b64")
"""Names under which an image may be."""


def _listed(model: LiveModel | ModelVersion, desk: Desk) -> Listed:
    return Listed(modelName=model.name or "", modelUrl=_place(model, desk))


def _place(model: LiveModel | ModelVersion, desk: Desk) -> str:
    found = model.model_version if isinstance(model, LiveModel) else model
    return found.path.name if found.name is None else str(found.path.relative_to(desk.settings.models))


def _described(model: LiveModel | ModelVersion, desk: Desk) -> Described:
    runners = desk.classifier.runners.alive_count if isinstance(model, LiveModel) else 0
    gpu = isinstance(model, LiveModel) and model.load_result.provider == "cuda"
    limit = desk.settings.queue_images
    return Described(
        modelName=model.name or "",
        modelVersion=model.version or "",
        modelUrl=_place(model, desk),
        runtime="onnxruntime",
        minWorkers=runners,
        maxWorkers=runners,
        batchSize=model.load_result.batch_max if isinstance(model, LiveModel) else None,
        maxBatchDelay=desk.settings.batch_wait_ms,
        workers=[Worker(id=str(number), status="READY", gpu=gpu) for number in range(runners)],
        jobQueueStatus=Jobs(
            remainingCapacity=max(0, limit - desk.classifier.images_in_flight),
            pendingRequests=model.images_in_flight if isinstance(model, LiveModel) else 0,
        ),
    )

"""The native dialect: `/v1/classify`, and the models and their contracts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Annotated, Any, Final

import orjson
from fastapi import FastAPI, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel

from service.api import bodies
from service.api.bodies import ClassifyRequest
from service.classifier import Classification, Classifier, Prediction, rank
from service.errors import RequestError
from service.repository import LiveModel


class ModelName(BaseModel):
    """Which model answered."""

    name: str
    version: str


class Label(BaseModel):
    """One label and its probability, 0 … 1. `selected` is there for multi-label models alone."""

    label: str
    index: int
    probability: float
    selected: bool | None = None


class ImageInfo(BaseModel):
    """The image as it is seen: EXIF orientation applied, sizes in pixels."""

    format: str
    width: int
    height: int


class ErrorDetail(BaseModel):
    """What was wrong, for a program (`code`) and for a person (`message`)."""

    code: str
    message: str
    request_id: str | None = None


class ErrorReply(BaseModel):
    """The answer to a request that could not be answered."""

    error: ErrorDetail


class ImageReply(BaseModel):
    """The answer to one image among several: its labels, or its own error."""

    predictions: list[Label] | None = None
    image: ImageInfo | None = None
    error: ErrorDetail | None = None


class ClassifyReply(BaseModel):
    """One image gives `predictions` and `image`; several give `results`, in order."""

    model: ModelName
    predictions: list[Label] | None = None
    image: ImageInfo | None = None
    results: list[ImageReply] | None = None


class ModelSummary(BaseModel):
    """One served model. `labels` is their number."""

    name: str
    version: str
    task: str
    labels: int
    default: bool


class ModelList(BaseModel):
    """All served models."""

    models: list[ModelSummary]


TopK = Annotated[int, Query(ge=0, description="How many labels, best first; 0 gives all.")]
Threshold = Annotated[
    float | None, Query(ge=0, le=1, description="Leave out labels less probable than this.")
]

_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"description": "Malformed request: bad JSON, bad base64, no file, a bad parameter."},
    404: {"description": "No such model."},
    408: {"description": "The body arrived too slowly."},
    413: {"description": "Too many bytes, or too many pixels by the image's header."},
    415: {"description": "Not an image format that is served."},
    422: {"description": "An image, but truncated, corrupt, or of a mode that cannot be converted."},
    500: {"description": "Our own bug; the log has the trace under the request id."},
    503: {"description": "Too many images in flight; `Retry-After` says when to try again."},
}
_REPLIES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": ClassifyReply},
    **{status: {**reply, "model": ErrorReply} for status, reply in _ERRORS.items()},
}


def add_routes(app: FastAPI, classifier: Classifier) -> None:
    """Add the native routes over one core."""
    request_body = _request_body(classifier)

    async def classify(
        request: Request,
        name: str | None = None,
        version: str | None = None,
        top_k: TopK = 5,
        threshold: Threshold = None,
    ) -> Response:
        model = classifier.repository.get(name, version)
        request.state.model = model.name
        return await _answer(classifier, request, model, top_k, threshold)

    async def by_default(request: Request, top_k: TopK = 5, threshold: Threshold = None) -> Response:
        """Classify one image or several with the default model."""
        return await classify(request, None, None, top_k, threshold)

    async def by_name(request: Request, name: str, top_k: TopK = 5, threshold: Threshold = None) -> Response:
        """Classify one image or several with the newest version of a model."""
        return await classify(request, name, None, top_k, threshold)

    async def by_version(
        request: Request, name: str, version: str, top_k: TopK = 5, threshold: Threshold = None
    ) -> Response:
        """Classify one image or several with one version of a model."""
        return await classify(request, name, version, top_k, threshold)

    for path, endpoint in (
        ("/v1/classify", by_default),
        ("/v1/models/{name}/classify", by_name),
        ("/v1/models/{name}/versions/{version}/classify", by_version),
    ):
        for method in ("POST", "PUT"):
            app.add_api_route(
                path,
                endpoint,
                methods=[method],
                tags=["classify"],
                operation_id=f"classify_{endpoint.__name__}_{method.lower()}",
                summary="Classify images",
                response_model=None,
                responses=_REPLIES,
                openapi_extra={"requestBody": request_body},
            )

    @app.get("/v1/models", response_model=ModelList, tags=["models"])
    async def models() -> dict[str, Any]:
        """The models that are served."""
        repository = classifier.repository
        return {
            "models": [
                {
                    "name": model.name,
                    "version": model.version,
                    "task": model.contract.task,
                    "labels": len(model.contract.labels),
                    "default": model.name == repository.default,
                }
                for model in repository.models.values()
            ]
        }

    def contract(name: str, version: str | None = None) -> Response:
        document = classifier.repository.get(name, version).contract.to_json()
        return Response(document, media_type="application/json")

    documented: dict[str, Any] = {
        "response_model": dict[str, Any],
        "responses": {404: _REPLIES[404]},
        "tags": ["models"],
    }

    @app.get("/v1/models/{name}/contract", **documented)
    async def contract_of_model(name: str) -> Response:
        """What the newest version of a model says about itself."""
        return contract(name)

    @app.get("/v1/models/{name}/versions/{version}/contract", **documented)
    async def contract_of_version(name: str, version: str) -> Response:
        """What one version of a model says about itself."""
        return contract(name, version)


async def _answer(
    classifier: Classifier, request: Request, model: LiveModel, top_k: int, threshold: float | None
) -> Response:
    started = time.monotonic()
    stages = classifier.metrics.stage_seconds
    content = await bodies.read(request, classifier.settings)
    content_type = request.headers.get("content-type", "")
    body = await classifier.in_thread(lambda: bodies.parse(content_type, content, classifier.settings))
    stages.labels("read").observe(time.monotonic() - started)
    with classifier.places(len(body.images), model):
        outcomes = await _classify_all(classifier, body.images, model)
    started = time.monotonic()
    top_k = top_k if body.top_k is None else body.top_k
    threshold = threshold if body.threshold is None else body.threshold
    reply: dict[str, Any] = {"model": model_name(model)}
    if len(outcomes) == 1:
        if isinstance(outcomes[0], RequestError):
            raise outcomes[0]
        reply |= render(outcomes[0], top_k, threshold)
    else:
        reply["results"] = [_render_outcome(classifier, one, top_k, threshold) for one in outcomes]
    encoded = orjson.dumps(reply)
    stages.labels("encode").observe(time.monotonic() - started)
    return Response(encoded, media_type="application/json")


async def _classify_all(
    classifier: Classifier, images: Sequence[bodies.Image], model: LiveModel
) -> list[Classification | RequestError]:
    """Each image's own answer or own error. Anything else that is raised is a bug, and raised."""

    async def one(image: bodies.Image) -> Classification | RequestError:
        try:
            return await classifier.classify(image, model)
        except RequestError as error:
            return error

    return await asyncio.gather(*(one(image) for image in images))


def _render_outcome(
    classifier: Classifier, outcome: Classification | RequestError, top_k: int, threshold: float | None
) -> dict[str, Any]:
    if isinstance(outcome, Classification):
        return render(outcome, top_k, threshold)
    classifier.metrics.errors.labels(outcome.code).inc()
    return {"error": {"code": outcome.code, "message": str(outcome)}}


def model_name(model: LiveModel) -> dict[str, str]:
    """Which model answered, as plain values."""
    return {"name": model.name, "version": model.version}


def render(classification: Classification, top_k: int, threshold: float | None = None) -> dict[str, Any]:
    """One image's part of a reply, as plain values."""
    image = classification.image
    return {
        "predictions": [
            _render_prediction(prediction)
            for prediction in rank(classification, top_k=top_k, threshold=threshold)
        ],
        "image": {"format": image.format, "width": image.width, "height": image.height},
    }


def _render_prediction(prediction: Prediction) -> dict[str, Any]:
    rendered: dict[str, Any] = {
        "label": prediction.label,
        "index": prediction.index,
        "probability": prediction.probability,
    }
    return rendered if prediction.selected is None else {**rendered, "selected": prediction.selected}


def _request_body(classifier: Classifier) -> dict[str, Any]:
    """The three forms of a request, for the OpenAPI document, with an example that runs.

    The example is the smallest image of a golden set: one that this host is known to decode.
    """
    binary = {"type": "string", "format": "binary"}
    golden = [
        image for model in classifier.repository.models.values() for image in model.contract.golden.images
    ]
    smallest = min(golden, key=lambda image: len(image.image))
    example = {"images": [{"b64": smallest.image}], "top_k": 3}
    return {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": binary}, "required": ["file"]}
            },
            "application/json": {"schema": ClassifyRequest.model_json_schema(), "example": example},
            "application/octet-stream": {"schema": binary},
        },
    }

"""The native dialect: `/v1/classify`, and the models and their contracts."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Query, Request
from fastapi.responses import Response

from service.api import bodies
from service.api.schemas import REPLIES, ModelList, Options, request_body
from service.classifier import Classification, Classifier, Prediction, rank
from service.errors import RequestError
from service.repository import LiveModel


def add_routes(app: FastAPI, classifier: Classifier) -> None:
    """Add the native routes over one core."""
    documented_body = request_body(_example(classifier))

    async def by_default(request: Request, options: Annotated[Options, Query()]) -> Response:
        """Classify one image or several with the default model."""
        return await _classify(classifier, request, classifier.repository.get(), options)

    async def by_name(request: Request, name: str, options: Annotated[Options, Query()]) -> Response:
        """Classify one image or several with the newest version of a model."""
        return await _classify(classifier, request, classifier.repository.get(name), options)

    async def by_version(
        request: Request, name: str, version: str, options: Annotated[Options, Query()]
    ) -> Response:
        """Classify one image or several with one version of a model."""
        return await _classify(classifier, request, classifier.repository.get(name, version), options)

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
                responses=REPLIES,
                openapi_extra={"requestBody": documented_body},
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
        "responses": {404: REPLIES[404]},
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


def _example(classifier: Classifier) -> str:
    """The smallest image of a golden set, base64: one that this host is known to decode."""
    models = classifier.repository.models.values()
    return min((golden.image for model in models for golden in model.contract.golden.images), key=len)


async def _classify(classifier: Classifier, request: Request, model: LiveModel, options: Options) -> Response:
    request.state.model = model.name
    started = time.monotonic()
    stages = classifier.metrics.stage_seconds
    content = await bodies.read(request, classifier.settings)
    content_type = request.headers.get("content-type", "")
    body = await classifier.in_thread(lambda: bodies.parse(content_type, content, classifier.settings))
    stages.labels("read").observe(time.monotonic() - started)
    with classifier.places(len(body.images), model):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(classifier.outcome(image, model)) for image in body.images]
    outcomes = [task.result() for task in tasks]
    started = time.monotonic()
    top_k = options.top_k if body.top_k is None else body.top_k
    threshold = options.threshold if body.threshold is None else body.threshold
    reply: dict[str, Any] = {"model": model_name(model)}
    if len(outcomes) == 1:
        if isinstance(outcomes[0], RequestError):
            raise outcomes[0]
        reply |= render(outcomes[0], top_k, threshold)
    else:
        for error in (one for one in outcomes if isinstance(one, RequestError)):
            classifier.metrics.errors.labels(error.code).inc()
        reply["results"] = [render(one, top_k, threshold) for one in outcomes]
    encoded = orjson.dumps(reply, option=orjson.OPT_APPEND_NEWLINE)
    stages.labels("encode").observe(time.monotonic() - started)
    return Response(encoded, media_type="application/json")


def model_name(model: LiveModel) -> dict[str, str]:
    """Which model answered, as plain values."""
    return {"name": model.name, "version": model.version}


def render(
    outcome: Classification | RequestError, top_k: int, threshold: float | None = None
) -> dict[str, Any]:
    """One image's part of a reply, as plain values: its labels, or its error."""
    if isinstance(outcome, RequestError):
        return {"error": outcome.to_dict()}
    image = outcome.image
    return {
        "predictions": [
            _render_prediction(prediction) for prediction in rank(outcome, top_k=top_k, threshold=threshold)
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

"""Routes that cloud platforms expect of a container.

POST /invocations              SageMaker: what /v1/classify takes, and its answer; MLflow's JSON
GET  /ping                     SageMaker: 200 if the models are ready; TorchServe has the same route
GET  /execution-parameters     SageMaker's batch transform: how much it may send
POST FOVEA_PREDICT_ROUTE       Vertex AI: {"instances": […], "parameters": {…}} → {"predictions": […]}
GET  FOVEA_HEALTH_ROUTE        Vertex AI: 200 if the models are ready
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Match

from fovea.service.api import tensorflow
from fovea.service.api.endpoint import Endpoint
from fovea.service.api.mlflow import InvocationsAdapter
from fovea.service.api.protocol_routes import EndpointRoute, ProtocolRoutes, add_endpoint_route
from fovea.service.api.reply_schemas import CLASSIFY_RESPONSES, FlatError
from fovea.service.api.request_schemas import ClassifyOptions, build_request_content
from fovea.service.api.route_scopes import PLATFORM_HEALTH
from fovea.service.api.services import Services
from fovea.service.errors import StartError
from fovea.service.http.api_protocol import NATIVE, ApiProtocols
from fovea.service.http.paths import HEALTH_PATHS

_KEPT_PROTOCOLS: Final = ("native", "oip", "tensorflow", "torchserve")
"""Protocols whose routes a predict route does not replace: it then names the route that you want.

The routes of Hugging Face (`/predict`) take another body than Vertex AI sends.
"""

_BATCH_MEGABYTES: Final = 6
"""Largest image of a batch transform. SageMaker allows 100 for all concurrent requests."""


def add_routes(app: FastAPI, services: Services, protocols: ApiProtocols) -> None:
    """Add the routes. Call this after all protocols have added theirs, because of equal paths."""
    add_endpoint_route(
        app,
        "/invocations",
        Endpoint(services, InvocationsAdapter(), NATIVE),
        content=build_request_content(services.example_image),
        methods=("POST",),
        operation="invocations",
        query_type=ClassifyOptions,
        tags=["clouds"],
        summary="Classify images on SageMaker",
        description="Classify one image or several with the default model, as `/v1/classify` does. JSON of "
        "MLflow (`dataframe_split`, `dataframe_records`, `instances` or `inputs`) gets `predictions`.",
        response_model=None,
        responses=CLASSIFY_RESPONSES,
    )

    @app.get("/execution-parameters", tags=["clouds"])
    async def execution_parameters() -> dict[str, Any]:
        """Return what SageMaker's batch transform may send: one image at a time, several at once."""
        settings = services.settings
        megabytes = max(1, min(_BATCH_MEGABYTES, settings.body_bytes >> 20))
        return {
            "MaxConcurrentTransforms": max(1, min(100 // megabytes, settings.queue_images // 2)),
            "BatchStrategy": "SINGLE_RECORD",
            "MaxPayloadInMB": megabytes,
        }

    async def check_health() -> dict[str, str]:
        """Check that the models are ready, as `/health/ready` does."""
        services.require_ready()
        return {"status": "ready"}

    health_options: dict[str, Any] = {"tags": ["clouds"], "responses": {503: CLASSIFY_RESPONSES[503]}}
    if _find_route(app, "GET", "/ping") is None:  # without TorchServe's protocol
        app.get("/ping", **health_options)(check_health)
    settings = services.settings
    if path := settings.health_route:
        if path == "/" or _find_route(app, "GET", path) is None:
            route = APIRoute(
                path, check_health, methods=["GET"], name=PLATFORM_HEALTH, include_in_schema=False
            )
            app.routes.insert(0, route)
        elif settings.tls_client_ca and path not in HEALTH_PATHS:
            raise StartError(
                f"FOVEA_HEALTH_ROUTE is {path!r}, which answers more than health; with FOVEA_TLS_CLIENT_CA "
                "choose another path, because health is answered without a client's certificate"
            )
    if path := settings.predict_route:
        _add_predict_route(app, services, protocols, path)


def _add_predict_route(app: FastAPI, services: Services, protocols: ApiProtocols, path: str) -> None:
    """Let `path` answer as `:predict` does, with the default model."""
    found = _find_route(app, "POST", path)
    if isinstance(found, EndpointRoute) and found.answerer.protocol.name in _KEPT_PROTOCOLS:
        return
    with protocols.register_routes(app.routes, tensorflow.PROTOCOL):
        ProtocolRoutes(app, services, tensorflow.PROTOCOL, FlatError).add_endpoint(
            path,
            tensorflow.PredictAdapter(),
            reply_type=tensorflow.PredictReply,
            body_type=tensorflow.PredictRequest,
            include_in_schema=False,
        )
    app.routes.insert(0, app.routes.pop())  # before a route of the same path


def _find_route(app: FastAPI, method: str, path: str) -> BaseRoute | None:
    scope = {"type": "http", "method": method, "path": path}
    return next((route for route in app.routes if route.matches(scope)[0] is Match.FULL), None)

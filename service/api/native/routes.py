"""The native protocol: `/v1/classify`, the list of models and their contracts."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import Response
from fastapi.routing import APIRoute

from fovea.service.api.native.classify import ClassifyEndpoint
from fovea.service.api.reply_schemas import CLASSIFY_RESPONSES, ModelList
from fovea.service.api.request_schemas import ClassifyOptions, build_request_body
from fovea.service.api.services import Services


def add_routes(app: FastAPI, services: Services) -> ClassifyEndpoint:
    """Add the native routes, and return the application that answers classifications without FastAPI."""
    classifier = services.classifier
    body_documentation = build_request_body(services.example_image)

    # FastAPI reads these signatures for the OpenAPI document, and never calls them: `ClassifyEndpoint`
    # replaces the application of each route below, and answers the requests.
    def by_default(options: Annotated[ClassifyOptions, Query()]) -> None:
        """Classify one image or several with the default model."""

    def by_name(name: str, options: Annotated[ClassifyOptions, Query()]) -> None:
        """Classify one image or several with the newest version of a model."""

    def by_version(name: str, version: str, options: Annotated[ClassifyOptions, Query()]) -> None:
        """Classify one image or several with one version of a model."""

    for path, signature in (
        ("/v1/classify", by_default),
        ("/v1/models/{name}/classify", by_name),
        ("/v1/models/{name}/versions/{version}/classify", by_version),
    ):
        for method in ("POST", "PUT"):
            app.add_api_route(
                path,
                signature,
                methods=[method],
                tags=["classify"],
                operation_id=f"classify_{signature.__name__}_{method.lower()}",
                summary="Classify images",
                response_model=None,
                responses=CLASSIFY_RESPONSES,
                openapi_extra={"requestBody": body_documentation},
            )
    classify_routes = [
        route for route in app.routes if isinstance(route, APIRoute) and "classify" in route.tags
    ]
    endpoint = ClassifyEndpoint(services, classify_routes)
    for route in classify_routes:
        route.app = endpoint

    @app.get("/v1/models", response_model=ModelList, tags=["models"])
    async def models() -> dict[str, Any]:
        """List the models that are loaded, the resting models, and the refused versions.

        A resting model is loaded by the first request for it. A refused version did not pass its checks.
        """
        registry = classifier.registry
        loaded = [
            {
                "name": model.name,
                "version": model.version,
                "task": model.contract.task,
                "labels": len(model.contract.labels),
                "default": model.name == registry.default,
            }
            for model in registry.models
        ]
        resting = [{"name": found.name, "version": found.version} for found in registry.on_demand_versions]
        refused = [
            {"name": one.name, "version": one.version, "reason": one.reason}
            for one in registry.refused_versions
        ]
        return {"models": loaded, "resting": resting, "refused": refused}

    async def get_contract(name: str, version: str | None = None) -> Response:
        model = await services.get_model(name, version)
        return Response(model.load_result.contract_json, media_type="application/json")

    route_options: dict[str, Any] = {
        "response_model": dict[str, Any],
        "responses": {404: CLASSIFY_RESPONSES[404]},
        "tags": ["models"],
    }

    @app.get("/v1/models/{name}/contract", **route_options)
    async def contract_of_model(name: str) -> Response:
        """Return the contract of the newest version of a model."""
        return await get_contract(name)

    @app.get("/v1/models/{name}/versions/{version}/contract", **route_options)
    async def contract_of_version(name: str, version: str) -> Response:
        """Return the contract of one version of a model."""
        return await get_contract(name, version)

    return endpoint

"""The OpenAPI document at `/openapi.json`, and Swagger UI at `/docs`."""

from __future__ import annotations

import asyncio
from functools import cache
from pathlib import Path
from typing import Any, Final

import orjson
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response

from fovea.service.api import page
from fovea.service.api.protocol_routes import EndpointRoute
from fovea.service.api.request_schemas import build_request_schemas
from fovea.service.api.services import Services
from fovea.service.http.paths import relative_root_url
from fovea.service.http.request_context import get_request_origin
from fovea.service.serving.live_model import LiveModel

_SECURITY_SCHEMES: Final = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "An API key."},
}
"""Ways to send an API key, in OpenAPI's words."""


def add_routes(app: FastAPI, services: Services, web_folder: Path) -> None:
    """Add the OpenAPI document, and Swagger UI from `web_folder`.

    Swagger UI is served from our own files, because FastAPI's default page loads it from another site. The
    document is open: if callers need keys, it has no example of the models.
    """
    models = services.classifier.catalog.models
    examples = _example_parameters(models[0]) if models and not services.access else {}

    @cache
    def openapi() -> dict[str, Any]:
        document = _correct_document(_generate_document(app), examples)
        if services.access:
            document["components"]["securitySchemes"] = _SECURITY_SCHEMES
            document["security"] = [{name: []} for name in _SECURITY_SCHEMES]
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # this is the way that FastAPI documents
    app.mount("/docs/swagger", page.PageFiles(directory=web_folder / "swagger"))

    def render_document(server: str) -> bytes:
        """Return the OpenAPI document for a server at this address.

        OpenAPI resolves a relative server address against the address of the document.
        """
        return orjson.dumps({**openapi(), "servers": [{"url": server}]})

    render_relative_document = cache(render_document)

    @app.get("/openapi.json", include_in_schema=False)
    async def schema(request: Request) -> Response:
        if url := get_request_origin(request.scope).url:
            content = await asyncio.to_thread(render_document, url)
        else:
            content = await asyncio.to_thread(
                render_relative_document, relative_root_url(request.scope["raw_path"])
            )
        return Response(content, media_type="application/json")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return page.render_page(request, web_folder / "docs.html", page.DOCS_HEADERS)


def _generate_document(app: FastAPI) -> dict[str, Any]:
    """Return the document as FastAPI generates it, with the routes that endpoints answer."""
    routes = [
        route.create_document_route() if isinstance(route, EndpointRoute) else route for route in app.routes
    ]
    return get_openapi(
        title=app.title,
        version=app.version,
        openapi_version=app.openapi_version,
        description=app.description,
        routes=routes,
    )


def _example_parameters(model: LiveModel) -> dict[str, str]:
    """Return parameter values with which the example requests of the OpenAPI document work."""
    feature_maps = model.contract.feature_maps
    return {
        "name": model.name,
        "version": model.version,
        **({"tensor": feature_maps[0]} if feature_maps else {}),
    }


def _correct_document(document: dict[str, Any], examples: dict[str, str]) -> dict[str, Any]:
    """Correct FastAPI's OpenAPI document.

    Removes FastAPI's 422 response, which is a 400 in this service, adds the bodies that our routes read
    themselves, and adds examples with parameters that exist.
    """
    for operation in (one for path in document["paths"].values() for one in path.values()):
        if "HTTPValidationError" in str(operation["responses"].get("422")):
            del operation["responses"]["422"]
        for parameter in operation.get("parameters", ()):
            if parameter["name"] in examples:
                parameter["example"] = examples[parameter["name"]]
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas.update(build_request_schemas())
    return document

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
from fastapi.routing import APIRoute

from fovea.service.api import page
from fovea.service.api.oip import routes as oip
from fovea.service.api.protocol_routes import EndpointRoute
from fovea.service.api.request_schemas import build_request_schemas
from fovea.service.api.services import Services
from fovea.service.api.web_files import WebFiles
from fovea.service.http.compression import Compressor
from fovea.service.http.paths import relative_root_url
from fovea.service.http.request_context import get_request_origin
from fovea.service.serving.live_model import LiveModel

_SECURITY_SCHEMES: Final = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "An API key."},
}
"""Ways to send an API key, in OpenAPI's words."""


_TAGS: Final = {
    "classify": "Labels and probabilities of images. Choose a file below, and execute.",
    "images": "Send an image once, and ask about it many times.",
    "explain": "What a model looked at, and every layer of the network with its values and weights.",
    "models": "The models that are served, and what they say about themselves.",
    "operations": "Health, metrics, and the configuration that is in force.",
    "management": "Load and unload models. Needs FOVEA_MANAGEMENT.",
    "oip": "Open Inference Protocol v2, as clients of KServe, Triton and OpenVINO speak it.",
    "tensorflow": "The REST API of TensorFlow Serving.",
    "torchserve": "The APIs of TorchServe for predictions, explanations and the list of models.",
    "huggingface": "The API of Hugging Face for image classification.",
    "clouds": "What cloud platforms call.",
}
"""Descriptions of the groups of calls, in the order in which they are shown."""

_PATH_PARAMETERS: Final = {
    "name": "Name of the model, as `/v1/models` lists it.",
    "version": "Version of the model, as `/v1/models` lists it.",
}

_CONTENT_ORDER: Final = ("application/octet-stream", "multipart/form-data")
"""Forms of a body that come first."""


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
    files = WebFiles(web_folder / "swagger", page.FILE_HEADERS, page.DOCS_HEADERS)
    compressor = Compressor()
    app.mount("/docs/swagger", files)

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
        return await compressor.create_response(request.scope, content, "application/json")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        text = (web_folder / "docs.html").read_text()
        version = await asyncio.to_thread(files.read_version)
        text = text.replace('="./docs/swagger/', f'="./docs/swagger/{version}/')
        root = relative_root_url(request.scope["raw_path"])
        return await page.render_page(request, text, page.DOCS_HEADERS, compressor, root=root)


def _generate_document(app: FastAPI) -> dict[str, Any]:
    """Return the document as FastAPI generates it, with the routes that endpoints answer."""
    routes = [
        route.create_document_route() if isinstance(route, EndpointRoute) else route for route in app.routes
    ]
    for route in routes:
        if isinstance(route, APIRoute) and not route.summary:
            # FastAPI would make a summary of the function's name.
            sentence, _, rest = route.description.replace("\n", " ").partition(". ")
            route.summary, route.description = sentence.removesuffix("."), rest.strip()
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


def _find_description(parameter: dict[str, Any]) -> str | None:
    """Return the description of a parameter that FastAPI has left without one, or None if there is none.

    FastAPI leaves the description of an optional type in the type's schema.
    """
    for schema in parameter["schema"].get("anyOf", ()):
        if "description" in schema:
            return str(schema["description"])
    return _PATH_PARAMETERS.get(parameter["name"])


def _rank_content(item: tuple[str, Any]) -> int:
    """Return the place of a form of a body.

    Swagger UI selects the first form, and has a file chooser for bytes.
    """
    return _CONTENT_ORDER.index(item[0]) if item[0] in _CONTENT_ORDER else len(_CONTENT_ORDER)


def _correct_document(document: dict[str, Any], examples: dict[str, str]) -> dict[str, Any]:
    """Correct FastAPI's OpenAPI document.

    Removes FastAPI's 422 response, which is a 400 in this service, adds the bodies that our routes read
    themselves, adds examples with parameters that exist, and describes tags and parameters.
    """
    operations = [one for path in document["paths"].values() for one in path.values()]
    for operation in operations:
        if "HTTPValidationError" in str(operation["responses"].get("422")):
            del operation["responses"]["422"]
        for parameter in operation.get("parameters", ()):
            if parameter["name"] in examples:
                parameter["example"] = examples[parameter["name"]]
            if "description" not in parameter and (description := _find_description(parameter)):
                parameter["description"] = description
        body = operation.get("requestBody", {})
        if "content" in body and oip.PROTOCOL.name not in operation["tags"]:
            body["content"] = dict(sorted(body["content"].items(), key=_rank_content))
    used_tags = {tag for operation in operations for tag in operation["tags"]}
    document["tags"] = [
        {"name": name, "description": text} for name, text in _TAGS.items() if name in used_tags
    ]
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas.update(build_request_schemas())
    return document

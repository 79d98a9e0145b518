"""Routes that an endpoint answers and FastAPI only documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Annotated, Any, Final

from fastapi import FastAPI, Query
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import Match, Route
from starlette.types import Scope

from fovea.service.api.adapter import ProtocolAdapter
from fovea.service.api.asgi_endpoint import AsgiEndpoint
from fovea.service.api.endpoint import Endpoint
from fovea.service.api.reply_schemas import build_error_responses
from fovea.service.api.services import Services
from fovea.service.http.api_protocol import ApiProtocol

_BINARY_SCHEMA: Final = {"type": "string", "format": "binary"}

_NO_CONTENT: Final[Mapping[str, Any]] = {}

RAW_IMAGE_CONTENT: Final[Mapping[str, Any]] = {"application/octet-stream": {"schema": _BINARY_SCHEMA}}
"""OpenAPI content of a body that is a raw image."""


def build_form_content(field_name: str) -> Mapping[str, Any]:
    """Return the OpenAPI content of a form with files in this field; other field names work too."""
    files = {
        "type": "object",
        "properties": {field_name: {"type": "array", "items": _BINARY_SCHEMA}},
        "required": [field_name],
    }
    return {"multipart/form-data": {"schema": files}}


class EndpointRoute(Route):
    """A route that an endpoint answers.

    FastAPI's route is created only for the OpenAPI document: it takes 4 ms, a tenth of a second for all.
    """

    def __init__(
        self, path: str, endpoint: AsgiEndpoint, method: str, signature: Callable[..., None], **options: Any
    ) -> None:
        """Let `endpoint` answer. FastAPI documents a function with `signature` and these options."""
        super().__init__(path, endpoint, methods=[method])
        self.answerer = endpoint
        self._method = method
        self._signature = signature
        self._options = options

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match a request. As in FastAPI's routes, the scope then names the route for the log and metrics."""
        match, child_scope = super().matches(scope)
        if match is not Match.NONE:
            child_scope["route"] = self
        return match, child_scope

    def create_document_route(self) -> APIRoute:
        """Return the route as FastAPI documents it."""
        return APIRoute(self.path, self._signature, methods=[self._method], **self._options)


def add_endpoint_route(
    app: FastAPI,
    path: str,
    endpoint: AsgiEndpoint,
    *,
    content: Mapping[str, Any],
    methods: Sequence[str] = ("POST", "PUT"),
    operation: str | None = None,
    body_type: type[BaseModel] | None = None,
    query_type: type[BaseModel] | None = None,
    **route_options: Any,
) -> None:
    """Let `endpoint` answer requests to `path`, which may contain `{name}` and `{version}` of the model.

    The other parameters are for the OpenAPI document only: `content` are the bodies by media type,
    `body_type` is the type of a JSON body and `query_type` of the query. `operation` is the operation's id
    without the method; by default it is made from the protocol and the path.
    """
    words = "".join(letter if letter.isalnum() else " " for letter in path).split()
    operation = operation or "_".join([endpoint.protocol.name, *words])
    for method in methods:
        route = EndpointRoute(
            path,
            endpoint,
            method,
            _build_signature(path, body_type, query_type),
            operation_id=f"{operation}_{method.lower()}",
            openapi_extra={"requestBody": {"required": True, "content": dict(content)}},
            **route_options,
        )
        app.routes.append(route)


@dataclass(frozen=True)
class ProtocolRoutes:
    """A builder of the classification routes of one protocol."""

    app: FastAPI
    services: Services
    protocol: ApiProtocol
    error_type: type[BaseModel]
    """Type of the protocol's errors in the OpenAPI document."""

    def add_endpoint(
        self,
        path: str,
        adapter: ProtocolAdapter,
        *,
        reply_type: Any,
        content: Mapping[str, Any] = _NO_CONTENT,
        methods: Sequence[str] = ("POST",),
        make_example: Callable[[str], Any] | None = None,
        **route_options: Any,
    ) -> None:
        """Classify the images that are sent to `path`.

        `reply_type` is the type of a successful reply in the OpenAPI document. `make_example` makes a working
        JSON body from a base64 image. The other parameters are as in `add_endpoint_route`.
        """
        if make_example:
            content = {"application/json": {"example": make_example(self.services.example_image)}, **content}
        add_endpoint_route(
            self.app,
            path,
            Endpoint(self.services, adapter, self.protocol),
            content=content,
            methods=methods,
            tags=[self.protocol.name],
            response_model=reply_type,
            responses=build_error_responses(self.error_type),
            **route_options,
        )


def _build_signature(
    path: str, body_type: type[BaseModel] | None, query_type: type[BaseModel] | None
) -> Callable[..., None]:
    """Return a function whose signature FastAPI reads for the OpenAPI document; it is never called."""

    def stub() -> None: ...

    parameter_types: dict[str, Any] = {name: str for name in ("name", "version") if f"{{{name}}}" in path}
    if body_type:
        parameter_types["body"] = body_type
    if query_type:
        parameter_types["query"] = Annotated[query_type, Query()]
    stub.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind) for name, kind in parameter_types.items()]
    )
    return stub

"""Base classes for protocol adapters.

An adapter parses the request and renders the response; admission, limits and metrics are handled by
`Services`.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from inspect import Parameter, Signature
from typing import Annotated, Any, Final, NamedTuple

import orjson
from fastapi import FastAPI, Query
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import QueryParams
from starlette.types import Receive, Scope, Send

from fovea.service.api import bodies
from fovea.service.api.options import refuse_native_options
from fovea.service.api.reply_schemas import build_error_responses
from fovea.service.api.services import MAX_INLINE_LABELS, ModelAddress, Services, make_deadline_error
from fovea.service.errors import RequestError
from fovea.service.http.api_protocol import ApiProtocol
from fovea.service.http.fast_path import Headers
from fovea.service.http.observer import Observer, render_error
from fovea.service.http.request_context import get_record
from fovea.service.http.request_record import RequestRecord
from fovea.service.image_warnings import create_warning_headers
from fovea.service.runners.batch_messages import Item
from fovea.service.runners.lane import INFINITY
from fovea.service.serving.admission import Admission
from fovea.service.serving.classifier import Classification
from fovea.service.serving.registry import LiveModel
from fovea.service.settings import Settings


@dataclass(frozen=True)
class Reply:
    """A complete HTTP reply."""

    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    media_type: str = "application/json"

    @classmethod
    def from_value(cls, value: Any) -> Reply:
        """Return a reply with plain values as JSON; NaN becomes null, because JSON has no NaN."""
        return cls(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))


@dataclass(frozen=True)
class InferenceRequest:
    """A classification request with its whole body."""

    body: bodies.RawBody
    headers: Headers
    query: QueryParams
    model: LiveModel
    settings: Settings

    @property
    def content_type(self) -> bytes:
        """Content type, empty if there is none."""
        return self.headers.get(b"content-type", b"")


class ParsedRequest(NamedTuple):
    """A parsed request: the images, and a function that renders their results in the same order."""

    images: list[Item]
    render_reply: Callable[[Sequence[Classification]], Reply]
    labels_per_image: int
    """Number of labels per image in the reply; a reply with many labels is rendered in a thread."""
    time_limit: float | None = None
    """Time limit for the answer in seconds, if the body sets one."""


class ProtocolAdapter(ABC):
    """A parser of the bodies of one route."""

    def body_limit(self, headers: Headers, settings: Settings) -> bodies.BodyLimit:
        """Return the size limit of the body."""
        return bodies.body_limit(settings)

    @abstractmethod
    async def parse_request(self, request: InferenceRequest) -> ParsedRequest:
        """Parse a request; slow work belongs into a thread.

        Raises `RequestError`.
        """


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


class ProtocolRoutes:
    """A builder of the classification routes of one protocol."""

    def __init__(
        self, app: FastAPI, services: Services, protocol: ApiProtocol, error_type: type[BaseModel]
    ) -> None:
        """Create the builder; `error_type` is the type of the protocol's errors in the OpenAPI document."""
        self._app = app
        self._services = services
        self._protocol = protocol
        self._error_type = error_type

    def add_endpoint(
        self,
        path: str,
        adapter: ProtocolAdapter,
        *,
        summary: str,
        reply_type: Any,
        body_type: type[BaseModel] | None = None,
        content: Mapping[str, Any] = _NO_CONTENT,
        query_type: type[BaseModel] | None = None,
        methods: Sequence[str] = ("POST",),
        make_example: Callable[[str], Any] | None = None,
    ) -> None:
        """Answer requests to `path`, which may contain `{name}` and `{version}` of the model.

        The other parameters are for the OpenAPI document only: `reply_type` is the type of a successful
        reply, `body_type` of a JSON body and `query_type` of the query; `content` are other bodies by media
        type. `make_example` makes a working JSON body from a base64 image.
        """
        if make_example:
            content = {"application/json": {"example": make_example(self._services.example_image)}, **content}
        for method in methods:
            self._app.add_api_route(
                path,
                build_signature(path, body_type, query_type),
                methods=[method],
                tags=[self._protocol.name],
                operation_id=build_operation_id(self._protocol.name, path, method),
                summary=summary,
                response_model=reply_type,
                responses=build_error_responses(self._error_type),
                openapi_extra={"requestBody": {"required": True, "content": dict(content)}},
            )
            # FastAPI has documented the route. From here on the endpoint answers it, without FastAPI.
            route = self._app.routes[-1]
            if isinstance(route, APIRoute):
                route.app = Endpoint(self._services, adapter, self._protocol)


class AsgiEndpoint(ABC):
    """The ASGI application of a route that bypasses FastAPI.

    FastAPI's own error handling would treat a client that disconnects as a bug.
    """

    @abstractmethod
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


def list_bypass_routes(app: FastAPI) -> list[APIRoute]:
    """Return all routes that bypass FastAPI."""
    return [
        route for route in app.routes if isinstance(route, APIRoute) and isinstance(route.app, AsgiEndpoint)
    ]


def build_signature(
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


def build_operation_id(tag: str, path: str, method: str) -> str:
    """Return the id of an operation in the OpenAPI document."""
    words = "".join(letter if letter.isalnum() else " " for letter in path).split()
    return "_".join([tag, *words, method.lower()])


class Endpoint(AsgiEndpoint):
    """The ASGI application of a classification route."""

    def __init__(self, services: Services, adapter: ProtocolAdapter, protocol: ApiProtocol) -> None:
        self._services = services
        self.adapter = adapter
        self.protocol = protocol

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            reply = await self._handle_asgi(scope, receive)
        except RequestError as error:
            await render_error(scope, error, self._services.observer)(scope, receive, send)
            return
        response = Response(reply.content, headers=dict(reply.headers), media_type=reply.media_type)
        await response(scope, receive, send)

    async def _handle_asgi(self, scope: Scope, receive: Receive) -> Reply:
        """Answer a request over ASGI.

        Raises `RequestError`, or `ClientDisconnect`.
        """
        services, record = self._services, get_record(scope)
        address = ModelAddress(**scope["path_params"])
        model = services.admit(*address, record)
        headers = dict(scope["headers"])
        query = QueryParams(scope["query_string"])

        async def handle_body(raw_body: bodies.RawBody, admission: Admission, deadline: float) -> Reply:
            request = InferenceRequest(raw_body, headers, query, admission.model, services.settings)
            return await self.handle_request(request, admission, deadline, record)

        limit = self.adapter.body_limit(headers, services.settings)
        return await services.run(scope, receive, address, model, limit, handle_body)

    async def handle_request(
        self, request: InferenceRequest, admission: Admission, deadline: float, record: RequestRecord
    ) -> Reply:
        """Answer a request with its whole body.

        Raises `RequestError`.
        """
        refuse_native_options(request.query)
        parsed_request = await self.adapter.parse_request(request)
        admission.reserve_images(len(parsed_request.images))
        if (label_count := len(parsed_request.images) * parsed_request.labels_per_image) > MAX_INLINE_LABELS:
            admission.reserve_answer(label_count)
        own_deadline = (
            record.started_at + parsed_request.time_limit if parsed_request.time_limit else INFINITY
        )
        try:
            async with asyncio.timeout_at(own_deadline) if parsed_request.time_limit else nullcontext():
                outcomes = await self._services.classifier.classify_images(
                    parsed_request.images,
                    request.model,
                    deadline=min(deadline, own_deadline),
                    on_answer=record.add_image,
                )
        except TimeoutError:
            raise make_deadline_error(parsed_request.time_limit) from None
        # All jobs are over, so that the images are not needed any more.
        bodies.release_images(parsed_request.images)
        results = _require_results(outcomes, self._services.observer, record)
        started_at = time.monotonic()
        if parsed_request.labels_per_image * len(results) <= MAX_INLINE_LABELS:
            reply = parsed_request.render_reply(results)
        else:
            reply = await asyncio.to_thread(parsed_request.render_reply, results)
        self._services.end_stage("encode", started_at, record)
        if headers := create_warning_headers([one.answer.warnings for one in results]):
            reply = replace(reply, headers={**reply.headers, **headers})
        return reply


def _require_results(
    outcomes: Sequence[Classification | RequestError], observer: Observer, record: RequestRecord
) -> Sequence[Classification]:
    """Return the results of all images, or raise the first error.

    Only the native protocol can report an error beside the results of other images.
    """
    results = [one for one in outcomes if isinstance(one, Classification)]
    errors = [(number, one) for number, one in enumerate(outcomes) if isinstance(one, RequestError)]
    for _, error in errors[1:]:
        observer.record_image_failure(record, error.code)
    if errors:
        number, error = errors[0]
        if len(outcomes) > 1:
            error.args = (f"image {number}: {error}",)
        raise error
    return results

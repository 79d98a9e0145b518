"""Base classes for protocol adapters.

An adapter parses the request and renders the response; admission, limits and metrics are handled by `Desk`.
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
from fovea.service.api.schemas import failures
from fovea.service.api.services import MANY, Address, Desk, late
from fovea.service.errors import RequestError
from fovea.service.http.api_protocol import ApiProtocol
from fovea.service.http.fast_path import Headers
from fovea.service.http.observer import Observer, get_record, render_error
from fovea.service.http.request_record import RequestRecord
from fovea.service.image_warnings import create_warning_headers
from fovea.service.runners.batcher import INFINITY
from fovea.service.runners.messages import Item
from fovea.service.serving.classifier import Admission, Classification
from fovea.service.serving.registry import LiveModel
from fovea.service.settings import Settings


@dataclass(frozen=True)
class Reply:
    """A complete HTTP reply."""

    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    media_type: str = "application/json"

    @classmethod
    def json(cls, value: Any) -> Reply:
        """Return a reply with plain values as JSON; NaN becomes null, because JSON has no NaN."""
        return cls(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))


@dataclass(frozen=True)
class Heard:
    """A classification request with its whole body."""

    body: bodies.Received
    headers: Headers
    query: QueryParams
    model: LiveModel
    settings: Settings

    @property
    def content_type(self) -> bytes:
        """Content type, empty if there is none."""
        return self.headers.get(b"content-type", b"")


class Asked(NamedTuple):
    """A parsed request: the images, and a function that renders their results in the same order."""

    images: list[Item]
    reply: Callable[[Sequence[Classification]], Reply]
    labels: int
    """Number of labels per image in the reply; a reply with many labels is rendered in a thread."""
    seconds: float | None = None
    """Time limit for the answer in seconds, if the body sets one."""


class Translation(ABC):
    """A parser of the bodies of one route."""

    def limit(self, headers: Headers, settings: Settings) -> bodies.Limit:
        """Return the size limit of the body."""
        return bodies.body_limit(settings)

    @abstractmethod
    async def read(self, heard: Heard) -> Asked:
        """Parse a request; slow work belongs into a thread.

        Raises `RequestError`.
        """


_BINARY: Final = {"type": "string", "format": "binary"}

_NOTHING: Final[Mapping[str, Any]] = {}

RAW: Final[Mapping[str, Any]] = {"application/octet-stream": {"schema": _BINARY}}
"""OpenAPI content of a body that is a raw image."""


def form(field: str) -> Mapping[str, Any]:
    """Return the OpenAPI content of a form with files in this field; other field names work too."""
    files = {
        "type": "object",
        "properties": {field: {"type": "array", "items": _BINARY}},
        "required": [field],
    }
    return {"multipart/form-data": {"schema": files}}


class Routes:
    """A builder of the classification routes of one protocol."""

    def __init__(self, app: FastAPI, desk: Desk, dialect: ApiProtocol, error: type[BaseModel]) -> None:
        """Create the builder; `error` is the type of the protocol's errors in the OpenAPI document."""
        self._app = app
        self._desk = desk
        self._dialect = dialect
        self._error = error

    def ask(
        self,
        path: str,
        translation: Translation,
        *,
        summary: str,
        reply: Any,
        body: type[BaseModel] | None = None,
        content: Mapping[str, Any] = _NOTHING,
        query: type[BaseModel] | None = None,
        methods: Sequence[str] = ("POST",),
        example: Callable[[str], Any] | None = None,
    ) -> None:
        """Answer requests to `path`, which may contain `{name}` and `{version}` of the model.

        The other parameters are for the OpenAPI document only: `reply` is the type of a successful reply,
        `body` of a JSON body and `query` of the query; `content` are other bodies by media type. `example`
        makes a working JSON body from a base64 image.
        """
        if example:
            content = {"application/json": {"example": example(self._desk.example)}, **content}
        for method in methods:
            self._app.add_api_route(
                path,
                signature_of(path, body, query),
                methods=[method],
                tags=[self._dialect.name],
                operation_id=operation_of(self._dialect.name, path, method),
                summary=summary,
                response_model=reply,
                responses=failures(self._error),
                openapi_extra={"requestBody": {"required": True, "content": dict(content)}},
            )
            route = self._app.routes[-1]
            if isinstance(route, APIRoute):
                route.app = Answering(self._desk, translation, self._dialect)


class PastFastAPI(ABC):
    """The ASGI application of a route that bypasses FastAPI.

    FastAPI's own error handling would treat a client that disconnects as a bug.
    """

    @abstractmethod
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


def past_fastapi(app: FastAPI) -> list[APIRoute]:
    """Return all routes that bypass FastAPI."""
    return [
        route for route in app.routes if isinstance(route, APIRoute) and isinstance(route.app, PastFastAPI)
    ]


def signature_of(
    path: str, body: type[BaseModel] | None, query: type[BaseModel] | None
) -> Callable[..., None]:
    """Return a function whose signature FastAPI reads for the OpenAPI document; it is never called."""

    def stub() -> None: ...

    wanted: dict[str, Any] = {name: str for name in ("name", "version") if f"{{{name}}}" in path}
    if body:
        wanted["body"] = body
    if query:
        wanted["query"] = Annotated[query, Query()]
    stub.__signature__ = Signature(  # type: ignore[attr-defined]
        [Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind) for name, kind in wanted.items()]
    )
    return stub


def operation_of(tag: str, path: str, method: str) -> str:
    """Return the id of an operation in the OpenAPI document."""
    words = "".join(letter if letter.isalnum() else " " for letter in path).split()
    return "_".join([tag, *words, method.lower()])


class Answering(PastFastAPI):
    """The ASGI application of a classification route."""

    def __init__(self, desk: Desk, translation: Translation, dialect: ApiProtocol) -> None:
        self._desk = desk
        self.translation = translation
        self.dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            reply = await self._reply(scope, receive)
        except RequestError as error:
            await render_error(scope, error, self._desk.observer)(scope, receive, send)
            return
        response = Response(reply.content, headers=dict(reply.headers), media_type=reply.media_type)
        await response(scope, receive, send)

    async def _reply(self, scope: Scope, receive: Receive) -> Reply:
        """Answer a request over ASGI.

        Raises `RequestError`, or `ClientDisconnect`.
        """
        desk, record = self._desk, get_record(scope)
        address = Address(**scope["path_params"])
        model = desk.admit(*address, record)
        headers = dict(scope["headers"])
        query = QueryParams(scope["query_string"])

        async def work(received: bodies.Received, share: Admission, deadline: float) -> Reply:
            heard = Heard(received, headers, query, share.model, desk.settings)
            return await self.work(heard, share, deadline, record)

        limit = self.translation.limit(headers, desk.settings)
        return await desk.attend(scope, receive, address, model, limit, work)

    async def work(self, heard: Heard, share: Admission, deadline: float, record: RequestRecord) -> Reply:
        """Answer a request with its whole body.

        Raises `RequestError`.
        """
        bodies.check_foreign_query(heard.query)
        asked = await self.translation.read(heard)
        share.reserve_images(len(asked.images))
        if (labels := len(asked.images) * asked.labels) > MANY:
            share.reserve_answer(labels)
        own = record.started_at + asked.seconds if asked.seconds else INFINITY
        try:
            async with asyncio.timeout_at(own) if asked.seconds else nullcontext():
                outcomes = await self._desk.classifier.classify_images(
                    asked.images, heard.model, deadline=min(deadline, own), on_answer=record.add_image
                )
        except TimeoutError:
            raise late(asked.seconds) from None
        bodies.release(asked.images)
        found = _all(outcomes, self._desk.observer, record)
        started = time.monotonic()
        if asked.labels * len(found) <= MANY:
            reply = asked.reply(found)
        else:
            reply = await asyncio.to_thread(asked.reply, found)
        self._desk.end_stage("encode", started, record)
        if headers := create_warning_headers([one.answer.warnings for one in found]):
            reply = replace(reply, headers={**reply.headers, **headers})
        return reply


def _all(
    outcomes: Sequence[Classification | RequestError], observer: Observer, record: RequestRecord
) -> Sequence[Classification]:
    """Return the results of all images, or raise the first error.

    Only the native protocol can report an error beside the results of other images.
    """
    found = [one for one in outcomes if isinstance(one, Classification)]
    bad = [(number, one) for number, one in enumerate(outcomes) if isinstance(one, RequestError)]
    for _, error in bad[1:]:
        observer.record_image_failure(record, error.code)
    if bad:
        number, error = bad[0]
        if len(outcomes) > 1:
            error.args = (f"image {number}: {error}",)
        raise error
    return found

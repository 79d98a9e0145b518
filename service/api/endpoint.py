"""The frame of a dialect: it says what a body asks and how answers are written; the desk does the rest."""

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
from fovea.service.http.api_protocol import Dialect
from fovea.service.http.fast_path import Headers
from fovea.service.http.observer import Observer, record_of, render
from fovea.service.http.request_record import Record
from fovea.service.image_warnings import headers_of
from fovea.service.runners.batcher import FOREVER
from fovea.service.runners.messages import Item
from fovea.service.serving.classifier import Classification, Share
from fovea.service.serving.registry import LiveModel
from fovea.service.settings import Settings


@dataclass(frozen=True)
class Reply:
    """An answer as it is sent."""

    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    media_type: str = "application/json"

    @classmethod
    def json(cls, value: Any) -> Reply:
        """Of plain values. A NaN, which JSON has not, becomes null."""
        return cls(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))


@dataclass(frozen=True)
class Heard:
    """A request for answers, whole."""

    body: bodies.Received
    headers: Headers
    query: QueryParams
    model: LiveModel
    settings: Settings

    @property
    def content_type(self) -> bytes:
        """Empty where there is none."""
        return self.headers.get(b"content-type", b"")


class Asked(NamedTuple):
    """What it asks: the images, and how to write what was found in them, in the same order."""

    images: list[Item]
    reply: Callable[[Sequence[Classification]], Reply]
    labels: int
    """That a reply has of each image: many are written in a thread."""
    seconds: float | None = None
    """Within which the answer is of use, where the body says so."""


class Translation(ABC):
    """Of the bodies of one route."""

    def limit(self, headers: Headers, settings: Settings) -> bodies.Limit:
        """For the body."""
        return bodies.body_limit(settings)

    @abstractmethod
    async def read(self, heard: Heard) -> Asked:
        """Raises `RequestError`. What takes long belongs into a thread."""


_BINARY: Final = {"type": "string", "format": "binary"}

_NOTHING: Final[Mapping[str, Any]] = {}

RAW: Final[Mapping[str, Any]] = {"application/octet-stream": {"schema": _BINARY}}
"""A body that is an image as it is."""


def form(field: str) -> Mapping[str, Any]:
    """A body that has files in this field, or in others."""
    files = {
        "type": "object",
        "properties": {field: {"type": "array", "items": _BINARY}},
        "required": [field],
    }
    return {"multipart/form-data": {"schema": files}}


class Routes:
    """Adds the routes of a dialect that ask for answers."""

    def __init__(self, app: FastAPI, desk: Desk, dialect: Dialect, error: type[BaseModel]) -> None:
        """`error` is what its errors look like, for the OpenAPI document."""
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
        """Answer requests to `path`, which may name `{name}` and `{version}` of the model.

        The rest is for the OpenAPI document alone: the types of a good answer, of a JSON body and of the
        query, and what else a body may be, by media type; and a JSON body that runs, made of a base64 image.
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
    """The ASGI application of a route whose requests go straight to it: FastAPI's own error handling would
    take a client that leaves for a bug."""

    @abstractmethod
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


def past_fastapi(app: FastAPI) -> list[APIRoute]:
    """All such routes."""
    return [
        route for route in app.routes if isinstance(route, APIRoute) and isinstance(route.app, PastFastAPI)
    ]


def signature_of(
    path: str, body: type[BaseModel] | None, query: type[BaseModel] | None
) -> Callable[..., None]:
    """What stands for a route where FastAPI reads its document from."""

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
    """The name of an operation in the OpenAPI document."""
    words = "".join(letter if letter.isalnum() else " " for letter in path).split()
    return "_".join([tag, *words, method.lower()])


class Answering(PastFastAPI):
    """The ASGI application of a route."""

    def __init__(self, desk: Desk, translation: Translation, dialect: Dialect) -> None:
        self._desk = desk
        self.translation = translation
        self.dialect = dialect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            reply = await self._reply(scope, receive)
        except RequestError as error:
            await render(scope, error, self._desk.observer)(scope, receive, send)
            return
        response = Response(reply.content, headers=dict(reply.headers), media_type=reply.media_type)
        await response(scope, receive, send)

    async def _reply(self, scope: Scope, receive: Receive) -> Reply:
        """Raises `RequestError`, or `ClientDisconnect`."""
        desk, record = self._desk, record_of(scope)
        address = Address(**scope["path_params"])
        model = desk.admit(*address, record)
        headers = dict(scope["headers"])
        query = QueryParams(scope["query_string"])

        async def work(received: bodies.Received, share: Share, deadline: float) -> Reply:
            heard = Heard(received, headers, query, share.model, desk.settings)
            return await self.work(heard, share, deadline, record)

        limit = self.translation.limit(headers, desk.settings)
        return await desk.attend(scope, receive, address, model, limit, work)

    async def work(self, heard: Heard, share: Share, deadline: float, record: Record) -> Reply:
        """The answer to a request, whole. Raises `RequestError`."""
        bodies.check_foreign_query(heard.query)
        asked = await self.translation.read(heard)
        share.take_places(len(asked.images))
        if (labels := len(asked.images) * asked.labels) > MANY:
            share.take_answer(labels)
        own = record.started + asked.seconds if asked.seconds else FOREVER
        try:
            async with asyncio.timeout_at(own) if asked.seconds else nullcontext():
                outcomes = await self._desk.classifier.outcomes(
                    asked.images, heard.model, deadline=min(deadline, own), told=record.image
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
        if headers := headers_of([one.answer.warnings for one in found]):
            reply = replace(reply, headers={**reply.headers, **headers})
        return reply


def _all(
    outcomes: Sequence[Classification | RequestError], observer: Observer, record: Record
) -> Sequence[Classification]:
    """What was found in all images. Raises the error of the first that has one: no dialect but ours has a
    place for it beside the others' answers."""
    found = [one for one in outcomes if isinstance(one, Classification)]
    bad = [(number, one) for number, one in enumerate(outcomes) if isinstance(one, RequestError)]
    for _, error in bad[1:]:
        observer.image_failed(record, error.code)
    if bad:
        number, error = bad[0]
        if len(outcomes) > 1:
            error.args = (f"image {number}: {error}",)
        raise error
    return found

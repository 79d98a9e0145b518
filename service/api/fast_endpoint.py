"""Classification requests that bypass ASGI (`service.http.fast_path`), for all protocols."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import httptools
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.datastructures import QueryParams
from starlette.routing import Match

from fovea.service.api import bodies
from fovea.service.api.cached_replies import Rendered
from fovea.service.api.endpoint import Answering, Heard, Reply, past_fastapi
from fovea.service.api.services import Address, Desk, late, time_limit
from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import RequestError
from fovea.service.http import fast_path
from fovea.service.http.fast_path import Exchange, Headers
from fovea.service.http.paths import normalize_path
from fovea.service.runners.batcher import INFINITY
from fovea.service.runners.shared_memory import SharedBuffer
from fovea.service.serving.classifier import Admission
from fovea.service.serving.registry import LiveModel

KNOWN: Final = 1024
"""Maximum number of parsed URLs that are cached; parsing takes longer than everything else."""

KNOWN_BYTES: Final = 256
"""Maximum length in bytes of a URL that is cached."""


class Call(ABC):
    """A classification request; subclasses process its body (`service.http.fast_path.RequestHandler`)."""

    __slots__ = ("_alarm", "_deadline", "_desk", "_limit", "_share", "_started", "_task", "_turn")

    def __init__(self, desk: Desk, turn: Exchange, model: LiveModel, limit: float | None) -> None:
        """Start the deadline; `limit` is the time limit for the answer in seconds."""
        self._desk = desk
        self._turn = turn
        self._limit = limit
        self._share = Admission(desk.classifier, model)
        self._started = time.monotonic()
        self._deadline = self._started + limit if limit else INFINITY
        self._task: asyncio.Task[None] | None = None
        self._alarm = asyncio.get_running_loop().call_later(limit, self._ring) if limit else None

    def count(self, size: int) -> None:
        """Count `size` bytes of the body as they arrive."""
        self._share.reserve_bytes(size)

    def begin(self, body: bytes | SharedBuffer, size: int) -> None:
        """Process the whole body."""
        self._desk.end_stage("read", self._started, self._turn.record)
        self._begin(bodies.Received(body, size))

    @abstractmethod
    def _begin(self, received: bodies.Received) -> None:
        """Process the whole body.

        Raises `RequestError`.
        """

    def close(self) -> None:
        """Release everything that the request holds; see `service.http.fast_path.RequestHandler`."""
        self._share.release()
        if self._alarm:
            self._alarm.cancel()
        if self._task:
            self._task.cancel()

    def _run(self, work: Callable[[], Coroutine[Any, Any, Reply]]) -> None:
        """Run `work` in a task, and answer with its result."""
        self._task = asyncio.get_running_loop().create_task(self._answer(work))

    async def _answer(self, work: Callable[[], Coroutine[Any, Any, Reply]]) -> None:
        # `_task` is cleared before each answer, because answering closes this call, and `close` would cancel
        # the task that is answering.
        try:
            reply = await work()
        except RequestError as error:
            self._task = None
            self._turn.refuse(error)
        except Exception:
            self._task = None
            self._turn.fail()
        else:
            self._task = None
            self._turn.answer(reply.content, reply.headers, reply.media_type)

    def _ring(self) -> None:
        self._turn.refuse(late(self._limit))


class Way(NamedTuple):
    """A parsed URL: the matching route, and the requested model."""

    route: APIRoute
    answering: Answering
    address: Address
    query: QueryParams


class Calls:
    """The requests that bypass ASGI (`service.http.fast_path.FastApp`)."""

    def __init__(self, app: FastAPI, desk: Desk, native: fast_path.RequestOpener, rendered: Rendered) -> None:
        """Create the application from its parts.

        `native` answers the native requests, and the other protocols' routes the rest; `rendered` answers GET
        requests.
        """
        self._rendered = rendered
        self.slots = desk.classifier.shared_bodies
        self._desk = desk
        self._native = native
        self._routes = past_fastapi(app)
        self._known: dict[tuple[bytes, bytes], Way] = {}
        """Parsed URLs, by method and URL."""

    def open(
        self, turn: Exchange, method: bytes, url: bytes, headers: Headers
    ) -> fast_path.RequestHandler | None:
        """Accept a request, or return None if it must go through ASGI.

        See `service.http.fast_path.FastApp`. Compressed bodies go through ASGI.
        """
        if b"content-encoding" in headers:
            return None
        if method == b"GET":
            return self._rendered.open(turn, url, headers)
        return self._native.open(turn, method, url, headers) or self._open(turn, method, url, headers)

    def has_answer(self, url: bytes) -> bool:
        """Return True if there may be a cached reply; see `service.http.fast_path.FastApp`."""
        return self._rendered.has(url)

    def _open(
        self, turn: Exchange, method: bytes, url: bytes, headers: Headers
    ) -> fast_path.RequestHandler | None:
        way = self._known.get((method, url)) or self._find(method, url)
        if way is None:
            return None
        turn.record.route, turn.record.protocol = way.route.path, way.answering.dialect
        model = self._desk.admit(*way.address, turn.record)
        if isinstance(model, ModelVersion):
            return None
        limit = time_limit(headers, self._desk.settings)
        bodies.check_length(headers, way.answering.translation.limit(headers, self._desk.settings))
        self._desk.classifier.check_capacity(model)
        return _Translated(self._desk, turn, model, limit, way, headers)

    def _find(self, method: bytes, url: bytes) -> Way | None:
        try:
            parsed = httptools.parse_url(url)
        except httptools.HttpParserInvalidURLError:
            return None
        path = normalize_path(unquote((parsed.path or b"").decode("ascii", "replace")))
        for route in self._routes:
            match, found = route.matches({"type": "http", "method": method.decode(), "path": path})
            if match is Match.FULL and isinstance(route.app, Answering):
                address = Address(**found["path_params"])
                way = Way(route, route.app, address, QueryParams(parsed.query or b""))
                if len(url) <= KNOWN_BYTES:
                    if len(self._known) >= KNOWN:
                        self._known.clear()
                    self._known[method, url] = way
                return way
        return None


class _Translated(Call):
    __slots__ = ("_headers", "_model", "_way")

    def __init__(
        self, desk: Desk, turn: Exchange, model: LiveModel, limit: float | None, way: Way, headers: Headers
    ) -> None:
        super().__init__(desk, turn, model, limit)
        self._model = model
        self._way = way
        self._headers = headers

    def _begin(self, received: bodies.Received) -> None:
        heard = Heard(received, self._headers, self._way.query, self._model, self._desk.settings)
        work = self._way.answering.work
        self._run(lambda: work(heard, self._share, self._deadline, self._turn.record))

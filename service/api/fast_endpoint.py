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
from fovea.service.api.cached_replies import CachedReplies
from fovea.service.api.endpoint import Endpoint, InferenceRequest, Reply, list_bypass_routes
from fovea.service.api.services import ModelAddress, Services, make_deadline_error, parse_time_limit
from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import RequestError
from fovea.service.http import fast_path
from fovea.service.http.fast_path import Exchange, Headers
from fovea.service.http.paths import normalize_path
from fovea.service.runners.lane import INFINITY
from fovea.service.runners.shared_memory import SharedBuffer
from fovea.service.serving.admission import Admission
from fovea.service.serving.registry import LiveModel

MAX_CACHED_URLS: Final = 1024
"""Maximum number of parsed URLs that are cached; parsing takes longer than everything else."""

MAX_CACHED_URL_BYTES: Final = 256
"""Maximum length in bytes of a URL that is cached."""


class FastHandler(ABC):
    """A classification request; subclasses process its body (`service.http.fast_path.RequestHandler`)."""

    __slots__ = (
        "_admission",
        "_deadline",
        "_exchange",
        "_limit",
        "_services",
        "_started_at",
        "_task",
        "_timer",
    )

    def __init__(self, services: Services, exchange: Exchange, model: LiveModel, limit: float | None) -> None:
        """Start the deadline; `limit` is the time limit for the answer in seconds."""
        self._services = services
        self._exchange = exchange
        self._limit = limit
        self._admission = Admission(services.classifier, model)
        self._started_at = time.monotonic()
        self._deadline = self._started_at + limit if limit else INFINITY
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(limit, self._on_deadline) if limit else None

    def count_bytes(self, size: int) -> None:
        """Reserve memory for `size` bytes of the body, as they arrive.

        Raises `Overloaded`.
        """
        self._admission.reserve_bytes(size)

    def handle_body(self, body: bytes | SharedBuffer, size: int) -> None:
        """Process the whole body: the bytes, or the first `size` bytes of the shared buffer.

        `Exchange` calls this once, on the event loop, after all bytes were counted. The shared buffer stays
        valid until `close` returns.
        """
        self._services.end_stage("read", self._started_at, self._exchange.record)
        self._handle_body(bodies.RawBody(body, size))

    @abstractmethod
    def _handle_body(self, raw_body: bodies.RawBody) -> None:
        """Process the whole body.

        Raises `RequestError`.
        """

    def close(self) -> None:
        """Stop the work, then release everything that the request holds.

        `Exchange` calls this once, on the event loop, when the request is answered, refused, or abandoned by
        its client. It gives the body's shared buffer back right after this method returns.

        Invariant: a request's jobs are over before its memory is given back, both the shared buffer and the
        admission. A job is over when it has left the queue, or when its result will be ignored. The order
        matters:

        * A job that is still queued could otherwise read the next request's body from the shared buffer, and
          return its labels to this request's client.
        * Releasing the admission gives this request's places and bytes to others, and may release the model.
          Places of images that still wait must not be given away, and a model must not be unloaded under a
          job.
        """
        try:
            self._cancel_jobs()
        finally:  # the reservation must end even if cancelling fails, or its places are lost for ever
            self._admission.release()

    def _cancel_jobs(self) -> None:
        """Cancel the deadline and all work, so that every job is over when this method returns.

        Subclasses that submit jobs without the task cancel those jobs too.
        """
        if self._timer:
            self._timer.cancel()
        if self._task:
            # `cancel` reaches the futures of `Classifier.classify_images` at once, and they cancel their
            # jobs. The task itself ends in the next round of the event loop, and submits nothing before.
            self._task.cancel()
            assert self._task.done() or self._task.cancelling()  # noqa: S101 - no input is checked here

    def _run(self, make_reply: Callable[[], Coroutine[Any, Any, Reply]]) -> None:
        """Run `make_reply` in a task on the event loop, and answer with its result."""
        self._task = asyncio.get_running_loop().create_task(self._answer(make_reply))

    async def _answer(self, make_reply: Callable[[], Coroutine[Any, Any, Reply]]) -> None:
        # Clear `_task` before each answer: answering calls `close`, which would cancel the task that is
        # answering. All jobs of the task are over here, because `make_reply` has awaited them.
        try:
            reply = await make_reply()
        except RequestError as error:
            self._task = None
            self._exchange.refuse(error)
        except Exception:
            self._task = None
            self._exchange.fail()
        else:
            self._task = None
            self._exchange.answer(reply.content, reply.headers, reply.media_type)

    def _on_deadline(self) -> None:
        # The event loop calls this unless `close` came first. Refusing calls `close`, which ends the work.
        self._exchange.refuse(make_deadline_error(self._limit))


class RouteMatch(NamedTuple):
    """A parsed URL: the matching route, and the requested model."""

    route: APIRoute
    endpoint: Endpoint
    address: ModelAddress
    query: QueryParams


class FastRouter:
    """The requests that bypass ASGI (`service.http.fast_path.FastApp`)."""

    def __init__(
        self, app: FastAPI, services: Services, native: fast_path.RequestOpener, cached_replies: CachedReplies
    ) -> None:
        """Create the application from its parts.

        `native` answers the native requests, and the other protocols' routes the rest; `cached_replies`
        answers GET requests.
        """
        self._cached_replies = cached_replies
        self.shared_bodies = services.classifier.shared_bodies
        self._services = services
        self._native = native
        self._routes = list_bypass_routes(app)
        self._matches_by_url: dict[tuple[bytes, bytes], RouteMatch] = {}
        """Parsed URLs, by method and URL."""

    def open_request(
        self, exchange: Exchange, method: bytes, url: bytes, headers: Headers
    ) -> fast_path.RequestHandler | None:
        """Accept a request, or return None if it must go through ASGI.

        See `service.http.fast_path.FastApp`. Compressed bodies go through ASGI.
        """
        if b"content-encoding" in headers:
            return None
        if method == b"GET":
            return self._cached_replies.open_request(exchange, url, headers)
        return self._native.open_request(exchange, method, url, headers) or self._open(
            exchange, method, url, headers
        )

    def can_answer(self, url: bytes) -> bool:
        """Return True if there may be a cached reply; see `service.http.fast_path.FastApp`."""
        return self._cached_replies.has_reply(url)

    def _open(
        self, exchange: Exchange, method: bytes, url: bytes, headers: Headers
    ) -> fast_path.RequestHandler | None:
        route_match = self._matches_by_url.get((method, url)) or self._find(method, url)
        if route_match is None:
            return None
        exchange.record.route, exchange.record.protocol = (
            route_match.route.path,
            route_match.endpoint.protocol,
        )
        model = self._services.admit(*route_match.address, exchange.record)
        if isinstance(model, ModelVersion):
            return None
        limit = parse_time_limit(headers, self._services.settings)
        bodies.check_length(
            headers, route_match.endpoint.adapter.body_limit(headers, self._services.settings)
        )
        self._services.classifier.check_capacity(model)
        return _EndpointHandler(self._services, exchange, model, limit, route_match, headers)

    def _find(self, method: bytes, url: bytes) -> RouteMatch | None:
        try:
            url_parts = httptools.parse_url(url)
        except httptools.HttpParserInvalidURLError:
            return None
        path = normalize_path(unquote((url_parts.path or b"").decode("ascii", "replace")))
        for route in self._routes:
            match, child_scope = route.matches({"type": "http", "method": method.decode(), "path": path})
            if match is Match.FULL and isinstance(route.app, Endpoint):
                address = ModelAddress(**child_scope["path_params"])
                route_match = RouteMatch(route, route.app, address, QueryParams(url_parts.query or b""))
                if len(url) <= MAX_CACHED_URL_BYTES:
                    if len(self._matches_by_url) >= MAX_CACHED_URLS:
                        self._matches_by_url.clear()
                    self._matches_by_url[method, url] = route_match
                return route_match
        return None


class _EndpointHandler(FastHandler):
    __slots__ = ("_headers", "_model", "_route_match")

    def __init__(
        self,
        services: Services,
        exchange: Exchange,
        model: LiveModel,
        limit: float | None,
        route_match: RouteMatch,
        headers: Headers,
    ) -> None:
        super().__init__(services, exchange, model, limit)
        self._model = model
        self._route_match = route_match
        self._headers = headers

    def _handle_body(self, raw_body: bodies.RawBody) -> None:
        request = InferenceRequest(
            raw_body, self._headers, self._route_match.query, self._model, self._services.settings
        )
        handle_request = self._route_match.endpoint.handle_request
        self._run(lambda: handle_request(request, self._admission, self._deadline, self._exchange.record))

"""Classification in the native protocol, bypassing FastAPI and usually ASGI too.

FastAPI's own handling takes longer than a small image, and so does ASGI. `ClassifyEndpoint` is an application
of both kinds. It is an ASGI application for other servers, and for requests that cannot be answered
immediately, and it is an application of `service.http.fast_path`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import httptools
import orjson
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from fovea.service.api import bodies
from fovea.service.api.body_parser import needs_parsing, parse_body
from fovea.service.api.endpoint import Reply
from fovea.service.api.fast_endpoint import MAX_CACHED_URL_BYTES, MAX_CACHED_URLS, FastHandler
from fovea.service.api.native.classification_replies import (
    ReplyOptions,
    render_model_name,
    render_outcome,
    resolve_options,
)
from fovea.service.api.options import parse_query
from fovea.service.api.request_schemas import ClassifyOptions
from fovea.service.api.services import MAX_INLINE_LABELS, ModelAddress, Services, parse_time_limit
from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import RequestError
from fovea.service.http import observer
from fovea.service.http.fast_path import Exchange, Headers
from fovea.service.http.paths import normalize_path
from fovea.service.http.request_context import get_context, get_record
from fovea.service.http.request_record import RequestRecord
from fovea.service.runners.lane import Job
from fovea.service.serving.admission import Admission
from fovea.service.serving.classifier import Classification
from fovea.service.serving.registry import LiveModel


@dataclass(frozen=True, slots=True)
class RouteTarget:
    """The route and the model that a method and path select."""

    route: APIRoute
    name: str | None
    version: str | None


class ClassifyEndpoint:
    """The application that answers all native classification requests."""

    def __init__(self, services: Services, routes: Sequence[APIRoute]) -> None:
        """Create the application; `routes` are the routes that it answers."""
        self.services = services
        self.classifier = services.classifier
        self.shared_bodies = services.classifier.shared_bodies
        self.body_limit = bodies.body_limit(services.settings)
        self._routes = routes
        self._parsed_urls: dict[tuple[bytes, bytes], tuple[RouteTarget, ClassifyOptions]] = {}
        """Parsed requests by method and URL; parsing takes longer than everything else."""

    def find_target(self, method: str, path: str) -> RouteTarget | None:
        """Return the target of a request, or None if no classification route matches."""
        if path.endswith("/classify"):
            for route in self._routes:
                match, child_scope = route.matches({"type": "http", "method": method, "path": path})
                if match is Match.FULL:
                    return RouteTarget(route, **{"name": None, "version": None, **child_scope["path_params"]})
        return None

    def _check_request(self, headers: Headers, model: LiveModel) -> float | None:
        """Check the headers, and return the time limit for the answer in seconds.

        Raises `RequestError`.
        """
        limit = parse_time_limit(headers, self.services.settings)
        bodies.check_length(headers, self.body_limit)
        self.classifier.check_capacity(model)
        return limit

    async def classify_body(
        self,
        content_type: bytes,
        raw_body: bodies.RawBody,
        model: LiveModel,
        options: ClassifyOptions,
        admission: Admission,
        deadline: float,
        record: RequestRecord,
    ) -> bytes:
        """Classify the images in a body, and return the JSON reply.

        Raises `RequestError`.
        """
        parsed_body = await parse_body(content_type, raw_body, self.classifier.settings)
        reply_options = resolve_options(options, parsed_body, model)
        admission.reserve_images(len(parsed_body.images))
        if (
            label_count := len(parsed_body.images) * (reply_options.top_k + reply_options.label_set_cost)
        ) > MAX_INLINE_LABELS:
            admission.reserve_answer(label_count)
        outcomes = await self.classifier.classify_images(
            parsed_body.images, model, deadline=deadline, on_answer=record.add_image
        )
        bodies.release_images(parsed_body.images)  # all jobs are over
        if len(outcomes) > 1:
            for error in (one for one in outcomes if isinstance(one, RequestError)):
                self.services.observer.record_image_failure(record, error.code)
        return await self.encode_reply(model, outcomes, reply_options, record)

    async def encode_reply(
        self,
        model: LiveModel,
        outcomes: Sequence[Classification | RequestError],
        reply_options: ReplyOptions,
        record: RequestRecord,
    ) -> bytes:
        """Call `render_reply`, in a thread if it may take long."""
        started_at = time.monotonic()
        if (reply_options.top_k + reply_options.label_set_cost) * len(outcomes) <= MAX_INLINE_LABELS:
            content = self.render_reply(model, outcomes, reply_options, record)
        else:
            content = await asyncio.to_thread(self.render_reply, model, outcomes, reply_options, record)
        self.services.end_stage("encode", started_at, record)
        return content

    def render_reply(
        self,
        model: LiveModel,
        outcomes: Sequence[Classification | RequestError],
        reply_options: ReplyOptions,
        record: RequestRecord,
    ) -> bytes:
        """Return the JSON reply, or raise the error of a single image.

        Several images get `results`, which may contain errors.
        """
        reply: dict[str, Any] = {"model": render_model_name(model)}
        if len(outcomes) == 1:
            if isinstance(outcomes[0], RequestError):
                raise outcomes[0]
            reply |= render_outcome(outcomes[0], reply_options)
        else:
            # Render the results one after the other: as plain values they take four times as much memory.
            reply["results"] = [
                orjson.Fragment(orjson.dumps(render_outcome(one, reply_options))) for one in outcomes
            ]
        if reply_options.timing:
            reply["timing"] = {name: 1000 * stage.seconds for name, stage in record.longest_stages().items()}
        return orjson.dumps(reply, option=orjson.OPT_APPEND_NEWLINE)

    # --- without ASGI ---

    def open_request(
        self, exchange: Exchange, method: bytes, url: bytes, headers: Headers
    ) -> FastHandler | None:
        """Accept a request, or return None if it must go through ASGI.

        See `service.http.fast_path.FastApp`.
        """
        entry = self._parsed_urls.get((method, url))
        if entry is None:
            try:
                url_parts = httptools.parse_url(url)
            except httptools.HttpParserInvalidURLError:
                return None
            path = normalize_path(unquote((url_parts.path or b"").decode("ascii", "replace")))
            target = self.find_target(method.decode(), path)
            if target is None:
                return None
        else:
            target = entry[0]
        exchange.record.route = target.route.path
        model = self.services.admit(target.name, target.version, exchange.record)
        if isinstance(model, ModelVersion):
            return None
        if entry is None:
            entry = self._cache_url(method, url, (target, _parse_options(url_parts.query or b"")))
        content_type = headers.get(b"content-type", b"")
        is_structured = needs_parsing(content_type)
        reply_options = resolve_options(_DEFAULT_OPTIONS if is_structured else entry[1], _EMPTY_BODY, model)
        limit = self._check_request(headers, model)
        return _ClassifyHandler(
            self, exchange, model, entry[1], reply_options, content_type, limit, is_structured=is_structured
        )

    def _cache_url(
        self, method: bytes, url: bytes, entry: tuple[RouteTarget, ClassifyOptions]
    ) -> tuple[RouteTarget, ClassifyOptions]:
        if len(url) <= MAX_CACHED_URL_BYTES:
            if len(self._parsed_urls) >= MAX_CACHED_URLS:
                self._parsed_urls.clear()
            self._parsed_urls[method, url] = entry
        return entry

    # --- ASGI ---

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            content = await self._handle_asgi(scope, receive)
        except RequestError as error:
            await observer.render_error(scope, error, self.services.observer)(scope, receive, send)
            return
        length = str(len(content)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _handle_asgi(self, scope: Scope, receive: Receive) -> bytes:
        """Answer a request over ASGI.

        Raises `RequestError`, or `ClientDisconnect`.
        """
        context = get_context(scope)
        target: RouteTarget | None = context.target or self.find_target(scope["method"], scope["path"])
        if target is None:
            raise RuntimeError(f"no classification route matches {scope['path']}")
        scope["route"] = target.route
        record = get_record(scope)
        address = ModelAddress(target.name, target.version)
        model = self.services.admit(*address, record)
        options = _parse_options(scope["query_string"])
        content_type = dict(scope["headers"]).get(b"content-type", b"")

        async def handle_body(raw_body: bodies.RawBody, admission: Admission, deadline: float) -> bytes:
            return await self.classify_body(
                content_type, raw_body, admission.model, options, admission, deadline, record
            )

        return await self.services.run(scope, receive, address, model, self.body_limit, handle_body)


class _ClassifyHandler(FastHandler):
    """A request that bypasses ASGI."""

    __slots__ = (
        "_content_type",
        "_endpoint",
        "_is_structured",
        "_job",
        "_model",
        "_options",
        "_reply_options",
    )

    def __init__(
        self,
        endpoint: ClassifyEndpoint,
        exchange: Exchange,
        model: LiveModel,
        options: ClassifyOptions,
        reply_options: ReplyOptions,
        content_type: bytes,
        limit: float | None,
        *,
        is_structured: bool,
    ) -> None:
        """Create the request.

        `reply_options` are the `options` resolved for a raw image; a body that is structured may set other
        options.
        """
        super().__init__(endpoint.services, exchange, model, limit)
        self._endpoint = endpoint
        self._model = model
        self._options = options
        self._reply_options = reply_options
        self._content_type = content_type
        self._is_structured = is_structured
        self._job: Job | None = None

    def _handle_body(self, raw_body: bodies.RawBody) -> None:
        """Put a raw image into the queue immediately, or start a task for a body that must be parsed."""
        if self._is_structured:
            self._run(lambda: self._classify_body(raw_body))
            return
        image = raw_body.to_image()
        self._admission.reserve_images(1)
        # The batcher calls `_on_outcome` on the event loop when a runner has answered, never before
        # `submit_image` returns: `_job` is set by then. No task is needed.
        self._job = self._endpoint.classifier.submit_image(
            image,
            self._model,
            self._on_outcome,
            deadline=self._deadline,
            on_answer=self._exchange.record.add_image,
        )

    def _cancel_jobs(self) -> None:
        """Cancel the deadline, the task and the job of a raw image; `FastHandler.close` says why first."""
        super()._cancel_jobs()
        if job := self._job:
            self._job = None  # breaks the reference cycle with this handler
            if not job.is_over:
                self._exchange.record.add_queue_time(job)
            self._endpoint.classifier.cancel(job)
            assert job.is_over  # noqa: S101 - the invariant of `FastHandler.close`, not a check of input

    def _on_outcome(self, outcome: Classification | RequestError | Exception) -> None:
        """Answer the request.

        The batcher calls this once, on the event loop, and not after `close`. The job is over by then, so
        that the answer may close this handler and give the image's memory back.
        """
        if isinstance(outcome, RequestError):
            self._exchange.refuse(outcome)
            return
        try:
            if not isinstance(outcome, Classification):
                raise outcome
            reply_options = self._reply_options
            if reply_options.top_k + reply_options.label_set_cost > MAX_INLINE_LABELS:
                self._run(lambda: self._encode_outcome(outcome))
                return
            started_at = time.monotonic()
            content = self._endpoint.render_reply(
                self._model, [outcome], reply_options, self._exchange.record
            )
            self._endpoint.services.end_stage("encode", started_at, self._exchange.record)
        except Exception:
            self._exchange.fail()
        else:
            self._exchange.answer(content)

    async def _classify_body(self, raw_body: bodies.RawBody) -> Reply:
        content = await self._endpoint.classify_body(
            self._content_type,
            raw_body,
            self._model,
            self._options,
            self._admission,
            self._deadline,
            self._exchange.record,
        )
        return Reply(content)

    async def _encode_outcome(self, outcome: Classification) -> Reply:
        return Reply(
            await self._endpoint.encode_reply(
                self._model, [outcome], self._reply_options, self._exchange.record
            )
        )


_DEFAULT_OPTIONS: Final = ClassifyOptions()

_EMPTY_BODY: Final = bodies.ParsedBody([])
"""Body without options of its own."""


def _parse_options(query: bytes) -> ClassifyOptions:
    if not query:
        return _DEFAULT_OPTIONS
    return parse_query(ClassifyOptions, query)

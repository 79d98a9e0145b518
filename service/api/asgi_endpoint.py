"""Endpoints: the applications of the routes that the router answers without FastAPI."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any, NamedTuple

from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fovea.service.access.caller import Scope as KeyScope
from fovea.service.api import bodies
from fovea.service.api.adapter import InferenceRequest
from fovea.service.api.services import ModelAddress, Services, make_deadline_error, parse_time_limit
from fovea.service.errors import PacedRefusal, RequestError
from fovea.service.http.api_protocol import ApiProtocol
from fovea.service.http.fast_path import Exchange, Headers, RequestHandler
from fovea.service.http.observer import render_error
from fovea.service.http.request_context import RequestContext, get_context, get_record
from fovea.service.runners.lane import INFINITY
from fovea.service.serving.admission import Admission


class RouteMatch(NamedTuple):
    """The result of routing a method and a URL: a route, its endpoint, a model, and options."""

    route: Route
    endpoint: AsgiEndpoint
    address: ModelAddress
    options: Any
    """Options of the query, parsed by the endpoint."""
    refusal: RequestError | None = None
    """Error of the query. The endpoint raises it once the request is admitted."""


class AsgiEndpoint(ABC):
    """The application of a route: it admits a request, reads the body, and answers over ASGI.

    FastAPI only documents the route (`protocol_routes.EndpointRoute`), because FastAPI takes longer than a
    small image, and would treat a client that disconnects as a bug. The router calls the endpoint with a
    `RouteMatch`, over ASGI as `RequestContext.target`. A subclass may also accept requests that bypass ASGI.
    """

    key_scope: KeyScope = KeyScope.CLASSIFY
    """Scope that the route needs of an API key."""

    def __init__(self, services: Services, protocol: ApiProtocol) -> None:
        self.services = services
        self.protocol = protocol
        self._body_limit = bodies.body_limit(services.settings)

    @abstractmethod
    def parse_options(self, query: bytes) -> Any:
        """Parse the query of a URL. Raises `BadRequest`."""

    def body_limit(self, headers: Headers) -> bodies.BodyLimit:
        """Return the size limit of the body."""
        return self._body_limit

    def open_request(
        self, exchange: Exchange, route_match: RouteMatch, headers: Headers
    ) -> RequestHandler | None:
        """Accept a request that bypasses ASGI, or return None to leave the request to ASGI.

        Raises `RequestError`.
        """
        return None

    @abstractmethod
    async def answer_body(
        self, request: InferenceRequest, admission: Admission, deadline: float, send: Send
    ) -> Response | None:
        """Return the response to a request with its whole body, or None if the response has been sent.

        Called once, on the event loop. `deadline` is in seconds of the monotonic clock. The call is
        cancelled when the deadline passes or the client disconnects. The admission is released after the call
        has ended, so that its jobs are over by then. Raises `RequestError`.
        """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if access := self.services.access:
                record = get_record(scope)
                access.authorize(self.key_scope, record.credential, record.client)
            response = await self.answer(scope, receive, send)
        except RequestError as error:
            await await_refusal(error, get_context(scope))
            response = await self.refuse(scope, error, send)
        if response:
            await response(scope, receive, send)

    async def refuse(self, scope: Scope, error: RequestError, send: Send) -> Response | None:
        """Return the response for an error, or None if the response has been sent."""
        return render_error(scope, error, self.services.observer)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """Admit a request, read its body, and call `answer_body`.

        Raises `RequestError`, or `ClientDisconnect`.
        """
        services, context, record = self.services, get_context(scope), get_record(scope)
        route_match: RouteMatch = context.target
        model = services.admit(*route_match.address, record)
        if route_match.refusal:
            raise route_match.refusal
        if context.has_disconnected:
            raise ClientDisconnect
        headers = dict(scope["headers"])
        limit = self.body_limit(headers)
        time_limit = parse_time_limit(headers, services.settings)
        deadline = record.started_at + time_limit if time_limit else INFINITY
        try:
            async with asyncio.timeout_at(deadline) if time_limit else nullcontext():
                bodies.check_length(headers, limit)
                with await services.create_admission(route_match.address, model, record) as admission:
                    reserve = admission.reserve_bytes
                    raw_body = await bodies.read_body(receive, services.settings, reserve, limit)
                    encoding = headers.get(b"content-encoding", b"identity")
                    raw_body = await bodies.decompress_body(raw_body, encoding, limit, reserve)
                    services.end_stage("read", record.started_at, record)
                    options, model = route_match.options, admission.model
                    request = InferenceRequest(
                        raw_body,
                        headers,
                        options,
                        model,
                        services.settings,
                        record,
                        services.url_images.bind(reserve, record),
                        admission.count_images,
                    )
                    with DisconnectGuard(context):
                        return await self.answer_body(request, admission, deadline, send)
        except TimeoutError:
            raise make_deadline_error(time_limit) from None


async def await_refusal(error: RequestError, context: RequestContext) -> None:
    """Wait until an error may be sent, if its caller gets many errors.

    Raises `ClientDisconnect` at once when the client leaves: nothing may be kept for a client that is gone.
    """
    if isinstance(error, PacedRefusal) and error.delay:
        error.__traceback__ = None  # it refers to all that the request had
        with DisconnectGuard(context):
            await asyncio.sleep(error.delay)


class DisconnectGuard:
    """A context that cancels its task when the client disconnects, and then raises `ClientDisconnect`.

    The connection sets `has_disconnected` and calls `on_disconnect`, on the event loop that also runs the
    task. Waiting for ASGI's `receive` instead would need a task for each request.
    """

    __slots__ = ("_context", "_has_disconnected", "_task")

    def __init__(self, context: RequestContext) -> None:
        self._context = context
        self._has_disconnected = False

    def __enter__(self) -> None:
        if self._context.has_disconnected:
            raise ClientDisconnect
        self._task = asyncio.current_task()
        self._context.on_disconnect = self._cancel_task

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._context.on_disconnect = None
        if self._has_disconnected and kind is asyncio.CancelledError and self._task:
            self._task.uncancel()
            raise ClientDisconnect

    def _cancel_task(self) -> None:
        # The connection calls this on the event loop, while the task is suspended. `__exit__` turns the
        # cancellation into `ClientDisconnect`; cancellations by others, such as a deadline, pass through.
        if self._task:
            self._has_disconnected = True
            self._task.cancel()

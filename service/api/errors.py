"""Handlers that convert FastAPI's errors to the error tree of the service."""

from __future__ import annotations

from contextlib import suppress

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from fovea.service.api.asgi_endpoint import await_refusal
from fovea.service.errors import BadRequest, MethodNotAllowed, NotFound, RequestError
from fovea.service.http.observer import Observer, render_error
from fovea.service.http.request_context import get_context
from fovea.service.validation import describe_error


def add_error_handlers(app: FastAPI, observer: Observer) -> None:
    """Convert every error to our error tree, and render it in one place."""

    @app.exception_handler(RequestError)
    async def handle_request_error(request: Request, error: RequestError) -> Response:
        with suppress(ClientDisconnect):  # then nobody gets the answer
            await await_refusal(error, get_context(request.scope))
        return render_error(request.scope, error, observer)

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return render_error(
            request.scope, BadRequest(f"{first['loc'][-1]}: {describe_error(first)}"), observer
        )

    @app.exception_handler(HTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            allowed_methods = _allowed_methods(app, request)
            response = render_error(
                request.scope,
                MethodNotAllowed(f"{request.method} is not allowed here; use {allowed_methods}"),
                observer,
            )
            response.headers["Allow"] = allowed_methods
            return response
        return render_error(request.scope, NotFound(f"there is nothing at {request.url.path}"), observer)


def _allowed_methods(app: FastAPI, request: Request) -> str:
    """Return the methods of all routes at this path; Starlette names those of the first route only."""
    matching_routes = [route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in matching_routes for method in getattr(route, "methods", ())}
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods)) or "GET, HEAD"  # the path is inside the mounted folder of files

"""The application: the core, the protocol adapters, the documentation and the web page, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from fovea.service import __version__
from fovea.service.api import huggingface, operations, page, tensorflow, torchserve
from fovea.service.api.cached_replies import CachedReplies
from fovea.service.api.endpoint import list_bypass_routes
from fovea.service.api.fast_endpoint import FastRouter
from fovea.service.api.native import explain
from fovea.service.api.native import routes as native
from fovea.service.api.native.classify import ClassifyEndpoint
from fovea.service.api.oip import repository as management
from fovea.service.api.oip import routes as oip
from fovea.service.api.oip.repository import ModelLoader
from fovea.service.api.request_schemas import build_request_schemas
from fovea.service.api.services import Services
from fovea.service.artifact.repository import ServingState
from fovea.service.errors import BadRequest, MethodNotAllowed, NotFound, RequestError, StartError, to_one_line
from fovea.service.explain.client import ExplainerClient
from fovea.service.http.access_log import AccessLog
from fovea.service.http.api_protocol import ApiProtocols
from fovea.service.http.fast_path import FastApp
from fovea.service.http.lifecycle import Lifecycle
from fovea.service.http.observer import Observer, ObserverMiddleware, render_error
from fovea.service.http.paths import relative_root_url
from fovea.service.http.proxies import TrustedProxies
from fovea.service.http.request_context import get_context, get_request_origin
from fovea.service.observability.metrics import Metrics
from fovea.service.rollout.manager import ModelManager
from fovea.service.rollout.refusals import Refusals
from fovea.service.rollout.watcher import Watcher
from fovea.service.serving.classifier import Classifier
from fovea.service.serving.registry import LiveModel
from fovea.service.settings import Settings
from fovea.service.validation import describe_error

if TYPE_CHECKING:  # the packages of tracing are an optional extra
    from fovea.service.http.tracing import Tracing

_OTHER_PROTOCOLS: Final = (oip, torchserve, tensorflow, huggingface)
"""Protocol adapters other than the native one, one module each."""

_WEB_FOLDER: Final = Path(__file__).parent / "web"


@dataclass(frozen=True)
class Application:
    """The parts of the service that a server needs."""

    asgi: ASGIApp
    """Entry point for a server: the middleware around FastAPI."""
    fast_app: FastApp
    """Handlers of the most frequent requests, for a server that can bypass ASGI."""
    classifier: Classifier
    manager: ModelManager
    watcher: Watcher
    observer: Observer
    lifecycle: Lifecycle


def create_app(
    settings: Settings,
    *,
    registry: CollectorRegistry,
    exposed_registry: CollectorRegistry | None = None,
    serving_state: ServingState | None = None,
    participant: ModelLoader | None = None,
    refusals: Refusals | None = None,
) -> Application:
    """Load the models and build the application.

    Raises `StartError`; in that case nothing has been started.

    The metrics go into `registry`; `/metrics` shows `exposed_registry` if it is given. A worker gets the
    models to serve as `serving_state` and a `participant` that manages them. Without a manager the
    application watches the repository itself, and keeps its verdicts on model versions in `refusals`.
    """
    metrics = Metrics(registry)
    protocols = ApiProtocols()
    proxies = TrustedProxies(settings.trusted_proxies)
    observer = Observer(
        metrics, AccessLog(settings.log_requests), _create_tracing(settings), protocols, proxies
    )
    classifier = Classifier(settings, metrics, serving_state)
    model_manager = ModelManager(classifier)
    heatmap_explainer, layer_explainer = (
        ExplainerClient(idle_seconds=settings.explain_idle, memory=classifier.spare_memory) for _ in range(2)
    )
    watcher = Watcher(
        settings.models,
        classifier.registry.state,
        model_manager,
        configured_default=settings.default_model,
        refusals=refusals or Refusals(settings.state),
        has_limits=settings.swap_flips < 1 or settings.swap_slowdown > 0,
        change_timeout=2 * model_manager.change_timeout,
    )
    classifier.on_model_lost = model_manager.handle_lost_model
    # A model that is lost or refused must be recorded where the repository is watched. In a worker the
    # supervisor watches the repository, and its manager is told instead.
    if not participant:
        model_manager.on_lost, model_manager.on_refused = watcher.count_lost_model, watcher.refuse_version

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await classifier.start()
        watch_task = None if participant else asyncio.create_task(watcher.run(settings.watch))
        yield
        # The order matters: no new version may start once the service stops, and the explaining processes
        # reserve memory that the classifier owns.
        if watch_task:
            watch_task.cancel()
        model_manager.close()
        heatmap_explainer.close()
        layer_explainer.close()
        await classifier.close()
        observer.close()

    app = FastAPI(
        title="Fovea",
        version=__version__,
        description="An image classification service: photo in, class probabilities out.",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        # A redirect would lose a proxy's scheme and prefix. `plain_path` makes redirects unnecessary.
        redirect_slashes=False,
        lifespan=lifespan,
    )
    lifecycle = Lifecycle()
    services = Services(classifier, lifecycle, observer, model_manager, heatmap_explainer, layer_explainer)
    classify = native.add_routes(app, services)
    explain.add_routes(app, services)
    with protocols.register_routes(app.routes, oip.PROTOCOL):
        management.add_routes(app, classifier, participant or watcher)
    operations.add_routes(app, services, exposed_registry or registry)
    for adapter in _OTHER_PROTOCOLS:
        if adapter.PROTOCOL.name in settings.protocols:
            with protocols.register_routes(app.routes, adapter.PROTOCOL):
                adapter.add_routes(app, services)
    _add_documentation(app, classifier)
    page.add_routes(app, _WEB_FOLDER)
    _add_error_handlers(app, observer)
    cached_replies = CachedReplies(classifier.registry, observer)
    asgi = FastPathMiddleware(app, classify, cached_replies)
    return Application(
        asgi=HeadMiddleware(ObserverMiddleware(asgi, observer=observer), observer),
        fast_app=FastRouter(app, services, classify, cached_replies),
        classifier=classifier,
        manager=model_manager,
        watcher=watcher,
        observer=observer,
        lifecycle=lifecycle,
    )


def _create_tracing(settings: Settings) -> Tracing | None:
    """Return the object that sends traces, or None if tracing is off.

    Raises `StartError` if its packages are not installed or its configuration is invalid.
    """
    if not settings.traces:
        return None
    try:
        from fovea.service.http.tracing import Tracing

        return Tracing()
    except ModuleNotFoundError as error:
        raise StartError(f"FOVEA_TRACES needs the extra `traces`: no {error.name}") from None
    except Exception as error:  # depending on the `OTEL_*` variables, OpenTelemetry raises errors of any type
        raise StartError(f"FOVEA_TRACES: {to_one_line(error)}") from None


class HeadMiddleware:
    """ASGI middleware that answers HEAD requests as GET requests.

    The server omits the body. Load balancers send HEAD requests, which FastAPI would refuse.
    """

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # This must come before the method is replaced: the log record describes the request as it was
            # received.
            self._observer.prepare_scope(scope)
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class FastPathMiddleware:
    """ASGI middleware that passes inference requests to their handlers directly, bypassing FastAPI."""

    def __init__(self, app: FastAPI, classify: ClassifyEndpoint, cached_replies: CachedReplies) -> None:
        self._app = app
        self._cached_replies = cached_replies
        self._classify = classify
        self._bypass_routes = list_bypass_routes(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._find_app(scope)
        if app is self._app and scope["type"] == "http" and scope["method"] == "GET":
            await self._cached_replies.capture_reply(app, scope, receive, send)
        else:
            await app(scope, receive, send)

    def _find_app(self, scope: Scope) -> ASGIApp:
        if scope["type"] != "http":
            return self._app
        context = get_context(scope)
        if refusal := context.refusal:
            return render_error(scope, refusal, self._classify.services.observer)
        if scope["path"] == "*":  # an OPTIONS request about the server as a whole (RFC 9110, section 9.3.7)
            return Response(headers={"Allow": "GET, HEAD, OPTIONS, POST, PUT"})
        if scope["method"] not in ("POST", "PUT"):
            return self._app
        if target := self._classify.find_target(scope["method"], scope["path"]):
            context.target = target
            return self._classify
        for route in self._bypass_routes:
            match, child_scope = route.matches(scope)
            if match is Match.FULL:
                scope.update(child_scope)
                return route.app
        return self._app


def _add_documentation(app: FastAPI, classifier: Classifier) -> None:
    """Add the OpenAPI document and Swagger UI.

    Swagger UI is served from our own files, because FastAPI's default page loads it from another site.
    """
    generate_schema = app.openapi
    models = classifier.registry.models
    examples = _example_parameters(models[0]) if models else {}

    @cache
    def openapi() -> dict[str, Any]:
        return _correct_document(generate_schema(), examples)

    app.openapi = openapi  # type: ignore[method-assign]  # this is the way that FastAPI documents
    app.mount("/docs/swagger", StaticFiles(directory=_WEB_FOLDER / "swagger"))

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
        return Response(content, media_type="application/json")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return page.render_page(request, _WEB_FOLDER / "docs.html")


def _example_parameters(model: LiveModel) -> dict[str, str]:
    """Return parameter values with which the example requests of the OpenAPI document work."""
    feature_maps = model.contract.feature_maps
    return {
        "name": model.name,
        "version": model.version,
        **({"tensor": feature_maps[0]} if feature_maps else {}),
    }


def _correct_document(document: dict[str, Any], examples: dict[str, str]) -> dict[str, Any]:
    """Correct FastAPI's OpenAPI document.

    Removes FastAPI's 422 response, which is a 400 in this service, adds the bodies that our routes read
    themselves, and adds examples with parameters that exist.
    """
    for operation in (one for path in document["paths"].values() for one in path.values()):
        if "HTTPValidationError" in str(operation["responses"].get("422")):
            del operation["responses"]["422"]
        for parameter in operation.get("parameters", ()):
            if parameter["name"] in examples:
                parameter["example"] = examples[parameter["name"]]
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas.update(build_request_schemas())
    return document


def _add_error_handlers(app: FastAPI, observer: Observer) -> None:
    """Convert every error to our error tree, and render it in one place."""

    @app.exception_handler(RequestError)
    async def handle_request_error(request: Request, error: RequestError) -> Response:
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
            response = render_error(request.scope, MethodNotAllowed(f"use {allowed_methods} here"), observer)
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

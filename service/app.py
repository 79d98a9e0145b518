"""The application: the core, the dialects, the documentation and the page, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
from fovea.service.api.cached_replies import Rendered
from fovea.service.api.endpoint import past_fastapi
from fovea.service.api.fast_endpoint import Calls
from fovea.service.api.native import explain
from fovea.service.api.native import routes as native
from fovea.service.api.native.classify import Classify
from fovea.service.api.oip import repository as management
from fovea.service.api.oip import routes as oip
from fovea.service.api.oip.repository import Manager
from fovea.service.api.schemas import request_schemas
from fovea.service.api.services import Desk
from fovea.service.artifact.repository import Served
from fovea.service.errors import BadRequest, MethodNotAllowed, NotFound, RequestError, StartError, one_line
from fovea.service.explain.client import Explainers
from fovea.service.http.access_log import AccessLog
from fovea.service.http.api_protocol import Dialects
from fovea.service.http.lifecycle import Lifecycle
from fovea.service.http.observer import Observe, Observer, origin_of, render
from fovea.service.http.paths import root_of
from fovea.service.http.proxies import Proxies
from fovea.service.observability.metrics import Metrics
from fovea.service.rollout.manager import Steward
from fovea.service.rollout.refusals import Refusals
from fovea.service.rollout.watcher import Watch
from fovea.service.serving.classifier import Classifier
from fovea.service.serving.registry import LiveModel
from fovea.service.settings import Settings
from fovea.service.validation import reason_of

if TYPE_CHECKING:  # its packages are an extra
    from fovea.service.http.tracing import Tracing

_OTHERS: Final = (oip, torchserve, tensorflow, huggingface)
"""The dialects beside ours, one module each."""

_WEB: Final = Path(__file__).parent / "web"


def create_app(
    settings: Settings,
    *,
    registry: CollectorRegistry,
    exposed: CollectorRegistry | None = None,
    served: Served | None = None,
    manager: Manager | None = None,
    refusals: Refusals | None = None,
) -> FastAPI:
    """Load the models and build the application. Raises `StartError`: then nothing was started.

    What must be served is `app.state.entry`, the ASGI application around FastAPI. `app.state.direct` answers
    the requests that are most, for a server that can do it past ASGI.

    Its metrics go into `registry`; `/metrics` shows `exposed` where that is another. A worker is told what to
    serve, `served`, and by whom its models are managed; others look at the repository by themselves, and keep
    their verdicts in `refusals`.
    """
    metrics = Metrics(registry)
    dialects = Dialects()
    proxies = Proxies(settings.trusted_proxies)
    observer = Observer(metrics, AccessLog(settings.log_requests), _tracing(settings), dialects, proxies)
    classifier = Classifier(settings, metrics, served)
    steward = Steward(classifier)
    heat, inside = (Explainers(idle=settings.explain_idle, memory=classifier.spare) for _ in range(2))
    watch = Watch(
        settings.models,
        classifier.repository.served,
        steward,
        named=settings.default_model,
        refusals=refusals or Refusals(settings.state),
        limits=settings.swap_flips < 1 or settings.swap_slowdown > 0,
        patience=2 * steward.patience,
    )
    classifier.on_forfeit = steward.forfeit
    if not manager:
        steward.on_lost, steward.on_refused = watch.lost, watch.refuse

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await classifier.start()
        watching = None if manager else asyncio.create_task(watch.run(settings.watch))
        yield
        if watching:
            watching.cancel()
        steward.close()
        heat.close()
        inside.close()
        await classifier.close()
        observer.close()

    app = FastAPI(
        title="Fovea",
        version=__version__,
        description="An image classification service: photo in, class probabilities out.",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect loses a proxy's scheme and prefix; `plain_path` needs none
        lifespan=lifespan,
    )
    app.state.classifier = classifier
    app.state.watch = watch
    app.state.lifecycle = lifecycle = Lifecycle()
    desk = Desk(classifier, lifecycle, observer, steward, heat, inside)
    classify = native.add_routes(app, desk)
    explain.add_routes(app, desk)
    with dialects.adding(app.routes, oip.DIALECT):
        management.add_routes(app, classifier, manager or watch)
    operations.add_routes(app, desk, exposed or registry)
    for other in _OTHERS:
        if other.DIALECT.name in settings.dialects:
            with dialects.adding(app.routes, other.DIALECT):
                other.add_routes(app, desk)
    _add_documentation(app, classifier)
    page.add_routes(app, _WEB)
    _add_error_handlers(app, observer)
    rendered = Rendered(classifier.repository, observer)
    app.state.direct = Calls(app, desk, classify, rendered)
    app.state.observer = observer
    app.state.steward = steward
    app.state.entry = Head(Observe(HotPath(app, classify, rendered), observer=observer), observer)
    return app


def _tracing(settings: Settings) -> Tracing | None:
    """None where it is off. Raises `StartError` where its packages are not installed."""
    if not settings.traces:
        return None
    try:
        from fovea.service.http.tracing import Tracing

        return Tracing()
    except ModuleNotFoundError as error:
        raise StartError(f"FOVEA_TRACES needs the extra `traces`: no {error.name}") from None
    except Exception as error:  # of any kind, for what the `OTEL_*` variables say
        raise StartError(f"FOVEA_TRACES: {one_line(error)}") from None


class Head:
    """ASGI middleware: HEAD is answered as GET is, and the server leaves the body out. Load balancers ask so,
    and FastAPI would refuse it."""

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._observer.settle(scope)  # its record tells of the request as it came
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class HotPath:
    """ASGI middleware: requests for answers go straight to what answers them, past FastAPI."""

    def __init__(self, app: FastAPI, classify: Classify, rendered: Rendered) -> None:
        self._app = app
        self._rendered = rendered
        self._classify = classify
        self._others = past_fastapi(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._find(scope)
        if app is self._app and scope["type"] == "http" and scope["method"] == "GET":
            await self._rendered.record(app, scope, receive, send)
        else:
            await app(scope, receive, send)

    def _find(self, scope: Scope) -> ASGIApp:
        if scope["type"] != "http":
            return self._app
        if refusal := scope.get("state", {}).get("refusal"):  # by the connection
            return render(scope, refusal, self._classify.desk.observer)
        if scope["path"] == "*":  # what OPTIONS asks of the server as a whole (RFC 9110, section 9.3.7)
            return Response(headers={"Allow": "GET, HEAD, OPTIONS, POST, PUT"})
        if scope["method"] not in ("POST", "PUT"):
            return self._app
        if target := self._classify.target(scope["method"], scope["path"]):
            scope["state"]["target"] = target
            return self._classify
        for route in self._others:
            match, found = route.matches(scope)
            if match is Match.FULL:
                scope.update(found)
                return route.app
        return self._app


def _add_documentation(app: FastAPI, classifier: Classifier) -> None:
    """Swagger UI from our own files: FastAPI's default page loads it from elsewhere."""
    generate = app.openapi
    models = classifier.repository.models
    examples = _examples(models[0]) if models else {}

    @cache
    def openapi() -> dict[str, Any]:
        return _correct(generate(), examples)

    app.openapi = openapi  # type: ignore[method-assign]  # the way that FastAPI documents
    app.mount("/docs/swagger", StaticFiles(directory=_WEB / "swagger"))

    def document(server: str) -> bytes:
        """OpenAPI takes a relative address of the server as relative to that of the document."""
        return orjson.dumps({**openapi(), "servers": [{"url": server}]})

    relative = cache(document)

    @app.get("/openapi.json", include_in_schema=False)
    async def schema(request: Request) -> Response:
        if url := origin_of(request.scope).url:
            content = await asyncio.to_thread(document, url)
        else:
            content = await asyncio.to_thread(relative, root_of(request.scope["raw_path"]))
        return Response(content, media_type="application/json")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return page.rooted(request, _WEB / "docs.html")


def _examples(model: LiveModel) -> dict[str, str]:
    """Parameters with which the document's requests run."""
    maps = model.contract.feature_maps
    return {"name": model.name, "version": model.version, **({"tensor": maps[0]} if maps else {})}


def _correct(document: dict[str, Any], examples: dict[str, str]) -> dict[str, Any]:
    """FastAPI's document without its own 422, which is our 400, with the bodies that our routes read by
    themselves, and with parameters that exist."""
    for operation in (one for path in document["paths"].values() for one in path.values()):
        if "HTTPValidationError" in str(operation["responses"].get("422")):
            del operation["responses"]["422"]
        for parameter in operation.get("parameters", ()):
            if parameter["name"] in examples:
                parameter["example"] = examples[parameter["name"]]
    schemas = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas.update(request_schemas())
    return document


def _add_error_handlers(app: FastAPI, observer: Observer) -> None:
    """Bring every error into our tree, and render it in one place."""

    @app.exception_handler(RequestError)
    async def ours(request: Request, error: RequestError) -> Response:
        return render(request.scope, error, observer)

    @app.exception_handler(RequestValidationError)
    async def parameters(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return render(request.scope, BadRequest(f"{first['loc'][-1]}: {reason_of(first)}"), observer)

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            allowed = _methods(app, request)
            answer = render(request.scope, MethodNotAllowed(f"use {allowed} here"), observer)
            answer.headers["Allow"] = allowed
            return answer
        return render(request.scope, NotFound(f"there is nothing at {request.url.path}"), observer)


def _methods(app: FastAPI, request: Request) -> str:
    """The methods that this path is offered for; Starlette names those of the first route alone."""
    matching = [route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in matching for method in getattr(route, "methods", ())}
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods)) or "GET, HEAD"  # inside the mounted folder of files

"""The application: the function that builds it from its parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from fovea.service import __version__
from fovea.service.access.caller_table import CallerTable
from fovea.service.access.key_watcher import KeyWatcher
from fovea.service.access.refusal_pace import RefusalPace
from fovea.service.api import clouds, huggingface, openapi, operations, page, tensorflow, torchserve
from fovea.service.api.cached_replies import CachedReplies
from fovea.service.api.errors import add_error_handlers
from fovea.service.api.native import explain, images
from fovea.service.api.native import routes as native
from fovea.service.api.oip import repository as management
from fovea.service.api.oip import routes as oip
from fovea.service.api.oip.repository import ModelLoader, RepositoryManager
from fovea.service.api.route_scopes import guard_routes
from fovea.service.api.router import Router
from fovea.service.api.services import Services
from fovea.service.api.uploads import Uploads
from fovea.service.api.url_images import UrlImages
from fovea.service.artifact.repository import ServingState
from fovea.service.errors import StartError, to_one_line
from fovea.service.explain.client import ExplainerClient
from fovea.service.http.access_log import AccessLog
from fovea.service.http.api_protocol import ApiProtocols
from fovea.service.http.cors import CorsPolicy
from fovea.service.http.fast_path import FastApp
from fovea.service.http.head_requests import HeadMiddleware
from fovea.service.http.lifecycle import Lifecycle
from fovea.service.http.observer import Observer, ObserverMiddleware
from fovea.service.http.proxies import TrustedProxies
from fovea.service.observability.metrics import Metrics
from fovea.service.remote.guarded_https import GuardedHttps
from fovea.service.rollout.manager import ModelManager
from fovea.service.rollout.refusals import Refusals
from fovea.service.rollout.store_sync import StoreSync
from fovea.service.rollout.watcher import Watcher
from fovea.service.serving.classifier import Classifier
from fovea.service.settings import Settings

if TYPE_CHECKING:  # the packages of tracing and of gRPC are optional extras
    from fovea.service.grpc.server import GrpcServer
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
    grpc_server: GrpcServer | None
    """Server for gRPC; None if it is off."""


def create_app(
    settings: Settings,
    *,
    registry: CollectorRegistry,
    exposed_registry: CollectorRegistry | None = None,
    serving_state: ServingState | None = None,
    participant: ModelLoader | None = None,
    refusals: Refusals | None = None,
    caller_table: CallerTable | None = None,
    keys: bytes | None = None,
    https: GuardedHttps | None = None,
) -> Application:
    """Load the models and build the application.

    Raises `StartError`; in that case nothing has been started.

    The metrics go into `registry`; `/metrics` shows `exposed_registry` if it is given. A worker gets the
    models to serve as `serving_state`, a `participant` that manages them, the `caller_table` that all
    workers share, and as `keys` the content of the keys file that is in force. Without a participant the
    application watches the repository itself, and keeps its verdicts on model versions in `refusals`. `https`
    replaces the client that fetches images by URL.
    """
    # A scrape of another worker must find every request whose answer has been sent.
    metrics = Metrics(registry, is_shared=settings.workers > 1)
    protocols = ApiProtocols()
    proxies = TrustedProxies(settings.trusted_proxies)
    key_watcher = None
    if settings.keys:
        pace = RefusalPace(caller_table or CallerTable.create())
        key_watcher = KeyWatcher(settings.keys, keys, pace, on_reload=metrics.count_keys_reload)
    access = key_watcher.access if key_watcher else None
    cors = CorsPolicy(settings.cors_origins) if settings.cors_origins else None
    access_log = AccessLog(settings.log_requests)
    observer = Observer(metrics, access_log, _create_tracing(settings), protocols, proxies, access, cors)
    classifier = Classifier(settings, metrics, serving_state, caller_table)
    model_manager = ModelManager(classifier)
    heatmap_explainer, layer_explainer = explainers = [
        ExplainerClient(idle_seconds=settings.explain_idle, memory=classifier.spare_memory) for _ in range(2)
    ]
    store_sync = None
    if settings.store_uri and not participant:  # with several workers, the supervisor updates the copy
        store_sync = StoreSync(settings, metrics.process_metrics)
    watcher = Watcher(
        settings.models,
        classifier.catalog.state,
        model_manager,
        configured_default=settings.default_model,
        single_name=settings.model_name,
        refusals=refusals or Refusals(settings.state),
        has_limits=settings.swap_flips < 1 or settings.swap_slowdown > 0,
        change_timeout=2 * model_manager.change_timeout,
        update_copy=store_sync.update if store_sync else None,
    )
    classifier.on_model_lost = model_manager.handle_lost_model
    # A model that is lost or refused must be recorded where the repository is watched. In a worker the
    # supervisor watches the repository, and `Participant.attach` sets both callbacks to send messages.
    if not participant:
        model_manager.on_lost, model_manager.on_refused = watcher.count_lost_model, watcher.refuse_version

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await classifier.start()
        tasks = [] if participant else [asyncio.create_task(watcher.run(settings.watch))]
        if store_sync:
            tasks.append(asyncio.create_task(store_sync.run()))
        if key_watcher:
            tasks.append(asyncio.create_task(key_watcher.run()))
        yield
        # The order matters: no new version may start once the service stops, and the explaining processes
        # reserve memory that the classifier owns.
        for task in tasks:
            task.cancel()
        model_manager.close()
        for explainer in explainers:
            explainer.close()
        await classifier.close()
        uploads.close()
        observer.close()

    lifecycle = Lifecycle()
    app = FastAPI(
        title="Fovea",
        version=__version__,
        description="An image classification service: photo in, class probabilities out.",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        # A redirect would lose a proxy's scheme and prefix. `normalize_path` makes redirects unnecessary.
        redirect_slashes=False,
        lifespan=lifespan,
    )
    uploads = Uploads(classifier.body_memory)
    url_images = UrlImages(settings, metrics, uploads, https)
    services = Services(
        classifier,
        lifecycle,
        observer,
        model_manager,
        heatmap_explainer,
        layer_explainer,
        url_images,
        access,
    )
    repository = RepositoryManager(classifier, participant or watcher)
    _add_routes(app, services, protocols, repository, exposed_registry or registry)
    router = Router(app, services, CachedReplies(classifier.catalog, observer, access))
    # The order matters. `HeadMiddleware` is outermost: it creates the record before it replaces the method.
    # `ObserverMiddleware` comes next, so that it also counts what the router answers.
    return Application(
        asgi=HeadMiddleware(ObserverMiddleware(router, observer=observer), observer),
        fast_app=router,
        classifier=classifier,
        manager=model_manager,
        watcher=watcher,
        observer=observer,
        lifecycle=lifecycle,
        grpc_server=_create_grpc_server(services, repository),
    )


def _add_routes(
    app: FastAPI,
    services: Services,
    protocols: ApiProtocols,
    repository: RepositoryManager,
    exposed_registry: CollectorRegistry,
) -> None:
    """Add every route and the error handlers."""
    native.add_routes(app, services)
    explain.add_routes(app, services)
    images.add_routes(app, services)
    with protocols.register_routes(app.routes, oip.PROTOCOL):
        management.add_routes(app, services.classifier, repository)
    operations.add_routes(app, services, exposed_registry)
    for adapter in _OTHER_PROTOCOLS:
        if adapter.PROTOCOL.name in services.settings.protocols:
            with protocols.register_routes(app.routes, adapter.PROTOCOL):
                adapter.add_routes(app, services)
    clouds.add_routes(app, services, protocols)
    openapi.add_routes(app, services, _WEB_FOLDER)
    page.add_routes(
        app,
        _WEB_FOLDER,
        needs_key=services.access is not None,
        fetches_urls=bool(services.settings.url_hosts),
    )
    add_error_handlers(app, services.observer)
    if services.access:
        guard_routes(app, services.access)


def _create_grpc_server(services: Services, repository: RepositoryManager) -> GrpcServer | None:
    """Return the server for gRPC, or None if FOVEA_GRPC_PORT is not set.

    Raises `StartError` if its packages are missing or do not fit.
    """
    if services.settings.grpc_port is None:
        return None
    from fovea.service.grpc.port import require_modules

    require_modules()
    try:
        from fovea.service.grpc.server import GrpcServer
    except Exception as error:  # protobuf raises an error of its own for modules of another version
        raise StartError(f"FOVEA_GRPC_PORT: the packages of gRPC do not work: {to_one_line(error)}") from None
    return GrpcServer(services, repository)


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
        raise StartError(
            f"FOVEA_TRACES needs the extra `traces`: the module {error.name} is not installed"
        ) from None
    except Exception as error:  # depending on the `OTEL_*` variables, OpenTelemetry raises errors of any type
        raise StartError(f"FOVEA_TRACES: {to_one_line(error)}") from None

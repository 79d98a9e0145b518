"""Operations: health probes, metrics, and the effective configuration."""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Final, TypeAlias

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from fovea.service import __version__
from fovea.service.api.reply_schemas import CLASSIFY_RESPONSES
from fovea.service.api.services import Services
from fovea.service.observability.metrics import Metrics

MetricsEncoder: TypeAlias = Callable[[CollectorRegistry], bytes]
"""Function that renders all metrics in one format."""


def add_routes(app: FastAPI, services: Services, metrics_registry: CollectorRegistry) -> None:
    """Add the operations routes; `metrics_registry` is the registry that `/metrics` shows."""
    classifier = services.classifier
    renderer = _MetricsRenderer(metrics_registry, classifier.metrics)

    @app.get("/health/live", tags=["operations"], responses={503: CLASSIFY_RESPONSES[503]})
    async def live() -> dict[str, str]:
        """Check that the process answers, and has not been without a runner for FOVEA_RUNNER_ABSENCE."""
        classifier.require_alive()
        return {"status": "live"}

    @app.get("/health/ready", tags=["operations"], responses={503: CLASSIFY_RESPONSES[503]})
    async def ready() -> dict[str, str]:
        """Check that the models are loaded, warmed up and tested, and that the service is not stopping."""
        services.require_ready()
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, tags=["operations"])
    async def metrics(request: Request) -> Response:
        """Return Prometheus metrics, in the text or the OpenMetrics format."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(
            await renderer.render_text(encode, content_type), headers={"Content-Type": content_type}
        )

    @app.get("/runtime", tags=["operations"])
    async def runtime() -> dict[str, Any]:
        """Return versions, threads, limits, and the execution provider of each model.

        The values are those of the worker that answers.
        """
        settings, ready = classifier.settings, classifier.runners.setup_reply
        return {
            "fovea": __version__,
            "python": platform.python_version(),
            "onnxruntime": ready.onnxruntime_version,
            "providers_available": ready.providers,
            "formats": ready.formats,
            "workers": settings.workers,
            "pid": os.getpid(),
            "threads": asdict(classifier.thread_plan),
            "limits": {
                "body_bytes": settings.body_bytes,
                "json_bytes": settings.json_bytes,
                "bodies_bytes": settings.bodies_bytes,
                "connections": settings.connections,
                "explain_idle": settings.explain_idle,
                "image_pixels": settings.image_pixels,
                "decode_bytes": settings.decode_bytes,
                "request_images": settings.request_images,
                "queue_images": settings.queue_images,
            },
            "models": [
                {
                    "name": model.name,
                    "version": model.version,
                    "provider": model.load_result.provider,
                    "golden": model.load_result.golden_differences,
                }
                for model in classifier.catalog.models
            ],
        }


class _MetricsRenderer:
    """A renderer of the metrics that makes one text at a time; requests in the meantime share the next text.

    Rendering holds the interpreter's lock for milliseconds, so it may take at most a third of the time.
    """

    def __init__(self, registry: CollectorRegistry, metrics: Metrics) -> None:
        self._registry = registry
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scrape")
        self._last_pause: asyncio.Future[None] | None = None
        """Future that is done when the next text may be rendered."""
        self._pending_tasks: dict[str, asyncio.Task[bytes]] = {}
        """Tasks that have not started rendering yet, by media type."""

    async def render_text(self, encode: MetricsEncoder, media_type: str) -> bytes:
        """Return the metrics in one format, read after this call."""
        task = self._pending_tasks.get(media_type)
        if task is None:
            task = self._pending_tasks[media_type] = asyncio.create_task(
                self._render_next(encode, media_type)
            )
        # Several requests share the task, so a request that is cancelled must not cancel the task.
        return await asyncio.shield(task)

    async def _render_next(self, encode: MetricsEncoder, media_type: str) -> bytes:
        loop = asyncio.get_running_loop()
        previous_pause, self._last_pause = self._last_pause, loop.create_future()
        own_pause, started_at = self._last_pause, loop.time()
        try:
            if previous_pause:
                await previous_pause
            # From here on the text is being made. Later requests need a newer text, and must not share it.
            del self._pending_tasks[media_type]
            started_at = loop.time()
            self._metrics.fold()
            # `encode` runs on the thread of `_thread`, one call at a time. It reads metrics that the event
            # loop changes meanwhile; each metric has its own lock.
            return await loop.run_in_executor(self._thread, encode, self._registry)
        finally:
            pause_seconds = min(_PAUSE_FACTOR * (loop.time() - started_at), _MAX_PAUSE)
            # The next task waits for this future, so it must be set whatever happened above.
            loop.call_later(pause_seconds, own_pause.set_result, None)


_PAUSE_FACTOR: Final = 2.0
"""Pause after rendering, as a multiple of the rendering time; at most `_MAX_PAUSE` seconds."""

_MAX_PAUSE: Final = 0.2

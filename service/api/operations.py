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
from fovea.service.api.schemas import REPLIES
from fovea.service.api.services import Desk

Encoder: TypeAlias = Callable[[CollectorRegistry], bytes]
"""Function that renders all metrics in one format."""


def add_routes(app: FastAPI, desk: Desk, exposed: CollectorRegistry) -> None:
    """Add the operations routes; `exposed` is the registry that `/metrics` shows."""
    classifier = desk.classifier
    scrapes = _Scrapes(exposed)

    @app.get("/health/live", tags=["operations"], responses={503: REPLIES[503]})
    async def live() -> dict[str, str]:
        """The process answers, and has not been without a runner for too long (FOVEA_RUNNER_ABSENCE)."""
        classifier.require_alive()
        return {"status": "live"}

    @app.get("/health/ready", tags=["operations"], responses={503: REPLIES[503]})
    async def ready() -> dict[str, str]:
        """The models are loaded, warmed up and proven, and the service is not about to stop."""
        desk.require_ready()
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, tags=["operations"])
    async def metrics(request: Request) -> Response:
        """Prometheus metrics, in the text or the OpenMetrics format."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(await scrapes.text(encode, content_type), headers={"Content-Type": content_type})

    @app.get("/runtime", tags=["operations"])
    async def runtime() -> dict[str, Any]:
        """Versions, threads, limits, and where each model really runs: of the worker that answers."""
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
                for model in classifier.registry.models
            ],
        }


class _Scrapes:
    """A renderer of the metrics that makes one text at a time; requests in the meantime share the next text.

    Rendering holds the interpreter's lock for milliseconds, so it may take at most a third of the time.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scrape")
        self._last: asyncio.Future[None] | None = None
        """Future that is done when the next text may be rendered."""
        self._next: dict[str, asyncio.Task[bytes]] = {}
        """Tasks that have not started rendering yet, by media type."""

    async def text(self, encode: Encoder, media_type: str) -> bytes:
        """Return the metrics in one format, read after this call."""
        task = self._next.get(media_type)
        if task is None:
            task = self._next[media_type] = asyncio.create_task(self._make(encode, media_type))
        # Several requests share the task, so a request that is cancelled must not cancel the task.
        return await asyncio.shield(task)

    async def _make(self, encode: Encoder, media_type: str) -> bytes:
        loop = asyncio.get_running_loop()
        before, self._last = self._last, loop.create_future()
        mine, began = self._last, loop.time()
        try:
            if before:
                await before
            del self._next[media_type]  # later requests need a newer text, so they must not share this one
            began = loop.time()
            return await loop.run_in_executor(self._thread, encode, self._registry)
        finally:
            rest = min(_REST * (loop.time() - began), _LONGEST_REST)
            loop.call_later(rest, mine.set_result, None)


_REST: Final = 2.0
"""Pause after rendering, as a multiple of the rendering time; at most `_LONGEST_REST` seconds."""

_LONGEST_REST: Final = 0.2

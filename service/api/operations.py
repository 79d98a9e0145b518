"""Operations: health, metrics, and what really runs."""

from __future__ import annotations

import asyncio
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from service import __version__
from service.api.desk import Desk
from service.api.schemas import REPLIES


def add_routes(app: FastAPI, desk: Desk, exposed: CollectorRegistry) -> None:
    """Add the operations routes over one core; `exposed` is what a scrape shows."""
    classifier = desk.classifier
    scraper = ThreadPoolExecutor(1, thread_name_prefix="scrape")

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
        text = await asyncio.get_running_loop().run_in_executor(scraper, encode, exposed)
        return Response(text, headers={"Content-Type": content_type})

    @app.get("/runtime", tags=["operations"])
    async def runtime() -> dict[str, Any]:
        """Versions, threads, limits, and where each model really runs: of the worker that answers."""
        settings, ready = classifier.settings, classifier.runners.ready
        return {
            "fovea": __version__,
            "python": platform.python_version(),
            "onnxruntime": ready.onnxruntime,
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
                    "provider": model.loaded.provider,
                    "golden": model.loaded.golden,
                }
                for model in classifier.repository.models
            ],
        }

"""Operations: health, metrics, and what really runs."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import onnxruntime
from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client.exposition import choose_encoder

from service import __version__
from service.classifier import Classifier
from service.images import served_formats


def add_routes(app: FastAPI, classifier: Classifier) -> None:
    """Add the operations routes over one core."""

    @app.head("/health/live", include_in_schema=False)
    @app.get("/health/live", tags=["operations"])
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "live"}

    @app.head("/health/ready", include_in_schema=False)
    @app.get("/health/ready", tags=["operations"])
    async def ready() -> dict[str, str]:
        """The models are loaded, warmed up and proven: the service listens only from then on."""
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, tags=["operations"])
    async def metrics(request: Request) -> Response:
        """Prometheus metrics, in the text or the OpenMetrics format."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(classifier.metrics.registry), headers={"Content-Type": content_type})

    @app.get("/runtime", tags=["operations"])
    async def runtime() -> dict[str, Any]:
        """Versions, threads, limits, and where each model really runs."""
        settings = classifier.settings
        return {
            "fovea": __version__,
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,
            "providers_available": onnxruntime.get_available_providers(),
            "formats": served_formats(),
            "threads": asdict(classifier.thread_plan),
            "limits": {
                "body_bytes": settings.body_bytes,
                "image_pixels": settings.image_pixels,
                "request_images": settings.request_images,
                "queue_images": settings.queue_images,
            },
            "models": [
                {
                    "name": model.name,
                    "version": model.version,
                    "provider": model.engine.provider,
                    "golden": asdict(model.proof),
                }
                for model in classifier.repository.models.values()
            ],
        }

"""An image classifier as tutorials for FastAPI and ONNX Runtime write it.

The body is the raw image instead of a form, so that every server gets the same bytes. `/classify` runs in
FastAPI's pool of 40 threads, and `/classify-on-loop` on the event loop: tutorials have both.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Body, FastAPI

from fovea.bench.servers.plain import PlainClassifier

app = FastAPI()
classifier = PlainClassifier()


@app.post("/classify")
def classify(body: Annotated[bytes, Body(media_type="application/octet-stream")]) -> dict[str, Any]:
    """Return the five most probable labels."""
    return classifier.classify([body])[0]


@app.post("/classify-on-loop")
async def classify_on_loop(
    body: Annotated[bytes, Body(media_type="application/octet-stream")],
) -> dict[str, Any]:
    """Return the five most probable labels; other requests wait meanwhile."""
    return classifier.classify([body])[0]

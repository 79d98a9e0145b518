"""The replies of the explanation routes."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from fovea.service.api.native.outcomes import (
    render_known,
    render_model_name,
    render_predictions,
    render_warnings,
)
from fovea.service.api.request_schemas import ExplainOptions
from fovea.service.explain.messages import HeatmapProgress, HeatmapResult, ModelInput
from fovea.service.runners.batch_messages import Answer, ImageTiming
from fovea.service.serving.classifier import Classification
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.ranking import rank_labels

NPY: Final = "application/x-npy"
"""Media type of NumPy's file format."""

NDJSON: Final = "application/x-ndjson"
"""Media type of lines with one JSON document each."""


def render_explanation(model: LiveModel, query: ExplainOptions, result: HeatmapResult) -> dict[str, Any]:
    """Return the reply from the result of the explaining process."""
    return {
        "model": render_model_name(model),
        "label": model.contract.labels[result.label],
        "index": result.label,
        "probability": result.input.probabilities[result.label],
        "method": result.method,
        "samples": result.samples,
        "note": result.note,
        "heatmap": result.heatmap,
        **_render_input(model, query, result.input),
    }


def render_progress(model: LiveModel, query: ExplainOptions, progress: HeatmapProgress) -> dict[str, Any]:
    """Return a line of the reply; the first line contains the model's input."""
    line = {"progress": progress.progress, "samples": progress.samples, "heatmap": progress.heatmap}
    return {**line, **_render_input(model, query, progress.input)} if progress.input else line


def _render_input(model: LiveModel, query: ExplainOptions, model_input: ModelInput) -> dict[str, Any]:
    classification = _to_classification(model, model_input)
    predictions = rank_labels(classification, top_k=query.top_k)
    warnings = render_warnings(model_input.warnings)
    return {
        "predictions": render_predictions(predictions),
        **render_known(classification),
        "image": model_input.photo,
        **({"warnings": warnings} if warnings else {}),
        "what_the_model_saw": model_input.picture,
    }


def _to_classification(model: LiveModel, model_input: ModelInput) -> Classification:
    probabilities, photo = model_input.probabilities, model_input.photo
    ranking = sorted(range(len(probabilities)), key=lambda place: -probabilities[place])
    answer = Answer(
        format=photo.format,
        width=photo.width,
        height=photo.height,
        brightness=0.0,
        entropy=0.0,
        known_score=model_input.known_score,
        probabilities=memoryview(array("f", probabilities)),
        ranking=memoryview(array("i", ranking)),
        timing=_NO_TIMING,
    )
    return Classification(model, answer)


_NO_TIMING: Final = ImageTiming(0.0, 0.0, 0.0, 0.0, 1)


class PiecewiseResponse(Response):
    """A response that is sent piece by piece, at the speed of the client."""

    def __init__(self, pieces: Sequence[bytes], media_type: str, headers: Mapping[str, str]) -> None:
        length = str(sum(map(len, pieces)))
        super().__init__(headers={**headers, "Content-Length": length}, media_type=media_type)
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def json_response(value: Any) -> Response:
    """Return a response with plain values as JSON."""
    return Response(render_json(value), media_type="application/json")


def render_json(value: Any) -> bytes:
    """Return plain values as JSON."""
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


async def send_line(send: Send, value: Any, *, more: bool = True) -> None:
    """Send a line of JSON; `more` is False for the last line of the response."""
    line = orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
    await send({"type": "http.response.body", "body": line, "more_body": more})

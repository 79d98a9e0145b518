"""The replies of the explanation routes."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from fovea.service.api.native.classification_replies import (
    render_model_name,
    render_predictions,
    render_warnings,
)
from fovea.service.api.request_schemas import ExplainOptions
from fovea.service.image_warnings import ImageWarning
from fovea.service.runners.batch_messages import Answer, ImageTiming
from fovea.service.serving.classifier import Classification
from fovea.service.serving.ranking import rank_labels
from fovea.service.serving.registry import LiveModel

NPY: Final = "application/x-npy"
"""Media type of NumPy's file format."""

NDJSON: Final = "application/x-ndjson"
"""Media type of lines with one JSON document each."""


def parse_warnings(values: Mapping[str, Any]) -> list[ImageWarning]:
    """Return the warnings about the image from the values of the explaining process."""
    return [ImageWarning(*warning) for warning in values["warnings"]]


def render_explanation(model: LiveModel, query: ExplainOptions, values: dict[str, Any]) -> dict[str, Any]:
    """Return the reply from the values of the explaining process."""
    label = values["label"]
    return {
        "model": render_model_name(model),
        "label": model.contract.labels[label],
        "index": label,
        "probability": values["probabilities"][label],
        "method": values["method"],
        "samples": values["samples"],
        "note": values["note"],
        "heatmap": values["heatmap"],
        **_render_input(model, query, values),
    }


def render_part(model: LiveModel, query: ExplainOptions, line: dict[str, Any]) -> dict[str, Any]:
    """Return a line of the reply; the first line contains the model's input."""
    if "probabilities" not in line:
        return line
    progress = {key: line[key] for key in ("progress", "samples", "heatmap")}
    return {**progress, **_render_input(model, query, line)}


def _render_input(model: LiveModel, query: ExplainOptions, values: dict[str, Any]) -> dict[str, Any]:
    predictions = rank_labels(_to_classification(model, values), top_k=query.top_k)
    warnings = parse_warnings(values)
    return {
        "predictions": render_predictions(predictions),
        "image": values["image"],
        **({"warnings": render_warnings(warnings)} if warnings else {}),
        "what_the_model_saw": values["what_the_model_saw"],
    }


def _to_classification(model: LiveModel, values: dict[str, Any]) -> Classification:
    probabilities = values["probabilities"]
    ranking = sorted(range(len(probabilities)), key=lambda place: -probabilities[place])
    image = values["image"]
    answer = Answer(
        format=image["format"],
        width=image["width"],
        height=image["height"],
        brightness=0.0,
        entropy=0.0,
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
    return Response(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE), media_type="application/json")


async def send_line(send: Send, value: Any, *, more: bool = True) -> None:
    """Send a line of JSON; `more` is False for the last line of the response."""
    line = orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
    await send({"type": "http.response.body", "body": line, "more_body": more})

"""Hugging Face's image classification protocol, as used by its inference toolkit and endpoints.

POST /, /predict, /models/{name}    a raw image, or {"inputs": base64, "parameters": {…}}
                                    → [{"label", "score"}, …], highest first
GET /health                         → Ok
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from fovea.service.api import bodies
from fovea.service.api.endpoint import RAW, Asked, Heard, Reply, Routes, Translation
from fovea.service.api.schemas import Closed, FlatError, failures
from fovea.service.api.services import Desk
from fovea.service.artifact.contract import Task
from fovea.service.http.api_protocol import ApiProtocol, render_flat_error
from fovea.service.http.fast_path import Headers
from fovea.service.runners.messages import Image, ImageRequest, Item
from fovea.service.serving.classifier import Classification
from fovea.service.settings import MAX_REQUEST_IMAGES, Settings

DIALECT: Final = ApiProtocol("huggingface", render_flat_error)


class Parameters(Closed):
    """Of a JSON request."""

    top_k: Annotated[int, Field(ge=1, description="How many labels, highest first.")] | None = None
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(
        None, description="What makes scores of logits; by default what the model itself has."
    )


class Inputs(Closed):
    """The JSON form of a request: one image, or several, base64."""

    inputs: str | Annotated[list[str], Field(min_length=1, max_length=MAX_REQUEST_IMAGES)]
    parameters: Parameters | None = None
    options: dict[str, Any] | None = Field(None, description="Of the Hub's own service; of no effect.")


class Score(BaseModel):
    """One label and its probability."""

    label: str
    score: float


Floats: TypeAlias = npt.NDArray[np.floating[Any]]

_TOP: Final = 5
"""Number of labels if the request does not set it; transformers' default."""


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Add the routes of this protocol."""
    routes = Routes(app, desk, DIALECT, FlatError)
    for path in ("/", "/predict", "/models/{name}"):
        routes.ask(
            path,
            _Classification(),
            summary="Classify an image",
            reply=list[Score] | list[list[Score]],
            body=Inputs,
            example=lambda image: {"inputs": image, "parameters": {"top_k": 3}},
            content=RAW,
        )

    @app.get(
        "/health",
        response_class=PlainTextResponse,
        tags=[DIALECT.name],
        responses={503: failures(FlatError)[503]},
    )
    async def health() -> str:
        """The models are ready."""
        desk.require_ready()
        return "Ok"


class _Classification(Translation):
    def limit(self, headers: Headers, settings: Settings) -> bodies.Limit:
        is_json = bodies.is_json(headers.get(b"content-type", b""))
        return bodies.json_limit(settings) if is_json else bodies.body_limit(settings)

    async def read(self, heard: Heard) -> Asked:
        if not bodies.is_json(heard.content_type):
            return _asked([heard.body.image()], Parameters(), heard, is_one=True)

        def take_apart(value: Any) -> Asked:
            wanted = bodies.validate(Inputs, value)
            is_one = isinstance(wanted.inputs, str)
            texts = [wanted.inputs] if isinstance(wanted.inputs, str) else wanted.inputs
            bodies.check_count(texts, heard.settings)
            images = [bodies.from_base64(text, f"inputs.{index}") for index, text in enumerate(texts)]
            return _asked(images, wanted.parameters or Parameters(), heard, is_one=is_one)

        return await bodies.parse_json(heard.body, take_apart)


def _asked(images: Sequence[Image], parameters: Parameters, heard: Heard, *, is_one: bool) -> Asked:
    contract = heard.model.contract
    top_k = min(parameters.top_k or _TOP, len(contract.labels))
    function = parameters.function_to_apply or _OWN[contract.task][0]
    logits = function not in _OWN[contract.task]

    def reply(found: Sequence[Classification]) -> Reply:
        scores = [_scores(one, function, top_k) for one in found]
        return Reply.json(scores[0] if is_one else scores)

    items: list[Item] = [ImageRequest(image, include_logits=True) if logits else image for image in images]
    return Asked(items, reply, top_k)


_OWN: Final = {
    Task.MULTICLASS: ("softmax",),
    Task.MULTILABEL: ("sigmoid",),
    Task.BINARY: ("sigmoid", "softmax"),
}
"""Functions that turn each model's logits into its probabilities. The softmax of two labels is the sigmoid
of the one logit between them."""


def _scores(found: Classification, function: str, top_k: int) -> list[dict[str, Any]]:
    """Return the labels and scores in the order of the probabilities.

    The order is the same for all functions, because all of them are strictly increasing.
    """
    contract, answer = found.model.contract, found.answer
    values: Sequence[float] = answer.probabilities
    if answer.logits is not None and function not in _OWN[contract.task]:
        values = _applied(function, np.asarray(answer.logits) / contract.temperature)
    return [{"label": contract.labels[index], "score": values[index]} for index in answer.ranking[:top_k]]


def _applied(function: str, logits: Floats) -> list[float]:
    """Apply a function to the logits, which are already divided by the temperature.

    A binary model has one logit; the first label gets its negative.
    """
    if len(logits) == 1:
        logits = np.concatenate([-logits, logits])
    if function == "softmax":
        logits = np.exp(logits - logits.max())
        logits /= logits.sum()
    elif function == "sigmoid":
        logits = 1 / (1 + np.exp(-logits.astype(np.float64)))
    applied: list[float] = logits.tolist()
    return applied

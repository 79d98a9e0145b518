"""Hugging Face's image classification, as its inference toolkit and endpoints speak it.

POST /, /predict, /models/{name}    an image as it is, or {"inputs": base64, "parameters": {…}}
                                    → [{"label", "score"}, …], highest first
GET /health                         → Ok
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from service.api import bodies
from service.api.desk import Desk
from service.api.schemas import FlatError, failures
from service.api.translation import RAW, Asked, Heard, Reply, Routes, Translation
from service.classifier import Classification, rank
from service.contract import Task
from service.dialect import Dialect, write_flat
from service.direct import Headers
from service.errors import BadRequest
from service.repository import LiveModel
from service.settings import Settings

DIALECT: Final = Dialect("huggingface", write_flat)


class Parameters(BaseModel):
    """Of a JSON request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    top_k: Annotated[int, Field(ge=1, description="How many labels, highest first.")] | None = None
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(
        None, description="Of the scores; it must be the one that the model has."
    )


class Inputs(BaseModel):
    """The JSON form of a request: one image, or several, base64."""

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: str | Annotated[list[str], Field(min_length=1)]
    parameters: Parameters | None = None
    options: dict[str, Any] | None = Field(None, description="Of the Hub's own service; of no effect.")


class Score(BaseModel):
    """One label and its probability."""

    label: str
    score: float


_TOP: Final = 5
"""Labels where a request does not say: transformers' default."""

_DATA: Final = "data:image/"
"""How a data URI begins, which transformers takes for base64."""


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Add the routes of this dialect."""
    routes = Routes(app, desk, DIALECT, FlatError)
    for path in ("/", "/predict", "/models/{name}"):
        routes.ask(
            path,
            _Classification(),
            summary="Classify an image",
            reply=list[Score] | list[list[Score]],
            body=Inputs,
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
            images = [_image(text, f"inputs.{index}") for index, text in enumerate(texts)]
            return _asked(images, wanted.parameters or Parameters(), heard, is_one=is_one)

        return await bodies.parse_json(heard.body, take_apart)


def _image(text: str, place: str) -> bytes:
    if text.startswith(_DATA):
        text = text.partition("base64,")[2]
    return bodies.from_base64(text, place)


def _asked(images: list[Any], parameters: Parameters, heard: Heard, *, is_one: bool) -> Asked:
    _check_function(parameters.function_to_apply, heard.model)
    top_k = min(parameters.top_k or _TOP, len(heard.model.contract.labels))

    def reply(found: Sequence[Classification]) -> Reply:
        scores = [
            [{"label": one.label, "score": one.probability} for one in rank(image, top_k=top_k)]
            for image in found
        ]
        return Reply.json(scores[0] if is_one else scores)

    return Asked(images, reply, top_k)


def _scores(image: Classification, top_k: int) -> list[dict[str, Any]]:
    return [{"label": one.label, "score": one.probability} for one in rank(image, top_k=top_k)]


def _check_function(wanted: str | None, model: LiveModel) -> None:
    own = {Task.MULTICLASS: ("softmax",), Task.MULTILABEL: ("sigmoid",), Task.BINARY: ("softmax", "sigmoid")}
    if wanted and wanted not in own[model.contract.task]:
        raise BadRequest(f"function_to_apply: this model's scores are those of {own[model.contract.task][0]}")

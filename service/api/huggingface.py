"""Hugging Face's image classification protocol, as used by its inference toolkit and endpoints.

POST /, /predict, /models/{name}    a raw image, or {"inputs": base64, "parameters": {…}}
                                    → [{"label", "score"}, …], highest first
GET /health                         → Ok
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, NamedTuple

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from fovea.service.api import bodies
from fovea.service.api.adapter import InferenceRequest, ParsedRequest, ProtocolAdapter, Reply
from fovea.service.api.base64_text import from_base64
from fovea.service.api.json_bodies import parse_json, validate_json
from fovea.service.api.protocol_routes import RAW_IMAGE_CONTENT, ProtocolRoutes
from fovea.service.api.reply_schemas import FlatError, build_error_responses
from fovea.service.api.request_schemas import StrictModel
from fovea.service.api.services import Services
from fovea.service.artifact.contract import Task
from fovea.service.http.api_protocol import ApiProtocol, render_flat_error
from fovea.service.http.fast_path import Headers
from fovea.service.http.request_record import RequestRecord
from fovea.service.runners.batch_messages import ImageRequest
from fovea.service.serving.classifier import Classification
from fovea.service.serving.live_model import LiveModel
from fovea.service.settings import MAX_REQUEST_IMAGES

PROTOCOL: Final = ApiProtocol("huggingface", render_flat_error)


class PipelineParameters(StrictModel):
    """The parameters of a JSON request."""

    top_k: (
        Annotated[int, Field(ge=1, description="Maximum number of labels, highest score first.")] | None
    ) = None
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = Field(
        None, description="The function that turns logits into scores; by default the model's own."
    )


class PipelineRequest(StrictModel):
    """The JSON form of a request: one or several images, as base64."""

    inputs: str | Annotated[list[str], Field(min_length=1, max_length=MAX_REQUEST_IMAGES)]
    parameters: PipelineParameters | None = None
    options: dict[str, Any] | None = Field(
        None, description="Options of the Hub's own service; they have no effect."
    )


class LabelScore(BaseModel):
    """A label and its score."""

    label: str
    score: float


_DEFAULT_TOP_K: Final = 5
"""Number of labels if the request does not set it; transformers' default."""


def add_routes(app: FastAPI, services: Services) -> None:
    """Add the routes of this protocol."""
    routes = ProtocolRoutes(app, services, PROTOCOL, FlatError)
    for path in ("/", "/predict", "/models/{name}"):
        routes.add_endpoint(
            path,
            _ClassifyAdapter(),
            summary="Classify an image",
            reply_type=list[LabelScore] | list[list[LabelScore]],
            body_type=PipelineRequest,
            make_example=lambda image: {"inputs": image, "parameters": {"top_k": 3}},
            content=RAW_IMAGE_CONTENT,
        )

    @app.get(
        "/health",
        response_class=PlainTextResponse,
        tags=[PROTOCOL.name],
        responses={503: build_error_responses(FlatError)[503]},
    )
    async def health() -> str:
        """Check that the models are ready."""
        services.require_ready()
        return "Ok"


class _ClassifyAdapter(ProtocolAdapter):
    def choose_raw_format(self, options: None, headers: Headers, model: LiveModel) -> _ScoresFormat | None:
        return (
            None if self.is_json_body(headers) else _choose_format(PipelineParameters(), model, is_one=True)
        )

    async def parse_request(self, request: InferenceRequest) -> ParsedRequest:
        def convert_value(value: Any) -> ParsedRequest:
            pipeline_request = validate_json(PipelineRequest, value)
            inputs, parameters = pipeline_request.inputs, pipeline_request.parameters or PipelineParameters()
            texts = [inputs] if isinstance(inputs, str) else inputs
            bodies.check_image_count(len(texts), request.settings)
            images = [from_base64(text, f"inputs.{index}") for index, text in enumerate(texts)]
            scores_format = _choose_format(parameters, request.model, is_one=isinstance(inputs, str))
            needs_logits = scores_format.function not in _OWN_FUNCTIONS[request.model.contract.task]
            return ParsedRequest(
                [ImageRequest(image, include_logits=True) if needs_logits else image for image in images],
                scores_format,
            )

        return await parse_json(request.body, convert_value)


class _ScoresFormat(NamedTuple):
    """The content of a reply: the best labels and their scores for each image."""

    labels_per_image: int
    function: str
    """Function that turns logits into scores."""
    is_one: bool
    """True if the reply is the list of one image, False if the reply is a list of such lists."""

    def render(self, results: Sequence[Classification], model: LiveModel, record: RequestRecord) -> Reply:
        """Render the results (`service.api.adapter.ReplyFormat`)."""
        scores = [_render_scores(one, self.function, self.labels_per_image) for one in results]
        return Reply.from_value(scores[0] if self.is_one else scores)


def _choose_format(parameters: PipelineParameters, model: LiveModel, *, is_one: bool) -> _ScoresFormat:
    contract = model.contract
    top_k = min(parameters.top_k or _DEFAULT_TOP_K, len(contract.labels))
    function = parameters.function_to_apply or _OWN_FUNCTIONS[contract.task][0]
    return _ScoresFormat(top_k, function, is_one)


_OWN_FUNCTIONS: Final = {
    Task.MULTICLASS: ("softmax",),
    Task.MULTILABEL: ("sigmoid",),
    Task.BINARY: ("sigmoid", "softmax"),
}
"""Functions that turn each model's logits into its probabilities. The softmax of two labels is the sigmoid
of the one logit between them."""


def _render_scores(result: Classification, function: str, top_k: int) -> list[dict[str, Any]]:
    """Return the labels and scores in the order of the probabilities.

    The order is the same for all functions, because all of them are strictly increasing.
    """
    contract, answer = result.model.contract, result.answer
    values: Sequence[float] = answer.probabilities
    if answer.logits is not None and function not in _OWN_FUNCTIONS[contract.task]:
        values = _apply_function(function, [logit / contract.temperature for logit in answer.logits])
    return [{"label": contract.labels[index], "score": values[index]} for index in answer.ranking[:top_k]]


def _apply_function(function: str, logits: list[float]) -> list[float]:
    """Apply a function to the logits, which are already divided by the temperature.

    A binary model has one logit; the first label gets its negative.
    """
    if len(logits) == 1:
        logits = [-logits[0], logits[0]]
    if function == "softmax":
        largest = max(logits)
        powers = [math.exp(logit - largest) for logit in logits]
        total = sum(powers)
        return [power / total for power in powers]
    return list(map(_compute_sigmoid, logits)) if function == "sigmoid" else logits


def _compute_sigmoid(logit: float) -> float:
    """Return 1 / (1 + exp(-logit)), without an overflow for negative logits."""
    power = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else power) / (1.0 + power)

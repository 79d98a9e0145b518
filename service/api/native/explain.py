"""The explanation routes of the native protocol: `explain`, `layers`, `maps`, `weights`.

The explaining processes do the work (`service.explain.client`); this module passes requests and replies on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Annotated, Any, Final, TypeAlias

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from fovea.service.access.caller import Scope as KeyScope
from fovea.service.api import bodies
from fovea.service.api.adapter import InferenceRequest
from fovea.service.api.asgi_endpoint import AsgiEndpoint
from fovea.service.api.body_parser import parse_body
from fovea.service.api.native.explanation_replies import (
    NDJSON,
    NPY,
    PiecewiseResponse,
    json_response,
    render_explanation,
    render_json,
    render_progress,
    send_line,
)
from fovea.service.api.native.outcomes import render_model_name
from fovea.service.api.options import parse_query, refuse_options
from fovea.service.api.protocol_routes import RAW_IMAGE_CONTENT, add_endpoint_route
from fovea.service.api.reply_schemas import ErrorReply, ExplainReply, LayersReply, build_error_responses
from fovea.service.api.request_schemas import ExplainOptions, MapsOptions, WeightsOptions
from fovea.service.api.services import Services, make_deadline_error, parse_time_limit
from fovea.service.api.url_images import fetch_images
from fovea.service.errors import BadRequest, Forbidden, RequestError
from fovea.service.explain.client import ExplainerAnswer
from fovea.service.explain.messages import (
    ExplanationRequest,
    HeatmapProgress,
    HeatmapResult,
    LayersQuestion,
    MapsQuestion,
    Question,
    Result,
    WeightsQuestion,
)
from fovea.service.http.api_protocol import NATIVE, ApiProtocol
from fovea.service.http.compression import Compressor
from fovea.service.http.request_context import get_record
from fovea.service.image_warnings import create_warning_headers
from fovea.service.serving.admission import Admission
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.ranking import find_label_index
from fovea.service.settings import Settings

BodyParser: TypeAlias = Callable[[bytes, bodies.RawBody, Settings], Awaitable[bodies.ParsedBody]]
"""Function that parses a body of this content type. Raises `BadRequest`."""

Responder: TypeAlias = Callable[[LiveModel, Any, bytes, Send], Awaitable[Response | None]]
"""Function that answers a question about a model from the query and the image. Returns None if it has sent
the answer itself."""

_MAX_PENDING_LINES: Final = 4
"""Maximum number of partial answers that wait until the client has read the earlier ones."""

_MATRIX_PART: Final = "weight"
"""Part of a layer that is a matrix or has kernels. Other parts have one number for each output."""

_MODEL_PATHS: Final = ("/v1/models/{name}", "/v1/models/{name}/versions/{version}")

_BINARY_CONTENT: Final = RAW_IMAGE_CONTENT["application/octet-stream"]

_EXPLAIN_RESPONSE: Final = {
    "model": ExplainReply,
    "content": {"image/png": _BINARY_CONTENT, NDJSON: {"schema": {"type": "string"}}},
    "description": "The heat map; a PNG for `format=png`, lines of JSON for `progress=true`.",
}

_ARRAY_RESPONSE: Final = {"content": {NPY: _BINARY_CONTENT}, "description": "float32, as a NumPy file."}


def add_routes(app: FastAPI, services: Services) -> None:
    """Add the explanation routes."""
    handlers = _ExplainHandlers(services)
    forbidden = {
        "description": "Explanations or whole weights are switched off, or an image's URL is refused.",
        "model": ErrorReply,
    }
    error_responses: dict[int | str, dict[str, Any]] = {**build_error_responses(ErrorReply), 403: forbidden}

    def add_route(path: str, query_type: type[BaseModel], respond: Responder, **route_options: Any) -> None:
        add_endpoint_route(
            app,
            path,
            ImageEndpoint(services, NATIVE, query_type, respond),
            content=RAW_IMAGE_CONTENT,
            query_type=query_type,
            response_model=None,
            tags=["explain"],
            **route_options,
        )

    for path in ("/v1/explain", *(f"{model}/explain" for model in _MODEL_PATHS)):
        responses = {200: _EXPLAIN_RESPONSE, **error_responses}
        add_route(path, ExplainOptions, handlers.explain, summary="Explain an answer", responses=responses)
    for model in _MODEL_PATHS:
        responses = {200: _ARRAY_RESPONSE, **error_responses}
        summary = "Output of a layer for an image"
        add_route(f"{model}/maps", MapsOptions, handlers.get_maps, summary=summary, responses=responses)

    model_errors = {code: error_responses[code] for code in (400, 403, 404, 429, 500, 503, 504)}
    layers_options: dict[str, Any] = {
        "tags": ["explain"],
        "responses": model_errors,
        "response_model": LayersReply,
    }
    weights_options: dict[str, Any] = {
        "tags": ["explain"],
        "responses": {200: _ARRAY_RESPONSE, **model_errors},
        "response_model": None,
    }

    @app.get("/v1/models/{name}/layers", **layers_options)
    async def layers_of_model(request: Request, name: str) -> Response:
        """Return the layers of the newest version of a model, in the order of computation."""
        return await handlers.get_layers(request.scope, name, None)

    @app.get("/v1/models/{name}/versions/{version}/layers", **layers_options)
    async def layers_of_version(request: Request, name: str, version: str) -> Response:
        """Return the layers of one version of a model, in the order of computation."""
        return await handlers.get_layers(request.scope, name, version)

    @app.get("/v1/models/{name}/weights", **weights_options)
    async def weights_of_model(
        request: Request, name: str, query: Annotated[WeightsOptions, Query()]
    ) -> Response:
        """Return the weights of a layer of the newest version of a model."""
        return await handlers.get_weights(request.scope, name, None, query)

    @app.get("/v1/models/{name}/versions/{version}/weights", **weights_options)
    async def weights_of_version(
        request: Request, name: str, version: str, query: Annotated[WeightsOptions, Query()]
    ) -> Response:
        """Return the weights of a layer of one version of a model."""
        return await handlers.get_weights(request.scope, name, version, query)


class ImageEndpoint(AsgiEndpoint):
    """The application of a route that takes one image, over ASGI only."""

    key_scope = KeyScope.EXPLAIN

    def __init__(
        self,
        services: Services,
        protocol: ApiProtocol,
        query_type: type[BaseModel],
        respond: Responder,
        parse: BodyParser = parse_body,
    ) -> None:
        super().__init__(services, protocol)
        self._query_type = query_type
        self._respond = respond
        self._parse = parse

    def parse_options(self, query: bytes) -> BaseModel:
        return parse_query(self._query_type, query)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        _require_enabled(self.services)
        return await super().answer(scope, receive, send)

    async def refuse(self, scope: Scope, error: RequestError, send: Send) -> Response | None:
        record = get_record(scope)
        if not record.status:
            return await super().refuse(scope, error, send)
        # The response has started, so that the error becomes its last line.
        self.services.observer.record_failure(record, error.code)
        await send_line(send, {"error": error.to_dict()}, more=False)
        return None

    async def answer_body(
        self, request: InferenceRequest, admission: Admission, deadline: float, send: Send
    ) -> Response | None:
        parsed_body = await self._parse(request.content_type, request.body, request.settings)
        refuse_options(parsed_body.options, self._query_type.model_fields)
        if len(parsed_body.images) != 1:
            raise BadRequest(f"the request has {len(parsed_body.images)} images; send one")
        for error in (await fetch_images(parsed_body.images, parsed_body.urls, request.fetch_url)).values():
            raise error
        (image,) = parsed_body.images
        if not isinstance(image, bytes | memoryview):
            raise TypeError(f"a body over ASGI must be bytes, and is {type(image).__name__}")
        options = request.options.model_copy(update=parsed_body.options)
        with self.services.question_places.reserve(admission.queue_name):
            return await self._respond(request.model, options, bytes(image), send)


async def explain_label(
    services: Services,
    model: LiveModel,
    query: ExplainOptions,
    image: bytes,
    on_progress: Callable[[HeatmapProgress], None] = lambda progress: None,
) -> ExplainerAnswer[HeatmapResult]:
    """Explain the label of an image.

    Raises `RequestError`.
    """
    question = ExplanationRequest(
        method=query.method,
        label=None if query.label is None else find_label_index(model.contract, query.label),
        seed=query.seed,
        samples=query.samples,
        seconds=services.settings.explain_seconds,
        picture=query.format == "png",
        has_progress=query.progress,
    )
    answer = await services.heatmap_explainer.send_request(model, question, image, on_progress)
    metrics = services.classifier.metrics
    metrics.explanations.labels(model.name, model.version, answer.result.method).inc()
    for warning in answer.result.input.warnings:
        metrics.image_warnings.labels(warning.code).inc()
    return answer


class _ExplainHandlers:
    """The handlers of the explanation routes."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._compressor = Compressor()

    async def explain(
        self, model: LiveModel, query: ExplainOptions, image: bytes, send: Send
    ) -> Response | None:
        """Return the heat map of one label."""
        if query.progress and query.format != "json":
            raise BadRequest("progress is sent as lines of JSON; leave out format=png or progress=true")
        if query.progress:
            return await self._stream_explanation(model, query, image, send)
        answer = await explain_label(self._services, model, query, image)
        if query.format == "png":
            headers = create_warning_headers([answer.result.input.warnings])
            return PiecewiseResponse(answer.pieces, "image/png", headers)
        return json_response(render_explanation(model, query, answer.result))

    async def _stream_explanation(
        self, model: LiveModel, query: ExplainOptions, image: bytes, send: Send
    ) -> Response | None:
        """Send the answer line by line: partial answers during the work, then the result.

        An error before the first line is sent with its own status.
        """
        lines: asyncio.Queue[HeatmapProgress | dict[str, Any] | None] = asyncio.Queue()

        def on_progress(progress: HeatmapProgress) -> None:
            # The explainer's client calls this on the event loop while it reads the explaining process's
            # socket, so it must not wait.
            if lines.qsize() < _MAX_PENDING_LINES:  # a slow client gets fewer partial answers
                lines.put_nowait(progress)

        async def run_explanation() -> None:
            try:
                answer = await explain_label(self._services, model, query, image, on_progress)
                lines.put_nowait({"result": render_explanation(model, query, answer.result)})
            finally:
                lines.put_nowait(None)  # ends the loop below, after a result or an error

        # The task fills the queue, and this coroutine sends its lines at the client's speed.
        task = asyncio.create_task(run_explanation())
        try:
            if (line := await lines.get()) is None:
                await task  # raises the error
                return None
            headers = [(b"content-type", NDJSON.encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while line is not None:
                if isinstance(line, HeatmapProgress):
                    line = render_progress(model, query, line)
                await send_line(send, line)
                line = await lines.get()
            await task  # raises an error that came after the first line
            await send({"type": "http.response.body", "body": b""})
            return None
        finally:
            task.cancel()  # the client has left or sending failed: stop the work; nothing if it is done

    async def get_maps(self, model: LiveModel, query: MapsOptions, image: bytes, _send: Send) -> Response:
        """Return the output of a layer for an image."""
        if query.indices and (query.first or query.count):
            raise BadRequest("indices names single maps; leave out first and count")
        options = query.model_dump()
        options["indices"] = [int(index) for index in query.indices.split(",") if index]
        question = MapsQuestion(**options)
        answer = await self._services.layer_explainer.send_request(model, question, image)
        headers = {
            "X-Channels": str(answer.result.channels),
            "X-Lowest": repr(answer.result.lowest),
            "X-Highest": repr(answer.result.highest),
        }
        return PiecewiseResponse(answer.pieces, NPY, headers)

    async def get_layers(self, scope: Scope, name: str, version: str | None) -> Response:
        """Return the layers of a model."""
        model, answer = await self._ask_model(scope, name, version, LayersQuestion())
        contract, result = model.contract, answer.result
        reply = {
            "model": render_model_name(model),
            "task": contract.task,
            "labels": contract.labels,
            "input": {"height": contract.input.height, "width": contract.input.width},
            "temperature": contract.temperature,
            "parameters": sum(layer.parameters for layer in result.layers),
            "layers": result.layers,
            "cam": result.cam,
            "reason": result.reason,
        }
        return await self._compressor.create_response(scope, render_json(reply), "application/json")

    async def get_weights(
        self, scope: Scope, name: str, version: str | None, query: WeightsOptions
    ) -> Response:
        """Return the weights of a layer.

        If whole weights are not allowed, matrices and kernels are available one output at a time, as the web
        page draws them.
        """
        question = WeightsQuestion(**query.model_dump())
        is_part = self._services.settings.weights or query.part != _MATRIX_PART or query.count == 1
        if not is_part:
            question = replace(question, count=1)  # enough to find errors and the number of outputs
        _, answer = await self._ask_model(scope, name, version, question)
        channels = answer.result.channels
        if not is_part and channels - query.first > 1:
            raise Forbidden("whole weights are switched off (FOVEA_WEIGHTS); request one output with count=1")
        return PiecewiseResponse(answer.pieces, NPY, {"X-Channels": str(channels)})

    async def _ask_model(
        self, scope: Scope, name: str, version: str | None, question: Question[Result]
    ) -> tuple[LiveModel, ExplainerAnswer[Result]]:
        """Ask about a model without an image, within the caller's time limit."""
        _require_enabled(self._services)
        self._services.lifecycle.require_accepting()
        seconds = parse_time_limit(dict(scope["headers"]), self._services.settings)
        caller = self._services.reserve_caller(get_record(scope))  # first: a request that waits counts
        try:
            async with asyncio.timeout(seconds):
                model = await self._services.get_model(name, version)
                # At once: no `await` may come between, in which the model could be unloaded.
                with (
                    Admission(self._services.classifier, model, caller) as admission,
                    self._services.question_places.reserve(admission.queue_name),
                ):
                    model.last_used = time.monotonic()
                    return model, await self._services.layer_explainer.send_request(model, question)
        except TimeoutError:
            raise make_deadline_error(seconds) from None
        finally:
            if caller:
                caller.release()


def _require_enabled(services: Services) -> None:
    if not services.settings.explain:
        raise Forbidden("explanations are switched off (FOVEA_EXPLAIN)")

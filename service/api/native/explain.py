"""The explanation routes of the native protocol: `explain`, `layers`, `maps`, `weights`.

The explaining processes do the work (`service.explain.client`); this module passes requests and replies on.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, Final, TypeAlias

import orjson
from fastapi import FastAPI, Query, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from fovea.service.api import bodies
from fovea.service.api.endpoint import RAW, PastFastAPI, operation_of, signature_of
from fovea.service.api.native.classify import model_name, render_predictions, render_warnings
from fovea.service.api.schemas import (
    ErrorReply,
    ExplainOptions,
    ExplainReply,
    LayersReply,
    MapsOptions,
    WeightsOptions,
    failures,
)
from fovea.service.api.services import Address, Desk, late, time_limit
from fovea.service.errors import BadRequest, Forbidden, RequestError
from fovea.service.explain.client import ExplainerReply
from fovea.service.http.observer import get_record, render_error
from fovea.service.image_warnings import ImageWarning, create_warning_headers
from fovea.service.runners.messages import Answer, ImageTiming
from fovea.service.serving.classifier import Admission, Classification, find_label_index, rank_labels
from fovea.service.serving.registry import LiveModel
from fovea.service.settings import Settings

Parse: TypeAlias = Callable[[bytes, bodies.Received, Settings], Awaitable[bodies.Body]]
"""Function that parses a body of this content type. Raises `BadRequest`."""

Respond: TypeAlias = Callable[[LiveModel, Any, bytes, Send], Awaitable[Response | None]]
"""Function that answers a question about a model from the query and the image. Returns None if it has sent
the answer itself."""

NPY: Final = "application/x-npy"
"""Media type of NumPy's file format."""

NDJSON: Final = "application/x-ndjson"
"""Media type of lines with one JSON document each."""

_AHEAD: Final = 4
"""Maximum number of partial answers that wait until the client has read the earlier ones."""

_MATRIX: Final = "weight"
"""Part of a layer that is a matrix or has kernels. Other parts have one number for each output."""

_MODELS: Final = ("/v1/models/{name}", "/v1/models/{name}/versions/{version}")

_BINARY: Final = {"schema": {"type": "string", "format": "binary"}}

_EXPLAINED: Final = {
    "model": ExplainReply,
    "content": {"image/png": _BINARY, NDJSON: {"schema": {"type": "string"}}},
    "description": "The heat map; a PNG for `format=png`, lines of JSON for `progress=true`.",
}

_ARRAY: Final = {"content": {NPY: _BINARY}, "description": "float32, as a NumPy file."}


def add_routes(app: FastAPI, desk: Desk) -> None:
    """Add the explanation routes."""
    answers = _Answers(desk)
    forbidden = {"description": "Explanations, or whole weights, are switched off.", "model": ErrorReply}
    replies: dict[int | str, dict[str, Any]] = {403: forbidden, **failures(ErrorReply)}

    def take(
        path: str, query: type[BaseModel], respond: Respond, summary: str, reply: dict[str, Any]
    ) -> None:
        names: dict[str, Any] = {
            "tags": ["explain"],
            "summary": summary,
            "responses": {200: reply, **replies},
        }
        add_question(app, desk, path, query, respond, dialect="native", **names)

    for path in ("/v1/explain", *(f"{model}/explain" for model in _MODELS)):
        take(path, ExplainOptions, answers.explain, "Explain an answer", _EXPLAINED)
    for model in _MODELS:
        take(f"{model}/maps", MapsOptions, answers.maps, "What a layer makes of an image", _ARRAY)

    looked = {code: replies[code] for code in (400, 403, 404, 500, 503, 504)}
    layers: dict[str, Any] = {"tags": ["explain"], "responses": looked, "response_model": LayersReply}
    weights: dict[str, Any] = {
        "tags": ["explain"],
        "responses": {200: _ARRAY, **looked},
        "response_model": None,
    }

    @app.get("/v1/models/{name}/layers", **layers)
    async def layers_of_model(request: Request, name: str) -> Response:
        """The layers of the newest version of a model, in the order of computation."""
        return await answers.layers(request.scope, name, None)

    @app.get("/v1/models/{name}/versions/{version}/layers", **layers)
    async def layers_of_version(request: Request, name: str, version: str) -> Response:
        """The layers of one version of a model, in the order of computation."""
        return await answers.layers(request.scope, name, version)

    @app.get("/v1/models/{name}/weights", **weights)
    async def weights_of_model(
        request: Request, name: str, query: Annotated[WeightsOptions, Query()]
    ) -> Response:
        """The weights of a layer of the newest version of a model."""
        return await answers.weights(request.scope, name, None, query)

    @app.get("/v1/models/{name}/versions/{version}/weights", **weights)
    async def weights_of_version(
        request: Request, name: str, version: str, query: Annotated[WeightsOptions, Query()]
    ) -> Response:
        """The weights of a layer of one version of a model."""
        return await answers.weights(request.scope, name, version, query)


def add_question(
    app: FastAPI,
    desk: Desk,
    path: str,
    query: type[BaseModel],
    respond: Respond,
    *,
    dialect: str,
    parse: Parse = bodies.parse,
    content: Mapping[str, Any] = RAW,
    **documented: Any,
) -> None:
    """Add a route that takes an image.

    `documented` and `content`, the types of the body, are for the OpenAPI document only.
    """
    for method in ("POST", "PUT"):
        app.add_api_route(
            path,
            signature_of(path, None, query),
            methods=[method],
            operation_id=operation_of(dialect, path, method),
            response_model=None,
            openapi_extra={"requestBody": {"required": True, "content": dict(content)}},
            **documented,
        )
        route = app.routes[-1]
        if isinstance(route, APIRoute):
            route.app = _Ask(desk, query, respond, parse)


class _Ask(PastFastAPI):
    """The ASGI application of a route that takes one image."""

    def __init__(self, desk: Desk, query: type[BaseModel], respond: Respond, parse: Parse) -> None:
        self._desk = desk
        self._query = query
        self._respond = respond
        self._parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = get_record(scope)
        response: Response | None
        try:
            response = await self._answer(scope, receive, send)
        except RequestError as error:
            if record.status:  # the response has started, so that the error becomes its last line
                self._desk.observer.record_failure(record, error.code)
                await _send_line(send, {"error": error.to_dict()}, more=False)
                return
            response = render_error(scope, error, self._desk.observer)
        if response:
            await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        desk = self._desk
        _require_allowed(desk)
        address = Address(**scope["path_params"])
        model = desk.admit(*address, get_record(scope))
        query = bodies.read_query(self._query, scope["query_string"])
        content_type = dict(scope["headers"]).get(b"content-type", b"")

        async def work(received: bodies.Received, share: Admission, _deadline: float) -> Response | None:
            parsed = await self._parse(content_type, received, desk.settings)
            bodies.refuse_options(parsed.options, self._query.model_fields)
            if len(parsed.images) != 1:
                raise BadRequest(f"the request has {len(parsed.images)} images; send one")
            (image,) = parsed.images
            if not isinstance(image, bytes | memoryview):
                raise TypeError("past ASGI no body is stored")
            wanted = query.model_copy(update=parsed.options)
            return await self._respond(share.model, wanted, bytes(image), send)

        return await desk.attend(scope, receive, address, model, bodies.body_limit(desk.settings), work)


async def explained(
    desk: Desk,
    model: LiveModel,
    query: ExplainOptions,
    image: bytes,
    told: Callable[[dict[str, Any]], None] = lambda part: None,
) -> ExplainerReply:
    """Explain the label of an image.

    Raises `RequestError`.
    """
    question = {
        "method": query.method,
        "label": None if query.label is None else find_label_index(model.contract, query.label),
        "seed": query.seed,
        "samples": query.samples,
        "seconds": desk.settings.explain_seconds,
        "picture": query.format == "png",
    }
    asked = {"ask": "explain", "question": question, "told": query.progress}
    said = await desk.heat.send_request(model, asked, image, told)
    metrics = desk.classifier.metrics
    metrics.explanations.labels(model.name, model.version, said.values["method"]).inc()
    for warning in warnings_of(said.values):
        metrics.image_warnings.labels(warning.code).inc()
    return said


def warnings_of(values: Mapping[str, Any]) -> list[ImageWarning]:
    """Return the warnings about the image from the values of the explaining process."""
    return [ImageWarning(*warning) for warning in values["warnings"]]


class _Answers:
    """The handlers of the explanation routes."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def explain(
        self, model: LiveModel, query: ExplainOptions, image: bytes, send: Send
    ) -> Response | None:
        """Return the heat map of one label."""
        if query.progress and query.format != "json":
            raise BadRequest("progress is told in lines of JSON; leave out format=png, or progress=true")
        if query.progress:
            return await self._tell(model, query, image, send)
        said = await explained(self._desk, model, query, image)
        if query.format == "png":
            return _Pieces(said.pieces, "image/png", create_warning_headers([warnings_of(said.values)]))
        return _json(_explanation(model, query, said.values))

    async def _tell(
        self, model: LiveModel, query: ExplainOptions, image: bytes, send: Send
    ) -> Response | None:
        """Send the answer line by line: partial answers during the work, then the result.

        An error before the first line is sent with its own status.
        """
        lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        def told(part: dict[str, Any]) -> None:
            # `told` must not wait: it runs while the process's socket is read.
            if lines.qsize() < _AHEAD:  # a slow client gets fewer partial answers
                lines.put_nowait(part)

        async def work() -> None:
            try:
                said = await explained(self._desk, model, query, image, told)
                lines.put_nowait({"result": _explanation(model, query, said.values)})
            finally:
                lines.put_nowait(None)  # ends the loop below, after a result or an error

        task = asyncio.create_task(work())
        try:
            if (line := await lines.get()) is None:
                await task  # raises the error
                return None
            headers = [(b"content-type", NDJSON.encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while line is not None:
                await _send_line(send, _part(model, query, line))
                line = await lines.get()
            await task  # raises an error that came after the first line
            await send({"type": "http.response.body", "body": b""})
            return None
        finally:
            task.cancel()

    async def maps(self, model: LiveModel, query: MapsOptions, image: bytes, _send: Send) -> Response:
        """Return the output of a layer for an image."""
        asked = {"ask": "maps", **query.model_dump()}
        said = await self._desk.inside.send_request(model, asked, image)
        headers = {
            "X-Channels": str(said.values["channels"]),
            "X-Lowest": repr(said.values["lowest"]),
            "X-Highest": repr(said.values["highest"]),
        }
        return _Pieces(said.pieces, NPY, headers)

    async def layers(self, scope: Scope, name: str, version: str | None) -> Response:
        """Return the layers of a model."""
        model, said = await self._look(scope, name, version, {"ask": "layers"})
        contract = model.contract
        return _json(
            {
                "model": model_name(model),
                "task": contract.task,
                "labels": contract.labels,
                "input": {"height": contract.input.height, "width": contract.input.width},
                "temperature": contract.temperature,
                "parameters": sum(layer["parameters"] for layer in said.values["layers"]),
                **said.values,
            }
        )

    async def weights(self, scope: Scope, name: str, version: str | None, query: WeightsOptions) -> Response:
        """Return the weights of a layer.

        If whole weights are not allowed, matrices and kernels are available one output at a time, as the web
        page draws them.
        """
        asked = query.model_dump()
        is_part = self._desk.settings.weights or query.part != _MATRIX or query.count == 1
        if not is_part:
            asked["count"] = 1  # finds errors in the question and the number of outputs
        _, said = await self._look(scope, name, version, {"ask": "weights", **asked})
        if not is_part and said.values["channels"] - query.first > 1:
            raise Forbidden("whole weights are not given out (FOVEA_WEIGHTS); ask for one output by count=1")
        return _Pieces(said.pieces, NPY, {"X-Channels": str(said.values["channels"])})

    async def _look(
        self, scope: Scope, name: str, version: str | None, asked: dict[str, Any]
    ) -> tuple[LiveModel, ExplainerReply]:
        """Ask about a model without an image, within the caller's time limit."""
        _require_allowed(self._desk)
        self._desk.lifecycle.require_accepting()
        seconds = time_limit(dict(scope["headers"]), self._desk.settings)
        try:
            async with asyncio.timeout(seconds):
                return await self._held(name, version, asked)
        except TimeoutError:
            raise late(seconds) from None

    async def _held(
        self, name: str, version: str | None, asked: dict[str, Any]
    ) -> tuple[LiveModel, ExplainerReply]:
        """Ask about a model, and keep the model loaded meanwhile."""
        model = await self._desk.model(name, version)
        model.acquire()
        model.last_used = time.monotonic()
        try:
            return model, await self._desk.inside.send_request(model, asked)
        finally:
            model.release()


def _require_allowed(desk: Desk) -> None:
    if not desk.settings.explain:
        raise Forbidden("explanations are switched off (FOVEA_EXPLAIN)")


# --- replies -------------------------------------------------------------------------------------


def _explanation(model: LiveModel, query: ExplainOptions, values: dict[str, Any]) -> dict[str, Any]:
    """Return the reply from the values of the explaining process."""
    label = values["label"]
    return {
        "model": model_name(model),
        "label": model.contract.labels[label],
        "index": label,
        "probability": values["probabilities"][label],
        "method": values["method"],
        "samples": values["samples"],
        "note": values["note"],
        "heatmap": values["heatmap"],
        **_seen(model, query, values),
    }


def _part(model: LiveModel, query: ExplainOptions, line: dict[str, Any]) -> dict[str, Any]:
    """Return a line of the reply; the first line contains the model's input."""
    if "probabilities" not in line:
        return line
    told = {key: line[key] for key in ("progress", "samples", "heatmap")}
    return {**told, **_seen(model, query, line)}


def _seen(model: LiveModel, query: ExplainOptions, values: dict[str, Any]) -> dict[str, Any]:
    ranked = rank_labels(_classification(model, values), top_k=query.top_k)
    warnings = warnings_of(values)
    return {
        "predictions": render_predictions(ranked),
        "image": values["image"],
        **({"warnings": render_warnings(warnings)} if warnings else {}),
        "what_the_model_saw": values["what_the_model_saw"],
    }


def _classification(model: LiveModel, values: dict[str, Any]) -> Classification:
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
        timing=_NO_WORK,
    )
    return Classification(model, answer)


_NO_WORK: Final = ImageTiming(0.0, 0.0, 0.0, 0.0, 1)


class _Pieces(Response):
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


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE), media_type="application/json")


async def _send_line(send: Send, value: Any, *, more: bool = True) -> None:
    line = orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
    await send({"type": "http.response.body", "body": line, "more_body": more})

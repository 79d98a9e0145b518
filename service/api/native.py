"""The native dialect: `/v1/classify`, and the models and their contracts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, Any, Final

import orjson
from fastapi import FastAPI, Query
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service import observe
from service.api import bodies
from service.api.schemas import REPLIES, ModelList, Options, request_body
from service.batcher import FOREVER
from service.classifier import Classification, Classifier, Prediction, Share, rank
from service.errors import BadRequest, DeadlineExceeded, RequestError
from service.lifecycle import Lifecycle
from service.repository import LiveModel
from service.settings import Settings


def add_routes(app: FastAPI, classifier: Classifier, lifecycle: Lifecycle) -> tuple[Classify, list[APIRoute]]:
    """Add the native routes over one core. Returns what answers the hot ones, and those routes."""
    documented_body = request_body(_example(classifier))

    # Signatures for the OpenAPI document; what answers is `Classify`, past FastAPI's machinery.
    def by_default(options: Annotated[Options, Query()]) -> None:
        """Classify one image or several with the default model."""

    def by_name(name: str, options: Annotated[Options, Query()]) -> None:
        """Classify one image or several with the newest version of a model."""

    def by_version(name: str, version: str, options: Annotated[Options, Query()]) -> None:
        """Classify one image or several with one version of a model."""

    for path, signature in (
        ("/v1/classify", by_default),
        ("/v1/models/{name}/classify", by_name),
        ("/v1/models/{name}/versions/{version}/classify", by_version),
    ):
        for method in ("POST", "PUT"):
            app.add_api_route(
                path,
                signature,
                methods=[method],
                tags=["classify"],
                operation_id=f"classify_{signature.__name__}_{method.lower()}",
                summary="Classify images",
                response_model=None,
                responses=REPLIES,
                openapi_extra={"requestBody": documented_body},
            )
    handler = Classify(classifier, lifecycle)
    hot = [route for route in app.routes if isinstance(route, APIRoute) and "classify" in route.tags]
    for route in hot:
        route.app = handler

    @app.get("/v1/models", response_model=ModelList, tags=["models"])
    async def models() -> dict[str, Any]:
        """The models that are served."""
        repository = classifier.repository
        return {
            "models": [
                {
                    "name": model.name,
                    "version": model.version,
                    "task": model.contract.task,
                    "labels": len(model.contract.labels),
                    "default": model.name == repository.default,
                }
                for model in repository.models.values()
            ]
        }

    def contract(name: str, version: str | None = None) -> Response:
        model = classifier.repository.get(name, version)
        return Response(model.loaded.contract, media_type="application/json")

    documented: dict[str, Any] = {
        "response_model": dict[str, Any],
        "responses": {404: REPLIES[404]},
        "tags": ["models"],
    }

    @app.get("/v1/models/{name}/contract", **documented)
    async def contract_of_model(name: str) -> Response:
        """What the newest version of a model says about itself."""
        return contract(name)

    @app.get("/v1/models/{name}/versions/{version}/contract", **documented)
    async def contract_of_version(name: str, version: str) -> Response:
        """What one version of a model says about itself."""
        return contract(name, version)

    return handler, hot


def _example(classifier: Classifier) -> str:
    """The smallest image of a golden set, base64: one that this host is known to decode."""
    models = classifier.repository.models.values()
    return min((golden.image for model in models for golden in model.contract.golden.images), key=len)


class Classify:
    """Answers every classification: plain ASGI, because FastAPI's own way costs more than a small image."""

    def __init__(self, classifier: Classifier, lifecycle: Lifecycle) -> None:
        self._classifier = classifier
        self._lifecycle = lifecycle
        self._metrics = classifier.metrics
        self._coming = 0
        """Requests that were let in and have not come here yet, to take their places."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            content = await self._answer(scope, receive)
        except RequestError as error:
            await observe.render(scope, error, self._metrics)(scope, receive, send)
            return
        length = str(len(content)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def refusal(self, scope: Scope) -> RequestError | None:
        """What stands against a request by its headers alone: then it need not cost a task."""
        try:
            self._admit(scope)
            self._classifier.check_places(1 + self._coming)
            self._coming += 1
        except RequestError as error:
            return error
        return None

    def _admit(self, scope: Scope) -> LiveModel:
        self._lifecycle.admit()
        model = self._classifier.repository.get(**scope["path_params"])
        scope["state"]["model"] = model.name
        return model

    async def _answer(self, scope: Scope, receive: Receive) -> bytes:
        """The reply's body. Raises `RequestError`."""
        started = time.monotonic()
        self._coming = 0
        settings = self._classifier.settings
        model = self._admit(scope)
        options = _options(scope["query_string"])
        headers = dict(scope["headers"])
        limit = _limit(headers, settings)
        self._classifier.check_places()  # before the body is read
        with Share(self._classifier) as share:
            try:
                # A timeout costs more than all of the above; and most requests need none.
                async with asyncio.timeout(limit) if limit else nullcontext():
                    body = await bodies.parse(
                        headers.get(b"content-type", b""),
                        await bodies.read(scope, receive, headers, settings, share.take_bytes),
                        settings,
                    )
                    self._metrics.stage_seconds["read"].observe(time.monotonic() - started)
                    share.take_places(len(body.images))
                    deadline = started + limit if limit else FOREVER
                    with _Attended(scope):
                        outcomes = await self._classifier.outcomes(body.images, model, deadline=deadline)
                    body.release()
            except TimeoutError:
                raise DeadlineExceeded(
                    f"no answer was there within {limit or 0:g} s (X-Deadline-Ms)"
                ) from None
        started = time.monotonic()
        options = _effective(options, body, model)
        if options.top_k * len(outcomes) <= _MANY:
            reply = self._reply(model, outcomes, options)
        else:
            reply = await asyncio.to_thread(self._reply, model, outcomes, options)
        self._metrics.stage_seconds["encode"].observe(time.monotonic() - started)
        return reply

    def _reply(
        self,
        model: LiveModel,
        outcomes: Sequence[Classification | RequestError],
        options: Options,
    ) -> bytes:
        """One image's answer, or raise its error; several get `results`, with errors among them."""
        top_k, threshold = options.top_k, options.threshold
        reply: dict[str, Any] = {"model": model_name(model)}
        if len(outcomes) == 1:
            if isinstance(outcomes[0], RequestError):
                raise outcomes[0]
            reply |= render(outcomes[0], top_k, threshold)
        else:
            for error in (one for one in outcomes if isinstance(one, RequestError)):
                self._metrics.errors.labels(error.code).inc()
            reply["results"] = [render(one, top_k, threshold) for one in outcomes]
        return orjson.dumps(reply, option=orjson.OPT_APPEND_NEWLINE)


# --- what a request says -------------------------------------------------------------------------

_DEFAULT_OPTIONS: Final = Options()

_MANY: Final = 200
"""Labels that the event loop may put into one reply: each takes 2 to 10 us with its share of the rest."""


def _options(query: bytes) -> Options:
    if not query:
        return _DEFAULT_OPTIONS
    given: dict[str, Any] = dict(QueryParams(query))
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise BadRequest(f"{first['loc'][-1]}: {first['msg']}") from None


def _effective(options: Options, body: bodies.Body, model: LiveModel) -> Options:
    """Those of the body come first; `top_k` is how many labels there are at most."""
    top_k = options.top_k if body.top_k is None else body.top_k
    threshold = options.threshold if body.threshold is None else body.threshold
    count = len(model.contract.labels)
    return Options.model_construct(top_k=min(top_k or count, count), threshold=threshold)


def _limit(headers: bodies.Headers, settings: Settings) -> float | None:
    """Seconds within which the answer is of use; None for any time. Raises `BadRequest`."""
    given = headers.get(b"x-deadline-ms")
    if given is None:
        return settings.deadline_ms / 1000 or None
    try:
        limit = float(given) / 1000
    except ValueError:
        limit = 0.0
    if not 0 < limit < FOREVER:
        raise BadRequest("X-Deadline-Ms is not a positive number of milliseconds")
    return limit


class _Attended:
    """What is awaited inside is cancelled when the caller leaves; that raises `ClientDisconnect`.

    The connection says `left` and calls `on_leave`: asking ASGI's `receive` would take a task for each
    request.
    """

    __slots__ = ("_left", "_scope", "_task")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._left = False

    def __enter__(self) -> None:
        if self._scope["state"].get("left"):
            raise ClientDisconnect
        self._task = asyncio.current_task()
        self._scope["state"]["on_leave"] = self._leave

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        del self._scope["state"]["on_leave"]
        if self._left and kind is asyncio.CancelledError and self._task:
            self._task.uncancel()
            raise ClientDisconnect

    def _leave(self) -> None:
        if self._task:
            self._left = True
            self._task.cancel()


# --- replies -------------------------------------------------------------------------------------


def model_name(model: LiveModel) -> dict[str, str]:
    """Which model answered, as plain values."""
    return {"name": model.name, "version": model.version}


def render(
    outcome: Classification | RequestError, top_k: int, threshold: float | None = None
) -> dict[str, Any]:
    """One image's part of a reply, as plain values: its labels, or its error."""
    if isinstance(outcome, RequestError):
        return {"error": outcome.to_dict()}
    image = outcome.answer
    return {
        "predictions": [
            _render_prediction(prediction) for prediction in rank(outcome, top_k=top_k, threshold=threshold)
        ],
        "image": {"format": image.format, "width": image.width, "height": image.height},
    }


def _render_prediction(prediction: Prediction) -> dict[str, Any]:
    rendered: dict[str, Any] = {
        "label": prediction.label,
        "index": prediction.index,
        "probability": prediction.probability,
    }
    return rendered if prediction.selected is None else {**rendered, "selected": prediction.selected}

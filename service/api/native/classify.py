"""Classification in the native protocol, bypassing FastAPI and usually ASGI too.

FastAPI's own handling takes longer than a small image, and so does ASGI. `Classify` is an application of both
kinds. It is an ASGI application for other servers, and for requests that cannot be answered immediately, and
it is an application of `service.http.fast_path`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import httptools
import orjson
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from fovea.service.api import bodies
from fovea.service.api.endpoint import Reply
from fovea.service.api.fast_endpoint import KNOWN, KNOWN_BYTES, Call
from fovea.service.api.schemas import Options
from fovea.service.api.services import MANY, Address, Desk, time_limit
from fovea.service.artifact.contract import Coverage
from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import RequestError
from fovea.service.http import observer
from fovea.service.http.fast_path import Exchange, Headers
from fovea.service.http.paths import normalize_path
from fovea.service.http.request_record import RequestRecord
from fovea.service.image_warnings import ImageWarning
from fovea.service.runners.batcher import Job
from fovea.service.serving.classifier import (
    Admission,
    Classification,
    Prediction,
    compute_label_set,
    find_coverage,
    rank_labels,
)
from fovea.service.serving.registry import LiveModel


@dataclass(frozen=True, slots=True)
class Target:
    """The route and the model that a method and path select."""

    route: APIRoute
    name: str | None
    version: str | None


class Classify:
    """The application that answers all native classification requests."""

    def __init__(self, desk: Desk, routes: Sequence[APIRoute]) -> None:
        """Create the application; `routes` are the routes that it answers."""
        self.desk = desk
        self.classifier = desk.classifier
        self.slots = desk.classifier.shared_bodies
        self.body_limit = bodies.body_limit(desk.settings)
        self._routes = routes
        self._known: dict[tuple[bytes, bytes], tuple[Target, Options]] = {}
        """Parsed requests by method and URL; parsing takes longer than everything else."""

    def target(self, method: str, path: str) -> Target | None:
        """Return the target of a request, or None if no classification route matches."""
        if path.endswith("/classify"):
            for route in self._routes:
                match, matched = route.matches({"type": "http", "method": method, "path": path})
                if match is Match.FULL:
                    return Target(route, **{"name": None, "version": None, **matched["path_params"]})
        return None

    def _limit(self, headers: Headers, model: LiveModel) -> float | None:
        """Check the headers, and return the time limit for the answer in seconds.

        Raises `RequestError`.
        """
        limit = time_limit(headers, self.desk.settings)
        bodies.check_length(headers, self.body_limit)
        self.classifier.check_capacity(model)
        return limit

    async def work(
        self,
        content_type: bytes,
        received: bodies.Received,
        model: LiveModel,
        options: Options,
        share: Admission,
        deadline: float,
        record: RequestRecord,
    ) -> bytes:
        """Classify the images in a body, and return the JSON reply.

        Raises `RequestError`.
        """
        parsed = await bodies.parse(content_type, received, self.classifier.settings)
        wanted = _wanted(options, parsed, model)
        share.reserve_images(len(parsed.images))
        if (labels := len(parsed.images) * (wanted.top_k + wanted.extra)) > MANY:
            share.reserve_answer(labels)
        outcomes = await self.classifier.classify_images(
            parsed.images, model, deadline=deadline, on_answer=record.add_image
        )
        bodies.release(parsed.images)
        if len(outcomes) > 1:
            for error in (one for one in outcomes if isinstance(one, RequestError)):
                self.desk.observer.record_image_failure(record, error.code)
        return await self.encode(model, outcomes, wanted, record)

    async def encode(
        self,
        model: LiveModel,
        outcomes: Sequence[Classification | RequestError],
        wanted: Wanted,
        record: RequestRecord,
    ) -> bytes:
        """Call `reply`, in a thread if it may take long."""
        started = time.monotonic()
        if (wanted.top_k + wanted.extra) * len(outcomes) <= MANY:
            content = self.reply(model, outcomes, wanted, record)
        else:
            content = await asyncio.to_thread(self.reply, model, outcomes, wanted, record)
        self.desk.end_stage("encode", started, record)
        return content

    def reply(
        self,
        model: LiveModel,
        outcomes: Sequence[Classification | RequestError],
        wanted: Wanted,
        record: RequestRecord,
    ) -> bytes:
        """Return the JSON reply, or raise the error of a single image.

        Several images get `results`, which may contain errors.
        """
        reply: dict[str, Any] = {"model": model_name(model)}
        if len(outcomes) == 1:
            if isinstance(outcomes[0], RequestError):
                raise outcomes[0]
            reply |= render(outcomes[0], wanted)
        else:
            # Render the results one after the other: as plain values they take four times as much memory.
            reply["results"] = [orjson.Fragment(orjson.dumps(render(one, wanted))) for one in outcomes]
        if wanted.timing:
            reply["timing"] = {name: 1000 * stage.seconds for name, stage in record.longest_stages().items()}
        return orjson.dumps(reply, option=orjson.OPT_APPEND_NEWLINE)

    # --- without ASGI ---

    def open(self, turn: Exchange, method: bytes, url: bytes, headers: Headers) -> Call | None:
        """Accept a request, or return None if it must go through ASGI.

        See `service.http.fast_path.FastApp`.
        """
        known = self._known.get((method, url))
        if known is None:
            try:
                parsed = httptools.parse_url(url)
            except httptools.HttpParserInvalidURLError:
                return None
            path = normalize_path(unquote((parsed.path or b"").decode("ascii", "replace")))
            target = self.target(method.decode(), path)
            if target is None:
                return None
        else:
            target = known[0]
        turn.record.route = target.route.path
        model = self.desk.admit(target.name, target.version, turn.record)
        if isinstance(model, ModelVersion):
            return None
        if known is None:
            known = self._remember(method, url, (target, _options(parsed.query or b"")))
        content_type = headers.get(b"content-type", b"")
        wrapped = bodies.is_wrapped(content_type)
        wanted = _wanted(_DEFAULT_OPTIONS if wrapped else known[1], _PLAIN, model)
        limit = self._limit(headers, model)
        return _Classification(self, turn, model, known[1], wanted, content_type, limit, wrapped=wrapped)

    def _remember(self, method: bytes, url: bytes, meaning: tuple[Target, Options]) -> tuple[Target, Options]:
        if len(url) <= KNOWN_BYTES:
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known[method, url] = meaning
        return meaning

    # --- ASGI ---

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            content = await self._answer(scope, receive)
        except RequestError as error:
            await observer.render_error(scope, error, self.desk.observer)(scope, receive, send)
            return
        length = str(len(content)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _answer(self, scope: Scope, receive: Receive) -> bytes:
        """Answer a request over ASGI.

        Raises `RequestError`, or `ClientDisconnect`.
        """
        target = scope["state"].get("target") or self.target(scope["method"], scope["path"])
        if target is None:
            raise RuntimeError(f"{scope['path']} is not ours")
        scope["route"] = target.route
        record = observer.get_record(scope)
        address = Address(target.name, target.version)
        model = self.desk.admit(*address, record)
        options = _options(scope["query_string"])
        content_type = dict(scope["headers"]).get(b"content-type", b"")

        async def work(received: bodies.Received, share: Admission, deadline: float) -> bytes:
            return await self.work(content_type, received, share.model, options, share, deadline, record)

        return await self.desk.attend(scope, receive, address, model, self.body_limit, work)


_SET_LABELS: Final = 16
"""Number of labels of a label set that take as long as one prediction. A label takes 0.13 us, and a set may
contain all labels."""


class _Classification(Call):
    """A request that bypasses ASGI."""

    __slots__ = ("_classify", "_content_type", "_job", "_model", "_options", "_wanted", "_wrapped")

    def __init__(
        self,
        classify: Classify,
        turn: Exchange,
        model: LiveModel,
        options: Options,
        wanted: Wanted,
        content_type: bytes,
        limit: float | None,
        *,
        wrapped: bool,
    ) -> None:
        """Create the request.

        `wanted` are the `options` resolved for a raw image; a `wrapped` body may set other options.
        """
        super().__init__(classify.desk, turn, model, limit)
        self._classify = classify
        self._model = model
        self._options = options
        self._wanted = wanted
        self._content_type = content_type
        self._wrapped = wrapped
        self._job: Job | None = None

    def _begin(self, received: bodies.Received) -> None:
        """Put a raw image into the queue immediately, or start a task for a body that must be parsed."""
        if self._wrapped:
            self._run(lambda: self._work(received))
            return
        image = received.image()
        self._share.reserve_images(1)
        # The batcher calls `_answered` on the event loop when a runner has answered. No task is needed.
        self._job = self._classify.classifier.submit_image(
            image, self._model, self._answered, deadline=self._deadline, on_answer=self._turn.record.add_image
        )

    def close(self) -> None:
        """Release everything that the request holds; see `service.http.fast_path.RequestHandler`."""
        super().close()
        if self._job:
            if not self._job.is_over:
                self._turn.record.add_queue_time(self._job)
            self._classify.classifier.cancel(self._job)
            self._job = None  # breaks the reference cycle with this call

    def _answered(self, outcome: Classification | RequestError | Exception) -> None:
        if isinstance(outcome, RequestError):
            self._turn.refuse(outcome)
            return
        try:
            if not isinstance(outcome, Classification):
                raise outcome
            wanted = self._wanted
            if wanted.top_k + wanted.extra > MANY:
                self._run(lambda: self._encode(outcome))
                return
            started = time.monotonic()
            content = self._classify.reply(self._model, [outcome], wanted, self._turn.record)
            self._classify.desk.end_stage("encode", started, self._turn.record)
        except Exception:
            self._turn.fail()
        else:
            self._turn.answer(content)

    async def _work(self, received: bodies.Received) -> Reply:
        content = await self._classify.work(
            self._content_type,
            received,
            self._model,
            self._options,
            self._share,
            self._deadline,
            self._turn.record,
        )
        return Reply(content)

    async def _encode(self, outcome: Classification) -> Reply:
        return Reply(await self._classify.encode(self._model, [outcome], self._wanted, self._turn.record))


# --- request options -----------------------------------------------------------------------------

_DEFAULT_OPTIONS: Final = Options()

_PLAIN: Final = bodies.Body([])
"""Body without options of its own."""


def _options(query: bytes) -> Options:
    if not query:
        return _DEFAULT_OPTIONS
    return bodies.read_query(Options, query)


class Wanted(NamedTuple):
    """The content of a reply: at most `top_k` labels of at least `threshold`, and a label set."""

    top_k: int
    threshold: float | None = None
    coverage: Coverage | None = None
    extra: int = 0
    """Cost of the label set, in predictions."""
    timing: bool = False
    """True if the reply contains the stage times."""


def _wanted(options: Options, body: bodies.Body, model: LiveModel) -> Wanted:
    """Resolve the options; those of the body take precedence over those of the query.

    Raises `BadRequest` for a coverage that the model does not have.
    """
    top_k = options.top_k if body.top_k is None else body.top_k
    threshold = options.threshold if body.threshold is None else body.threshold
    level = options.coverage if body.coverage is None else body.coverage
    count = len(model.contract.labels)
    top_k = min(top_k or count, count)
    if level is None:
        return Wanted(top_k, threshold, timing=options.timing)
    coverage = find_coverage(model.contract, level)
    return Wanted(top_k, threshold, coverage, count // _SET_LABELS, options.timing)


# --- replies -------------------------------------------------------------------------------------


def model_name(model: LiveModel) -> dict[str, str]:
    """Return the name and version of a model, as plain values."""
    return {"name": model.name, "version": model.version}


def render(outcome: Classification | RequestError, wanted: Wanted) -> dict[str, Any]:
    """Return one image's part of a reply, its labels or its error, as plain values."""
    if isinstance(outcome, RequestError):
        return {"error": outcome.to_dict()}
    image = outcome.answer
    ranked = rank_labels(outcome, top_k=wanted.top_k, threshold=wanted.threshold)
    rendered: dict[str, Any] = {"predictions": render_predictions(ranked)}
    if wanted.coverage:
        rendered["coverage"] = compute_label_set(outcome, wanted.coverage)._asdict()
    rendered["image"] = {"format": image.format, "width": image.width, "height": image.height}
    if image.warnings:
        rendered["warnings"] = render_warnings(image.warnings)
    return rendered


def render_warnings(warnings: Sequence[ImageWarning]) -> list[dict[str, str]]:
    """Return the warnings about an image, as plain values."""
    return [{"code": warning.code, "message": warning.text} for warning in warnings]


def render_predictions(ranked: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Return labels as plain values."""
    return [_render_prediction(prediction) for prediction in ranked]


def _render_prediction(prediction: Prediction) -> dict[str, Any]:
    rendered: dict[str, Any] = {
        "label": prediction.label,
        "index": prediction.index,
        "probability": prediction.probability,
    }
    return rendered if prediction.selected is None else {**rendered, "selected": prediction.selected}

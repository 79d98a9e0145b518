"""What answers a classification in the native dialect, past FastAPI and mostly past ASGI too.

FastAPI's own way costs more than a small image, and so does ASGI. `Classify` is an application of both kinds:
of ASGI, for servers other than ours and for what ours cannot answer at once, and of `service.http.fast_path`.
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
from fovea.service.artifact.repository import Found
from fovea.service.errors import RequestError
from fovea.service.http import observer
from fovea.service.http.fast_path import Headers, Turn
from fovea.service.http.paths import plain_path
from fovea.service.http.request_record import Record
from fovea.service.image_warnings import ImageWarning
from fovea.service.runners.batcher import Job
from fovea.service.serving.classifier import Classification, Prediction, Share, coverage_of, label_set, rank
from fovea.service.serving.registry import LiveModel


@dataclass(frozen=True, slots=True)
class Target:
    """What a request's method and path ask for."""

    route: APIRoute
    name: str | None
    version: str | None


class Classify:
    """Answers every classification."""

    def __init__(self, desk: Desk, routes: Sequence[APIRoute]) -> None:
        """`routes` are those whose requests it answers."""
        self.desk = desk
        self.classifier = desk.classifier
        self.slots = desk.classifier.slots
        self.body_limit = bodies.body_limit(desk.settings)
        self._routes = routes
        self._known: dict[tuple[bytes, bytes], tuple[Target, Options]] = {}
        """By method and URL: to parse them takes longer than all else."""

    def target(self, method: str, path: str) -> Target | None:
        """What a request is for; None if it is none of ours."""
        if path.endswith("/classify"):
            for route in self._routes:
                match, matched = route.matches({"type": "http", "method": method, "path": path})
                if match is Match.FULL:
                    return Target(route, **{"name": None, "version": None, **matched["path_params"]})
        return None

    def _limit(self, headers: Headers, model: LiveModel) -> float | None:
        """How many seconds the answer is of use, if the rest of the headers lets the body in. Raises
        `RequestError`."""
        limit = time_limit(headers, self.desk.settings)
        bodies.check_length(headers, self.body_limit)
        self.classifier.check_places(model)
        return limit

    async def work(
        self,
        content_type: bytes,
        received: bodies.Received,
        model: LiveModel,
        options: Options,
        share: Share,
        deadline: float,
        record: Record,
    ) -> bytes:
        """The reply to the images in a body. Raises `RequestError`."""
        parsed = await bodies.parse(content_type, received, self.classifier.settings)
        wanted = _wanted(options, parsed, model)
        share.take_places(len(parsed.images))
        if (labels := len(parsed.images) * (wanted.top_k + wanted.extra)) > MANY:
            share.take_answer(labels)
        outcomes = await self.classifier.outcomes(parsed.images, model, deadline=deadline, told=record.image)
        bodies.release(parsed.images)
        if len(outcomes) > 1:
            for error in (one for one in outcomes if isinstance(one, RequestError)):
                self.desk.observer.image_failed(record, error.code)
        return await self.encode(model, outcomes, wanted, record)

    async def encode(
        self,
        model: LiveModel,
        outcomes: Sequence[Classification | RequestError],
        wanted: Wanted,
        record: Record,
    ) -> bytes:
        """As `reply`, where that may take long."""
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
        record: Record,
    ) -> bytes:
        """One image's answer, or raise its error; several get `results`, with errors among them."""
        reply: dict[str, Any] = {"model": model_name(model)}
        if len(outcomes) == 1:
            if isinstance(outcomes[0], RequestError):
                raise outcomes[0]
            reply |= render(outcomes[0], wanted)
        else:
            # one after the other: as plain values they take four times as much memory
            reply["results"] = [orjson.Fragment(orjson.dumps(render(one, wanted))) for one in outcomes]
        if wanted.timing:
            reply["timing"] = {name: 1000 * stage.seconds for name, stage in record.longest().items()}
        return orjson.dumps(reply, option=orjson.OPT_APPEND_NEWLINE)

    # --- past ASGI ---

    def open(self, turn: Turn, method: bytes, url: bytes, headers: Headers) -> Call | None:
        """See `service.http.fast_path.Application`."""
        known = self._known.get((method, url))
        if known is None:
            try:
                parsed = httptools.parse_url(url)
            except httptools.HttpParserInvalidURLError:
                return None
            path = plain_path(unquote((parsed.path or b"").decode("ascii", "replace")))
            target = self.target(method.decode(), path)
            if target is None:
                return None
        else:
            target = known[0]
        turn.record.route = target.route.path
        model = self.desk.admit(target.name, target.version, turn.record)
        if isinstance(model, Found):
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
            await observer.render(scope, error, self.desk.observer)(scope, receive, send)
            return
        length = str(len(content)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _answer(self, scope: Scope, receive: Receive) -> bytes:
        """The reply's body. Raises `RequestError`, or `ClientDisconnect`."""
        target = scope["state"].get("target") or self.target(scope["method"], scope["path"])
        if target is None:
            raise RuntimeError(f"{scope['path']} is not ours")
        scope["route"] = target.route
        record = observer.record_of(scope)
        address = Address(target.name, target.version)
        model = self.desk.admit(*address, record)
        options = _options(scope["query_string"])
        content_type = dict(scope["headers"]).get(b"content-type", b"")

        async def work(received: bodies.Received, share: Share, deadline: float) -> bytes:
            return await self.work(content_type, received, share.model, options, share, deadline, record)

        return await self.desk.attend(scope, receive, address, model, self.body_limit, work)


_SET_LABELS: Final = 16
"""Labels of a set that take as long as one prediction: 0.13 us each, and a set may have all labels."""


class _Classification(Call):
    """One request past ASGI."""

    __slots__ = ("_classify", "_content_type", "_job", "_model", "_options", "_wanted", "_wrapped")

    def __init__(
        self,
        classify: Classify,
        turn: Turn,
        model: LiveModel,
        options: Options,
        wanted: Wanted,
        content_type: bytes,
        limit: float | None,
        *,
        wrapped: bool,
    ) -> None:
        """`wanted` is what `options` ask of a raw image; a `wrapped` body may ask for something else."""
        super().__init__(classify.desk, turn, model, limit)
        self._classify = classify
        self._model = model
        self._options = options
        self._wanted = wanted
        self._content_type = content_type
        self._wrapped = wrapped
        self._job: Job | None = None

    def _begin(self, received: bodies.Received) -> None:
        """A raw image is put in line at once; whatever must be taken apart has a task."""
        if self._wrapped:
            self._run(lambda: self._work(received))
            return
        image = received.image()
        self._share.take_places(1)
        self._job = self._classify.classifier.put(
            image, self._model, self._answered, deadline=self._deadline, told=self._turn.record.image
        )

    def close(self) -> None:
        """See `service.http.fast_path.Call`."""
        super().close()
        if self._job:
            if not self._job.over:
                self._turn.record.given_up(self._job)
            self._classify.classifier.cancel(self._job)
            self._job = None  # it leads back here

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


# --- what a request says -------------------------------------------------------------------------

_DEFAULT_OPTIONS: Final = Options()

_PLAIN: Final = bodies.Body([])
"""A body that says nothing of its own."""


def _options(query: bytes) -> Options:
    if not query:
        return _DEFAULT_OPTIONS
    return bodies.read_query(Options, query)


class Wanted(NamedTuple):
    """Which labels a reply has: `top_k` at most, of at least this probability; and which label set."""

    top_k: int
    threshold: float | None = None
    coverage: Coverage | None = None
    extra: int = 0
    """What the set may cost, in predictions."""
    timing: bool = False
    """And where the time went."""


def _wanted(options: Options, body: bodies.Body, model: LiveModel) -> Wanted:
    """What the body says comes first. Raises `BadRequest` for a coverage that the model has not."""
    top_k = options.top_k if body.top_k is None else body.top_k
    threshold = options.threshold if body.threshold is None else body.threshold
    level = options.coverage if body.coverage is None else body.coverage
    count = len(model.contract.labels)
    top_k = min(top_k or count, count)
    if level is None:
        return Wanted(top_k, threshold, timing=options.timing)
    coverage = coverage_of(model.contract, level)
    return Wanted(top_k, threshold, coverage, count // _SET_LABELS, options.timing)


# --- replies -------------------------------------------------------------------------------------


def model_name(model: LiveModel) -> dict[str, str]:
    """Which model answered, as plain values."""
    return {"name": model.name, "version": model.version}


def render(outcome: Classification | RequestError, wanted: Wanted) -> dict[str, Any]:
    """One image's part of a reply, as plain values: its labels, or its error."""
    if isinstance(outcome, RequestError):
        return {"error": outcome.to_dict()}
    image = outcome.answer
    ranked = rank(outcome, top_k=wanted.top_k, threshold=wanted.threshold)
    rendered: dict[str, Any] = {"predictions": render_predictions(ranked)}
    if wanted.coverage:
        rendered["coverage"] = label_set(outcome, wanted.coverage)._asdict()
    rendered["image"] = {"format": image.format, "width": image.width, "height": image.height}
    if image.warnings:
        rendered["warnings"] = render_warnings(image.warnings)
    return rendered


def render_warnings(warnings: Sequence[ImageWarning]) -> list[dict[str, str]]:
    """What may surprise about an image's answer, as plain values."""
    return [{"code": warning.code, "message": warning.text} for warning in warnings]


def render_predictions(ranked: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Labels, as plain values."""
    return [_render_prediction(prediction) for prediction in ranked]


def _render_prediction(prediction: Prediction) -> dict[str, Any]:
    rendered: dict[str, Any] = {
        "label": prediction.label,
        "index": prediction.index,
        "probability": prediction.probability,
    }
    return rendered if prediction.selected is None else {**rendered, "selected": prediction.selected}

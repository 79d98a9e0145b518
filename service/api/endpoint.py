"""The one endpoint of all classification routes, over ASGI and without it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext
from typing import Any

from fastapi.responses import Response
from starlette.types import Send

from fovea.service.api import bodies
from fovea.service.api.adapter import (
    InferenceRequest,
    ParsedRequest,
    ProtocolAdapter,
    Reply,
    ReplyFormat,
)
from fovea.service.api.asgi_endpoint import AsgiEndpoint, RouteMatch
from fovea.service.api.services import (
    MAX_INLINE_LABELS,
    Services,
    make_deadline_error,
    parse_time_limit,
)
from fovea.service.artifact.repository import ModelVersion
from fovea.service.errors import RequestError
from fovea.service.http.api_protocol import ApiProtocol
from fovea.service.http.fast_path import Exchange, Headers
from fovea.service.http.request_record import RequestRecord
from fovea.service.image_warnings import create_warning_headers
from fovea.service.runners.batch_messages import Image, Item
from fovea.service.runners.lane import INFINITY, Job
from fovea.service.runners.shared_memory import SharedBuffer
from fovea.service.serving.admission import Admission
from fovea.service.serving.classifier import BoxClassification, Classification
from fovea.service.serving.live_model import LiveModel


class Endpoint(AsgiEndpoint):
    """The application of a classification route of any protocol."""

    def __init__(self, services: Services, adapter: ProtocolAdapter, protocol: ApiProtocol) -> None:
        super().__init__(services, protocol)
        self._adapter = adapter
        self._json_limit = bodies.json_limit(services.settings)

    def parse_options(self, query: bytes) -> Any:
        """Parse the query of a URL. Raises `BadRequest`."""
        return self._adapter.parse_options(query)

    def body_limit(self, headers: Headers) -> bodies.BodyLimit:
        """Return the size limit of the body."""
        return self._json_limit if self._adapter.is_json_body(headers) else self._body_limit

    # --- without ASGI ---

    def open_request(
        self, exchange: Exchange, route_match: RouteMatch, headers: Headers
    ) -> FastHandler | None:
        """Accept a request, or return None if its model must be loaded first.

        Raises `RequestError`.
        """
        services, record = self.services, exchange.record
        record.route, record.protocol = route_match.route.path, self.protocol
        model = services.admit(*route_match.address, record)
        if isinstance(model, ModelVersion):
            return None
        if route_match.refusal:
            raise route_match.refusal
        raw_format = self._adapter.choose_raw_format(route_match.options, headers, model)
        time_limit = parse_time_limit(headers, services.settings)
        limit = self._body_limit if raw_format is not None else self.body_limit(headers)
        limit.check(exchange.content_length)
        services.classifier.check_capacity(model)
        admission = Admission(services.classifier, model, services.reserve_caller(record))
        return FastHandler(self, exchange, route_match.options, headers, admission, raw_format, time_limit)

    # --- with the whole body ---

    async def answer_body(
        self, request: InferenceRequest, admission: Admission, deadline: float, send: Send
    ) -> Response:
        """Return the response to an ASGI request with its whole body. Raises `RequestError`."""
        reply = await self.handle_request(request, admission, deadline)
        return Response(reply.content, headers=dict(reply.headers), media_type=reply.media_type)

    async def handle_request(self, request: InferenceRequest, admission: Admission, deadline: float) -> Reply:
        """Answer a request with its whole body. Raises `RequestError`."""
        model, record = request.model, request.record
        reply_format = self._adapter.choose_raw_format(request.options, request.headers, model)
        images, reply_format, time_limit, failures, result_count = (
            await self._adapter.parse_request(request)
            if reply_format is None
            else ParsedRequest(
                [self._adapter.create_item(request.body.to_image(), reply_format)], reply_format
            )
        )
        if result_count is None:
            result_count = len(images)
        self.reserve_images(admission, result_count, reply_format)
        own_deadline = record.started_at + time_limit if time_limit else INFINITY
        try:
            async with asyncio.timeout_at(own_deadline) if time_limit else nullcontext():
                outcomes = await self.services.classifier.classify_images(
                    images,
                    model,
                    deadline=min(deadline, own_deadline),
                    on_answer=record.add_image,
                    caller=admission.queue_name,
                )
        except TimeoutError:
            raise make_deadline_error(time_limit) from None
        # All jobs are over, so that the images are not needed any more.
        bodies.release_images(images)
        for place in sorted(failures):
            outcomes.insert(place, failures[place])
        self._check_outcomes(outcomes, record)
        if result_count * reply_format.labels_per_image <= MAX_INLINE_LABELS:
            return self.render_reply(outcomes, model, reply_format, record)
        return await asyncio.to_thread(self.render_reply, outcomes, model, reply_format, record)

    def create_item(self, image: Image, reply_format: ReplyFormat) -> Item:
        """Return the entry of a batch for one raw image (`ProtocolAdapter.create_item`)."""
        return self._adapter.create_item(image, reply_format)

    def reserve_images(self, admission: Admission, count: int, reply_format: ReplyFormat) -> None:
        """Reserve the places of `count` images, and the memory of a long reply.

        Raises `RequestError`.
        """
        admission.reserve_images(count)
        if (label_count := count * reply_format.labels_per_image) > MAX_INLINE_LABELS:
            admission.reserve_answer(label_count)

    def _check_outcomes(
        self,
        outcomes: Sequence[Classification | BoxClassification | RequestError],
        record: RequestRecord,
    ) -> None:
        """Count the errors of single images, and raise the first one if it is the answer to the request."""
        errors = [(number, one) for number, one in enumerate(outcomes) if isinstance(one, RequestError)]
        if len(outcomes) > 1 and self._adapter.reports_each_image:
            answer = None
        else:  # the answer to the request is counted when it is rendered
            answer = errors.pop(0) if errors else None
        for _, error in errors:
            self.services.observer.record_image_failure(record, error.code)
        if answer:
            number, error = answer
            if len(outcomes) > 1:
                error.args = (f"image {number}: {error}",)
            raise error

    def render_reply(
        self, outcomes: Sequence[Any], model: LiveModel, reply_format: ReplyFormat, record: RequestRecord
    ) -> Reply:
        """Render the outcomes of a request's images; called in a thread if there are many labels."""
        started_at = time.monotonic()
        reply = reply_format.render(outcomes, model, record)
        self.services.end_stage("encode", started_at, record)
        if not self._adapter.reports_each_image and (
            headers := create_warning_headers([one.answer.warnings for one in outcomes])
        ):
            return reply._replace(headers={**reply.headers, **headers})
        return reply


class FastHandler:
    """The handler of a request that bypasses ASGI (`service.http.fast_path.RequestHandler`)."""

    __slots__ = (
        "_admission",
        "_deadline",
        "_endpoint",
        "_exchange",
        "_headers",
        "_job",
        "_model",
        "_options",
        "_raw_format",
        "_started_at",
        "_task",
        "_time_limit",
        "_timer",
    )

    def __init__(
        self,
        endpoint: Endpoint,
        exchange: Exchange,
        options: Any,
        headers: Headers,
        admission: Admission,
        raw_format: ReplyFormat | None,
        time_limit: float | None,
    ) -> None:
        """Start the deadline, `time_limit` seconds from now. The handler releases the `admission`.

        `raw_format` is the format of the reply to a raw image, or None if the body must be parsed.
        """
        self._endpoint = endpoint
        self._exchange = exchange
        self._options = options
        self._headers = headers
        self._model = admission.model
        self._raw_format = raw_format
        self._time_limit = time_limit
        self._admission = admission
        self._started_at = time.monotonic()
        self._deadline = self._started_at + time_limit if time_limit else INFINITY
        self._job: Job | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer = (
            asyncio.get_running_loop().call_later(time_limit, self._on_deadline) if time_limit else None
        )

    def count_bytes(self, size: int) -> None:
        """Reserve memory for `size` bytes of the body, as they arrive.

        Raises `Overloaded`.
        """
        self._admission.reserve_bytes(size)

    def handle_body(self, body: bytes | SharedBuffer, size: int) -> None:
        """Process the whole body: the bytes, or the first `size` bytes of the shared buffer.

        A raw image is put into the queue at once; any other body is parsed in a task. `Exchange` calls this
        once, on the event loop, after all bytes were counted. The shared buffer stays valid until `close`
        returns. Raises `RequestError`.
        """
        endpoint, record = self._endpoint, self._exchange.record
        endpoint.services.end_stage("read", self._started_at, record)
        if self._raw_format is None:
            raw_body, settings = bodies.RawBody(body, size), endpoint.services.settings
            request = InferenceRequest(
                raw_body,
                self._headers,
                self._options,
                self._model,
                settings,
                record,
                endpoint.services.url_images.bind(self._admission.reserve_bytes, record),
                self._admission.count_images,
            )
            self._run(endpoint.handle_request, request, self._admission, self._deadline)
            return
        image = endpoint.create_item(bodies.to_image(body, size), self._raw_format)
        endpoint.reserve_images(self._admission, 1, self._raw_format)
        # The batcher calls `_on_outcome` on the event loop when a runner has answered, never before
        # `submit_image` returns: `_job` is set by then. No task is needed.
        self._job = endpoint.services.classifier.submit_image(
            image,
            self._model,
            self._on_outcome,
            deadline=self._deadline,
            on_answer=record.add_image,
            caller=self._admission.queue_name,
        )

    def _on_outcome(self, outcome: Classification | RequestError | Exception) -> None:
        """Answer the request with the outcome of its raw image.

        The batcher calls this once, on the event loop, and not after `close`. The job is over by then, so
        that the answer may close this handler and give the image's memory back.
        """
        if isinstance(outcome, RequestError):
            self._exchange.refuse(outcome)
            return
        render_reply, raw_format = self._endpoint.render_reply, self._raw_format
        try:
            if not isinstance(outcome, Classification):
                raise outcome
            assert raw_format is not None  # noqa: S101 - only raw images have a job of their own
            if raw_format.labels_per_image > MAX_INLINE_LABELS:
                arguments = [outcome], self._model, raw_format, self._exchange.record
                self._run(asyncio.to_thread, render_reply, *arguments)
                return
            reply = render_reply([outcome], self._model, raw_format, self._exchange.record)
        except Exception:
            self._exchange.fail()
        else:
            self._exchange.answer(*reply)

    def close(self) -> None:
        """Stop the work, then release everything that the request holds.

        `Exchange` calls this once, on the event loop, when the request is answered, refused, or abandoned by
        its client. It gives the body's shared buffer back right after this method returns.

        Invariant: a request's jobs are over before its memory is given back, both the shared buffer and the
        admission. A job is over when it has left the queue, or when its result will be ignored. The order
        matters:

        * A job that is still queued could otherwise read the next request's body from the shared buffer, and
          return its labels to this request's client.
        * Releasing the admission gives this request's places and bytes to others, and may release the model.
          Places of images that still wait must not be given away, and a model must not be unloaded under a
          job.
        """
        try:
            self._cancel_jobs()
        finally:  # the reservation must end even if cancelling fails, or its places are lost for ever
            self._admission.release()

    def _cancel_jobs(self) -> None:
        """Cancel the deadline and all work, so that every job is over when this method returns."""
        if self._timer:
            self._timer.cancel()
        if self._task:
            # `cancel` reaches the futures of `Classifier.classify_images` at once, and they cancel their
            # jobs. The task itself ends in the next round of the event loop, and submits nothing before.
            self._task.cancel()
            assert self._task.done() or self._task.cancelling()  # noqa: S101 - no input is checked here
        if job := self._job:
            self._job = None  # breaks the reference cycle with this handler
            if not job.is_over:
                self._exchange.record.add_queue_time(job)
                self._endpoint.services.classifier.cancel(job)
            assert job.is_over  # noqa: S101 - the invariant of `close`, not a check of input

    def _run(self, make_reply: Callable[..., Coroutine[Any, Any, Reply]], *arguments: object) -> None:
        """Run `make_reply` in a task on the event loop, and answer with its result."""
        self._task = asyncio.get_running_loop().create_task(self._answer(make_reply, *arguments))

    async def _answer(
        self, make_reply: Callable[..., Coroutine[Any, Any, Reply]], *arguments: object
    ) -> None:
        # Clear `_task` before each answer: answering calls `close`, which would cancel the task that is
        # answering. All jobs of the task are over here, because `make_reply` has awaited them.
        try:
            reply = await make_reply(*arguments)
        except RequestError as error:
            self._task = None
            self._exchange.refuse(error)
        except Exception:
            self._task = None
            self._exchange.fail()
        else:
            self._task = None
            self._exchange.answer(*reply)

    def _on_deadline(self) -> None:
        # The event loop calls this unless `close` came first. Refusing calls `close`, which ends the work.
        self._exchange.refuse(make_deadline_error(self._time_limit))

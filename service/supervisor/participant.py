"""Participant in changes to the served models: the worker's side of the two-phase commit.

The supervisor decides about every change, so that all workers serve the same versions.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any

from fovea.service.artifact.repository import ModelVersion, ServingState
from fovea.service.errors import Draining, Interrupted, ModelError, SwapRefused, to_one_line
from fovea.service.http.lifecycle import exit_after_internal_error
from fovea.service.rollout.manager import ModelManager
from fovea.service.runners.frames import FrameError
from fovea.service.supervisor.messages import (
    AbandonCommand,
    ChangeReply,
    ChangeRequest,
    ErrorValues,
    LoadModelRequest,
    LostModelReport,
    ModelMessage,
    PrepareReply,
    PrepareRequest,
    RefusedVersionReport,
    ServeCommand,
    UnloadModelRequest,
    VersionValues,
    WorkerMessage,
)

log = logging.getLogger(__name__)


class Participant:
    """Client of the supervisor: it applies the supervisor's changes, and forwards requests for changes."""

    def __init__(self) -> None:
        self._open_requests: dict[int, asyncio.Future[ChangeReply]] = {}
        """Requests without a reply, by number, also those whose caller has left."""
        self._is_gone = False
        self._request_numbers = count()
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, send_message: Callable[[WorkerMessage], None], manager: ModelManager) -> None:
        """Set the function that sends a message to the supervisor, and the model manager.

        Call this before the first message arrives. The manager calls both callbacks on the event loop.
        """
        self._send_message = send_message
        self._manager = manager
        manager.on_lost = lambda name, is_lost: send_message(LostModelReport(name, is_lost))
        manager.on_refused = lambda version, reason, is_lasting: send_message(
            RefusedVersionReport(VersionValues.from_version(version), reason, is_lasting)
        )

    def fail_pending(self) -> None:
        """Fail all pending requests, because the supervisor has ended and cannot answer."""
        self._is_gone = True
        for future in self._open_requests.values():
            if not future.done():
                future.set_exception(_create_gone_error())

    def handle_message(self, message: ModelMessage) -> None:
        """Handle a message of the supervisor. `SupervisedSource` calls this on the event loop.

        Raises `FrameError` if the message is a reply that no open request expects.

        Messages arrive in the order in which the supervisor has sent them: a state never comes before the
        answer to the `prepare` for it. Only `prepare` takes time, and runs in a task.
        """
        match message:
            case PrepareRequest():
                versions = [one.to_version() for one in message.versions]
                self._start_task(self._prepare(message, versions))
            case ServeCommand():
                self._serve(message.to_state())
            case AbandonCommand(name):
                self._manager.abort(name)
            case ChangeReply(number):
                if (future := self._open_requests.pop(number, None)) is None:
                    raise FrameError(f"answered request {number}, which is not open")
                if not future.done():  # done: the caller has left
                    future.set_result(message)

    def _serve(self, state: ServingState) -> None:
        """Serve a state, or end this process if that fails."""
        try:
            self._manager.serve(state)
        except Exception:  # otherwise this worker would serve other versions than the other workers
            log.critical(
                "this worker cannot make a change that the other workers make, and exits", exc_info=True
            )
            exit_after_internal_error()

    async def load(self, name: str | None, version: str | None = None) -> None:
        """Load a model in all workers, as `service.api.oip.repository.ModelLoader` describes."""
        await self._request_change(LoadModelRequest(next(self._request_numbers), name, version))

    async def unload(self, name: str | None) -> None:
        """Unload a model in all workers, as `service.api.oip.repository.ModelLoader` describes."""
        await self._request_change(UnloadModelRequest(next(self._request_numbers), name))

    async def _request_change(self, request: ChangeRequest) -> None:
        """Send a request to the supervisor and wait for its answer. Raises `RequestError`.

        The time limit covers the limits of every step of a change.
        """
        if self._is_gone:
            raise _create_gone_error()
        limit = 2 * self._manager.change_timeout  # the first worker prepares alone, then the others
        future = self._open_requests[request.number] = asyncio.get_running_loop().create_future()
        self._send_message(request)
        try:
            async with asyncio.timeout(limit):
                reply = await future
        except TimeoutError:
            raise SwapRefused(
                f"the change has not ended within {limit:g} s; check the served versions later"
            ) from None
        if reply.error:
            raise reply.error.to_exception()

    async def _prepare(self, request: PrepareRequest, versions: list[ModelVersion]) -> None:
        """Prepare a change and send the outcome to the supervisor."""
        error = None
        try:
            await self._manager.prepare(request.name, versions, force=request.force)
        except ModelError as refusal:
            error = ErrorValues.from_exception(refusal)
        except Exception as bug:  # the supervisor waits for an answer in any case
            log.exception("a change could not be prepared")
            error = ErrorValues.from_exception(Interrupted(f"{type(bug).__name__}: {to_one_line(bug)}"))
        self._send_message(PrepareReply(request.number, error))

    def _start_task(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Start a task and keep a reference to it."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _create_gone_error() -> Draining:
    """Return the error for requests after the end of the supervisor."""
    return Draining("the supervisor has ended, and this worker is stopping", retry_after=1.0)

"""Participant in changes to the served models: the worker's side of the two-phase commit.

The supervisor decides about every change, so that all workers serve the same versions.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any

from fovea.service.artifact.repository import ModelVersion, ServingState
from fovea.service.errors import (
    Draining,
    Internal,
    Interrupted,
    ModelError,
    ModelNotFound,
    RequestError,
    SwapRefused,
    to_one_line,
)
from fovea.service.rollout.manager import ModelManager

log = logging.getLogger(__name__)

_ERROR_TYPES = {kind.code: kind for kind in (ModelNotFound, SwapRefused, Internal)}
"""Errors that the supervisor may answer a request with, by code."""


class Participant:
    """Client of the supervisor: it applies the supervisor's changes, and forwards requests for changes."""

    def __init__(self) -> None:
        self._pending_requests: dict[int, asyncio.Future[None]] = {}
        self._is_gone = False
        self._request_ids = count()
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, send_message: Callable[..., None], manager: ModelManager) -> None:
        """Set the function that sends a message to the supervisor, and the model manager.

        Call this before the first message arrives. The manager calls both callbacks on the event loop.
        """
        self._send_message = send_message
        self._manager = manager
        manager.on_lost = lambda name, is_lost: send_message(lost=name, is_lost=is_lost)
        manager.on_refused = lambda version, reason, lasting: send_message(
            found=version.to_plain(), reason=reason, lasting=lasting
        )

    def fail_pending(self) -> None:
        """Fail all pending requests, because the supervisor has ended and cannot answer."""
        self._is_gone = True
        for future in self._pending_requests.values():
            if not future.done():
                future.set_exception(_create_gone_error())

    def handle_message(self, message: dict[str, Any]) -> None:
        """Handle a message of the supervisor. `SupervisedSource` calls this on the event loop.

        Messages arrive in the order in which the supervisor has sent them: a state never comes before the
        answer to the `prepare` for it. Only `prepare` takes time, and runs in a task.
        """
        match message:
            case {"prepare": plain_versions, "name": name, "change": change, "force": force}:
                versions = [ModelVersion.from_plain(one) for one in plain_versions]
                self._start_task(self._prepare(name, versions, change, force=force))
            case {"serve": state}:
                self._serve(ServingState.from_json(state))
            case {"gone": _}:
                self.fail_pending()
            case {"abandon": name}:
                self._manager.abort(name)
            case {"managed": number, "error": error}:
                self._resolve_request(number, error)

    def _serve(self, state: ServingState) -> None:
        """Serve a state, or end this process if that fails."""
        try:
            self._manager.serve(state)
        except Exception:  # otherwise this worker would serve other versions than the other workers
            log.critical(
                "this worker cannot make a change that the other workers make, and exits", exc_info=True
            )
            os._exit(70)  # sysexits.h: an internal error

    async def load(self, name: str | None, version: str | None = None) -> None:
        """Load a model in all workers, as `service.api.oip.repository.ModelLoader` describes."""
        await self._request_change(load=name, version=version)

    async def unload(self, name: str | None) -> None:
        """Unload a model in all workers, as `service.api.oip.repository.ModelLoader` describes."""
        await self._request_change(unload=name)

    async def _request_change(self, **change: Any) -> None:
        """Send a request to the supervisor and wait for its answer. Raises `RequestError`.

        The time limit covers the limits of every step of a change.
        """
        if self._is_gone:
            raise _create_gone_error()
        request_id = next(self._request_ids)
        limit = 2 * self._manager.change_timeout  # the first worker prepares alone, then the others
        # Register the future before the request is sent: the answer may come at once.
        self._pending_requests[request_id] = asyncio.get_running_loop().create_future()
        try:
            self._send_message(request=request_id, **change)
            async with asyncio.timeout(limit):
                await self._pending_requests[request_id]
        except TimeoutError:
            raise SwapRefused(
                f"the change has not ended within {limit:g} s; check the served versions later"
            ) from None
        finally:
            del self._pending_requests[request_id]

    def _resolve_request(self, request_id: int, error: dict[str, str] | None) -> None:
        """Complete a pending request with the supervisor's answer."""
        future = self._pending_requests.get(request_id)
        if future is None or future.done():  # the caller has left
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(_parse_error(error))

    async def _prepare(
        self, name: str | None, versions: list[ModelVersion], change: int, *, force: bool
    ) -> None:
        """Prepare a change and send the outcome to the supervisor."""
        error, kind = None, None
        try:
            await self._manager.prepare(name, versions, force=force)
        except ModelError as refusal:
            error, kind = to_one_line(refusal), type(refusal).__name__
        except Exception as bug:  # the supervisor waits for an answer in any case
            log.exception("a change could not be prepared")
            error, kind = f"{type(bug).__name__}: {to_one_line(bug)}", Interrupted.__name__
        self._send_message(prepared=change, error=error, kind=kind)

    def _start_task(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Start a task and keep a reference to it."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _create_gone_error() -> Draining:
    """Return the error for requests after the end of the supervisor."""
    return Draining("the supervisor has ended, and this worker is stopping", retry_after=1.0)


def _parse_error(values: dict[str, str]) -> RequestError:
    """Return the error that the supervisor has sent."""
    return _ERROR_TYPES.get(values["code"], Internal)(values["message"])

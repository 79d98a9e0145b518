"""A worker's part in changes to the served models.

The supervisor decides about every change, so that all workers serve the same versions.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any

from fovea.service.artifact.repository import ModelVersion, RefusedVersion
from fovea.service.errors import (
    Draining,
    Internal,
    Interrupted,
    ModelError,
    ModelNotFound,
    RequestError,
    SwapRefused,
    one_line,
)
from fovea.service.rollout.manager import ModelManager

log = logging.getLogger(__name__)

_KINDS = {kind.code: kind for kind in (ModelNotFound, SwapRefused, Internal)}
"""Errors that the supervisor may answer a request with, by code."""


class Remote:
    """Client of the supervisor: it applies the supervisor's changes, and forwards requests for changes."""

    def __init__(self) -> None:
        self._asked: dict[int, asyncio.Future[None]] = {}
        self._is_gone = False
        self._numbers = count()
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, tell: Callable[..., None], steward: ModelManager) -> None:
        """Set the function that sends a message to the supervisor, and the model manager."""
        self._tell = tell
        self._steward = steward
        steward.on_lost = lambda name, is_lost: tell(lost=name, is_lost=is_lost)
        steward.on_refused = lambda found, reason, lasting: tell(
            found=found.to_plain(), reason=reason, lasting=lasting
        )

    def end(self) -> None:
        """Fail all pending requests, because the supervisor has ended and cannot answer."""
        self._is_gone = True
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(_gone())

    def told(self, message: dict[str, Any]) -> None:
        """Handle a message of the supervisor."""
        match message:
            case {"prepare": found, "name": name, "change": change, "force": force}:
                versions = [ModelVersion.from_plain(one) for one in found]
                self._spawn(self._prepare(name, versions, change, force=force))
            case {"commit": name}:
                self._commit(name)
            case {"default": name}:
                self._steward.set_default(name)
            case {"refused": refused, "waits": waits}:
                self._steward.set_refused_versions([RefusedVersion(*one) for one in refused], is_empty=waits)
            case {"gone": _}:
                self.end()
            case {"abandon": name}:
                self._steward.abort(name)
            case {"managed": number, "error": error}:
                self._managed(number, error)

    def _commit(self, name: str | None) -> None:
        """Commit a change, or end this process if that fails."""
        try:
            self._steward.commit(name)
        except Exception:  # else this worker would serve other versions than the rest
            log.critical("this worker cannot make a change that all others make, and ends", exc_info=True)
            os._exit(70)  # sysexits.h: an internal error

    async def load(self, name: str | None, version: str | None = None) -> None:
        """Load a model in all workers, as `service.api.oip.repository.Manager` describes."""
        await self._ask(load=name, version=version)

    async def unload(self, name: str | None) -> None:
        """Unload a model in all workers, as `service.api.oip.repository.Manager` describes."""
        await self._ask(unload=name)

    async def _ask(self, **what: Any) -> None:
        """Send a request to the supervisor and wait for its answer. Raises `RequestError`.

        The time limit covers the limits of every step of a change.
        """
        if self._is_gone:
            raise _gone()
        number = next(self._numbers)
        limit = 2 * self._steward.change_timeout  # the first worker prepares alone, then the others
        # Register the future before the request is sent: the answer may come at once.
        self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._tell(request=number, **what)
            async with asyncio.timeout(limit):
                await self._asked[number]
        except TimeoutError:
            raise SwapRefused(
                f"the change has not ended within {limit:g} s; look whether it has later"
            ) from None
        finally:
            del self._asked[number]

    def _managed(self, number: int, error: dict[str, str] | None) -> None:
        """Settle a pending request with the supervisor's answer."""
        asked = self._asked.get(number)
        if asked is None or asked.done():  # the caller has left
            return
        if error is None:
            asked.set_result(None)
        else:
            asked.set_exception(_error(error))

    async def _prepare(
        self, name: str | None, found: list[ModelVersion], change: int, *, force: bool
    ) -> None:
        """Prepare a change and send the outcome to the supervisor."""
        error, kind = None, None
        try:
            await self._steward.prepare(name, found, force=force)
        except ModelError as refusal:
            error, kind = one_line(refusal), type(refusal).__name__
        except Exception as bug:  # the supervisor waits for an answer in any case
            log.exception("a change could not be prepared")
            error, kind = f"{type(bug).__name__}: {one_line(bug)}", Interrupted.__name__
        self._tell(prepared=change, error=error, kind=kind)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task and keep a reference to it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _gone() -> Draining:
    """Return the error for requests after the end of the supervisor."""
    return Draining("the supervisor is gone, and this worker stops", retry_after=1.0)


def _error(values: dict[str, str]) -> RequestError:
    """Return the error that the supervisor has sent."""
    return _KINDS.get(values["code"], Internal)(values["message"])

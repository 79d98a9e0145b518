"""A worker's part in changes to what is served: the supervisor decides, so that all workers do the same."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any

from service.errors import (
    Internal,
    Interrupted,
    ModelError,
    ModelNotFound,
    RequestError,
    SwapRefused,
    one_line,
)
from service.layout import Found
from service.steward import Steward

log = logging.getLogger(__name__)

_KINDS = {kind.code: kind for kind in (ModelNotFound, SwapRefused, Internal)}
"""What the supervisor may refuse with."""


class Remote:
    """Carries out what the supervisor says, and asks it for what callers want (`service.api.management`)."""

    def __init__(self) -> None:
        self._asked: dict[int, asyncio.Future[None]] = {}
        self._numbers = count()
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, tell: Callable[..., None], steward: Steward) -> None:
        """`tell` sends a message to the supervisor."""
        self._tell = tell
        self._steward = steward

    def told(self, message: dict[str, Any]) -> None:
        """The supervisor has said something."""
        match message:
            case {"prepare": found, "name": name, "change": change}:
                self._spawn(self._prepare(name, [Found.from_plain(one) for one in found], change))
            case {"commit": name}:
                self._steward.commit(name)
            case {"default": name}:
                self._steward.choose(name)
            case {"abandon": name}:
                self._steward.abandon(name)
            case {"managed": number, "error": error}:
                self._managed(number, error)

    async def load(self, name: str | None, version: str | None = None) -> None:
        """See `service.api.management.Manager`."""
        await self._ask(load=name, version=version)

    async def unload(self, name: str | None) -> None:
        """See `service.api.management.Manager`."""
        await self._ask(unload=name)

    async def _ask(self, **what: Any) -> None:
        number = next(self._numbers)
        self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._tell(request=number, **what)
            await self._asked[number]
        finally:
            del self._asked[number]

    def _managed(self, number: int, error: dict[str, str] | None) -> None:
        asked = self._asked.get(number)
        if asked is None or asked.done():  # its caller has left
            return
        if error is None:
            asked.set_result(None)
        else:
            asked.set_exception(_error(error))

    async def _prepare(self, name: str | None, found: list[Found], change: int) -> None:
        error, interrupted = None, False
        try:
            await self._steward.prepare(name, found)
        except ModelError as refusal:
            error, interrupted = one_line(refusal), isinstance(refusal, Interrupted)
        except Exception as bug:  # whatever it is, the supervisor waits for an answer
            log.exception("a change could not be prepared")
            error, interrupted = f"{type(bug).__name__}: {one_line(bug)}", True
        self._tell(prepared=change, error=error, interrupted=interrupted)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _error(values: dict[str, str]) -> RequestError:
    return _KINDS[values["code"]](values["message"])

"""Names what holds the event loop: for debugging and for tests, since watching costs a few microseconds."""

from __future__ import annotations

import asyncio
import logging
import time
from asyncio.events import Handle
from typing import Final

log = logging.getLogger(__name__)

LIMIT: Final = 0.002
"""Seconds of processor time that one callback may take. Time on the clock would blame whatever else runs."""


def install() -> None:
    """From now on log every callback, of any event loop in this process, that takes more than `LIMIT`."""
    run = Handle._run

    def watched(self: Handle) -> None:
        before = time.thread_time()
        run(self)
        taken = time.thread_time() - before
        if taken > LIMIT:
            log.warning("the event loop was held for %.1f ms by %s", 1000 * taken, _name(self))

    Handle._run = watched  # type: ignore[method-assign]  # asyncio has no hook for it


def _name(handle: Handle) -> str:
    """Of a step of a task the task, and of any other callback the function."""
    callback: object = handle._callback  # type: ignore[attr-defined]
    owner = getattr(callback, "__self__", None)
    return repr(owner if isinstance(owner, asyncio.Task) else callback)

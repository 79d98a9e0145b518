"""Report callbacks that block the event loop.

This is for debugging and tests, because the measurement costs a few microseconds for each callback.
"""

from __future__ import annotations

import asyncio
import logging
import time
from asyncio.events import Handle
from typing import Final

log = logging.getLogger(__name__)

LIMIT: Final = 0.002
"""Processor time limit of one callback, in seconds.

Wall-clock time would also count other processes that run at the same time.
"""


def install() -> None:
    """Log every callback that takes more than `LIMIT` seconds, on all event loops of this process."""
    run = Handle._run

    def watched(self: Handle) -> None:
        before = time.thread_time()
        run(self)
        taken = time.thread_time() - before
        if taken > LIMIT:
            log.warning("the event loop was held for %.1f ms by %s", 1000 * taken, _name(self))

    Handle._run = watched  # type: ignore[method-assign]  # asyncio has no hook for it


def _name(handle: Handle) -> str:
    """Return the task if the callback is a step of a task, otherwise the function."""
    callback: object = handle._callback  # type: ignore[attr-defined]
    owner = getattr(callback, "__self__", None)
    return repr(owner if isinstance(owner, asyncio.Task) else callback)

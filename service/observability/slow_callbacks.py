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

MAX_CALLBACK_SECONDS: Final = 0.002
"""Processor time limit of one callback, in seconds.

Wall-clock time would also count other processes that run at the same time.
"""


def log_slow_callbacks() -> None:
    """Log every callback longer than `MAX_CALLBACK_SECONDS`, on all event loops of this process."""
    original_run = Handle._run

    # asyncio calls this for each callback, in the thread of the event loop.
    def timed_run(self: Handle) -> None:
        started_at = time.thread_time()
        original_run(self)
        duration = time.thread_time() - started_at
        if duration > MAX_CALLBACK_SECONDS:
            log.warning(
                "the event loop was blocked for %.1f ms by %s", 1000 * duration, _describe_callback(self)
            )

    Handle._run = timed_run  # type: ignore[method-assign]  # asyncio has no hook for it


def _describe_callback(handle: Handle) -> str:
    """Return the task if the callback is a step of a task, otherwise the function."""
    callback: object = handle._callback  # type: ignore[attr-defined]
    owner = getattr(callback, "__self__", None)
    return repr(owner if isinstance(owner, asyncio.Task) else callback)

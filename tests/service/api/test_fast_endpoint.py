"""A request that bypasses ASGI releases its resources in the right order."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from fovea.service.api import bodies
from fovea.service.api.fast_endpoint import FastHandler


class RecordingHandler(FastHandler):
    """A handler that records the order in which it cancels its jobs and releases its admission."""

    def __init__(self, *, fails: bool = False) -> None:
        self.events: list[str] = []
        self._fails = fails
        model: Any = SimpleNamespace(acquire=lambda: None, release=lambda: self.events.append("release"))
        body_memory = SimpleNamespace(release=lambda _size: None)
        services: Any = SimpleNamespace(classifier=SimpleNamespace(body_memory=body_memory))
        super().__init__(services, exchange=None, model=model, limit=60)  # type: ignore[arg-type]

    def _handle_body(self, raw_body: bodies.RawBody) -> None: ...

    def _cancel_jobs(self) -> None:
        super()._cancel_jobs()
        self.events.append("cancel")
        if self._fails:
            raise ValueError


def close_handler(*, fails: bool = False) -> list[str]:
    """Close a handler on an event loop, and return its events."""

    async def close() -> list[str]:
        handler = RecordingHandler(fails=fails)
        with suppress(ValueError):
            handler.close()
        return handler.events

    return asyncio.run(close())


def test_jobs_are_cancelled_before_memory_is_released() -> None:
    assert close_handler() == ["cancel", "release"]


def test_memory_is_released_even_if_cancelling_fails() -> None:
    assert close_handler(fails=True) == ["cancel", "release"]

"""Time for processes on a busy machine."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a child process take a minute to end by itself before the service kills it."""
    monkeypatch.setattr("fovea.service.runners.child_process._EXIT_SECONDS", 60.0)

"""Backoff of changes that were interrupted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from fovea.service.artifact.repository import ModelVersion

_BACKOFF_SECONDS: Final = (2.0, 300.0)
"""Time in seconds before an interrupted change is tried again: the delay after the second interruption, which
doubles each time, and the maximum. The file was not the cause of the interruption."""


class _Interruptions(NamedTuple):
    """Number of consecutive interruptions of a change, and the time of the next attempt."""

    versions: tuple[ModelVersion, ...]
    interruption_count: int
    retry_at: float
    """Time of the next attempt on the monotonic clock in seconds."""


class ChangeBackoff:
    """Interruptions of all models, and the time of the next attempt for each."""

    def __init__(self) -> None:
        self._interruptions: dict[str | None, _Interruptions] = {}

    def is_due(self, name: str | None, versions: Sequence[ModelVersion]) -> bool:
        """Return whether a change may be tried now."""
        interruption = self._interruptions.get(name)
        return not (
            interruption and interruption.versions == versions and time.monotonic() < interruption.retry_at
        )

    def postpone(self, name: str | None, versions: Sequence[ModelVersion]) -> None:
        """Schedule an interrupted change again: at the next scan, then with growing delays."""
        interruption = self._interruptions.get(name)
        count = (
            interruption.interruption_count + 1
            if interruption and interruption.versions == tuple(versions)
            else 0
        )
        shortest, longest = _BACKOFF_SECONDS
        delay = min(longest, shortest * 2 ** min(count, 16)) if count else 0.0
        self._interruptions[name] = _Interruptions(tuple(versions), count, time.monotonic() + delay)

    def reset(self, name: str | None) -> None:
        """Forget the interruptions of a model, because a change has succeeded."""
        self._interruptions.pop(name, None)

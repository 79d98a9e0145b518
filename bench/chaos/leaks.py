"""Growth of memory and open files: the trend under load, and the difference between two states at rest."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

MAX_RISE: Final = 0.05
"""Maximum growth of the memory as a share, from the trend under load and between two rests."""

_MAX_IDLE_GROWTH: Final = 48 << 20
"""Maximum growth of the memory at rest, in bytes, for all processes and for the first one.

The limit covers the last images of two models, 16 MB each (FOVEA_REPLAY_IMAGES), and a heap of 16 MB that is
kept from a large request. A small leak shows in the trend.
"""

_WARM_SECONDS: Final = 90.0
"""Time under load until processes have the blocks that they keep for large images, in seconds.

The blocks have 64 MB each (PILLOW_BLOCKS_MAX). Before that time, growth at rest means nothing.
"""

_TREND_SECONDS: Final = 240.0
"""Minimum time for a trend, in seconds; in a shorter time, a one-time allocation would look like a trend."""

_MAX_FILE_GROWTH: Final = 8
"""Maximum growth of the number of open files at rest."""

_BLOCK_COUNT: Final = 12
"""Number of blocks of time whose median memory the trend is fitted to; single samples are correlated."""

_WARM_UP_SHARE: Final = 0.25
"""Share of the time at the start that the trend leaves out."""


@dataclass(frozen=True)
class Trend:
    """The change of the memory over the measured time, as a share of its mean."""

    rise: float
    error: float
    """Twice the standard error."""

    def __str__(self) -> str:
        if self == Trend(0.0, 0.0):
            return "unknown, the time was too short"
        return f"{self.rise:+.1%} ± {self.error:.1%}"


def fit_trend(points: Sequence[tuple[float, int]]) -> Trend:
    """Fit a line to times (seconds) and bytes; a short period has no trend."""
    start = points[0][0] + _WARM_UP_SHARE * (points[-1][0] - points[0][0]) if points else 0.0
    late_points = [(second, size) for second, size in points if second >= start]
    if len(late_points) < 2 * _BLOCK_COUNT or late_points[-1][0] - late_points[0][0] < _TREND_SECONDS:
        return Trend(0.0, 0.0)
    blocks = [
        late_points[len(late_points) * one // _BLOCK_COUNT : len(late_points) * (one + 1) // _BLOCK_COUNT]
        for one in range(_BLOCK_COUNT)
    ]
    times = [statistics.fmean(second for second, _ in block) for block in blocks]
    sizes = [statistics.median(size for _, size in block) for block in blocks]
    line = statistics.linear_regression(times, sizes)
    residuals = [
        size - line.intercept - line.slope * second for second, size in zip(times, sizes, strict=True)
    ]
    time_variance = sum((second - statistics.fmean(times)) ** 2 for second in times)
    error = (sum(one * one for one in residuals) / (_BLOCK_COUNT - 2) / time_variance) ** 0.5
    share = (times[-1] - times[0]) / statistics.fmean(sizes)
    return Trend(line.slope * share, 2 * error * share)


@dataclass(frozen=True)
class IdleState:
    """The service without requests."""

    resident_bytes: int
    """Memory of all processes, in bytes."""
    main_bytes: int
    """Memory of the first process, in bytes: the service itself, or the supervisor of its workers."""
    open_files: int


def find_leaks(
    state_before: IdleState, state_after: IdleState, *curves: Sequence[tuple[float, int]]
) -> list[str]:
    """Return a sentence for each growth; the curves are those of all processes and of the first one."""
    growths = []
    for name, points in zip(("memory", "memory of the first process"), curves, strict=False):
        if (memory_trend := fit_trend(points)).rise - memory_trend.error > MAX_RISE:
            growths.append(f"{name}: the trend rises by {memory_trend}; at most {MAX_RISE:.0%}")
    points = curves[0] if curves else ()
    if points and points[-1][0] - points[0][0] < _WARM_SECONDS:
        state_before = replace(
            state_before, resident_bytes=state_after.resident_bytes, main_bytes=state_after.main_bytes
        )
    growth = state_after.resident_bytes - state_before.resident_bytes
    if growth > _MAX_IDLE_GROWTH:
        growths.append(
            f"memory at rest: {state_before.resident_bytes / 1e6:.0f} MB before and "
            f"{state_after.resident_bytes / 1e6:.0f} MB after"
        )
    if state_after.main_bytes - state_before.main_bytes > _MAX_IDLE_GROWTH:
        growths.append(
            f"memory of the first process at rest: {state_before.main_bytes / 1e6:.0f} MB before and "
            f"{state_after.main_bytes / 1e6:.0f} MB after"
        )
    if state_after.open_files - state_before.open_files > _MAX_FILE_GROWTH:
        growths.append(
            f"open files at rest: {state_before.open_files} before and {state_after.open_files} after"
        )
    return growths

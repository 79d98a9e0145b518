"""The results of `make soak`, and the limits that they must keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_GROWTH: Final = 0.05
"""Maximum growth, as a share of the memory after the first tenth."""

MAX_IDLE_CPU: Final = 0.005
"""Maximum use when idle, as a share of one processor."""


@dataclass(frozen=True)
class IdleSample:
    """The service between two parts of the load."""

    requests: int
    """Number of requests so far."""
    seconds: float
    """Time since the start."""
    resident_bytes: int


@dataclass(frozen=True)
class SoakResult:
    """The results of a soak: memory in bytes, times in seconds."""

    machine: str
    idle_samples: list[IdleSample]
    curve: list[tuple[float, int]]
    """(time since the start, memory) over the whole run."""
    request_counts: dict[str, int]
    differences: list[str]
    idle_cpu: float
    """Number of processors that the idle service and its runners use."""

    @property
    def growth(self) -> float:
        """Growth of the memory at rest, from the first tenth of the requests to the last, as a share."""
        return self.idle_samples[-1].resident_bytes / self.idle_samples[1].resident_bytes - 1

    @property
    def failures(self) -> list[str]:
        """Sentences about everything that is wrong."""
        failures = list(self.differences)
        if self.growth > MAX_GROWTH:
            failures.append(f"the memory at rest grew by {self.growth:.1%}; at most {MAX_GROWTH:.0%}")
        if self.idle_cpu > MAX_IDLE_CPU:
            failures.append(
                f"the idle service uses {self.idle_cpu:.2%} of a processor; at most {MAX_IDLE_CPU:.1%}"
            )
        return failures

"""The record of deliberate faults, which excuse some outcomes of requests.

Times are monotonic, in seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

NOTICE_SECONDS: Final = 2.0
"""Time after a kill within which clients notice it, in seconds; the end of a process takes a moment."""

RECOVERY_SECONDS: Final = 20.0
"""Time after a fault within which a request may be refused with 503, in seconds.

A runner starts in two seconds, but its start is put off by up to 8 s if it was killed while loading, and
others may be killed meanwhile.
"""


@dataclass
class Fault:
    """A deliberate fault of a process or a model."""

    target: str
    """`runner`, `worker` or `explainer`, or the name of an unloaded model."""
    kind: str
    """`killed`, `stopped` or `unloaded`."""
    began_at: float
    ended_at: float = float("inf")
    """Time at which the fault stops affecting later requests."""

    def overlap(self, start: float, end: float) -> float:
        """Return the overlap with a period in seconds; negative without an overlap."""
        return min(self.ended_at, end) - max(self.began_at, start)


class FaultLog:
    """The collection of all faults."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self._faults = list(faults)

    def add(self, fault: Fault) -> Fault:
        """Record a fault that begins, and return it."""
        self._faults.append(fault)
        return fault

    def find_overlapping(self, start: float, end: float, *targets: str) -> list[Fault]:
        """Return the faults of these targets that overlap with the period."""
        return [one for one in self._faults if one.target in targets and one.overlap(start, end) >= 0]

    def __iter__(self) -> Iterator[Fault]:
        return iter(self._faults)

    @property
    def counts(self) -> Counter[str]:
        """Number of faults by description."""
        return Counter(f"{one.target} {one.kind}" for one in self._faults)

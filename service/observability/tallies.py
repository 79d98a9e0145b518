"""Tallies: counts of frequent events, which are added to the metrics in bulk.

Observing one value in a histogram of `prometheus_client` takes a lock and a walk over the buckets, and an
image has twenty values. A tally only appends the value to a list. `Metrics.fold` adds all values at once,
which takes a tenth of the time. Everything here runs on the event loop, so no locks are needed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

from prometheus_client import Counter, Histogram


class Tally(Protocol):
    """Interface of counts that wait to be added to a metric."""

    def fold(self) -> None:
        """Add the counts to the metric, and start again at zero."""


class HistogramTally:
    """Values that wait to be added to one histogram."""

    __slots__ = ("_histogram", "_values", "observe")

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._values: list[float] = []
        self.observe: Callable[[float], None] = self._values.append
        """Function that counts one value."""

    def fold(self) -> None:
        """Add the values to the histogram."""
        if self._values:
            values = self._values.copy()
            self._values.clear()  # the same list stays: `observe` appends to it
            observe_all(self._histogram, values)


class SumTally:
    """Amounts that wait to be added to one counter."""

    __slots__ = ("_amounts", "_counter", "add")

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._amounts: list[float] = []
        self.add: Callable[[float], None] = self._amounts.append
        """Function that counts one amount, which is not negative."""

    def fold(self) -> None:
        """Add the amounts to the counter."""
        if self._amounts:
            total = sum(self._amounts)
            self._amounts.clear()
            self._counter.inc(total)


def observe_all(histogram: Histogram, values: Sequence[float]) -> None:
    """Observe many values in one histogram.

    The result is that of `Histogram.observe` for each value; `prometheus_client` has no method for several.
    A value that is not a number changes the sum, and is in no bucket.
    """
    bounds = histogram._upper_bounds
    counts = [0] * len(bounds)
    total = sum(values)
    if math.isnan(total):
        values = [value for value in values if not math.isnan(value)]
    for value in values:
        counts[bisect_left(bounds, value)] += 1
    histogram._sum.inc(total)
    for bucket, count in zip(histogram._buckets, counts, strict=True):
        if count:
            bucket.inc(count)

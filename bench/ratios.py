"""Ratios between contestants, taken within rounds: a machine that is slow for a minute is slow for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from fovea.bench.cells import DISTURBANCE_LIMIT, ClosedLoopCell
from fovea.bench.contestants import LOOPS
from fovea.bench.peers import PEERS


@dataclass(frozen=True)
class Ratio:
    """The ratios of several rounds."""

    other: str
    """Name of the contestant in the denominator."""
    values: tuple[float, ...]
    """One ratio for each round."""

    @property
    def median(self) -> float:
        return median_or_nan(self.values)

    def __str__(self) -> str:
        if not self.values:
            return ""
        return f"{self.median:.2f} ({min(self.values):.2f} to {max(self.values):.2f})"


def compute_ratio(
    cells: Sequence[ClosedLoopCell],
    name: str,
    other: str,
    connections: int,
    value: Callable[[ClosedLoopCell], float] = lambda cell: cell.rate,
) -> Ratio:
    """Divide a value of `name` by that of `other`, for the cells of one workload and each round with both.

    A loop that is measured once per round is compared with all loads of that round. Disturbed rounds count
    only if there are no others. A round in which `other` answered nothing in time does not count.
    """
    other_cells = select_cells(cells, other, connections)
    if not other_cells and other in LOOPS:
        other_cells = select_cells(cells, other)
    by_round = {cell.round: cell for cell in other_cells if value(cell)}
    pairs = [
        (cell, by_round[cell.round])
        for cell in select_cells(cells, name, connections)
        if cell.round in by_round
    ]
    undisturbed_pairs = [pair for pair in pairs if max(cell.others for cell in pair) < DISTURBANCE_LIMIT]
    return Ratio(other, tuple(value(one) / value(two) for one, two in undisturbed_pairs or pairs))


def find_best_peer(cells: Sequence[ClosedLoopCell], connections: int) -> str | None:
    """Return the peer with the highest median rate, for the cells of one workload; None without peers."""
    rates = {
        name: median_or_nan(cell.rate for cell in select_cells(cells, name, connections))
        for name in PEERS
        if select_cells(cells, name, connections)
    }
    return max(rates, key=lambda name: rates[name]) if rates else None


def select_cells(
    cells: Sequence[ClosedLoopCell], name: str, connections: int | None = None
) -> list[ClosedLoopCell]:
    """Return the cells of a contestant, at one number of connections or at all."""
    return [cell for cell in cells if cell.name == name and connections in (None, cell.connections)]


def tail_ratio(cells: Sequence[ClosedLoopCell], name: str, connections: int) -> float:
    """Return the 99th percentile of the latencies over their median, for one workload's cells."""
    return median_or_nan(cell.p99 / cell.p50 for cell in select_cells(cells, name, connections) if cell.p50)


def median_or_nan(values: Iterable[float]) -> float:
    """Return the median; NaN without values."""
    numbers = list(values)
    return median(numbers) if numbers else math.nan

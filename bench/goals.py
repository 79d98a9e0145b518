"""The goals of the project, evaluated for one run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from fovea.bench.cells import ClosedLoopCell
from fovea.bench.ratios import Ratio, compute_ratio, find_best_peer, median_or_nan, select_cells
from fovea.bench.results import Results

LOADED: Final = (8, 32)
"""Numbers of connections that keep all processors busy."""

MIN_PEER_RATIO: Final = {"thumbnails": 1.0, "photographs": 1.05, "phone": 2.5}
"""Minimum of Fovea's images per second over those of the best tuned peer, by workload."""

MIN_SINGLE_RATIO: Final = 1.0
"""Minimum of Fovea's images per second over the tutorial's, at one connection."""

MAX_CALL_RATIO: Final = 1.25
"""Maximum of Fovea's median latency over that of one call in process, at one connection."""

SMALL_WORKLOADS: Final = ("thumbnails", "photographs")
"""Workloads of the goals for a single caller."""

INT8: Final = "int8"
"""Label of a version of Fovea that serves a quantised model: `--fovea int8=,FOVEA_MODELS=…`."""

MIN_INT8_RATIO: Final = 1.35
MAX_FRONT_RATIO: Final = 2.5
MAX_PROBE_SECONDS: Final = 0.02
MAX_REST_BYTES: Final = 150e6
MAX_START_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Goal:
    """A goal with the result of this run."""

    workload: str
    description: str
    value: float
    target: float
    at_least: bool
    """Flag for a lower limit; otherwise an upper limit."""
    detail: str = ""
    """The range of the rounds, or what else belongs to the value."""

    @property
    def is_met(self) -> bool:
        return self.value >= self.target if self.at_least else self.value <= self.target


def evaluate_goals(results: Results, fovea_name: str) -> list[Goal]:
    """Return the goals for which there are measurements."""
    goals: list[Goal] = []
    for workload in dict.fromkeys(cell.workload for cell in results.closed):
        cells = [cell for cell in results.closed if cell.workload == workload]
        goals += _evaluate_workload(workload, cells, fovea_name)
        if workload == "photographs":
            goals += _evaluate_int8(results, cells, fovea_name)
    goals += _evaluate_front(results)
    for workload in dict.fromkeys(cell.workload for cell in results.probes):
        p99 = median_or_nan(cell.p99 for cell in results.probes if cell.workload == workload)
        goals.append(
            Goal(workload, "p99 of /health/live under load, ms", 1e3 * p99, 1e3 * MAX_PROBE_SECONDS, False)
        )
    for rest in results.rests:
        memory, start = median_or_nan(rest.proportional_bytes), median_or_nan(rest.start_seconds)
        goals.append(Goal("at rest", "PSS of all processes, MB", memory / 1e6, MAX_REST_BYTES / 1e6, False))
        goals.append(Goal("at rest", "cold start, s", start, MAX_START_SECONDS, False))
    return [goal for goal in goals if not math.isnan(goal.value)]


def list_variants(cells: Sequence[ClosedLoopCell], fovea_name: str) -> list[str]:
    """Return the names of a version's contestants, one for each pixel path."""
    names = dict.fromkeys(cell.name for cell in cells)
    return [name for name in names if name == fovea_name or name.startswith(f"{fovea_name}, ")]


def _evaluate_workload(workload: str, cells: Sequence[ClosedLoopCell], fovea_name: str) -> Iterator[Goal]:
    all_connections = sorted({cell.connections for cell in cells})
    for name in list_variants(cells, fovea_name):
        for connections in LOADED if workload in SMALL_WORKLOADS else all_connections:
            best_peer = find_best_peer(cells, connections)
            if best_peer is not None and workload in MIN_PEER_RATIO:
                ratio = compute_ratio(cells, name, best_peer, connections)
                title = f"{name} / {best_peer}, {name_connections(connections)}"
                yield Goal(workload, title, ratio.median, MIN_PEER_RATIO[workload], True, str(ratio))
        if workload in SMALL_WORKLOADS:
            ratio = compute_ratio(cells, name, "tutorial", 1)
            title = f"{name} / tutorial, {name_connections(1)}"
            yield Goal(workload, title, ratio.median, MIN_SINGLE_RATIO, True, str(ratio))
            ratio = compute_ratio(cells, name, "alone", 1, lambda cell: cell.p50)
            title = f"{name}, p50 / one call in process, {name_connections(1)}"
            yield Goal(workload, title, ratio.median, MAX_CALL_RATIO, False, str(ratio))


def _evaluate_int8(results: Results, cells: Sequence[ClosedLoopCell], fovea_name: str) -> Iterator[Goal]:
    shares = [one.share for one in results.checks if (one.workload, one.name) == ("photographs", INT8)]
    for connections in sorted({cell.connections for cell in select_cells(cells, INT8)}):
        ratio = compute_ratio(cells, INT8, fovea_name, connections)
        yield Goal(
            "photographs",
            f"{INT8} / {fovea_name}, {name_connections(connections)}",
            ratio.median,
            MIN_INT8_RATIO,
            True,
            f"{ratio}; {median_or_nan(shares):.1%} of the labels are those of the bare loop",
        )


def _evaluate_front(results: Results) -> Iterator[Goal]:
    for connections in dict.fromkeys(cell.connections for cell in results.fronts):
        cells = [cell for cell in results.fronts if cell.connections == connections]
        ratio = Ratio("minimal", tuple(cell.ratio for cell in cells))
        title = f"front's processor time / minimal server's, {name_connections(connections)}"
        yield Goal(cells[0].workload, title, ratio.median, MAX_FRONT_RATIO, False, str(ratio))


def name_connections(connections: int) -> str:
    """Return the number with its noun."""
    return f"{connections} connection" + ("" if connections == 1 else "s")

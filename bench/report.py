"""Results as Markdown tables: medians of the rounds, and ratios within a round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fovea.bench.cells import DISTURBANCE_LIMIT, ClosedLoopCell, OpenLoopCell

_NAN = math.nan


@dataclass(frozen=True)
class Goal:
    """One of the project's goals with the result of this run."""

    workload: str
    description: str
    value: float
    target: float
    at_least: bool
    """Flag for a lower limit; otherwise an upper limit."""

    @property
    def is_met(self) -> bool:
        return self.value >= self.target if self.at_least else self.value <= self.target


def show_results(
    closed_cells: Sequence[ClosedLoopCell], open_cells: Sequence[OpenLoopCell], fovea_name: str
) -> None:
    """Print all tables; the goals are those of the contestant `fovea_name`."""
    closed_cells = drop_disturbed(closed_cells)
    for workload in dict.fromkeys(cell.workload for cell in closed_cells):
        print(f"\n## {workload}, closed loop\n")
        print(_format_closed_table([cell for cell in closed_cells if cell.workload == workload], fovea_name))
        if workload_cells := [cell for cell in open_cells if cell.workload == workload]:
            print(f"\n## {workload}, open loop\n")
            print(_format_open_table(workload_cells))
    if reached_goals := evaluate_goals(closed_cells, open_cells, fovea_name):
        print("\n## Goals\n")
        print(_format_goal_table(reached_goals))


# --- closed loop ---------------------------------------------------------------------------------


def _format_closed_table(cells: Sequence[ClosedLoopCell], fovea_name: str) -> str:
    head = ["", "conn.", "images/s", "of bare", f"of {fovea_name}", "p50 ms", "p99 ms", "p99/p50",
            "p50/alone", "CPUs", "others", "MB", "refused", "errors"]  # fmt: skip
    rows = [
        _format_closed_row(cells, name, connections, fovea_name)
        for name in dict.fromkeys(cell.name for cell in cells)
        for connections in sorted({cell.connections for cell in cells if cell.name == name})
    ]
    return format_markdown([head, *rows])


def _format_closed_row(
    cells: Sequence[ClosedLoopCell], name: str, connections: int, fovea_name: str
) -> list[str]:
    own_cells = _select_cells(cells, name, connections)
    single_ratio = (
        _median_ratio(cells, own_cells, "alone", lambda cell: cell.p50) if connections == 1 else _NAN
    )
    return [
        name,
        f"{connections}",
        _format_number(_median_or_nan(cell.rate for cell in own_cells), 1),
        _format_number(_median_ratio(cells, own_cells, "bare", lambda cell: cell.rate), 3),
        _format_number(_median_ratio(cells, own_cells, fovea_name, lambda cell: cell.rate), 3),
        _format_number(1e3 * _median_or_nan(cell.p50 for cell in own_cells), 2),
        _format_number(1e3 * _median_or_nan(cell.p99 for cell in own_cells), 2),
        _format_number(_median_or_nan(cell.p99 / cell.p50 for cell in own_cells), 2),
        _format_number(single_ratio, 2),
        _format_number(_median_or_nan(cell.cpu_seconds / cell.seconds for cell in own_cells), 2),
        _format_number(max(cell.others for cell in own_cells), 2),
        _format_number(_median_or_nan(cell.resident_bytes for cell in own_cells) / 1e6, 0),
        f"{sum(cell.refusals for cell in own_cells)}",
        f"{sum(cell.errors for cell in own_cells)}",
    ]


def drop_disturbed(cells: Sequence[ClosedLoopCell]) -> list[ClosedLoopCell]:
    """Return the cells without disturbed measurements that also have an undisturbed counterpart."""

    def cell_key(cell: ClosedLoopCell) -> tuple[str, str, int]:
        return cell.workload, cell.name, cell.connections

    undisturbed_keys = {cell_key(cell) for cell in cells if cell.others < DISTURBANCE_LIMIT}
    return [
        cell for cell in cells if cell.others < DISTURBANCE_LIMIT or cell_key(cell) not in undisturbed_keys
    ]


def ratio_to_bare(cells: Sequence[ClosedLoopCell], name: str, connections: int) -> float:
    """Return the images per second over those of the bare loop, for one workload's cells."""
    return _median_ratio(cells, _select_cells(cells, name, connections), "bare", lambda cell: cell.rate)


def tail_ratio(cells: Sequence[ClosedLoopCell], name: str, connections: int) -> float:
    """Return the 99th percentile of the latencies over their median, for one workload's cells."""
    return _median_or_nan(cell.p99 / cell.p50 for cell in _select_cells(cells, name, connections))


def _select_cells(
    cells: Sequence[ClosedLoopCell], name: str, connections: int | None = None
) -> list[ClosedLoopCell]:
    return [cell for cell in cells if cell.name == name and connections in (None, cell.connections)]


def _median_ratio(
    cells: Sequence[ClosedLoopCell],
    own_cells: Sequence[ClosedLoopCell],
    other_name: str,
    value: Callable[[ClosedLoopCell], float],
) -> float:
    """Return the median over the rounds of a value divided by that of `other_name`.

    Both values are from the same round and load. A loop that is measured once per round is compared with all
    loads of that round. If no round has both, the result is the ratio of the medians.
    """
    other_cells = _select_cells(cells, other_name)
    other_cells = [
        one for one in other_cells if one.connections in {cell.connections for cell in own_cells}
    ] or other_cells
    by_round = {one.round: one for one in other_cells}
    ratios = [value(cell) / value(by_round[cell.round]) for cell in own_cells if cell.round in by_round]
    return (
        _median_or_nan(ratios)
        if ratios
        else _median_or_nan(map(value, own_cells)) / _median_or_nan(map(value, other_cells))
    )


# --- open loop -----------------------------------------------------------------------------------


def _format_open_table(cells: Sequence[OpenLoopCell]) -> str:
    head = ["", "offered", "capacity/s", "in time/s", "of capacity", "within s", "p50 ms", "p99 ms",
            "503 p50 ms", "503 p99 ms", "Retry-After", "answers", "errors", "queued", "late"]  # fmt: skip
    return format_markdown([head, *(_format_open_row(cell) for cell in cells)])


def _format_open_row(cell: OpenLoopCell) -> list[str]:
    return [
        cell.name,
        f"{cell.share:.0%}",
        _format_number(cell.capacity, 1),
        _format_number(cell.in_time, 1),
        _format_number(cell.in_time / cell.capacity, 3),
        _format_number(cell.deadline, 2),
        _format_number(1e3 * cell.p50, 2),
        _format_number(1e3 * cell.p99, 2),
        _format_number(1e3 * cell.refusal_p50, 2),
        _format_number(1e3 * cell.refusal_p99, 2),
        "" if cell.retry_after is None else "{} … {} s".format(*cell.retry_after),
        ", ".join(f"{count} x {status}" for status, count in sorted(cell.statuses.items())),
        ", ".join(f"{count} x {reason}" for reason, count in cell.errors.items()),
        f"{cell.queued_requests}",
        f"{cell.late_requests}",
    ]


# --- goals ---------------------------------------------------------------------------------------

_WORKLOADS = ("thumbnails", "photographs", "phone")
_MIN_THROUGHPUT = {32: (0.90, 1.05, 4.0), 8: (0.85, 1.00, 4.0)}
_MAX_SINGLE_RATIO = (1.6, 1.15, 0.3)
_MAX_TAIL_RATIO = 2.0
_MIN_OVERLOAD_SHARE = 0.90
_MAX_REFUSAL_SECONDS = 0.015
_MIN_MOSEC_RATIO = {"thumbnails": 1.1, "photographs": 1.1}


def evaluate_goals(
    closed_cells: Sequence[ClosedLoopCell], open_cells: Sequence[OpenLoopCell], fovea_name: str
) -> list[Goal]:
    """Return the goals for which this run has data."""
    closed_cells = drop_disturbed(closed_cells)
    goals: list[Goal] = []
    for column, workload in enumerate(_WORKLOADS):
        cells = [cell for cell in closed_cells if cell.workload == workload]

        def add_goal(
            description: str, value: float, target: float, at_least: bool, workload: str = workload
        ) -> None:
            if not math.isnan(value):
                goals.append(Goal(workload, description, value, target, at_least))

        for connections, targets in _MIN_THROUGHPUT.items():
            ratio = _median_ratio(
                cells, _select_cells(cells, fovea_name, connections), "bare", lambda cell: cell.rate
            )
            add_goal(f"throughput over bare, {connections} connections", ratio, targets[column], True)
        single_ratio = _median_ratio(
            cells, _select_cells(cells, fovea_name, 1), "alone", lambda cell: cell.p50
        )
        add_goal("p50 over one call alone, 1 connection", single_ratio, _MAX_SINGLE_RATIO[column], False)
        tail_latency = _median_or_nan(cell.p99 / cell.p50 for cell in _select_cells(cells, fovea_name, 32))
        add_goal("p99 / p50, 32 connections", tail_latency, _MAX_TAIL_RATIO, False)
        overload_cells = [
            c for c in open_cells if (c.workload, c.name) == (workload, fovea_name) and c.share > 1
        ]
        in_time = _median_or_nan(cell.in_time / cell.capacity for cell in overload_cells)
        add_goal("answered in time over capacity, at 300 %", in_time, _MIN_OVERLOAD_SHARE, True)
        refusal_p99 = _median_or_nan(cell.refusal_p99 for cell in overload_cells)
        add_goal("p99 of refusals at 300 %, in ms", 1e3 * refusal_p99, 1e3 * _MAX_REFUSAL_SECONDS, False)
        for connections in sorted({cell.connections for cell in cells}):
            ratio = _median_ratio(
                cells, _select_cells(cells, fovea_name, connections), "mosec", lambda cell: cell.rate
            )
            if workload in _MIN_MOSEC_RATIO:
                add_goal(
                    f"throughput over mosec, {connections} connections",
                    ratio,
                    _MIN_MOSEC_RATIO[workload],
                    True,
                )
    return goals


def _format_goal_table(goals: Iterable[Goal]) -> str:
    head = ["", "goal", "measured", "target", ""]
    return format_markdown(
        [
            head,
            *(
                [
                    goal.workload,
                    goal.description,
                    f"{goal.value:.2f}",
                    f"{'≥' if goal.at_least else '≤'} {goal.target:g}",
                    "met" if goal.is_met else "NOT MET",
                ]
                for goal in goals
            ),
        ]
    )


# --- text ----------------------------------------------------------------------------------------


def format_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table with the first row as its head and aligned columns, readable as text too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], _format_rule(widths), *lines[1:]])


def _format_rule(widths: Sequence[int]) -> str:
    first, *others = widths
    return "|".join(["", "-" * (first + 2), *("-" * (width + 1) + ":" for width in others), ""])


def _format_number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _median_or_nan(values: Iterable[float]) -> float:
    numbers = list(values)
    return statistics.median(numbers) if numbers else _NAN

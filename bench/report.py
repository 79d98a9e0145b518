"""Results as Markdown tables: medians of the rounds, and ratios within a round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fovea.bench.cells import DISTURBED, Closed, Open

_NAN = math.nan


@dataclass(frozen=True)
class Goal:
    """One of the project's goals with the result of this run."""

    workload: str
    what: str
    measured: float
    wanted: float
    at_least: bool
    """Flag for a lower limit; otherwise an upper limit."""

    @property
    def met(self) -> bool:
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted


def show(closed: Sequence[Closed], opened: Sequence[Open], fovea: str) -> None:
    """Print all tables; the goals are those of the contestant `fovea`."""
    closed = calm(closed)
    for workload in dict.fromkeys(cell.workload for cell in closed):
        print(f"\n## {workload}, closed loop\n")
        print(_closed_table([cell for cell in closed if cell.workload == workload], fovea))
        if mine := [cell for cell in opened if cell.workload == workload]:
            print(f"\n## {workload}, open loop\n")
            print(_open_table(mine))
    if found := goals(closed, opened, fovea):
        print("\n## Goals\n")
        print(_goal_table(found))


# --- closed loop ---------------------------------------------------------------------------------


def _closed_table(cells: Sequence[Closed], fovea: str) -> str:
    head = ["", "conn.", "images/s", "of bare", f"of {fovea}", "p50 ms", "p99 ms", "p99/p50", "p50/alone",
            "CPUs", "others", "MB", "refused", "errors"]  # fmt: skip
    rows = [
        _closed_row(cells, name, connections, fovea)
        for name in dict.fromkeys(cell.name for cell in cells)
        for connections in sorted({cell.connections for cell in cells if cell.name == name})
    ]
    return markdown([head, *rows])


def _closed_row(cells: Sequence[Closed], name: str, connections: int, fovea: str) -> list[str]:
    mine = _of(cells, name, connections)
    alone = _over(cells, mine, "alone", lambda cell: cell.p50) if connections == 1 else _NAN
    return [
        name,
        f"{connections}",
        _number(_median(cell.rate for cell in mine), 1),
        _number(_over(cells, mine, "bare", lambda cell: cell.rate), 3),
        _number(_over(cells, mine, fovea, lambda cell: cell.rate), 3),
        _number(1e3 * _median(cell.p50 for cell in mine), 2),
        _number(1e3 * _median(cell.p99 for cell in mine), 2),
        _number(_median(cell.p99 / cell.p50 for cell in mine), 2),
        _number(alone, 2),
        _number(_median(cell.cpu_seconds / cell.seconds for cell in mine), 2),
        _number(max(cell.others for cell in mine), 2),
        _number(_median(cell.resident_bytes for cell in mine) / 1e6, 0),
        f"{sum(cell.refused for cell in mine)}",
        f"{sum(cell.errors for cell in mine)}",
    ]


def calm(cells: Sequence[Closed]) -> list[Closed]:
    """Return the cells without disturbed measurements that also have an undisturbed counterpart."""

    def key(cell: Closed) -> tuple[str, str, int]:
        return cell.workload, cell.name, cell.connections

    undisturbed = {key(cell) for cell in cells if cell.others < DISTURBED}
    return [cell for cell in cells if cell.others < DISTURBED or key(cell) not in undisturbed]


def ratio_to_bare(cells: Sequence[Closed], name: str, connections: int) -> float:
    """Return the images per second over those of the bare loop, for one workload's cells."""
    return _over(cells, _of(cells, name, connections), "bare", lambda cell: cell.rate)


def tail(cells: Sequence[Closed], name: str, connections: int) -> float:
    """Return the 99th percentile of the latencies over their median, for one workload's cells."""
    return _median(cell.p99 / cell.p50 for cell in _of(cells, name, connections))


def _of(cells: Sequence[Closed], name: str, connections: int | None = None) -> list[Closed]:
    return [cell for cell in cells if cell.name == name and connections in (None, cell.connections)]


def _over(
    cells: Sequence[Closed], mine: Sequence[Closed], other: str, value: Callable[[Closed], float]
) -> float:
    """Return the median over the rounds of a value divided by that of `other`.

    Both values are from the same round and load. A loop that is measured once per round is compared with all
    loads of that round. If no round has both, the result is the ratio of the medians.
    """
    theirs = _of(cells, other)
    theirs = [one for one in theirs if one.connections in {cell.connections for cell in mine}] or theirs
    by_round = {one.round: one for one in theirs}
    ratios = [value(cell) / value(by_round[cell.round]) for cell in mine if cell.round in by_round]
    return _median(ratios) if ratios else _median(map(value, mine)) / _median(map(value, theirs))


# --- open loop -----------------------------------------------------------------------------------


def _open_table(cells: Sequence[Open]) -> str:
    head = ["", "offered", "capacity/s", "in time/s", "of capacity", "within s", "p50 ms", "p99 ms",
            "503 p50 ms", "503 p99 ms", "Retry-After", "answers", "errors", "held", "late"]  # fmt: skip
    return markdown([head, *(_open_row(cell) for cell in cells)])


def _open_row(cell: Open) -> list[str]:
    return [
        cell.name,
        f"{cell.share:.0%}",
        _number(cell.capacity, 1),
        _number(cell.in_time, 1),
        _number(cell.in_time / cell.capacity, 3),
        _number(cell.deadline, 2),
        _number(1e3 * cell.p50, 2),
        _number(1e3 * cell.p99, 2),
        _number(1e3 * cell.refusal_p50, 2),
        _number(1e3 * cell.refusal_p99, 2),
        "" if cell.retry_after is None else "{} … {} s".format(*cell.retry_after),
        ", ".join(f"{count} x {status}" for status, count in sorted(cell.statuses.items())),
        ", ".join(f"{count} x {reason}" for reason, count in cell.errors.items()),
        f"{cell.held}",
        f"{cell.late}",
    ]


# --- goals ---------------------------------------------------------------------------------------

_WORKLOADS = ("thumbnails", "photographs", "phone")
_THROUGHPUT = {32: (0.90, 1.05, 4.0), 8: (0.85, 1.00, 4.0)}
_ALONE = (1.6, 1.15, 0.3)
_TAIL = 2.0
_OVERLOAD = 0.90
_REFUSAL_SECONDS = 0.015
_OVER_MOSEC = {"thumbnails": 1.1, "photographs": 1.1}


def goals(closed: Sequence[Closed], opened: Sequence[Open], fovea: str) -> list[Goal]:
    """Return the goals for which this run has data."""
    closed = calm(closed)
    found: list[Goal] = []
    for column, workload in enumerate(_WORKLOADS):
        cells = [cell for cell in closed if cell.workload == workload]

        def add(what: str, measured: float, wanted: float, at_least: bool, workload: str = workload) -> None:
            if not math.isnan(measured):
                found.append(Goal(workload, what, measured, wanted, at_least))

        for connections, wanted in _THROUGHPUT.items():
            ratio = _over(cells, _of(cells, fovea, connections), "bare", lambda cell: cell.rate)
            add(f"throughput over bare, {connections} connections", ratio, wanted[column], True)
        alone = _over(cells, _of(cells, fovea, 1), "alone", lambda cell: cell.p50)
        add("p50 over one call alone, 1 connection", alone, _ALONE[column], False)
        tail = _median(cell.p99 / cell.p50 for cell in _of(cells, fovea, 32))
        add("p99 / p50, 32 connections", tail, _TAIL, False)
        overload = [c for c in opened if (c.workload, c.name) == (workload, fovea) and c.share > 1]
        in_time = _median(cell.in_time / cell.capacity for cell in overload)
        add("answered in time over capacity, at 300 %", in_time, _OVERLOAD, True)
        refused = _median(cell.refusal_p99 for cell in overload)
        add("p99 of refusals at 300 %, in ms", 1e3 * refused, 1e3 * _REFUSAL_SECONDS, False)
        for connections in sorted({cell.connections for cell in cells}):
            ratio = _over(cells, _of(cells, fovea, connections), "mosec", lambda cell: cell.rate)
            if workload in _OVER_MOSEC:
                add(f"throughput over mosec, {connections} connections", ratio, _OVER_MOSEC[workload], True)
    return found


def _goal_table(found: Iterable[Goal]) -> str:
    head = ["", "goal", "measured", "wanted", ""]
    return markdown(
        [
            head,
            *(
                [
                    goal.workload,
                    goal.what,
                    f"{goal.measured:.2f}",
                    f"{'≥' if goal.at_least else '≤'} {goal.wanted:g}",
                    "met" if goal.met else "NOT MET",
                ]
                for goal in found
            ),
        ]
    )


# --- text ----------------------------------------------------------------------------------------


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table with the first row as its head and aligned columns, readable as text too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], _rule(widths), *lines[1:]])


def _rule(widths: Sequence[int]) -> str:
    first, *others = widths
    return "|".join(["", "-" * (first + 2), *("-" * (width + 1) + ":" for width in others), ""])


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else _NAN

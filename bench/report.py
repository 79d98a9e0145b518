"""Results as Markdown tables: medians of the rounds, and ratios within a round."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from fovea.bench.cells import DISTURBANCE_LIMIT, ClosedLoopCell, FrontCell, OpenLoopCell
from fovea.bench.contestants import LOOPS
from fovea.bench.goals import Goal, evaluate_goals, list_variants
from fovea.bench.ratios import Ratio, compute_ratio, find_best_peer, median_or_nan, select_cells
from fovea.bench.results import Results


def show_results(results: Results, fovea_name: str) -> None:
    """Print all tables; ratios and goals are those of the contestant `fovea_name`."""
    for workload in dict.fromkeys(cell.workload for cell in results.closed):
        cells = [cell for cell in results.closed if cell.workload == workload]
        print(f"\n## {workload}, closed loop\n")
        print(_format_closed_table(drop_disturbed(cells)))
        print(f"\n## {workload}, ratios: median of the rounds (lowest to highest)\n")
        print(_format_ratio_table(cells, fovea_name))
        if workload_cells := [cell for cell in results.open if cell.workload == workload]:
            print(f"\n## {workload}, open loop\n")
            print(_format_open_table(workload_cells))
    if results.searches:
        print("\n## Configurations\n")
        print(_format_searches(results))
    if results.fronts:
        print("\n## Processor time of the front process for each request, µs\n")
        print(_format_front_table(results.fronts))
        print(_FRONT_NOTE)
    if goals := evaluate_goals(results, fovea_name):
        print("\n## Goals\n")
        print(_format_goal_table(goals))
    print(f"\n## Where {fovea_name} is slower\n")
    print("\n".join(list_losses(results, fovea_name)) or "Nowhere in this run.")
    print("\n" + "\n".join(f"Processor: {one}." for one in results.environments))
    if results.drawn_workloads:
        workloads = ", ".join(results.drawn_workloads)
        print(f"Drawn pictures took the place of missing test data in: {workloads}.")


# --- closed loop ---------------------------------------------------------------------------------


def _format_closed_table(cells: Sequence[ClosedLoopCell]) -> str:
    head = ["", "conn.", "images/s", "p50 ms", "p99 ms", "p99/p50", "CPUs", "others", "MB", "refused",
            "errors"]  # fmt: skip
    rows = [
        _format_closed_row(select_cells(cells, name, connections))
        for name in dict.fromkeys(cell.name for cell in cells)
        for connections in sorted({cell.connections for cell in cells if cell.name == name})
    ]
    return format_markdown([head, *rows])


def _format_closed_row(cells: Sequence[ClosedLoopCell]) -> list[str]:
    return [
        cells[0].name,
        f"{cells[0].connections}",
        _format_number(median_or_nan(cell.rate for cell in cells), 1),
        _format_number(1e3 * median_or_nan(cell.p50 for cell in cells), 2),
        _format_number(1e3 * median_or_nan(cell.p99 for cell in cells), 2),
        _format_number(median_or_nan(cell.p99 / cell.p50 for cell in cells if cell.p50), 2),
        _format_number(median_or_nan(cell.cpu_seconds / cell.seconds for cell in cells), 2),
        _format_number(max(cell.others for cell in cells), 2),
        _format_number(median_or_nan(cell.resident_bytes for cell in cells) / 1e6, 0),
        f"{sum(cell.refusals for cell in cells)}",
        f"{sum(cell.errors for cell in cells)}",
    ]


def drop_disturbed(cells: Sequence[ClosedLoopCell]) -> list[ClosedLoopCell]:
    """Return the cells without disturbed measurements that also have an undisturbed counterpart."""

    def cell_key(cell: ClosedLoopCell) -> tuple[str, str, int]:
        return cell.workload, cell.name, cell.connections

    undisturbed_keys = {cell_key(cell) for cell in cells if cell.others < DISTURBANCE_LIMIT}
    return [
        cell for cell in cells if cell.others < DISTURBANCE_LIMIT or cell_key(cell) not in undisturbed_keys
    ]


# --- ratios --------------------------------------------------------------------------------------


def _format_ratio_table(cells: Sequence[ClosedLoopCell], fovea_name: str) -> str:
    all_connections = sorted({cell.connections for cell in cells})
    names = [*list_variants(cells, fovea_name)]
    names += [name for name in dict.fromkeys(cell.name for cell in cells) if name not in (*names, *LOOPS)]
    head = ["", "conn.", "of the best peer", "", "of the tutorial", "of the bare loop", f"of {fovea_name}"]
    rows = [
        _format_ratio_row(cells, name, connections, fovea_name)
        for name in names
        for connections in all_connections
    ]
    return format_markdown([head, *rows])


def _format_ratio_row(
    cells: Sequence[ClosedLoopCell], name: str, connections: int, fovea_name: str
) -> list[str]:
    best_peer = find_best_peer(cells, connections)
    to_best = compute_ratio(cells, name, best_peer, connections) if best_peer else Ratio("", ())
    return [
        name,
        f"{connections}",
        str(to_best),
        to_best.other,
        *(str(compute_ratio(cells, name, other, connections)) for other in ("tutorial", "bare", fovea_name)),
    ]


def list_losses(results: Results, fovea_name: str) -> Iterator[str]:
    """Yield a sentence for each load at which a variant of `fovea_name` is slower than the best peer."""
    for workload in dict.fromkeys(cell.workload for cell in results.closed):
        cells = [cell for cell in results.closed if cell.workload == workload]
        for name in list_variants(cells, fovea_name):
            for connections in sorted({cell.connections for cell in select_cells(cells, name)}):
                best_peer = find_best_peer(cells, connections)
                if best_peer is None:
                    continue
                ratio = compute_ratio(cells, name, best_peer, connections)
                if ratio.median < 1:
                    yield (
                        f"* {workload}, {connections} connections: {name} serves {ratio} times as many "
                        f"images as {best_peer}."
                    )


# --- configurations and the front ----------------------------------------------------------------


def _format_searches(results: Results) -> str:
    head = ["", "peer", "conn.", "fastest configuration", "images/s", "of"]
    return format_markdown(
        [
            head,
            *(
                [
                    one.workload,
                    one.peer,
                    f"{one.connections}",
                    str(one.winner),
                    _format_number(median_or_nan(one.rates[str(one.winner)]), 1),
                    f"{len(one.rates)}",
                ]
                for one in results.searches
            ),
        ]
    )


def _format_front_table(cells: Sequence[FrontCell]) -> str:
    head = [
        "",
        "conn.",
        "requests/s",
        "Fovea's front",
        "minimal, same rate",
        "minimal, at its limit",
        "ratio",
    ]
    rows = []
    for connections in dict.fromkeys(cell.connections for cell in cells):
        own_cells = [cell for cell in cells if cell.connections == connections]
        rows.append(
            [
                own_cells[0].name,
                f"{connections}",
                _format_number(median_or_nan(cell.rate for cell in own_cells), 0),
                _format_number(1e6 * median_or_nan(cell.fovea for cell in own_cells), 0),
                _format_number(1e6 * median_or_nan(cell.minimal for cell in own_cells), 0),
                _format_number(1e6 * median_or_nan(cell.minimal_at_its_limit for cell in own_cells), 0),
                str(Ratio("", tuple(cell.ratio for cell in own_cells))),
            ]
        )
    return format_markdown([head, *rows])


_FRONT_NOTE = """
The ratio is to the minimal server at the rate of requests that Fovea answers, in open loop, because both are
then woken by single requests. At its limit the minimal server finds many requests at each wake-up."""


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


def _format_goal_table(goals: Iterable[Goal]) -> str:
    head = ["", "goal", "measured", "target", "", "rounds"]
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
                    goal.detail,
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

"""Pictures of measurements: throughput over the bare loop, tail latency, and memory over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from fovea.bench.bulk import BulkResult
from fovea.bench.cells import ClosedLoopCell
from fovea.bench.contestants import LOOPS
from fovea.bench.ratios import compute_ratio, tail_ratio
from fovea.bench.soak_result import MAX_GROWTH, SoakResult

COLOURS = ("#5b8def", "#e07a5f", "#3d9970", "#8e6bbf", "#c9a227", "#7a7a7a")


def draw_throughput(cells: Sequence[ClosedLoopCell], path: Path) -> None:
    """Draw a column for each workload, with throughput above and p99 over p50 below."""
    contestant_names = [name for name in dict.fromkeys(cell.name for cell in cells) if name not in LOOPS]
    workloads = list(dict.fromkeys(cell.workload for cell in cells))
    figure, axes = pyplot.subplots(
        2, len(workloads), figsize=(4.4 * len(workloads), 6), squeeze=False, layout="constrained"
    )
    for column, workload in enumerate(workloads):
        workload_cells = [cell for cell in cells if cell.workload == workload]
        names = [name for name in contestant_names if any(cell.name == name for cell in workload_cells)]
        connections = sorted({cell.connections for cell in workload_cells})
        for row, (value, line) in enumerate(((_ratio_to_bare, 1.0), (tail_ratio, 2.0))):
            axis = axes[row][column]
            width = 0.8 / max(1, len(names))
            for index, name in enumerate(names):
                axis.bar(
                    [place + (index - (len(names) - 1) / 2) * width for place in range(len(connections))],
                    [value(workload_cells, name, count) for count in connections],
                    width,
                    label=name,
                    color=COLOURS[contestant_names.index(name) % len(COLOURS)],
                )
            axis.axhline(line, color="#444", linewidth=0.8)
            axis.set_xticks(range(len(connections)), [str(count) for count in connections])
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][column].set_title(workload)
        axes[1][column].set_xlabel("connections")
    axes[0][0].set_ylabel("images/s, of the bare loop")
    axes[1][0].set_ylabel("p99 / p50")
    figure.legend(
        *_legend_entries(figure), loc="outside lower center", ncols=len(contestant_names), frameon=False
    )
    figure.savefig(path)
    pyplot.close(figure)


def _ratio_to_bare(cells: Sequence[ClosedLoopCell], name: str, connections: int) -> float:
    return compute_ratio(cells, name, "bare", connections).median


def _legend_entries(figure: Figure) -> tuple[list[Any], list[str]]:
    """Return the entries of the legend, each name once."""
    handles = {
        label: handle
        for axis in figure.axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    return list(handles.values()), list(handles)


def draw_memory(soak: SoakResult, path: Path) -> None:
    """Draw a soak: memory over time, at rest after each tenth of the requests, and its limit."""
    figure, axis = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    seconds, memory = zip(*soak.curve, strict=True)
    axis.plot(seconds, [one / 1e6 for one in memory], color=COLOURS[0], linewidth=0.8, label="under load")
    rests = soak.idle_samples[1:]
    axis.plot(
        [rest.seconds for rest in rests],
        [rest.resident_bytes / 1e6 for rest in rests],
        "o-",
        color=COLOURS[1],
        label="at rest",
    )
    limit = rests[0].resident_bytes * (1 + MAX_GROWTH) / 1e6
    axis.axhline(limit, color="#444", linewidth=0.8, label=f"{MAX_GROWTH:.0%} above the first rest")
    axis.set_ylim(bottom=0)
    axis.set_xlabel(f"seconds; {rests[-1].requests:,} requests\n{soak.machine}", fontsize="small")
    axis.set_ylabel("service and runners, MB")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)


def draw_bulk_memory(result: BulkResult, machine: str, path: Path) -> None:
    """Draw the memory of a run of bulk classification over time."""
    figure, axis = pyplot.subplots(figsize=(8, 3), layout="constrained")
    seconds, memory = zip(*result.curve, strict=True)
    axis.plot(seconds, [one / 1e6 for one in memory], color=COLOURS[0], linewidth=0.9)
    axis.set_ylim(bottom=0)
    axis.set_xlabel(f"seconds; {result.images:,} {result.workload}\n{machine}", fontsize="small")
    axis.set_ylabel("memory, MB")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    pyplot.close(figure)

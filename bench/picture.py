"""Pictures of measurements: throughput over the bare loop, tail latency, and memory over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from fovea.bench.cells import Closed
from fovea.bench.report import ratio_to_bare, tail
from fovea.bench.soak import GROWTH, Soak

COLOURS = ("#5b8def", "#e07a5f", "#3d9970", "#8e6bbf", "#c9a227")


def draw(cells: Sequence[Closed], path: Path) -> None:
    """Draw a column for each workload, with throughput above and p99 over p50 below."""
    everybody = [name for name in dict.fromkeys(cell.name for cell in cells) if name not in _LOOPS]
    workloads = list(dict.fromkeys(cell.workload for cell in cells))
    figure, axes = pyplot.subplots(
        2, len(workloads), figsize=(4.4 * len(workloads), 6), squeeze=False, layout="constrained"
    )
    for column, workload in enumerate(workloads):
        mine = [cell for cell in cells if cell.workload == workload]
        names = [name for name in everybody if any(cell.name == name for cell in mine)]
        connections = sorted({cell.connections for cell in mine})
        for row, (value, line) in enumerate(((ratio_to_bare, 1.0), (tail, 2.0))):
            axis = axes[row][column]
            width = 0.8 / max(1, len(names))
            for index, name in enumerate(names):
                axis.bar(
                    [place + (index - (len(names) - 1) / 2) * width for place in range(len(connections))],
                    [value(mine, name, count) for count in connections],
                    width,
                    label=name,
                    color=COLOURS[everybody.index(name) % len(COLOURS)],
                )
            axis.axhline(line, color="#444", linewidth=0.8)
            axis.set_xticks(range(len(connections)), [str(count) for count in connections])
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][column].set_title(workload)
        axes[1][column].set_xlabel("connections")
    axes[0][0].set_ylabel("images/s, of the bare loop")
    axes[1][0].set_ylabel("p99 / p50")
    figure.legend(*_named(figure), loc="outside lower center", ncols=len(everybody), frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def _named(figure: Figure) -> tuple[list[Any], list[str]]:
    """Return the entries of the legend, each name once."""
    found = {
        label: handle
        for axis in figure.axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    return list(found.values()), list(found)


def draw_memory(measured: Soak, path: Path) -> None:
    """Draw a soak: memory over time, at rest after each tenth of the requests, and its limit."""
    figure, axis = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    seconds, memory = zip(*measured.curve, strict=True)
    axis.plot(seconds, [one / 1e6 for one in memory], color=COLOURS[0], linewidth=0.8, label="under load")
    rests = measured.rests[1:]
    axis.plot(
        [rest.seconds for rest in rests],
        [rest.resident_bytes / 1e6 for rest in rests],
        "o-",
        color=COLOURS[1],
        label="at rest",
    )
    limit = rests[0].resident_bytes * (1 + GROWTH) / 1e6
    axis.axhline(limit, color="#444", linewidth=0.8, label=f"{GROWTH:.0%} above the first rest")
    axis.set_ylim(bottom=0)
    axis.set_xlabel(f"seconds; {rests[-1].requests:,} requests\n{measured.machine}", fontsize="small")
    axis.set_ylabel("service and runners, MB")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)


_LOOPS = ("bare", "bare, our way", "alone")

"""The `make bench` command: every contestant on every workload, alternating, as ratios to the bare loop."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from fovea.bench import contestants
from fovea.bench.cells import (
    DISTURBANCE_LIMIT,
    ClosedLoopCell,
    OpenLoopCell,
    measure_closed,
    measure_loop,
    measure_open,
    measure_undisturbed,
    warm_up_server,
)
from fovea.bench.contestants import FoveaVersion, Server
from fovea.bench.report import evaluate_goals, show_results
from fovea.bench.workloads import CACHE, WORKLOADS, BenchError, Workload


def main() -> int:
    """Measure as the command line asks, print tables, write JSON and a picture."""
    options = _parse_arguments()
    # exit through `finally`, so that no child process keeps running
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    fovea_name = (options.fovea or [FoveaVersion()])[0].name
    closed_cells: list[ClosedLoopCell] = []
    open_cells: list[OpenLoopCell] = []
    try:
        for path in options.show:
            _read_cells(path, closed_cells, open_cells)
        for name in [] if options.show else options.workloads:
            _measure_workload(WORKLOADS[name], options, closed_cells, open_cells)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    finally:
        if closed_cells:
            _write_results(options.out, closed_cells, open_cells, fovea_name)
    show_results(closed_cells, open_cells, fovea_name)
    drawn_workloads = [
        name for name in ([] if options.show else options.workloads) if WORKLOADS[name].is_drawn
    ]
    if drawn_workloads:
        print(f"Drawn pictures took the place of missing test data in: {', '.join(drawn_workloads)}.")
    if options.picture:
        # imported late: matplotlib is needed for the picture only
        from fovea.bench.picture import draw_throughput

        draw_throughput(closed_cells, options.out.with_suffix(".svg"))
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench", description=__doc__)
    add = parser.add_argument
    add("--workloads", type=_make_list_parser(*WORKLOADS), default=None, metavar="A,B")
    add("--servers", type=_make_list_parser(*_SERVER_NAMES), default=list(_SERVER_NAMES), metavar="A,B")
    add("--connections", type=_parse_numbers, default=[1, 8, 32], metavar="N,M")
    add(
        "--seconds",
        type=float,
        default=5,
        help="duration of each measurement; longer for phone photographs (default: 5)",
    )
    add("--rounds", type=int, default=3, help="number of rounds (default: 3)")
    add("--open", action=argparse.BooleanOptionalAction, default=True, help="measure in open loop too")
    add("--exact", action=argparse.BooleanOptionalAction, default=True,
        help="measure Fovea's exact path on photographs too")  # fmt: skip
    add("--fovea", type=FoveaVersion.parse, action="append", metavar="LABEL=TREE[,FOVEA_NAME=VALUE...]",
        help="a version with its settings; repeat to compare several (default: this tree)")  # fmt: skip
    add(
        "--quick", action="store_true", help="a short run on thumbnails, which shows whether everything works"
    )
    add("--picture", action=argparse.BooleanOptionalAction, default=True)
    add(
        "--show",
        type=Path,
        nargs="+",
        default=[],
        metavar="JSON",
        help="show the results of earlier runs together, and measure nothing",
    )
    add("--out", type=Path, default=CACHE / "bench.json")
    options = parser.parse_args()
    options.workloads = options.workloads or (["thumbnails"] if options.quick else list(WORKLOADS))
    if options.quick:
        options.seconds, options.rounds, options.connections = 1, 1, [1, 8]
    return options


_SERVER_NAMES = ("bare", "tutorial", "fovea", "mosec")


def _make_list_parser(*choices: str) -> Callable[[str], list[str]]:
    def parse_list(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(choices):
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(choices)}"
            )
        return names

    return parse_list


def _parse_numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def _measure_workload(
    workload: Workload,
    options: argparse.Namespace,
    closed_cells: list[ClosedLoopCell],
    open_cells: list[OpenLoopCell],
) -> None:
    """Measure all rounds of one workload; in each round every contestant runs once at every load."""
    expected_labels = contestants.compute_reference(workload)
    seconds = options.seconds * workload.duration_factor
    print(
        f"{workload.name}: {len(expected_labels)} images, {len(set(expected_labels.values()))} labels",
        flush=True,
    )
    with ExitStack() as stack:
        images = stack.enter_context(contestants.write_image_list(workload))
        loops = [stack.enter_context(contestants.start_loop(name, workload)) for name in contestants.LOOPS]
        servers = _start_servers(stack, workload, options, expected_labels)
        for server in servers:
            warm_up_server(server, images)
        for round_number in range(options.rounds):
            for connections in options.connections:
                for measure in (
                    *(
                        partial(measure_loop, loop, workload, round_number, connections, seconds)
                        for loop in loops
                        if loop.name == "bare" or connections == options.connections[0]
                    ),
                    *(
                        partial(measure_closed, server, workload, round_number, connections, seconds, images)
                        for server in servers
                    ),
                ):
                    _add_cell(closed_cells, measure_undisturbed(measure))
        if options.open:
            for server in servers:
                if "exact" not in server.name:
                    open_cells += measure_open(server, workload, 0, options.connections[-1], seconds, images)


def _add_cell(cells: list[ClosedLoopCell], cell: ClosedLoopCell) -> None:
    cells.append(cell)
    print(
        f"  round {cell.round + 1}  {cell.connections:>2} connections  {cell.name:<18}{cell.rate:8.1f}/s"
        f"  p50 {1e3 * cell.p50:7.2f} ms  p99 {1e3 * cell.p99:7.2f} ms"
        + (
            f"  disturbed: {cell.others:.2f} processors were busy with something else"
            if cell.others > DISTURBANCE_LIMIT
            else ""
        ),
        flush=True,
    )


def _start_servers(
    stack: ExitStack, workload: Workload, options: argparse.Namespace, expected_labels: dict[Path, int]
) -> list[Server]:
    """Start the requested servers, and check that their answers agree with the bare loop's."""
    servers: list[Server] = []

    def add_server(server: Server, agreement: float) -> None:
        share = contestants.check_answers(server, expected_labels, agreement=agreement)
        print(f"  {server.name}: {share:.1%} of the answers agree with the bare loop", flush=True)
        servers.append(server)

    if "tutorial" in options.servers:
        add_server(stack.enter_context(contestants.start_tutorial(workload)), 1.0)
    if "fovea" in options.servers:
        for version in options.fovea or [FoveaVersion()]:
            for path in workload.pixel_paths[: None if options.exact else 1]:
                name = version.name if path == workload.pixel_paths[0] else f"{version.name}, {path}"
                server_context = contestants.start_fovea(version, name, workload, path)
                add_server(stack.enter_context(server_context), contestants.MIN_AGREEMENT[path])
    if "mosec" in options.servers:
        add_server(stack.enter_context(contestants.start_mosec(workload)), 1.0)
    return servers


def _read_cells(path: Path, closed_cells: list[ClosedLoopCell], open_cells: list[OpenLoopCell]) -> None:
    document = json.loads(path.read_text())
    closed_cells += [ClosedLoopCell(**cell) for cell in document["closed"]]
    for cell in document["open"]:
        statuses = {int(status): count for status, count in cell["statuses"].items()}
        open_cells.append(OpenLoopCell(**{**cell, "statuses": statuses}))


def _write_results(
    path: Path, closed_cells: list[ClosedLoopCell], open_cells: list[OpenLoopCell], fovea_name: str
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": {
            "machine": platform.machine(),
            "processors": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
        },
        "closed": [asdict(cell) for cell in closed_cells],
        "open": [asdict(cell) for cell in open_cells],
        "goals": [asdict(goal) for goal in evaluate_goals(closed_cells, open_cells, fovea_name)],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

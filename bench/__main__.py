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
    DISTURBED,
    Closed,
    Open,
    measure_closed,
    measure_loop,
    measure_open,
    undisturbed,
    warm_up,
)
from fovea.bench.contestants import Fovea, Server
from fovea.bench.report import goals, show
from fovea.bench.workloads import CACHE, WORKLOADS, BenchError, Workload


def main() -> int:
    """Measure as the command line asks, print tables, write JSON and a picture."""
    given = _arguments()
    # exit through `finally`, so that no child process keeps running
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    first = (given.fovea or [Fovea()])[0].name
    closed: list[Closed] = []
    opened: list[Open] = []
    try:
        for path in given.show:
            _read(path, closed, opened)
        for name in [] if given.show else given.workloads:
            _measure(WORKLOADS[name], given, closed, opened)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    finally:
        if closed:
            _write(given.out, closed, opened, first)
    show(closed, opened, first)
    drawn = [name for name in ([] if given.show else given.workloads) if WORKLOADS[name].is_drawn]
    if drawn:
        print(f"of drawn pictures, not of the test data: {', '.join(drawn)}")
    if given.picture:
        from fovea.bench.picture import draw

        draw(closed, given.out.with_suffix(".svg"))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench", description=__doc__)
    add = parser.add_argument
    add("--workloads", type=_some_of(*WORKLOADS), default=None, metavar="A,B")
    add("--servers", type=_some_of(*_SERVERS), default=list(_SERVERS), metavar="A,B")
    add("--connections", type=_numbers, default=[1, 8, 32], metavar="N,M")
    add("--seconds", type=float, default=5, help="length of each measurement; more for phone photographs")
    add("--rounds", type=int, default=3)
    add("--open", action=argparse.BooleanOptionalAction, default=True, help="open loop too")
    add("--exact", action=argparse.BooleanOptionalAction, default=True,
        help="Fovea's exact path on photographs too")  # fmt: skip
    add("--fovea", type=Fovea.parse, action="append", metavar="LABEL=TREE[,FOVEA_NAME=VALUE...]",
        help="a version and its settings, to compare several; default this tree as it comes")  # fmt: skip
    add("--quick", action="store_true", help="a smoke run on thumbnails: does everything work?")
    add("--picture", action=argparse.BooleanOptionalAction, default=True)
    add("--show", type=Path, nargs="+", default=[], metavar="JSON", help="what earlier runs wrote, together")
    add("--out", type=Path, default=CACHE / "bench.json")
    given = parser.parse_args()
    given.workloads = given.workloads or (["thumbnails"] if given.quick else list(WORKLOADS))
    if given.quick:
        given.seconds, given.rounds, given.connections = 1, 1, [1, 8]
    return given


_SERVERS = ("bare", "tutorial", "fovea", "mosec")


def _some_of(*known: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; known are {', '.join(known)}")
        return names

    return parse


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def _measure(workload: Workload, given: argparse.Namespace, closed: list[Closed], opened: list[Open]) -> None:
    """Measure all rounds of one workload; in each round every contestant runs once at every load."""
    wanted = contestants.reference(workload)
    seconds = given.seconds * workload.patience
    print(f"{workload.name}: {len(wanted)} images, {len(set(wanted.values()))} labels", flush=True)
    with ExitStack() as stack:
        images = stack.enter_context(contestants.image_list(workload))
        loops = [stack.enter_context(contestants.loop(name, workload)) for name in contestants.LOOPS]
        servers = _start(stack, workload, given, wanted)
        for server in servers:
            warm_up(server, images)
        for turn in range(given.rounds):
            for connections in given.connections:
                for measure in (
                    *(
                        partial(measure_loop, loop, workload, turn, connections, seconds)
                        for loop in loops
                        if loop.name == "bare" or connections == given.connections[0]
                    ),
                    *(
                        partial(measure_closed, server, workload, turn, connections, seconds, images)
                        for server in servers
                    ),
                ):
                    _add(closed, undisturbed(measure))
        if given.open:
            for server in servers:
                if "exact" not in server.name:
                    opened += measure_open(server, workload, 0, given.connections[-1], seconds, images)


def _add(cells: list[Closed], cell: Closed) -> None:
    cells.append(cell)
    print(
        f"  round {cell.round + 1}  {cell.connections:>2} connections  {cell.name:<18}{cell.rate:8.1f}/s"
        f"  p50 {1e3 * cell.p50:7.2f} ms  p99 {1e3 * cell.p99:7.2f} ms"
        + (
            f"  disturbed: {cell.others:.2f} processors were busy otherwise"
            if cell.others > DISTURBED
            else ""
        ),
        flush=True,
    )


def _start(
    stack: ExitStack, workload: Workload, given: argparse.Namespace, wanted: dict[Path, int]
) -> list[Server]:
    """Start the requested servers, and check that their answers agree with the bare loop's."""
    servers: list[Server] = []

    def start(server: Server, agreement: float) -> None:
        share = contestants.check(server, wanted, agreement=agreement)
        print(f"  {server.name}: {share:.1%} of the answers are those of the bare loop", flush=True)
        servers.append(server)

    if "tutorial" in given.servers:
        start(stack.enter_context(contestants.tutorial(workload)), 1.0)
    if "fovea" in given.servers:
        for version in given.fovea or [Fovea()]:
            for path in workload.paths[: None if given.exact else 1]:
                name = version.name if path == workload.paths[0] else f"{version.name}, {path}"
                served = contestants.fovea(version, name, workload, path)
                start(stack.enter_context(served), contestants.AGREEMENT[path])
    if "mosec" in given.servers:
        start(stack.enter_context(contestants.mosec(workload)), 1.0)
    return servers


def _read(path: Path, closed: list[Closed], opened: list[Open]) -> None:
    document = json.loads(path.read_text())
    closed += [Closed(**cell) for cell in document["closed"]]
    for cell in document["open"]:
        statuses = {int(status): count for status, count in cell["statuses"].items()}
        opened.append(Open(**{**cell, "statuses": statuses}))


def _write(path: Path, closed: list[Closed], opened: list[Open], fovea: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": {
            "machine": platform.machine(),
            "processors": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
        },
        "closed": [asdict(cell) for cell in closed],
        "open": [asdict(cell) for cell in opened],
        "goals": [asdict(goal) for goal in goals(closed, opened, fovea)],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

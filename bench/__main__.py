"""The `make bench` command: Fovea and its tuned peers by turns, as ratios within a round."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from fovea.bench.cells import RestCell
from fovea.bench.contestants import FoveaVersion
from fovea.bench.figures import measure_start
from fovea.bench.peers import PEERS
from fovea.bench.report import show_results
from fovea.bench.results import Results, describe_environment
from fovea.bench.rounds import RunOptions, measure_workload
from fovea.bench.workloads import CACHE, WORKLOADS, BenchError

START_COUNT = 3
"""Number of cold starts; `make figures` has more of them."""


def main() -> int:
    """Measure as the command line asks, print tables, write JSON and a picture."""
    options = _parse_arguments()
    # exit through `finally`, so that no child process keeps running
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    fovea_name = (options.fovea or [FoveaVersion()])[0].name
    try:
        if options.show:
            results = Results.load(options.show[0])
            for path in options.show[1:]:
                results.add(Results.load(path))
        else:
            results = _measure(options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    show_results(results, fovea_name)
    if options.picture:
        # imported late: matplotlib is needed for the picture only
        from fovea.bench.picture import draw_throughput

        draw_throughput(results.closed, options.out.with_suffix(".svg"))
    return 0


def _measure(options: argparse.Namespace) -> Results:
    """Measure all workloads; what was measured before an error or a signal is written to the file, too."""
    results = Results([describe_environment([name for name in options.servers if name in PEERS])])
    run_options = RunOptions(
        servers=options.servers,
        fovea_versions=options.fovea or [FoveaVersion()],
        connections=options.connections,
        seconds=options.seconds,
        rounds=options.rounds,
        has_open_loop=options.open,
        has_exact=options.exact,
        is_short=options.quick,
        earlier=Results.load(options.winners) if options.winners else None,
    )
    try:
        for name in options.workloads:
            measure_workload(WORKLOADS[name], run_options, results)
        if "fovea" in options.servers and options.rest:
            starts, resident_bytes, _ = zip(
                *(measure_start(Path(sys.executable)) for _ in range(START_COUNT)), strict=True
            )
            results.rests.append(RestCell(list(starts), list(resident_bytes)))
    finally:
        if results.closed:
            results.save(options.out)
    return results


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fovea.bench", description=__doc__)
    add = parser.add_argument
    add("--workloads", type=_make_list_parser(*WORKLOADS), default=None, metavar="A,B")
    add("--servers", type=_make_list_parser(*_SERVER_NAMES), default=list(_SERVER_NAMES), metavar="A,B",
        help=f"servers besides the loops (default: {','.join(_SERVER_NAMES)})")  # fmt: skip
    add("--connections", type=_parse_numbers, default=[1, 8, 32], metavar="N,M")
    add("--seconds", type=float, default=None,
        help="duration of each measurement; longer for phone photographs (default: 2)")  # fmt: skip
    add("--rounds", type=int, default=None, help="number of rounds (default: 6)")
    add("--open", action=argparse.BooleanOptionalAction, default=None, help="measure Fovea in open loop too")
    add("--exact", action=argparse.BooleanOptionalAction, default=True,
        help="measure Fovea's exact path on photographs too")  # fmt: skip
    add(
        "--rest",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure cold start and memory too",
    )
    add("--fovea", type=FoveaVersion.parse, action="append", metavar="LABEL=TREE[,FOVEA_NAME=VALUE...]",
        help="a version with its settings; repeat to compare several (default: this tree)")  # fmt: skip
    add("--winners", type=Path, metavar="JSON",
        help="search only among the configurations that won in this earlier run")  # fmt: skip
    add("--quick", action="store_true",
        help="thumbnails and photographs with a short search, two rounds, no open loop")  # fmt: skip
    add("--picture", action=argparse.BooleanOptionalAction, default=True)
    add("--show", type=Path, nargs="+", default=[], metavar="JSON",
        help="show the results of earlier runs together, and measure nothing")  # fmt: skip
    add("--out", type=Path, default=CACHE / "bench.json")
    options = parser.parse_args()
    options.workloads = options.workloads or (_QUICK_WORKLOADS if options.quick else list(WORKLOADS))
    options.rounds = options.rounds or (2 if options.quick else 6)
    options.seconds = options.seconds or (1 if options.quick else 2)
    options.open = not options.quick if options.open is None else options.open
    return options


_SERVER_NAMES = ("bare", "fovea", *PEERS)
_QUICK_WORKLOADS = ["thumbnails", "photographs"]


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


if __name__ == "__main__":
    sys.exit(main())

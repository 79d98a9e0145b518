"""The rounds of `make bench`: in each round every contestant has its turn at every load."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from fovea.bench import contestants
from fovea.bench.cells import (
    DISTURBANCE_LIMIT,
    MAX_TRIES,
    ClosedLoopCell,
    measure_closed,
    measure_front,
    measure_loop,
    measure_open,
    measure_probes,
    measure_undisturbed,
    warm_up_server,
)
from fovea.bench.contestants import BareLoop, FoveaVersion, Server
from fovea.bench.peers import PEERS, install_peer
from fovea.bench.processes import start_process
from fovea.bench.results import AnswerCheck, Results
from fovea.bench.search import search_peer
from fovea.bench.workloads import ROOT, BenchError, Workload

FRONT_WORKLOAD: Final = "thumbnails"
"""Workload of which the front process is compared with the minimal server."""


@dataclass(frozen=True)
class RunOptions:
    """Selection of what a run measures."""

    servers: Sequence[str]
    """Names of `contestants` and `peers`: `fovea`, `bare`, and those of `PEERS`."""
    fovea_versions: Sequence[FoveaVersion]
    """Versions of Fovea; goals are about the first."""
    connections: Sequence[int]
    seconds: float
    rounds: int
    has_open_loop: bool
    has_exact: bool
    """Flag for Fovea's exact pixel path on workloads with several."""
    is_short: bool
    """Flag for a short search, of few configurations measured once."""
    earlier: Results | None
    """A run to whose winners the search is limited."""

    @property
    def tries(self) -> int:
        """Number of times that a disturbed measurement is tried."""
        return 1 if self.is_short else MAX_TRIES


@dataclass(frozen=True)
class Entrant:
    """A contestant with a server for each number of connections, often the same one."""

    name: str
    servers: dict[int, Server]
    agreement: float = 1.0
    """Minimum share of images with the bare loop's top-1 label."""


@dataclass(frozen=True)
class Lineup:
    """Everything that runs for one workload."""

    workload: Workload
    images: Path
    """File that lists the images."""
    loops: Sequence[BareLoop]
    entrants: Sequence[Entrant]
    """Versions of Fovea first, then peers."""
    minimal: Server | None
    """The minimal server, if the front process is measured."""


def measure_workload(workload: Workload, options: RunOptions, results: Results) -> None:
    """Measure all rounds of one workload."""
    with ExitStack() as stack:
        lineup = _start_lineup(stack, workload, options, results)
        for round_number in range(options.rounds):
            _measure_round(lineup, options, round_number, results)
        if options.has_open_loop and "fovea" in options.servers:
            connections = options.connections[-1]
            server = lineup.entrants[0].servers[connections]
            seconds = options.seconds * workload.duration_factor
            results.open += measure_open(server, workload, 0, connections, seconds, lineup.images)


def _start_lineup(stack: ExitStack, workload: Workload, options: RunOptions, results: Results) -> Lineup:
    """Start and check all contestants; the search for the peers' configurations is part of it."""
    expected_labels = contestants.compute_reference(workload)
    print(
        f"{workload.name}: {len(expected_labels)} images, {len(set(expected_labels.values()))} labels",
        flush=True,
    )
    if workload.is_drawn:
        results.drawn_workloads.append(workload.name)
    images = stack.enter_context(contestants.write_image_list(workload))
    entrants = [
        *_enter_fovea(stack, workload, options, images),
        *_enter_peers(stack, workload, options, images, results),
    ]
    for entrant in entrants:
        _check_answers(entrant, workload, expected_labels, results)
    loops = [stack.enter_context(contestants.start_loop(name, workload)) for name in contestants.LOOPS]
    minimal = None
    if workload.name == FRONT_WORKLOAD and "fovea" in options.servers:
        minimal = stack.enter_context(_start_minimal(workload))
        warm_up_server(minimal, images)
    return Lineup(workload, images, loops, entrants, minimal)


def _measure_round(lineup: Lineup, options: RunOptions, round_number: int, results: Results) -> None:
    workload, images, entrants = lineup.workload, lineup.images, lineup.entrants
    seconds = options.seconds * workload.duration_factor
    bodies = [path.read_bytes() for path in workload.images]
    # another contestant begins each round, so that nobody always runs behind the same one
    shift = round_number % len(entrants) if entrants else 0
    for connections in options.connections:
        for loop in lineup.loops:
            if loop.name == "bare" or connections == options.connections[0]:
                measure = partial(measure_loop, loop, workload, round_number, connections, seconds)
                _add_cell(results, measure_undisturbed(measure, options.tries))
        for entrant in (*entrants[shift:], *entrants[:shift]):
            server = entrant.servers[connections]
            cell = measure_undisturbed(
                partial(measure_closed, server, workload, round_number, connections, seconds, images),
                options.tries,
            )
            _add_cell(results, cell)
            if lineup.minimal and entrant is entrants[0] and connections > 1:
                results.fronts.append(measure_front(cell, lineup.minimal, seconds, bodies, images))
    if "fovea" in options.servers:
        connections = options.connections[-1]
        server = entrants[0].servers[connections]
        results.probes.append(measure_probes(server, workload, round_number, connections, seconds, images))


def _add_cell(results: Results, cell: ClosedLoopCell) -> None:
    results.closed.append(cell)
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


# --- contestants ---------------------------------------------------------------------------------


def _enter_fovea(
    stack: ExitStack, workload: Workload, options: RunOptions, images: Path
) -> Iterator[Entrant]:
    """Start the versions of Fovea, each with the workload's pixel paths."""
    if "fovea" not in options.servers:
        return
    for version in options.fovea_versions:
        has_variants = options.has_exact and not version.has_own_models
        for path in workload.pixel_paths[: None if has_variants else 1]:
            name = version.name if path == workload.pixel_paths[0] else f"{version.name}, {path}"
            server = stack.enter_context(contestants.start_fovea(version, name, workload, path))
            warm_up_server(server, images)
            agreement = (
                contestants.OWN_MODEL_AGREEMENT if version.has_own_models else contestants.MIN_AGREEMENT
            )
            yield Entrant(name, dict.fromkeys(options.connections, server), agreement)


def _enter_peers(
    stack: ExitStack, workload: Workload, options: RunOptions, images: Path, results: Results
) -> Iterator[Entrant]:
    """Search the best configuration of each peer; a peer that cannot be installed or started is left out."""
    for peer in (PEERS[name] for name in options.servers if name in PEERS):
        try:
            install_peer(peer)
            earlier = [
                one.winner
                for one in (options.earlier.searches if options.earlier else ())
                if (one.workload, one.peer) == (workload.name, peer.name)
            ]
            configurations = earlier or (peer.short_list if options.is_short else peer.configurations)
            servers, searches = stack.enter_context(
                search_peer(
                    peer,
                    configurations,
                    workload,
                    options.connections,
                    images,
                    repetitions=0 if options.is_short else 2,
                    tries=options.tries,
                )
            )
        except BenchError as error:
            print(f"bench: {peer.name} is left out: {error}", file=sys.stderr, flush=True)
            continue
        for search in searches:
            print(
                f"  {peer.name}, {search.connections} connections: {search.winner} is the fastest of "
                f"{len(search.rates)} configurations ({max(search.rates[str(search.winner)]):.1f}/s)",
                flush=True,
            )
        results.searches += searches
        yield Entrant(peer.name, servers)


def _check_answers(
    entrant: Entrant, workload: Workload, expected_labels: dict[Path, int], results: Results
) -> None:
    """Check that the answers of all servers of a contestant agree with the bare loop's."""
    for server in {one.url: one for one in entrant.servers.values()}.values():
        with server.take_turn():
            share = contestants.check_answers(server, expected_labels, agreement=entrant.agreement)
        print(f"  {server.name}: {share:.1%} of the answers agree with the bare loop", flush=True)
        results.checks.append(AnswerCheck(workload.name, server.name, share))


@contextmanager
def _start_minimal(workload: Workload) -> Iterator[Server]:
    port = contestants.find_free_port()
    command = [sys.executable, "-m", "fovea.bench.minimal_server", str(port)]
    with start_process(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        yield contestants.wait_until_ready(Server("minimal", f"http://127.0.0.1:{port}/", process), workload)

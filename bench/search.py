"""The search for each peer's best configuration: a short one, by successive halving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final, TypeVar

from fovea.bench.cells import measure_closed, measure_undisturbed, warm_up_server
from fovea.bench.contestants import Server, wait_until_ready
from fovea.bench.peers import Configuration, Peer, start_peer
from fovea.bench.workloads import Workload

FINALISTS: Final = 3
"""Number of configurations that are measured again."""

_SECONDS: Final = 1.0
"""Length of one measurement, which is the shortest that wrk knows."""

CandidateT = TypeVar("CandidateT")


@dataclass(frozen=True)
class SearchResult:
    """The configuration of a peer that was the fastest for a workload at a number of connections."""

    workload: str
    peer: str
    connections: int
    winner: Configuration
    rates: dict[str, list[float]]
    """Measured images per second of every configuration; the finalists have several."""


def find_fastest(
    candidates: Sequence[CandidateT], measure: Callable[[CandidateT], float], *, repetitions: int
) -> tuple[CandidateT, dict[CandidateT, list[float]]]:
    """Return the candidate with the highest median rate, and all measured rates.

    Every candidate is measured once. The best `FINALISTS` are measured `repetitions` times more, by turns.
    """
    rates = {candidate: [measure(candidate)] for candidate in candidates}
    finalists = sorted(candidates, key=lambda one: rates[one][0], reverse=True)[:FINALISTS]
    if len(finalists) > 1:
        for _ in range(repetitions):
            for candidate in finalists:
                rates[candidate].append(measure(candidate))
    return max(finalists, key=lambda one: median(rates[one])), rates


@contextmanager
def search_peer(
    peer: Peer,
    configurations: Sequence[Configuration],
    workload: Workload,
    connections: Sequence[int],
    images: Path,
    *,
    repetitions: int,
    tries: int,
) -> Iterator[tuple[dict[int, Server], list[SearchResult]]]:
    """Yield the server of the fastest configuration for each number of connections; other servers are ended.

    All configurations are started at the same time, and a server that has no turn is stopped.
    """
    with ExitStack() as winners, ExitStack() as losers:
        contexts = {one: ExitStack() for one in dict.fromkeys(configurations)}
        for context in contexts.values():
            losers.push(context)
        servers = {
            one: context.enter_context(start_peer(peer, one, workload)) for one, context in contexts.items()
        }
        for server in servers.values():
            warm_up_server(wait_until_ready(server, workload), images)
        results = [
            _search_load(peer, servers, workload, number, images, repetitions, tries)
            for number in connections
        ]
        for configuration in {result.winner: None for result in results}:
            winners.push(contexts[configuration].pop_all())
        losers.close()
        yield {result.connections: servers[result.winner] for result in results}, results


def _search_load(
    peer: Peer,
    servers: dict[Configuration, Server],
    workload: Workload,
    connections: int,
    images: Path,
    repetitions: int,
    tries: int,
) -> SearchResult:
    def measure_rate(configuration: Configuration) -> float:
        measure = partial(measure_closed, servers[configuration], workload, 0, connections, _SECONDS, images)
        return measure_undisturbed(measure, tries).rate

    winner, rates = find_fastest(list(servers), measure_rate, repetitions=repetitions)
    return SearchResult(
        workload.name, peer.name, connections, winner, {str(one): values for one, values in rates.items()}
    )

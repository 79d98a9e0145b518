"""Everything that one run of `make bench` measures, as a JSON file."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar

from fovea.bench.cells import ClosedLoopCell, FrontCell, OpenLoopCell, ProbeCell, RestCell
from fovea.bench.machine import describe_processor
from fovea.bench.peers import PEERS, Configuration
from fovea.bench.search import SearchResult
from fovea.bench.workloads import BenchError

FORMAT: Final = 2
"""Number of the file's format; files without a number are older than the search for configurations."""


@dataclass(frozen=True)
class AnswerCheck:
    """The share of images that a server gives the bare loop's top-1 label."""

    workload: str
    name: str
    share: float


@dataclass
class Results:
    """The measurements of a run, in the order in which they were taken."""

    environments: list[str]
    """Processor, date and versions; more than one if several runs are shown together."""
    searches: list[SearchResult] = field(default_factory=list)
    checks: list[AnswerCheck] = field(default_factory=list)
    closed: list[ClosedLoopCell] = field(default_factory=list)
    open: list[OpenLoopCell] = field(default_factory=list)
    fronts: list[FrontCell] = field(default_factory=list)
    probes: list[ProbeCell] = field(default_factory=list)
    rests: list[RestCell] = field(default_factory=list)
    drawn_workloads: list[str] = field(default_factory=list)
    """Workloads whose images were drawn, because there are no test data."""

    def save(self, path: Path) -> None:
        """Write all measurements to a JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read the measurements of an earlier run.

        Raises `BenchError` if the file has another format.
        """
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise BenchError(f"{path} cannot be read: {error}") from None
        number = document.pop("format", 1) if isinstance(document, dict) else None
        if number != FORMAT:
            raise BenchError(
                f"{path} has format {number}, and this version reads format {FORMAT}: "
                "measure again with `make bench`"
            )
        try:
            return cls._from_document(document)
        except (KeyError, TypeError) as error:
            raise BenchError(f"{path} cannot be read: {error}") from None

    @classmethod
    def _from_document(cls, document: dict[str, Any]) -> Results:
        return cls(
            environments=document["environments"],
            searches=[
                SearchResult(**{**one, "winner": Configuration(**one["winner"])})
                for one in document["searches"]
            ],
            checks=[AnswerCheck(**one) for one in document["checks"]],
            closed=[ClosedLoopCell(**one) for one in document["closed"]],
            open=[_read_open_cell(one) for one in document["open"]],
            fronts=[FrontCell(**one) for one in document["fronts"]],
            probes=[ProbeCell(**one) for one in document["probes"]],
            rests=[RestCell(**one) for one in document["rests"]],
            drawn_workloads=document["drawn_workloads"],
        )

    def add(self, other: Results) -> None:
        """Add another run; its rounds count on from the rounds of this run."""
        first_round = 1 + max((cell.round for cell in self.closed), default=-1)
        self.environments += [one for one in other.environments if one not in self.environments]
        self.searches += other.searches
        self.checks += other.checks
        self.closed += _shift_rounds(other.closed, first_round)
        self.open += _shift_rounds(other.open, first_round)
        self.fronts += _shift_rounds(other.fronts, first_round)
        self.probes += _shift_rounds(other.probes, first_round)
        self.rests += other.rests
        self.drawn_workloads += [one for one in other.drawn_workloads if one not in self.drawn_workloads]


RoundT = TypeVar("RoundT", ClosedLoopCell, OpenLoopCell, FrontCell, ProbeCell)


def _shift_rounds(cells: Sequence[RoundT], first_round: int) -> list[RoundT]:
    return [replace(cell, round=cell.round + first_round) for cell in cells]


def _read_open_cell(values: dict[str, Any]) -> OpenLoopCell:
    statuses = {int(status): count for status, count in values["statuses"].items()}
    retry_after = values["retry_after"] and tuple(values["retry_after"])
    return OpenLoopCell(**{**values, "statuses": statuses, "retry_after": retry_after})


def describe_environment(peer_names: Sequence[str]) -> str:
    """Return processor, date and versions of a run that begins now."""
    versions = [f"Python {platform.python_version()}", f"ONNX Runtime {version('onnxruntime')}"]
    versions += [one.replace("==", " ") for name in peer_names for one in PEERS[name].requirements]
    return f"{describe_processor()}, {datetime.now(UTC):%Y-%m-%d}; {', '.join(versions)}"

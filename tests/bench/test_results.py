"""Files of results: what `make bench` writes, `--show` reads."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fovea.bench.cells import ClosedLoopCell, FrontCell, OpenLoopCell, ProbeCell, RestCell
from fovea.bench.peers import Configuration
from fovea.bench.results import AnswerCheck, Results, describe_environment
from fovea.bench.search import SearchResult
from fovea.bench.workloads import BenchError
from tests.servers import ROOT

WINNER = Configuration(2, 1, "/inference", 4, 1)
RESULTS = Results(
    ["2 cores of a processor, 2026-11-29"],
    searches=[SearchResult("thumbnails", "mosec", 8, WINNER, {str(WINNER): [1000.0]})],
    checks=[AnswerCheck("thumbnails", "mosec", 1.0)],
    closed=[ClosedLoopCell("thumbnails", "fovea", 0, 8, 3.0, 900.0, 0.01, 0.02, 5.0, 1, 0.0, 0, 0)],
    open=[
        OpenLoopCell("thumbnails", "fovea", 0, 3.0, 1000.0, 1.2, 950.0, 0.2, 0.4, 0.001, 0.016,
                     {200: 1, 503: 2}, {}, (1, 1), 0, 0, 1.0, 0.1, 1, 0.0)
    ],
    fronts=[FrontCell("thumbnails", "fovea", 0, 8, 900.0, 3e-4, 1e-4, 5e-5)],
    probes=[ProbeCell("thumbnails", "fovea", 0, 32, 100, 0.001, 0.002)],
    rests=[RestCell([0.9], [150_000_000])],
    drawn_workloads=["thumbnails"],
)  # fmt: skip


def test_results_survive_the_file(tmp_path: Path) -> None:
    RESULTS.save(tmp_path / "new" / "bench.json")
    assert Results.load(tmp_path / "new" / "bench.json") == RESULTS


def test_rounds_of_several_runs_are_kept_apart(tmp_path: Path) -> None:
    RESULTS.save(tmp_path / "bench.json")
    both = Results.load(tmp_path / "bench.json")
    both.add(RESULTS)
    assert [cell.round for cell in both.closed] == [0, 1]
    assert both.closed[1] == replace(RESULTS.closed[0], round=1)
    assert both.environments == RESULTS.environments


@pytest.mark.parametrize("content", ['{"closed": [], "open": []}', '{"format": 3}', "[]"])
def test_other_formats_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(BenchError, match="this version reads format 2: measure again with `make bench`"):
        Results.load(path)


@pytest.mark.parametrize("content", ["", None, '{"format": 2, "environments": []}'])
def test_unreadable_file_is_one_sentence(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "bench.json").write_text(content)
    with pytest.raises(BenchError, match=r"bench.json cannot be read: "):
        Results.load(tmp_path / "bench.json")


def test_command_shows_earlier_results_and_refuses_old_ones(tmp_path: Path) -> None:
    RESULTS.save(tmp_path / "bench.json")
    (tmp_path / "old.json").write_text(json.dumps({"closed": [], "open": []}))
    shown = run_bench("--no-picture", "--show", tmp_path / "bench.json")
    assert shown.returncode == 0, shown.stderr
    assert "batch 4, wait 1 ms" in shown.stdout
    assert "Drawn pictures took the place of missing test data in: thumbnails." in shown.stdout
    refused = run_bench("--show", tmp_path / "bench.json", tmp_path / "old.json")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"bench: {tmp_path / 'old.json'} has format 1, ")
    assert len(refused.stderr.splitlines()) == 1


def run_bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fovea.bench", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_environment_names_processor_and_versions() -> None:
    sentence = describe_environment(["mosec"])
    assert " cores of " in sentence
    assert "ONNX Runtime 1." in sentence
    assert "mosec 0." in sentence
    assert "litserve" not in sentence

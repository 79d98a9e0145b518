"""A whole run of `make bench`, as short as it can be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fovea.bench.results import Results
from tests.servers import ROOT
from tests.tools import SYSTEM_REASON, find_tool


@pytest.mark.slow
def test_run_without_peers_measures_everything_else(tmp_path: Path) -> None:
    if find_tool("wrk") is None:
        pytest.skip(f"{SYSTEM_REASON}has no wrk: on Debian, apt-get install wrk")
    out = tmp_path / "bench.json"
    process = subprocess.run(
        [sys.executable, "-m", "fovea.bench", "--quick", "--servers", "bare,fovea",
         "--workloads", "thumbnails", "--connections", "1,8", "--rounds", "1", "--out", out],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    results = Results.load(out)
    assert {(cell.name, cell.connections) for cell in results.closed} == {
        ("bare", 1), ("bare, Fovea's code", 1), ("alone", 1), ("fovea", 1), ("bare", 8), ("fovea", 8)
    }  # fmt: skip
    (front,) = results.fronts
    assert front.fovea > front.minimal > 0
    assert results.probes[0].probes > 10
    assert results.rests[0].start_seconds
    assert out.with_suffix(".svg").exists()

"""`fovea doctor` on a real service, and its diagnosis of findings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fovea.bench.doctor import Findings, diagnose_bottleneck
from tests.graphs import add_to_repository, build_model
from tests.servers import ROOT

pytestmark = pytest.mark.long

GOOD = Findings(
    answered=100, p50=0.3, p99=0.4, failed=0, busy=0.9, client=0.05, others=0.02, runners=0.97, decode=0.3,
    throttled=0, memory=0.2,
)  # fmt: skip
THREADS = {"threads": {"cpus": 2.0, "runners": 2}}


def run_doctor(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    base_environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    environment = {**base_environment, "COLUMNS": "200", **settings}
    return subprocess.run(
        [sys.executable, "-m", "fovea", "doctor", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_doctor_reports_on_a_service_of_its_own(small_zoo: Path) -> None:
    process = run_doctor("--seconds", "1", "--json", FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="1")
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    load = report["load"]
    assert report["runtime"]["threads"]["runners"] == 1
    assert load["answered"] > 0
    assert load["failed"] == 0
    assert 0 < load["p50"] <= load["p99"]
    assert 0.2 < load["runners"] < 1.2
    assert 0 < load["decode"] < 1
    assert 0 < load["busy"] < 1.2
    assert report["bottleneck"]
    assert report["advice"]


def test_doctor_prints_a_table(tmp_path: Path) -> None:
    for name in ("first", "second"):  # there is no default model
        add_to_repository(build_model(), tmp_path, name)
    process = run_doctor("--seconds", "1", FOVEA_MODELS=str(tmp_path))
    assert process.returncode == 0, process.stderr
    for line in (
        "versions",
        "processors",
        "memory",
        "providers",
        "threads",
        "limits",
        "self-load",
        "bottleneck",
    ):
        assert f"\n{line} " in f"\n{process.stdout}"
    assert "first version 1 on cpu; golden set: 8 images, pixels to" in process.stdout


def test_failed_start_gives_one_sentence(tmp_path: Path) -> None:
    process = run_doctor(FOVEA_MODELS=str(tmp_path))
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == f"fovea: {tmp_path} has no <name>/<version>/model.onnx\n"


@pytest.mark.parametrize(
    ("changes", "threads", "bottleneck", "advice"),
    [
        (
            {},
            {},
            "processors",
            "70% of the runners' work is the model: use more processors, a GPU, or a smaller model",
        ),
        (
            {"decode": 0.8},
            {},
            "processors",
            "80% of the runners' work is decoding: use more processors, smaller uploads",
        ),
        ({"failed": 3}, {}, "errors", "requests failed"),
        ({"memory": 0.95}, {}, "memory", "FOVEA_DECODE_BYTES"),
        ({"memory": None}, {}, "processors", "the model"),
        ({"throttled": 0.3}, {}, "CPU quota", "the CPU quota was used up for 30% of the time"),
        (
            {"others": 0.5},
            {},
            "neighbours",
            "other programs on this machine used 50% of the processors' time",
        ),
        ({"busy": 0.5}, {"runners": 1}, "runners", "1 runners for 2 processors: set FOVEA_RUNNERS to 0"),
        ({"busy": 0.5, "runners": 0.5}, {}, "load", "this load cannot send faster"),
    ],
)
def test_bottleneck_is_diagnosed_from_the_findings(
    changes: dict[str, Any], threads: dict[str, Any], bottleneck: str, advice: str
) -> None:
    runtime = {"threads": {**THREADS["threads"], **threads}}
    diagnosis = diagnose_bottleneck(replace(GOOD, **changes), runtime)
    assert diagnosis[0] == bottleneck
    assert advice in diagnosis[1]

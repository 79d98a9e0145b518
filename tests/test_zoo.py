"""The default model: what it claims, and whether it is true."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fovea.service.artifact.contract import Task
from fovea.service.inference.drift import SIGNALS
from fovea.service.inference.engine import Engine
from tests.servers import DEFAULT_MODEL, ROOT, Server

pytestmark = pytest.mark.long

ZOO = ROOT / "zoo"
IMAGES = 1000


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(DEFAULT_MODEL, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def zoo_server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def chosen(cifar_test: Path) -> list[Path]:
    """A thousand test images, the same each time."""
    return random.Random(0).sample(sorted(cifar_test.rglob("*.jpg")), IMAGES)  # noqa: S311


@pytest.fixture(scope="module")
def answers(zoo_server: Server, chosen: list[Path]) -> list[dict[str, Any]]:
    """What the service says to each of them, with all labels and the set of 95 %."""
    return classify_paths(zoo_server, chosen, top_k=0, coverage=0.95)


def classify_paths(server: Server, paths: list[Path], **query: float) -> list[dict[str, Any]]:
    """Fifty in a request."""
    results: list[dict[str, Any]] = []
    for start in range(0, len(paths), 50):
        files = [("file", (path.name, path.read_bytes())) for path in paths[start : start + 50]]
        results += server.client.post("/v1/classify", params=query, files=files).json()["results"]
    return results


def test_the_contract_says_where_the_model_comes_from(engine: Engine) -> None:
    contract = engine.contract
    assert DEFAULT_MODEL.stat().st_size <= 12_000_000
    assert (contract.name, contract.version, contract.task) == ("cifar10", "3", Task.MULTICLASS)
    assert contract.training.command.startswith("fovea train ")
    assert len(contract.training.commit) == 40
    assert contract.training.images == 45_000
    assert contract.accuracy is not None
    assert contract.accuracy.images == 10_000
    assert contract.accuracy.top1 >= 0.91
    assert contract.accuracy.ece is not None
    assert contract.accuracy.ece <= 0.015


def test_this_host_is_proven(engine: Engine) -> None:
    assert engine.check_golden_set().images == 8


def test_the_report_beside_it_agrees(engine: Engine) -> None:
    report = json.loads(DEFAULT_MODEL.with_name("report.json").read_text())
    assert report["bytes"] == DEFAULT_MODEL.stat().st_size
    assert engine.contract.accuracy is not None
    assert report["accuracy"]["top1"] == engine.contract.accuracy.top1


@pytest.mark.parametrize(
    ("sample", "label"), [("airplane.jpg", "airplane"), ("ship.jpg", "ship"), ("truck.png", "truck")]
)
def test_the_samples_are_classified_right(zoo_server: Server, sample: str, label: str) -> None:
    content = (ROOT / "samples" / sample).read_bytes()
    best = zoo_server.client.put("/v1/classify", content=content).json()["predictions"][0]
    assert best["label"] == label
    assert best["probability"] > 0.9


def test_the_accuracy_over_http_is_that_of_the_contract(
    engine: Engine, chosen: list[Path], answers: list[dict[str, Any]]
) -> None:
    right = sum(
        answer["predictions"][0]["label"] == path.parent.name
        for path, answer in zip(chosen, answers, strict=True)
    )
    assert engine.contract.accuracy is not None
    claimed = engine.contract.accuracy.top1
    deviation = (claimed * (1 - claimed) / IMAGES) ** 0.5  # of a binomial proportion
    assert abs(right / IMAGES - claimed) < 3 * deviation


def test_sets_hold_the_true_label_as_often_as_they_say(
    chosen: list[Path], answers: list[dict[str, Any]]
) -> None:
    inside = sum(
        path.parent.name in answer["coverage"]["labels"] for path, answer in zip(chosen, answers, strict=True)
    )
    assert abs(inside / IMAGES - 0.95) < 0.01 + 3 * (0.95 * 0.05 / IMAGES) ** 0.5


def test_test_images_are_no_drift_and_one_label_s_are(chosen: list[Path], cifar_test: Path) -> None:
    """The window holds a thousand images."""
    with Server() as server:

        def send(paths: list[Path]) -> dict[str, tuple[float, float]]:
            classify_paths(server, paths)
            return {
                signal: (
                    server.read_metric("fovea_drift_psi", signal=signal),
                    server.read_metric("fovea_drift_chance_psi", signal=signal),
                )
                for signal in SIGNALS
            }

        assert all(0 < psi < 3 * chance < 0.1 for psi, chance in send(chosen).values())
        assert send(sorted((cifar_test / "cat").iterdir())[:IMAGES])["label"][0] > 1


def test_the_command_gives_the_same_answers_as_the_service(
    chosen: list[Path], answers: list[dict[str, Any]]
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "fovea", "classify", *chosen, "--json", "--top-k", "0"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for result, answer in zip(json.loads(ended.stdout)["results"], answers, strict=True):
        here = {label["label"]: label["probability"] for label in result["predictions"]}
        there = {label["label"]: label["probability"] for label in answer["predictions"]}
        assert list(here) == list(there)
        assert here == pytest.approx(there, abs=1e-6)

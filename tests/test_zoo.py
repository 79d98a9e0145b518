"""The default model: its contract, and measurements of its claims."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fovea.service.artifact.contract import Precision, Task
from fovea.service.inference.drift import SIGNALS
from fovea.service.inference.engine import Engine
from tests.servers import DEFAULT_MODEL, FLOAT_MODEL, ROOT, TEACHING_MODEL, Server

pytestmark = pytest.mark.long

ZOO = ROOT / "zoo"
IMAGES = 1000


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(DEFAULT_MODEL, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def zoo_server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def sample_paths(cifar_test: Path) -> list[Path]:
    """Return the paths of a thousand test images, the same in each run."""
    return random.Random(0).sample(sorted(cifar_test.rglob("*.jpg")), IMAGES)  # noqa: S311


@pytest.fixture(scope="module")
def answers(zoo_server: Server, sample_paths: list[Path]) -> list[dict[str, Any]]:
    """Return the answer of the service to each sample, with all labels and the set of 95 %."""
    return classify_paths(zoo_server, sample_paths, top_k=0, coverage=0.95)


def classify_paths(server: Server, paths: list[Path], **query: float) -> list[dict[str, Any]]:
    """Classify the images in requests of fifty."""
    results: list[dict[str, Any]] = []
    for start in range(0, len(paths), 50):
        files = [("file", (path.name, path.read_bytes())) for path in paths[start : start + 50]]
        results += server.client.post("/v1/classify", params=query, files=files).json()["results"]
    return results


def test_default_contract_states_training_and_accuracy(engine: Engine) -> None:
    contract = engine.contract
    assert DEFAULT_MODEL.stat().st_size <= 3_000_000
    assert (contract.name, contract.version, contract.task) == ("cifar10", "4", Task.MULTICLASS)
    assert contract.training.command.startswith("fovea train ")
    assert len(contract.training.commit) == 40
    assert contract.training.images == 45_000
    assert contract.accuracy is not None
    assert contract.accuracy.images == 9_900
    assert contract.accuracy.top1 >= 0.91
    assert contract.accuracy.ece is not None
    assert contract.accuracy.ece <= 0.015


def test_default_model_is_int8_for_every_processor_and_proven_against_the_float_version(
    engine: Engine,
) -> None:
    quantization = engine.contract.quantization
    assert quantization is not None
    assert (quantization.precision, quantization.weight_bits) == (Precision.INT8, 7)
    assert quantization.source_version == FLOAT_MODEL.parent.name
    assert quantization.source_sha256 == hashlib.sha256(FLOAT_MODEL.read_bytes()).hexdigest()
    assert quantization.loss_interval[1] <= 0.005
    assert quantization.speedup is not None
    assert quantization.speedup >= 2


def test_model_for_teaching_is_small_and_has_only_the_layers_of_a_first_lesson() -> None:
    contract = Engine.load(TEACHING_MODEL, provider="cpu", threads=1).contract
    assert TEACHING_MODEL.stat().st_size <= 100_000
    kinds = [layer.kind for layer in contract.layers]
    block = ["Conv", "Relu"] * 2 + ["MaxPool"]
    assert kinds[kinds.index("Conv") :] == [*block, *block, "Reshape", "Gemm", "Softmax"]
    assert contract.training.command.startswith("fovea train --data data/cifar10-jpeg.tar.gz --net tiny_vgg ")
    assert len(contract.training.commit) == 40  # and no changes that were not committed
    assert contract.training.images == 45_000
    assert contract.accuracy is not None
    assert contract.accuracy.top1 >= 0.6


def test_model_for_teaching_is_served_beside_the_default(zoo_server: Server) -> None:
    models = zoo_server.client.get("/v1/models").json()["models"]
    assert {one["name"]: one["default"] for one in models} == {"cifar10": True, "tiny_vgg": False}
    for sample in ("airplane.jpg", "ship.jpg", "truck.png"):
        content = (ROOT / "samples" / sample).read_bytes()
        answer = zoo_server.client.post("/v1/models/tiny_vgg/classify", content=content).json()
        assert answer["predictions"][0]["label"] == sample.split(".")[0]


@pytest.mark.parametrize(
    "path", [DEFAULT_MODEL, FLOAT_MODEL, TEACHING_MODEL], ids=["int8", "float", "teaching"]
)
def test_golden_set_passes_on_this_host(path: Path) -> None:
    assert Engine.load(path, provider="cpu", threads=1).check_golden_set().images == 8


def test_report_file_agrees_with_contract(engine: Engine) -> None:
    report = json.loads(DEFAULT_MODEL.with_name("report.json").read_text())
    assert report["bytes"] == DEFAULT_MODEL.stat().st_size
    assert engine.contract.accuracy is not None
    assert report["accuracy"]["top1"] == engine.contract.accuracy.top1


@pytest.mark.parametrize(
    ("sample", "label"), [("airplane.jpg", "airplane"), ("ship.jpg", "ship"), ("truck.png", "truck")]
)
def test_samples_are_classified_correctly(zoo_server: Server, sample: str, label: str) -> None:
    content = (ROOT / "samples" / sample).read_bytes()
    best = zoo_server.client.put("/v1/classify", content=content).json()["predictions"][0]
    assert best["label"] == label
    assert best["probability"] > 0.9


def test_http_accuracy_matches_contract(
    engine: Engine, sample_paths: list[Path], answers: list[dict[str, Any]]
) -> None:
    correct = sum(
        answer["predictions"][0]["label"] == path.parent.name
        for path, answer in zip(sample_paths, answers, strict=True)
    )
    assert engine.contract.accuracy is not None
    accuracy = engine.contract.accuracy.top1
    deviation = (accuracy * (1 - accuracy) / IMAGES) ** 0.5  # of a binomial proportion
    assert abs(correct / IMAGES - accuracy) < 3 * deviation


def test_sets_hold_true_label_at_their_coverage_rate(
    sample_paths: list[Path], answers: list[dict[str, Any]]
) -> None:
    covered = sum(
        path.parent.name in answer["coverage"]["labels"]
        for path, answer in zip(sample_paths, answers, strict=True)
    )
    assert abs(covered / IMAGES - 0.95) < 0.01 + 3 * (0.95 * 0.05 / IMAGES) ** 0.5


def test_drift_is_low_for_test_images_and_high_for_one_label(
    sample_paths: list[Path], cifar_test: Path
) -> None:
    """The window holds a thousand images."""
    with Server() as server:

        def measure_drift(paths: list[Path]) -> dict[str, tuple[float, float]]:
            classify_paths(server, paths)
            return {
                signal: (
                    server.read_metric("fovea_drift_psi", signal=signal),
                    server.read_metric("fovea_drift_chance_psi", signal=signal),
                )
                for signal in SIGNALS
            }

        assert all(0 < psi < 3 * chance < 0.1 for psi, chance in measure_drift(sample_paths).values())
        assert measure_drift(sorted((cifar_test / "cat").iterdir())[:IMAGES])["label"][0] > 1


def test_command_and_service_give_the_same_answers(
    sample_paths: list[Path], answers: list[dict[str, Any]]
) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "fovea", "classify", *sample_paths, "--json", "--top-k", "0"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for result, answer in zip(json.loads(process.stdout)["results"], answers, strict=True):
        command_probabilities = {label["label"]: label["probability"] for label in result["predictions"]}
        service_probabilities = {label["label"]: label["probability"] for label in answer["predictions"]}
        assert list(command_probabilities) == list(service_probabilities)
        assert command_probabilities == pytest.approx(service_probabilities, abs=1e-6)

"""The score that tells images like those of the training from others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from PIL import Image

from fovea.service.artifact.contract import KnownScore, Task
from fovea.service.errors import ContractError
from fovea.service.inference.engine import Engine
from fovea.service.inference.known import compute_known_scores
from tests.graphs import build_model, read_contract
from tests.pictures import encode_image
from tests.servers import Server

LOGITS = np.array([[3.0, -1.0, 0.5], [-200.0, 0.0, 100.0], [0.0, -math.inf, 0.0]], np.float32)


def sum_exponentials(row: npt.NDArray[np.float32]) -> float:
    return math.log(math.fsum(math.exp(value - max(row)) for value in map(float, row))) + float(max(row))


def test_multiclass_score_is_the_negative_free_energy() -> None:
    scores = compute_known_scores(LOGITS, Task.MULTICLASS)
    assert scores.dtype == np.float32
    assert scores.tolist() == pytest.approx([sum_exponentials(row) for row in LOGITS], rel=1e-6)


def test_multilabel_score_is_the_sum_over_the_labels() -> None:
    expected = [sum(math.log1p(math.exp(-abs(z))) + max(z, 0) for z in row) for row in LOGITS.tolist()]
    assert compute_known_scores(LOGITS, Task.MULTILABEL).tolist() == pytest.approx(expected, rel=1e-6)


def test_binary_model_has_no_score() -> None:
    """Its one logit says how sure it is, and nothing else."""
    contract = read_contract(build_model(Task.BINARY, ("ant", "bee")))
    with pytest.raises(ContractError, match="known: binary has no score"):
        replace(contract, known=KnownScore(1.0, 0.95, 1000))


def test_score_of_an_infinite_logit_is_finite() -> None:
    """Its probability is 1, so the image has an answer."""
    logits = np.array([[math.inf, 0.0]], np.float32)
    assert np.isfinite(compute_known_scores(logits, Task.MULTILABEL)).all()


# --- through the service -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[Task.MULTICLASS, Task.MULTILABEL])
def known_zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models: `tells` with a threshold between the scores of two images, and `silent` without one."""
    zoo = tmp_path_factory.mktemp("zoo")
    model = build_model(request.param)
    threshold = float(np.mean(score_images(Engine(model.SerializeToString(), provider="cpu", threads=1))))
    for name, known in (("tells", KnownScore(threshold, 0.95, 1000)), ("silent", None)):
        (zoo / name / "1").mkdir(parents=True)
        onnx.save(build_model(request.param, known=known), zoo / name / "1" / "model.onnx")
    return zoo


def draw_grey(level: int) -> bytes:
    return encode_image(Image.new("RGB", (16, 16), (level, level, level)), "PNG")


def score_images(engine: Engine) -> list[float]:
    pixels = np.stack([np.full((16, 16, 3), level, np.uint8) for level in (0, 255)])
    scores: list[float] = compute_known_scores(engine.compute_logits(pixels), engine.contract.task).tolist()
    return scores


@pytest.fixture
def server(known_zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(known_zoo), FOVEA_DEFAULT_MODEL="tells") as server:
        yield server


def test_answer_says_whether_the_image_is_known(server: Server, known_zoo: Path) -> None:
    engine = Engine.load(known_zoo / "tells" / "1" / "model.onnx", provider="cpu", threads=1)
    assert engine.contract.known
    threshold, expected_scores = engine.contract.known.threshold, score_images(engine)
    images = [draw_grey(level) for level in (0, 255)]
    unknown_count = server.read_metric("fovea_unknown_images_total", model="tells", version="1")
    for path in ("/v1/classify", "/v1/explain"):
        answers = [server.client.post(path, content=image).json() for image in images]
        assert [one["known_score"] for one in answers] == pytest.approx(expected_scores, abs=1e-4)
        assert [one["known"] for one in answers] == [score >= threshold for score in expected_scores]
    assert server.read_metric("fovea_unknown_images_total", model="tells", version="1") == unknown_count + 1
    batch = server.client.post("/v1/classify", files=[("image", image) for image in images]).json()
    assert [one["known"] for one in batch["results"]] == [score >= threshold for score in expected_scores]


def test_model_without_threshold_says_nothing(server: Server) -> None:
    image = draw_grey(0)
    for path in ("/v1/models/silent/classify", "/v1/models/silent/explain"):
        answer: httpx.Response = server.client.post(path, content=image)
        assert answer.status_code == 200
        assert not {"known", "known_score"} & answer.json().keys()

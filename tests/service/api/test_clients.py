"""The clients of other servers get the same labels and probabilities as native clients, for 100 images."""

from __future__ import annotations

import base64
import json
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import requests
import tritonclient.http as triton
from huggingface_hub import InferenceClient

from tests.servers import Server
from tests.tools import require_tool

pytestmark = pytest.mark.long

IMAGES = 100

ClientScores: TypeAlias = dict[str, float]
"""The probability of each label, the highest first."""


@pytest.fixture(scope="module")
def zoo_server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def sample_images(cifar_test: Path) -> list[Path]:
    """Random images, which are the same in every run."""
    return random.Random(1).sample(sorted(cifar_test.rglob("*.jpg")), IMAGES)  # noqa: S311


@pytest.fixture(scope="module")
def native_scores(zoo_server: Server, sample_images: list[Path]) -> list[ClientScores]:
    scores = []
    for path in sample_images:
        reply = zoo_server.client.post("/v1/classify?top_k=0", content=path.read_bytes()).json()
        scores.append({prediction["label"]: prediction["probability"] for prediction in reply["predictions"]})
    return scores


def ask_torchserve(server: Server, photo: Path) -> ClientScores:
    arguments = [require_tool("curl"), "--silent", f"{server.url}/predictions/cifar10", "-T", str(photo)]
    scores: ClientScores = json.loads(subprocess.run(arguments, capture_output=True, check=True).stdout)
    return scores


def ask_tensorflow_predict(server: Server, photo: Path) -> ClientScores:
    body = {"instances": [{"b64": base64.b64encode(photo.read_bytes()).decode()}]}
    reply = requests.post(f"{server.url}/v1/models/cifar10:predict", data=json.dumps(body), timeout=30)
    labels = server.client.get("/v1/models/cifar10/contract").json()["labels"]
    (probabilities,) = reply.json()["predictions"]
    pairs = zip(labels, probabilities, strict=True)
    return dict(sorted(pairs, key=lambda pair: pair[1], reverse=True))


def ask_tensorflow_classify(server: Server, photo: Path) -> ClientScores:
    body = {"examples": [{"image": {"b64": base64.b64encode(photo.read_bytes()).decode()}}]}
    reply = requests.post(f"{server.url}/v1/models/cifar10:classify", json=body, timeout=30)
    return dict(reply.json()["result"][0])


def ask_hugging_face(server: Server, photo: Path) -> ClientScores:
    return {
        prediction.label: prediction.score
        for prediction in InferenceClient(server.url).image_classification(photo, top_k=10)
    }


def ask_hugging_face_raw(server: Server, photo: Path) -> ClientScores:
    predictions = InferenceClient(f"{server.url}/models/cifar10").image_classification(photo)
    return {prediction.label: prediction.score for prediction in predictions}


def ask_triton(server: Server, photo: Path) -> ClientScores:
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    image = triton.InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([photo.read_bytes()], object))
    output = triton.InferRequestedOutput("probabilities", class_count=10)
    reply = client.infer("cifar10", [image], outputs=[output])
    lines = [text.decode().split(":") for text in reply.as_numpy("probabilities")[0]]
    return {label: float(value) for value, _, label in lines}


@pytest.mark.parametrize(
    "ask_server",
    [
        ask_torchserve,
        ask_tensorflow_predict,
        ask_tensorflow_classify,
        ask_hugging_face,
        ask_hugging_face_raw,
        ask_triton,
    ],
)
def test_client_scores_equal_native_scores(
    zoo_server: Server,
    sample_images: list[Path],
    native_scores: list[ClientScores],
    ask_server: Callable[[Server, Path], ClientScores],
) -> None:
    for photo, expected in zip(sample_images, native_scores, strict=True):
        scores = ask_server(zoo_server, photo)
        assert len(scores) in (5, 10)
        assert list(scores) == list(expected)[: len(scores)]
        assert all(abs(scores[label] - expected[label]) <= 1e-6 for label in scores)

"""Hugging Face's protocol, by its own client and by hand."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient

from fovea.service.artifact.contract import Task
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.servers import ROOT, Server

PICTURE = make_jpeg()
LABELS = ("ant", "bee", "cow", "dog")
B64 = base64.b64encode(PICTURE).decode()


def native_scores(server: Server, top_k: int = 5) -> list[tuple[str, float]]:
    reply = server.client.post("/v1/classify", params={"top_k": top_k}, content=PICTURE).json()
    return [(one["label"], one["probability"]) for one in reply["predictions"]]


def read_scores(reply: httpx.Response) -> list[tuple[str, float]]:
    assert reply.status_code == 200, reply.text
    return [(one["label"], one["score"]) for one in reply.json()]


@pytest.mark.parametrize("path", ["/", "/predict", "/models/small"])
def test_an_image_as_it_is(server: Server, path: str) -> None:
    reply = server.client.post(path, content=PICTURE, headers={"Content-Type": "image/jpeg"})
    assert read_scores(reply) == native_scores(server)


def test_its_own_client(server: Server, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(PICTURE)
    client = InferenceClient(server.url)
    for image in (photo, str(photo), PICTURE):
        found = client.image_classification(image)
        assert [(one.label, one.score) for one in found] == native_scores(server)
    found = client.image_classification(photo, top_k=2, function_to_apply="softmax")
    assert [(one.label, one.score) for one in found] == native_scores(server, 2)


@pytest.mark.parametrize("text", [B64, f"data:image/jpeg;base64,{B64}"])
def test_json(server: Server, text: str) -> None:
    asked = {"inputs": text, "parameters": {"top_k": 3}, "options": {"wait_for_model": True}}
    assert read_scores(server.client.post("/", json=asked)) == native_scores(server, 3)


def test_several_images_have_a_list_each(server: Server) -> None:
    reply = server.client.post("/", json={"inputs": [B64, B64], "parameters": {"top_k": 1}}).json()
    assert [[(one["label"], one["score"]) for one in image] for image in reply] == 2 * [
        native_scores(server, 1)
    ]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One model of each kind; the model with many labels has a temperature."""
    root = tmp_path_factory.mktemp("tasks")
    for task, labels in ((Task.MULTICLASS, LABELS), (Task.MULTILABEL, LABELS), (Task.BINARY, ("no", "yes"))):
        add_to_repository(build_model(task, labels), root, task)
    with Server(FOVEA_MODELS=str(root), FOVEA_DEFAULT_MODEL="binary") as running:
        yield running


def apply_function(server: Server, name: str, function: str) -> dict[str, float]:
    body = {"inputs": B64, "parameters": {"function_to_apply": function, "top_k": 9}}
    predictions = read_scores(server.client.post(f"/models/{name}", json=body))
    assert [score for _, score in predictions] == sorted((score for _, score in predictions), reverse=True)
    return dict(predictions)


@pytest.mark.parametrize("name", ["multiclass", "multilabel", "binary"])
def test_every_function_is_applied_to_the_logits(tasks: Server, name: str) -> None:
    logits = apply_function(tasks, name, "none")
    whole = sum(math.exp(logit) for logit in logits.values())
    softmax = {label: math.exp(logit) / whole for label, logit in logits.items()}
    sigmoid = {label: 1 / (1 + math.exp(-logit)) for label, logit in logits.items()}
    assert apply_function(tasks, name, "sigmoid") == pytest.approx(sigmoid, abs=1e-6)
    assert apply_function(tasks, name, "softmax") == pytest.approx(
        sigmoid if name == "binary" else softmax, abs=1e-6
    )
    own = read_scores(tasks.client.post(f"/models/{name}", content=PICTURE))
    default = apply_function(tasks, name, "softmax" if name == "multiclass" else "sigmoid")
    assert own == list(default.items())


@pytest.mark.long
def test_the_temperature_is_in_the_logits() -> None:
    with Server() as server:  # whose model has one
        photo = (ROOT / "samples" / "ship.jpg").read_bytes()
        asked = {"inputs": base64.b64encode(photo).decode(), "parameters": {"top_k": 10}}
        own = dict(read_scores(server.client.post("/", json=asked)))
        asked["parameters"] = {"top_k": 10, "function_to_apply": "none"}
        logits = dict(read_scores(server.client.post("/", json=asked)))
        assert server.client.get("/v1/models/cifar10/contract").json()["temperature"] != 1
    whole = sum(math.exp(logit) for logit in logits.values())
    assert {label: math.exp(logit) / whole for label, logit in logits.items()} == pytest.approx(own, abs=1e-6)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "inputs: it is missing"),
        ([], "the body"),
        ({"inputs": 3}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": "@"}, "inputs.0 is not base64"),
        ({"inputs": "https://example.org/cat.jpg"}, "inputs.0 is not base64"),
        ({"inputs": B64, "parameters": {"top_k": 0}}, "parameters.top_k"),
        ({"inputs": B64, "parameters": {"top_k": "3"}}, "parameters.top_k"),
        ({"inputs": B64, "parameters": {"top": 3}}, "parameters.top"),
        ({"inputs": B64, "parameters": {"function_to_apply": "tanh"}}, "parameters.function_to_apply"),
        ({"inputs": [B64] * 65}, "at most 64"),
    ],
)
def test_a_malformed_request_is_told_in_its_own_shape(server: Server, body: Any, said: str) -> None:
    reply = server.client.post("/", json=body, headers={"X-Request-ID": "mine"})
    assert reply.status_code == 400
    assert said in reply.json()["error"]
    assert (reply.json()["code"], reply.json()["request_id"]) == ("bad_request", "mine")
    assert reply.headers["x-request-id"] == "mine"


def test_one_bad_image_of_several_is_named(server: Server) -> None:
    nonsense = base64.b64encode(b"nonsense").decode()
    before = server.read_metric("fovea_errors_total", reason="unsupported_format")
    reply = server.client.post("/", json={"inputs": [B64, nonsense, nonsense]})
    assert (reply.status_code, reply.json()["code"]) == (415, "unsupported_format")
    assert reply.json()["error"].startswith("image 1: the bytes are not an image")
    assert server.read_metric("fovea_errors_total", reason="unsupported_format") == before + 2


def test_health(server: Server) -> None:
    assert server.client.get("/health").text == "Ok"

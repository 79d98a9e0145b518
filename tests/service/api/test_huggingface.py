"""Hugging Face's protocol, with its own client and with plain requests."""

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
    return [(prediction["label"], prediction["probability"]) for prediction in reply["predictions"]]


def read_scores(reply: httpx.Response) -> list[tuple[str, float]]:
    assert reply.status_code == 200, reply.text
    return [(prediction["label"], prediction["score"]) for prediction in reply.json()]


@pytest.mark.parametrize("path", ["/", "/predict", "/models/small"])
def test_raw_image_is_classified(server: Server, path: str) -> None:
    reply = server.client.post(path, content=PICTURE, headers={"Content-Type": "image/jpeg"})
    assert read_scores(reply) == native_scores(server)


def test_hugging_face_client_gets_native_scores(server: Server, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(PICTURE)
    client = InferenceClient(server.url)
    for image in (photo, str(photo), PICTURE):
        predictions = client.image_classification(image)
        assert [(prediction.label, prediction.score) for prediction in predictions] == native_scores(server)
    predictions = client.image_classification(photo, top_k=2, function_to_apply="softmax")
    assert [(prediction.label, prediction.score) for prediction in predictions] == native_scores(server, 2)


@pytest.mark.parametrize("text", [B64, f"data:image/jpeg;base64,{B64}"])
def test_json_body_is_classified(server: Server, text: str) -> None:
    body = {"inputs": text, "parameters": {"top_k": 3}, "options": {"wait_for_model": True}}
    assert read_scores(server.client.post("/", json=body)) == native_scores(server, 3)


def test_several_images_get_one_list_each(server: Server) -> None:
    reply = server.client.post("/", json={"inputs": [B64, B64], "parameters": {"top_k": 1}}).json()
    assert [
        [(prediction["label"], prediction["score"]) for prediction in predictions] for predictions in reply
    ] == 2 * [native_scores(server, 1)]


@pytest.fixture(scope="module")
def tasks_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One model of each kind; the model with many labels has a temperature."""
    root = tmp_path_factory.mktemp("tasks")
    for task, labels in ((Task.MULTICLASS, LABELS), (Task.MULTILABEL, LABELS), (Task.BINARY, ("no", "yes"))):
        add_to_repository(build_model(task, labels), root, task)
    with Server(FOVEA_MODELS=str(root), FOVEA_DEFAULT_MODEL="binary") as server:
        yield server


def apply_function(server: Server, name: str, function: str) -> dict[str, float]:
    body = {"inputs": B64, "parameters": {"function_to_apply": function, "top_k": 9}}
    predictions = read_scores(server.client.post(f"/models/{name}", json=body))
    assert [score for _, score in predictions] == sorted((score for _, score in predictions), reverse=True)
    return dict(predictions)


@pytest.mark.parametrize("name", ["multiclass", "multilabel", "binary"])
def test_functions_are_applied_to_the_logits(tasks_server: Server, name: str) -> None:
    logits = apply_function(tasks_server, name, "none")
    total = sum(math.exp(logit) for logit in logits.values())
    softmax = {label: math.exp(logit) / total for label, logit in logits.items()}
    sigmoid = {label: 1 / (1 + math.exp(-logit)) for label, logit in logits.items()}
    assert apply_function(tasks_server, name, "sigmoid") == pytest.approx(sigmoid, abs=1e-6)
    assert apply_function(tasks_server, name, "softmax") == pytest.approx(
        sigmoid if name == "binary" else softmax, abs=1e-6
    )
    plain_scores = read_scores(tasks_server.client.post(f"/models/{name}", content=PICTURE))
    function_scores = apply_function(tasks_server, name, "softmax" if name == "multiclass" else "sigmoid")
    assert plain_scores == list(function_scores.items())


@pytest.mark.long
def test_logits_include_the_temperature() -> None:
    with Server() as server:  # its model has a temperature
        photo = (ROOT / "samples" / "ship.jpg").read_bytes()
        body = {"inputs": base64.b64encode(photo).decode(), "parameters": {"top_k": 10}}
        probabilities = dict(read_scores(server.client.post("/", json=body)))
        body["parameters"] = {"top_k": 10, "function_to_apply": "none"}
        logits = dict(read_scores(server.client.post("/", json=body)))
        assert server.client.get("/v1/models/cifar10/contract").json()["temperature"] != 1
    total = sum(math.exp(logit) for logit in logits.values())
    assert {label: math.exp(logit) / total for label, logit in logits.items()} == pytest.approx(
        probabilities, abs=1e-6
    )


@pytest.mark.parametrize(
    ("body", "message"),
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
def test_malformed_request_gets_hugging_face_error(server: Server, body: Any, message: str) -> None:
    reply = server.client.post("/", json=body, headers={"X-Request-ID": "mine"})
    assert reply.status_code == 400
    assert message in reply.json()["error"]
    assert (reply.json()["code"], reply.json()["request_id"]) == ("bad_request", "mine")
    assert reply.headers["x-request-id"] == "mine"


def test_error_names_the_bad_image(server: Server) -> None:
    nonsense = base64.b64encode(b"nonsense").decode()
    errors_before = server.read_metric("fovea_errors_total", reason="unsupported_format")
    reply = server.client.post("/", json={"inputs": [B64, nonsense, nonsense]})
    assert (reply.status_code, reply.json()["code"]) == (415, "unsupported_format")
    assert reply.json()["error"].startswith("image 1: the bytes are not an image")
    assert server.read_metric("fovea_errors_total", reason="unsupported_format") == errors_before + 2


def test_health_route_returns_ok(server: Server) -> None:
    assert server.client.get("/health").text == "Ok"

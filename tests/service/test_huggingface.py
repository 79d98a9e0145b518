"""Hugging Face's dialect, by its own client and by hand."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient

from tests.pictures import jpeg
from tests.servers import Server

PICTURE = jpeg()
B64 = base64.b64encode(PICTURE).decode()


def native(server: Server, top_k: int = 5) -> list[tuple[str, float]]:
    reply = server.client.post("/v1/classify", params={"top_k": top_k}, content=PICTURE).json()
    return [(one["label"], one["probability"]) for one in reply["predictions"]]


def scores(reply: httpx.Response) -> list[tuple[str, float]]:
    assert reply.status_code == 200, reply.text
    return [(one["label"], one["score"]) for one in reply.json()]


@pytest.mark.parametrize("path", ["/", "/predict", "/models/small"])
def test_an_image_as_it_is(server: Server, path: str) -> None:
    reply = server.client.post(path, content=PICTURE, headers={"Content-Type": "image/jpeg"})
    assert scores(reply) == native(server)


def test_its_own_client(server: Server, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(PICTURE)
    client = InferenceClient(server.url)
    for image in (photo, str(photo), PICTURE):
        found = client.image_classification(image)
        assert [(one.label, one.score) for one in found] == native(server)
    found = client.image_classification(photo, top_k=2, function_to_apply="softmax")
    assert [(one.label, one.score) for one in found] == native(server, 2)


@pytest.mark.parametrize("text", [B64, f"data:image/jpeg;base64,{B64}"])
def test_json(server: Server, text: str) -> None:
    asked = {"inputs": text, "parameters": {"top_k": 3}, "options": {"wait_for_model": True}}
    assert scores(server.client.post("/", json=asked)) == native(server, 3)


def test_several_images_have_a_list_each(server: Server) -> None:
    reply = server.client.post("/", json={"inputs": [B64, B64], "parameters": {"top_k": 1}}).json()
    assert [[(one["label"], one["score"]) for one in image] for image in reply] == 2 * [native(server, 1)]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "inputs: Field required"),
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
    before = server.metric("fovea_errors_total", reason="unsupported_format")
    reply = server.client.post("/", json={"inputs": [B64, nonsense, nonsense]})
    assert (reply.status_code, reply.json()["code"]) == (415, "unsupported_format")
    assert reply.json()["error"].startswith("image 1: the bytes are not an image")
    assert server.metric("fovea_errors_total", reason="unsupported_format") == before + 2


def test_health(server: Server) -> None:
    assert server.client.get("/health").text == "Ok"

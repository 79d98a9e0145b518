"""The routes of cloud platforms. The tests play the platforms: probes, bodies and their answers."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.pictures import make_jpeg
from tests.servers import ROOT, Server

IMAGE = make_jpeg()
B64 = base64.b64encode(IMAGE).decode()
VERTEX_ROUTE = "/v1/endpoints/123/deployedModels/456:predict"


@pytest.fixture(scope="module")
def vertex(small_zoo: Path) -> Iterator[Server]:
    """A container as Vertex AI starts it."""
    with Server(
        FOVEA_MODELS=str(small_zoo),
        AIP_HEALTH_ROUTE="/v1/endpoints/123/deployedModels/456",
        AIP_PREDICT_ROUTE=VERTEX_ROUTE,
        FOVEA_PROTOCOLS="native",
    ) as server:
        yield server


@pytest.mark.parametrize(
    "content",
    [
        {"content": IMAGE, "headers": {"Content-Type": "application/x-image"}},
        {"content": IMAGE, "headers": {"Content-Type": "image/jpeg", "Accept": "application/json"}},
        {"content": IMAGE},
        {"json": {"images": [{"b64": B64}]}},
        {"files": {"image": ("a.jpg", IMAGE, "image/jpeg")}},
    ],
)
def test_invocations_answers_as_classify(server: Server, content: dict[str, Any]) -> None:
    expected = server.client.post("/v1/classify?top_k=3", **content)
    reply = server.client.post("/invocations?top_k=3", **content)
    assert reply.status_code == expected.status_code == 200, reply.text
    assert reply.json().keys() == expected.json().keys()
    if "predictions" in reply.json():
        assert reply.json()["predictions"] == expected.json()["predictions"]
    else:
        assert [one["predictions"] for one in reply.json()["results"]] == [
            one["predictions"] for one in expected.json()["results"]
        ]


def test_invocations_is_counted_and_refuses_as_native(server: Server) -> None:
    reply = server.client.post("/invocations", content=b"nonsense")
    assert reply.status_code in (415, 422)
    assert reply.json()["error"]["code"]
    labels = {"protocol": "native", "route": "/invocations", "status": str(reply.status_code)}
    assert server.read_metric("fovea_requests_total", **labels) >= 1


MLFLOW_BODIES: list[dict[str, Any]] = [
    {"dataframe_split": {"columns": ["image"], "data": [[B64], [B64]]}},
    {"dataframe_split": {"index": [0, 1], "columns": ["0"], "data": [[B64], [{"b64": B64}]]}},
    {"dataframe_records": [{"image": B64}, {"image": B64}]},
    {"instances": [{"b64": B64}, {"b64": B64}]},
    {"instances": [{"image": {"b64": B64}}, B64]},
    {"inputs": [B64, {"b64": B64}]},
    {"inputs": {"image": [B64, B64]}},
    {"params": {"top_k": 2}, "inputs": [B64, B64]},
]


@pytest.mark.parametrize("body", MLFLOW_BODIES, ids=lambda body: str(body)[:40])
@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8"])
def test_invocations_takes_the_bodies_of_mlflow(
    server: Server, body: dict[str, Any], content_type: str
) -> None:
    query = "" if "params" in body else "?top_k=2"
    text = "\n " + json.dumps(body)
    reply = server.client.post(f"/invocations{query}", content=text, headers={"Content-Type": content_type})
    assert reply.status_code == 200, reply.text
    expected = server.client.post("/v1/classify?top_k=2", content=IMAGE).json()["predictions"]
    assert list(reply.json()) == ["predictions"]
    assert len(reply.json()["predictions"]) == 2
    for prediction in reply.json()["predictions"]:
        assert prediction["label"] == expected[0]["label"]
        assert prediction["labels"] == [one["label"] for one in expected]
        assert prediction["probabilities"] == pytest.approx([one["probability"] for one in expected])
        assert prediction["probability"] == prediction["probabilities"][0]


def test_error_of_one_row_is_in_its_place(server: Server) -> None:
    broken = base64.b64encode(IMAGE[:100]).decode()
    reply = server.client.post("/invocations", json={"inputs": [B64, broken]})
    assert reply.status_code == 200
    first, second = reply.json()["predictions"]
    assert "label" in first
    assert list(second) == ["error"]
    alone = server.client.post("/invocations", json={"inputs": [broken]})
    assert alone.status_code == 422
    assert alone.json()["error"]["code"] == second["error"]["code"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"inputs": []}, "no images"),
        ({"instances": []}, "instances"),
        ({"inputs": [[1, 2, 3]]}, "inputs.0 is not an image"),
        ({"inputs": ["nonsense!"]}, "inputs.0 is not base64"),
        ({"inputs": [B64], "instances": [B64]}, "exactly one"),
        ({"params": {"top_k": 2}}, "exactly one"),
        ({"inputs": [B64], "params": {"top": 2}}, "top"),
        ({"dataframe_records": [{"a": B64, "b": B64}]}, "dataframe_records.0 has 2 columns"),
        ({"dataframe_split": {"columns": ["a"]}}, "dataframe_split.data"),
        ({"inputs": [B64] * 65}, "65 images; at most 64"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_bodies_of_mlflow_are_refused(server: Server, body: dict[str, Any], reason: str) -> None:
    reply = server.client.post("/invocations", json=body)
    assert reply.status_code == 400
    assert reason in reply.json()["error"]["message"]


def test_options_and_limits_of_mlflow(server: Server, vertex: Server) -> None:
    reply = server.client.post("/invocations?threshold=0.5", json={"inputs": [B64]})
    assert reply.status_code == 400
    assert "threshold" in reply.json()["error"]["message"]
    large = '{"inputs": ["' + " " * (5 << 20) + '"]}'  # above FOVEA_JSON_BYTES: orjson blocks all threads
    reply = vertex.client.post("/invocations", content=large, headers={"Content-Type": "application/json"})
    assert reply.status_code == 413
    assert "FOVEA_JSON_BYTES" in reply.json()["error"]["message"]
    # Only this route takes them.
    assert server.client.post("/v1/classify", json={"inputs": [B64]}).status_code == 400


def test_ping_is_there_with_and_without_torchserve(server: Server, vertex: Server) -> None:
    for one in (server, vertex):
        assert one.client.get("/ping").status_code == 200


def test_batch_transform_learns_its_limits(server: Server) -> None:
    limits = server.client.get("/execution-parameters").json()
    body_bytes = server.client.get("/runtime").json()["limits"]["body_bytes"]
    megabytes = max(1, min(6, body_bytes >> 20))
    assert limits == {
        "MaxConcurrentTransforms": 100 // megabytes,
        "BatchStrategy": "SINGLE_RECORD",
        "MaxPayloadInMB": megabytes,
    }
    assert limits["MaxConcurrentTransforms"] * limits["MaxPayloadInMB"] <= 100  # SageMaker's own limit


def test_vertex_probes_and_predicts(vertex: Server) -> None:
    assert vertex.client.get("/v1/endpoints/123/deployedModels/456").json() == {"status": "ready"}
    body = {"instances": [{"b64": B64}, {"b64": B64}], "parameters": {"labels": True, "top_k": 2}}
    reply = vertex.client.post(VERTEX_ROUTE, json=body)
    assert reply.status_code == 200, reply.text
    expected = vertex.client.post("/v1/classify?top_k=2", content=IMAGE).json()["predictions"]
    for prediction in reply.json()["predictions"]:
        assert prediction["label"] == expected[0]["label"]
        assert prediction["labels"] == [one["label"] for one in expected]
        assert prediction["probabilities"] == pytest.approx([one["probability"] for one in expected])
        assert prediction["probability"] == prediction["probabilities"][0]
    rows = vertex.client.post(VERTEX_ROUTE, json={"instances": [{"b64": B64}]}).json()["predictions"]
    assert all(isinstance(value, float) for value in rows[0])
    assert vertex.client.get("/openapi.json").json()["paths"].keys().isdisjoint({VERTEX_ROUTE})


def test_vertex_refusals_have_one_shape(vertex: Server) -> None:
    reply = vertex.client.post(VERTEX_ROUTE, json={"instances": []})
    assert reply.status_code == 400
    assert isinstance(reply.json()["error"], str)
    assert reply.json()["code"] == "bad_request"
    assert vertex.read_metric("fovea_requests_total", protocol="tensorflow", status="400") >= 1


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"top_k": 2}, "needs"),
        ({"labels": "yes"}, "labels"),
        ({"labels": True, "top_k": 0}, "top_k"),
        ({"confidenceThreshold": 0.5}, "confidenceThreshold"),
    ],
)
def test_wrong_parameters_are_refused(server: Server, parameters: Any, reason: str) -> None:
    body = {"instances": [{"b64": B64}], "parameters": parameters}
    reply = httpx.post(f"{server.url}/v1/models/small:predict", content=json.dumps(body))
    assert reply.status_code == 400
    assert reason in reply.json()["error"]


def test_labels_of_columns(server: Server) -> None:
    body = {"inputs": [{"b64": B64}], "parameters": {"labels": True}}
    (output,) = server.client.post("/v1/models/small:predict", json=body).json()["outputs"]
    labels = server.client.get("/v1/models/small/contract").json()["labels"]
    assert sorted(output["labels"]) == sorted(labels)
    assert output["probabilities"] == sorted(output["probabilities"], reverse=True)


@pytest.mark.long
def test_predict_route_takes_the_place_of_another_body_only(small_zoo: Path) -> None:
    settings = {"FOVEA_MODELS": str(small_zoo), "FOVEA_HEALTH_ROUTE": "/health/ready"}
    with Server(**settings, FOVEA_PREDICT_ROUTE="/predict") as server:  # Hugging Face's path
        reply = server.client.post("/predict", json={"instances": [{"b64": B64}]})
        assert (reply.status_code, list(reply.json())) == (200, ["predictions"])
        assert server.client.post("/", json={"inputs": B64}).status_code == 200
        assert server.client.get("/health/ready").status_code == 200
    with Server(**settings, FOVEA_PREDICT_ROUTE="/v1/classify") as server:
        assert "predictions" in server.client.post("/v1/classify", content=IMAGE).json()


@pytest.mark.long
def test_workers_follow_the_platform_too(small_zoo: Path) -> None:
    variables = {"AIP_HEALTH_ROUTE": "/healthy", "AIP_PREDICT_ROUTE": "/predict"}
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2", **variables) as server:
        for _ in range(6):  # a new connection each time, to either worker
            assert httpx.get(f"{server.url}/healthy").status_code == 200
            reply = httpx.post(f"{server.url}/predict", json={"instances": [{"b64": B64}]})
            assert list(reply.json()) == ["predictions"]


PLATFORMS: dict[str, tuple[list[str], dict[str, str], str, str, float]] = {
    "sagemaker": (["serve"], {}, "/ping", "/invocations", 30),
    "vertex": (
        [],
        {"AIP_HEALTH_ROUTE": "/healthy", "AIP_PREDICT_ROUTE": "/v1/endpoints/1:predict"},
        "/healthy",
        "/v1/endpoints/1:predict",
        30,
    ),
    "cloud-run": (
        [],
        {"FOVEA_DRAIN_GRACE": "0", "FOVEA_DRAIN_LIMIT": "7"},
        "/health/ready",
        "/v1/classify",
        10,
    ),
    "azure-ml": ([], {}, "/health/live", "/v1/classify", 30),
    "hugging-face": ([], {}, "/health", "/", 30),
}
"""Arguments, variables, probe and route of each platform, and its seconds from SIGTERM to SIGKILL."""

PORT_VARIABLES = {"vertex": "AIP_HTTP_PORT", "cloud-run": "PORT"}


@pytest.fixture
def port() -> Iterator[str]:
    """Yield a port that no other process gets, and that the service may bind too."""
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind(("127.0.0.1", 0))
        yield str(reservation.getsockname()[1])


@pytest.mark.long
@pytest.mark.parametrize("platform", PLATFORMS)
def test_container_lives_as_the_platform_expects(small_zoo: Path, platform: str, port: str) -> None:
    """The entry point of the image starts, answers the probe, and finishes its work after SIGTERM."""
    arguments, variables, probe, route, kill_seconds = PLATFORMS[platform]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    environment |= {"FOVEA_MODELS": str(small_zoo), PORT_VARIABLES.get(platform, "FOVEA_PORT"): port}
    environment |= {**variables, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "deploy" / "image" / "serve"), *arguments]
    body: dict[str, Any] = {"content": IMAGE, "headers": {"Content-Type": "image/jpeg"}}
    if platform == "vertex":
        body = {"json": {"instances": [{"b64": B64}]}}
    started = time.monotonic()
    with Server({"args": command, "env": environment}) as server:
        assert server.url.endswith(f":{port}")
        assert server.client.get(probe).status_code == 200
        assert time.monotonic() - started < 60  # a generous share of each platform's limit for a start
        assert server.client.post(route, **body).status_code == 200
        # The body of this request is complete only after SIGTERM: the work is accepted, and is finished.
        wire = socket.create_connection(("127.0.0.1", int(port)), timeout=30)
        head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(IMAGE)}\r\n\r\n"
        wire.sendall(head.encode() + IMAGE[:100])
        server.wait_for_metric(2, "fovea_requests_in_flight")  # this request and the scrape
        server.process.send_signal(signal.SIGTERM)
        stopped = time.monotonic()
        wire.sendall(IMAGE[100:])
        assert wire.recv(64).startswith(b"HTTP/1.1 200")
        wire.close()
        assert server.process.wait(kill_seconds) == 0
        assert time.monotonic() - stopped < kill_seconds

"""What all dialects have in common: limits, errors in their own shapes, metrics, and a switch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.errors import SettingsError
from service.settings import load_settings
from tests.pictures import jpeg
from tests.raw import Wire
from tests.servers import Server


@pytest.fixture(scope="module")
def narrow(small_zoo: Path) -> Iterator[Server]:
    """Little may be sent, and in little time."""
    with Server(
        FOVEA_MODELS=str(small_zoo),
        FOVEA_BODY_BYTES="100000",
        FOVEA_JSON_BYTES="10000",
        FOVEA_BODY_TIMEOUT="0.5",
    ) as running:
        yield running


def test_an_error_that_routing_finds_has_the_route_s_shape(server: Server) -> None:
    assert isinstance(server.client.get("/predict").json()["error"], str)
    assert isinstance(server.client.get("/v1/classify").json()["error"], dict)
    assert isinstance(server.client.get("/nothing").json()["error"], dict)
    assert server.client.get("/predict").headers["allow"] == "POST"


def test_json_has_a_limit_of_its_own(narrow: Server) -> None:
    body = b'{"inputs": "' + 20_000 * b"A" + b'"}'
    said = narrow.client.post("/", content=body, headers={"Content-Type": "application/json"})
    assert (said.status_code, said.json()["code"]) == (413, "body_too_large")
    assert "FOVEA_JSON_BYTES" in said.json()["error"]
    chunked = narrow.client.post("/", content=iter([body]), headers={"Content-Type": "application/json"})
    assert (chunked.status_code, chunked.json()["code"]) == (413, "body_too_large")
    raw = narrow.client.post("/", content=jpeg() + bytes(50_000))
    assert raw.status_code == 200, raw.text
    raw = narrow.client.post("/", content=bytes(100_001))
    assert (raw.status_code, raw.json()["code"]) == (413, "body_too_large")
    assert "FOVEA_BODY_BYTES" in raw.json()["error"]


def test_json_that_is_nested_too_deep_is_malformed(server: Server) -> None:
    body = b'{"inputs": ' + 10_000 * b"[" + 10_000 * b"]" + b"}"
    reply = server.client.post("/", content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["code"]) == (400, "bad_request")


def test_a_slow_body_is_refused_in_its_shape(narrow: Server) -> None:
    with Wire(narrow.url) as wire:
        wire.send(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        answer = wire.answer()
    assert (answer.status, answer.json["code"]) == (408, "body_timeout")


def test_what_is_no_http_any_more_is_refused_in_its_shape(narrow: Server) -> None:
    with Wire(narrow.url) as wire:
        wire.send(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n")
        answer = wire.answer()
    assert (answer.status, answer.json["code"], answer.json["request_id"]) == (
        400,
        "bad_http",
        answer.headers["x-request-id"],
    )
    narrow.wait_for(1, "fovea_requests_total", dialect="huggingface", status="400")


def test_a_client_that_leaves_is_no_error_of_ours(narrow: Server) -> None:
    with Wire(narrow.url) as wire:
        wire.send(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        narrow.wait_for(2, "fovea_requests_in_flight")  # it, and the scrape
    narrow.wait_for(1, "fovea_requests_total", dialect="huggingface", status="0")


def test_a_deadline_holds(server: Server) -> None:
    late = server.client.post("/", content=jpeg(), headers={"X-Deadline-Ms": "0.001"})
    assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
    bad = server.client.post("/", content=jpeg(), headers={"X-Deadline-Ms": "soon"})
    assert (bad.status_code, bad.json()["code"]) == (400, "bad_request")


def test_requests_are_counted_by_dialect(server: Server) -> None:
    labels = {"dialect": "huggingface", "route": "/models/{name}", "model": "small", "status": "200"}
    before = server.metric("fovea_requests_total", **labels)
    seconds = server.metric("fovea_request_seconds_count", dialect="huggingface", model="small")
    server.client.post("/models/small", content=jpeg())
    assert server.metric("fovea_requests_total", **labels) == before + 1
    assert server.metric("fovea_request_seconds_count", dialect="huggingface", model="small") == seconds + 1


def test_a_dialect_can_be_switched_off(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DIALECTS="native, torchserve") as running:
        assert running.client.post("/v1/classify", content=jpeg()).status_code == 200
        assert running.client.post("/predict", content=jpeg()).json()["error"]["code"] == "not_found"
        assert "/predict" not in running.client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "native,torchserv",
            "FOVEA_DIALECTS is .*: there is no dialect 'torchserv'; did you mean 'torchserve'?",
        ),
        ("native,", "did you mean"),
        ("oip", "'native' is missing"),
    ],
)
def test_an_unknown_dialect_is_refused(monkeypatch: pytest.MonkeyPatch, value: str, said: str) -> None:
    monkeypatch.setenv("FOVEA_DIALECTS", value)
    with pytest.raises(SettingsError, match=said.replace("?", r"\?")):
        load_settings()

"""All protocols have limits, errors in their own form, metrics, and a switch."""

from __future__ import annotations

import base64
import gzip
import json
import random
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fovea.service.errors import SettingsError
from fovea.service.settings import load_settings
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.raw import CLASSIFY_HEAD, Wire
from tests.servers import Server, wait_until

B64 = base64.b64encode(make_jpeg()).decode()

ASKED: dict[str, tuple[str, Any]] = {
    "native": ("/v1/models/{}/classify", {"images": [{"b64": B64}]}),
    "oip": (
        "/v2/models/{}/infer",
        {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [B64]}]},
    ),
    "torchserve": ("/predictions/{}", make_jpeg()),
    "tensorflow": ("/v1/models/{}:predict", {"instances": [{"b64": B64}]}),
    "huggingface": ("/models/{}", {"inputs": B64}),
}
"""A good request in each protocol: the path, with the model's name in it, and the body."""


JSON = {
    protocol: {"Content-Type": "application/octet-stream" if isinstance(body, bytes) else "application/json"}
    for protocol, (_, body) in ASKED.items()
}


PROBES = {
    "/health/ready": "native",
    "/v2/health/ready": "oip",
    "/v2/models/small/ready": "oip",
    "/v2/models/small/versions/1/ready": "oip",
    "/ping": "torchserve",
    "/v1/models/small": "tensorflow",
    "/v1/models/small/versions/1": "tensorflow",
    "/health": "huggingface",
}
"""The readiness routes of each protocol."""


def post_request(url: str, protocol: str, name: str = "small", **headers: str) -> httpx.Response:
    path, body = ASKED[protocol]
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    return httpx.post(url + path.format(name), headers=headers, timeout=60, **content)


def error_code(reply: httpx.Response, protocol: str) -> str:
    """Return Fovea's code of an error, and check that the error has all keys that clients read."""
    body = reply.json()
    if protocol == "native":
        assert body["error"]["message"]
        code, request_id = body["error"]["code"], body["error"]["request_id"]
    elif protocol == "torchserve":
        assert body["message"]
        assert (body["code"], body["type"][-9:]) == (reply.status_code, "Exception")
        code, request_id = body["reason"], body["request_id"]
    else:
        assert isinstance(body["error"], str)
        code, request_id = body["code"], body["request_id"]
    assert request_id == reply.headers["x-request-id"]
    return str(code)


@pytest.fixture(scope="module")
def narrow(small_zoo: Path) -> Iterator[Server]:
    """A server with small limits for the size of a body and for the time that it may take."""
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


@pytest.mark.parametrize(
    "path",
    ["/", "/ping", "/health", "/health/live", "/v2/health/ready", "/v1/models/small", "/v2/models/none"],
)
def test_head_is_answered_as_get_is(server: Server, path: str) -> None:
    """Load balancers send HEAD requests."""
    reply, head = server.client.get(path), server.client.head(path)
    assert head.status_code == reply.status_code
    assert head.content == b""
    if reply.status_code == 200:
        assert int(head.headers["content-length"]) == len(reply.content)


def test_head_is_counted_by_its_route(server: Server) -> None:
    labels = {"protocol": "torchserve", "route": "/ping", "status": "200"}
    before = server.read_metric("fovea_requests_total", **labels)
    server.client.head("/ping")
    assert server.read_metric("fovea_requests_total", **labels) == before + 1


def test_what_is_not_there_is_told_in_the_shape_of_what_is_around_it(server: Server) -> None:
    for path in ("/v2/trace/setting", "/v2/models/a/b/infer"):
        reply = server.client.get(path)
        assert (reply.status_code, error_code(reply, "oip")) == (404, "not_found")
    assert error_code(server.client.get("/v2nd"), "native") == "not_found"
    assert server.read_metric("fovea_requests_total", protocol="oip", route="unmatched", status="404") >= 2


@pytest.mark.parametrize("protocol", ASKED)
def test_errors_have_each_protocol_s_shape(server: Server, protocol: str) -> None:
    assert post_request(server.url, protocol).status_code == 200
    unknown = post_request(server.url, protocol, "large")
    assert (unknown.status_code, error_code(unknown, protocol)) == (404, "model_not_found")
    late = post_request(server.url, protocol, **{"X-Deadline-Ms": "0.001", "X-Request-ID": "mine"})
    assert (late.status_code, error_code(late, protocol)) == (504, "deadline_exceeded")
    assert late.headers["x-request-id"] == "mine"


@pytest.mark.long
def test_work_is_refused_in_each_protocol_s_shape(small_zoo: Path) -> None:
    """The first refusal is due to overload, the second because the service stops."""
    settings = {"FOVEA_BODY_BYTES": "100000", "FOVEA_BODIES_BYTES": "100000"}
    with (
        Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_LIMIT="600", **settings) as running,
        Wire(running.url) as wire,
    ):
        wire.send(CLASSIFY_HEAD, b"Content-Length: 100000\r\n\r\n", bytes(99_999))
        running.wait_for_metric(2, "fovea_requests_in_flight")  # it, and the scrape
        assert {httpx.get(running.url + path, timeout=60).status_code for path in PROBES} == {200}
        for protocol in ASKED:
            full = post_request(running.url, protocol)
            assert (full.status_code, error_code(full, protocol)) == (503, "overloaded")
            assert int(full.headers["retry-after"]) >= 1
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: error_code(post_request(running.url, "native"), "native") == "draining")
        for path, protocol in PROBES.items():
            probe = httpx.get(running.url + path, timeout=60)
            assert (probe.status_code, error_code(probe, protocol)) == (503, "draining"), path
        for protocol in ASKED:
            stopping = post_request(running.url, protocol)
            assert (stopping.status_code, error_code(stopping, protocol)) == (503, "draining")
            assert stopping.headers["retry-after"] == "1"
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=20) == 0


@pytest.mark.parametrize("protocol", ASKED)
def test_a_model_that_rests_is_woken(tmp_path: Path, protocol: str) -> None:
    for number in range(2):
        add_to_repository(build_model(seed=number), tmp_path, f"m{number}")
    with Server(FOVEA_MODELS=str(tmp_path), FOVEA_DEFAULT_MODEL="m0", FOVEA_MODELS_LOADED="1") as running:
        for name in ("m1", "m0", "m1"):
            assert post_request(running.url, protocol, name).status_code == 200
            assert [one["name"] for one in running.client.get("/v1/models").json()["models"]] == [name]
        assert running.read_metric("fovea_requests_total", protocol=protocol, model="m1", status="200") == 2


def test_json_has_a_limit_of_its_own(narrow: Server) -> None:
    body = b'{"inputs": "' + 20_000 * b"A" + b'"}'
    said = narrow.client.post("/", content=body, headers={"Content-Type": "application/json"})
    assert (said.status_code, said.json()["code"]) == (413, "body_too_large")
    assert "FOVEA_JSON_BYTES" in said.json()["error"]
    chunked = narrow.client.post("/", content=iter([body]), headers={"Content-Type": "application/json"})
    assert (chunked.status_code, chunked.json()["code"]) == (413, "body_too_large")
    raw = narrow.client.post("/", content=make_jpeg() + bytes(50_000))
    assert raw.status_code == 200, raw.text
    raw = narrow.client.post("/", content=bytes(100_001))
    assert (raw.status_code, raw.json()["code"]) == (413, "body_too_large")
    assert "FOVEA_BODY_BYTES" in raw.json()["error"]


@pytest.mark.parametrize("protocol", [one for one, (_, body) in ASKED.items() if not isinstance(body, bytes)])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_base64_may_be_in_lines(server: Server, protocol: str, end: str) -> None:
    """The command `base64` and Python's `encodebytes` write lines."""
    path, body = ASKED[protocol]
    lines = base64.encodebytes(make_jpeg()).decode().replace("\n", end)
    content = json.dumps(body).replace(json.dumps(B64), json.dumps(lines))
    reply = server.client.post(path.format("small"), content=content, headers=JSON[protocol])
    assert (reply.status_code, reply.json()) == (200, post_request(server.url, protocol).json())


@pytest.mark.parametrize("protocol", ASKED)
def test_bodies_may_be_compressed(server: Server, protocol: str) -> None:
    path, body = ASKED[protocol]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    as_it_is = server.client.post(path.format("small"), content=content, headers=JSON[protocol])
    for encoding, packed in (
        ("gzip", gzip.compress(content)),
        ("GZip", gzip.compress(content)),
        ("deflate", zlib.compress(content)),
        ("identity", content),
    ):
        headers = {**JSON[protocol], "Content-Encoding": encoding}
        reply = server.client.post(path.format("small"), content=packed, headers=headers)
        assert (reply.status_code, reply.json()) == (200, as_it_is.json())


@pytest.mark.parametrize("path", ["/v1/explain", "/explanations/small"])
def test_so_may_those_that_are_explained(server: Server, path: str) -> None:
    headers = {"Content-Encoding": "gzip"}
    reply = server.client.post(path, content=gzip.compress(make_jpeg()), headers=headers)
    assert (reply.status_code, reply.json()) == (200, server.client.post(path, content=make_jpeg()).json())


PACKED_WRONGLY = {
    "in another way": ("br", b"x", "the content encoding 'br'"),
    "twice": ("gzip, gzip", gzip.compress(gzip.compress(b"x")), "the content encoding 'gzip, gzip'"),
    "empty": ("gzip", b"", "ends too early"),
    "cut": ("gzip", gzip.compress(make_jpeg())[:-1], "ends too early"),
    "a byte more": ("gzip", gzip.compress(make_jpeg()) + b"x", "has more data after its end"),
    "many": ("deflate", zlib.compress(make_jpeg()) * 300, "has more data after its end"),
    "not at all": ("gzip", make_jpeg(), "malformed"),
    "another sum": ("deflate", zlib.compress(make_jpeg())[:-4] + b"sums", "malformed"),
}


@pytest.mark.parametrize("how", PACKED_WRONGLY)
def test_a_body_that_is_compressed_wrongly(server: Server, how: str) -> None:
    encoding, content, said = PACKED_WRONGLY[how]
    reply = server.client.post("/predict", content=content, headers={"Content-Encoding": encoding})
    assert (reply.status_code, error_code(reply, "huggingface")) == (400, "bad_request")
    assert said in reply.json()["error"]


def test_what_was_compressed_has_the_limits_of_what_was_not(narrow: Server) -> None:
    headers = {"Content-Encoding": "gzip"}
    reply = narrow.client.post("/predict", content=gzip.compress(bytes(100_001)), headers=headers)
    assert (reply.status_code, error_code(reply, "huggingface")) == (413, "body_too_large")
    written = gzip.compress(b'{"inputs": "' + 20_000 * b"A" + b'"}')
    for path, protocol in (("/v1/models/small:predict", "tensorflow"), ("/v2/models/small/infer", "oip")):
        reply = narrow.client.post(path, content=written, headers=headers)
        assert (reply.status_code, error_code(reply, protocol)) == (413, "body_too_large")
        assert "FOVEA_JSON_BYTES" in reply.json()["error"]


@pytest.mark.long
def test_what_was_compressed_is_counted_among_all_bodies(small_zoo: Path) -> None:
    settings = {"FOVEA_BODY_BYTES": "100000", "FOVEA_BODIES_BYTES": "100000"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running:
        content = make_jpeg() + random.Random(0).randbytes(60_000)  # noqa: S311
        assert running.client.post("/predict", content=content).status_code == 200
        headers = {"Content-Encoding": "gzip"}
        reply = running.client.post("/predict", content=gzip.compress(content), headers=headers)
        assert (reply.status_code, error_code(reply, "huggingface")) == (503, "overloaded")


def test_json_that_is_nested_too_deep_is_malformed(server: Server) -> None:
    body = b'{"inputs": ' + 10_000 * b"[" + 10_000 * b"]" + b"}"
    reply = server.client.post("/", content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["code"]) == (400, "bad_request")


def test_a_slow_body_is_refused_in_its_shape(narrow: Server) -> None:
    with Wire(narrow.url) as wire:
        wire.send(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        answer = wire.read_response()
    assert (answer.status, answer.json["code"]) == (408, "body_timeout")


def test_what_is_no_http_any_more_is_refused_in_its_shape(narrow: Server) -> None:
    with Wire(narrow.url) as wire:
        wire.send(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n")
        answer = wire.read_response()
    assert (answer.status, answer.json["code"], answer.json["request_id"]) == (
        400,
        "bad_http",
        answer.headers["x-request-id"],
    )
    narrow.wait_for_metric(1, "fovea_requests_total", protocol="huggingface", status="400")


@pytest.mark.parametrize(
    ("path", "protocol"),
    [("/predict", "huggingface"), ("/explanations/small", "torchserve"), ("/v1/explain", "native")],
)
def test_a_client_that_leaves_is_no_error_of_ours(narrow: Server, path: str, protocol: str) -> None:
    with Wire(narrow.url) as wire:
        wire.send(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc" % path.encode())
        narrow.wait_for_metric(2, "fovea_requests_in_flight")  # it, and the scrape
    narrow.wait_for_metric(1, "fovea_requests_total", protocol=protocol, status="0")


def test_a_deadline_holds(server: Server) -> None:
    late = server.client.post("/", content=make_jpeg(), headers={"X-Deadline-Ms": "0.001"})
    assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
    bad = server.client.post("/", content=make_jpeg(), headers={"X-Deadline-Ms": "soon"})
    assert (bad.status_code, bad.json()["code"]) == (400, "bad_request")


def test_requests_are_counted_by_protocol(server: Server) -> None:
    labels = {"protocol": "huggingface", "route": "/models/{name}", "model": "small", "status": "200"}
    before = server.read_metric("fovea_requests_total", **labels)
    seconds = server.read_metric("fovea_request_seconds_count", protocol="huggingface", model="small")
    server.client.post("/models/small", content=make_jpeg())
    assert server.read_metric("fovea_requests_total", **labels) == before + 1
    later = server.read_metric("fovea_request_seconds_count", protocol="huggingface", model="small")
    assert later == seconds + 1


@pytest.mark.long
def test_a_protocol_can_be_switched_off(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_PROTOCOLS="native, torchserve") as running:
        assert running.client.post("/v1/classify", content=make_jpeg()).status_code == 200
        assert running.client.post("/predict", content=make_jpeg()).json()["error"]["code"] == "not_found"
        assert "/predict" not in running.client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            "native,torchserv",
            "FOVEA_PROTOCOLS is .*: there is no protocol 'torchserv'; the protocols are native, oip, ",
        ),
        ("native,", "there is no protocol ''; the protocols are native"),
        ("oip", "'native' is missing"),
    ],
)
def test_an_unknown_protocol_is_refused(monkeypatch: pytest.MonkeyPatch, value: str, said: str) -> None:
    monkeypatch.setenv("FOVEA_PROTOCOLS", value)
    with pytest.raises(SettingsError, match=said.replace("?", r"\?")):
        load_settings()

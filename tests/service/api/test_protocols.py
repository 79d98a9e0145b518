"""All protocols have limits, errors of their own shape, metrics, and a switch."""

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


BODY_HEADERS = {
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
def limited_server(small_zoo: Path) -> Iterator[Server]:
    """A server with small limits for the size of a body and for the time that it may take."""
    with Server(
        FOVEA_MODELS=str(small_zoo),
        FOVEA_BODY_BYTES="100000",
        FOVEA_JSON_BYTES="10000",
        FOVEA_BODY_TIMEOUT="0.5",
    ) as server:
        yield server


def test_routing_error_has_the_shape_of_the_route(server: Server) -> None:
    assert isinstance(server.client.get("/predict").json()["error"], str)
    assert isinstance(server.client.get("/v1/classify").json()["error"], dict)
    assert isinstance(server.client.get("/nothing").json()["error"], dict)
    assert server.client.get("/predict").headers["allow"] == "POST"


@pytest.mark.parametrize(
    "path",
    ["/", "/ping", "/health", "/health/live", "/v2/health/ready", "/v1/models/small", "/v2/models/none"],
)
def test_head_equals_get_without_the_body(server: Server, path: str) -> None:
    """Load balancers send HEAD requests."""
    for coding in ("identity", "gzip"):
        accepted = {"Accept-Encoding": coding}
        reply, head = server.client.get(path, headers=accepted), server.client.head(path, headers=accepted)
        assert head.status_code == reply.status_code
        assert head.content == b""
        assert head.headers.get("content-encoding") == reply.headers.get("content-encoding")
        if reply.status_code == 200:
            assert int(head.headers["content-length"]) == reply.num_bytes_downloaded


def test_head_is_counted_under_its_route(server: Server) -> None:
    labels = {"protocol": "torchserve", "route": "/ping", "status": "200"}
    before = server.read_metric("fovea_requests_total", **labels)
    server.client.head("/ping")
    assert server.read_metric("fovea_requests_total", **labels) == before + 1


@pytest.mark.parametrize(
    ("protocol", "path", "route"),
    [
        ("native", "/v1/classify", "/v1/classify"),
        ("oip", "/v2/models/small/infer", "/v2/models/{name}/infer"),
    ],
)
def test_wrong_method_is_counted_under_its_route(
    server: Server, protocol: str, path: str, route: str
) -> None:
    labels = {"protocol": protocol, "route": route, "status": "405"}
    before = server.read_metric("fovea_requests_total", **labels)
    assert server.client.delete(path).status_code == 405
    assert server.read_metric("fovea_requests_total", **labels) == before + 1


def test_unknown_path_error_has_the_shape_of_its_prefix(server: Server) -> None:
    for path in ("/v2/trace/setting", "/v2/models/a/b/infer"):
        reply = server.client.get(path)
        assert (reply.status_code, error_code(reply, "oip")) == (404, "not_found")
    assert error_code(server.client.get("/v2nd"), "native") == "not_found"
    assert server.read_metric("fovea_requests_total", protocol="oip", route="unmatched", status="404") >= 2


@pytest.mark.parametrize("protocol", ASKED)
def test_errors_have_the_shape_of_the_protocol(server: Server, protocol: str) -> None:
    assert post_request(server.url, protocol).status_code == 200
    unknown_reply = post_request(server.url, protocol, "large")
    assert (unknown_reply.status_code, error_code(unknown_reply, protocol)) == (404, "model_not_found")
    late_reply = post_request(server.url, protocol, **{"X-Deadline-Ms": "0.001", "X-Request-ID": "mine"})
    assert (late_reply.status_code, error_code(late_reply, protocol)) == (504, "deadline_exceeded")
    assert late_reply.headers["x-request-id"] == "mine"


@pytest.mark.long
def test_refusals_have_the_shape_of_the_protocol(small_zoo: Path) -> None:
    """The first refusal is due to overload, the second to the stop of the service."""
    settings = {"FOVEA_BODY_BYTES": "100000", "FOVEA_BODIES_BYTES": "100000"}
    with (
        Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_LIMIT="600", **settings) as server,
        Wire(server.url) as wire,
    ):
        wire.send(CLASSIFY_HEAD, b"Content-Length: 100000\r\n\r\n", bytes(99_999))
        server.wait_for_metric(2, "fovea_requests_in_flight")  # the request and the scrape
        assert {httpx.get(server.url + path, timeout=60).status_code for path in PROBES} == {200}
        for protocol in ASKED:
            overload_reply = post_request(server.url, protocol)
            assert (overload_reply.status_code, error_code(overload_reply, protocol)) == (503, "overloaded")
            assert int(overload_reply.headers["retry-after"]) >= 1
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: error_code(post_request(server.url, "native"), "native") == "draining")
        for path, protocol in PROBES.items():
            probe = httpx.get(server.url + path, timeout=60)
            assert (probe.status_code, error_code(probe, protocol)) == (503, "draining"), path
        for protocol in ASKED:
            draining_reply = post_request(server.url, protocol)
            assert (draining_reply.status_code, error_code(draining_reply, protocol)) == (503, "draining")
            assert draining_reply.headers["retry-after"] == "1"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    "protocol",
    [one if one == "native" else pytest.param(one, marks=pytest.mark.long) for one in ASKED],
)
def test_unloaded_model_is_loaded_on_request(tmp_path: Path, protocol: str) -> None:
    for number in range(2):
        add_to_repository(build_model(seed=number), tmp_path, f"m{number}")
    with Server(FOVEA_MODELS=str(tmp_path), FOVEA_DEFAULT_MODEL="m0", FOVEA_MODELS_LOADED="1") as server:
        for name in ("m1", "m0", "m1"):
            assert post_request(server.url, protocol, name).status_code == 200
            assert [model["name"] for model in server.client.get("/v1/models").json()["models"]] == [name]
        assert server.read_metric("fovea_requests_total", protocol=protocol, model="m1", status="200") == 2


def test_json_has_its_own_size_limit(limited_server: Server) -> None:
    body = b'{"inputs": "' + 20_000 * b"A" + b'"}'
    reply = limited_server.client.post("/", content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["code"]) == (413, "body_too_large")
    assert "FOVEA_JSON_BYTES" in reply.json()["error"]
    chunked_reply = limited_server.client.post(
        "/", content=iter([body]), headers={"Content-Type": "application/json"}
    )
    assert (chunked_reply.status_code, chunked_reply.json()["code"]) == (413, "body_too_large")
    raw_reply = limited_server.client.post("/", content=make_jpeg() + bytes(50_000))
    assert raw_reply.status_code == 200, raw_reply.text
    raw_reply = limited_server.client.post("/", content=bytes(100_001))
    assert (raw_reply.status_code, raw_reply.json()["code"]) == (413, "body_too_large")
    assert "FOVEA_BODY_BYTES" in raw_reply.json()["error"]


@pytest.mark.parametrize(
    "protocol", [name for name, (_, body) in ASKED.items() if not isinstance(body, bytes)]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_base64_with_line_breaks_is_read(server: Server, protocol: str, end: str) -> None:
    """The command `base64` and Python's `encodebytes` write lines."""
    path, body = ASKED[protocol]
    lines = base64.encodebytes(make_jpeg()).decode().replace("\n", end)
    content = json.dumps(body).replace(json.dumps(B64), json.dumps(lines))
    reply = server.client.post(path.format("small"), content=content, headers=BODY_HEADERS[protocol])
    assert (reply.status_code, reply.json()) == (200, post_request(server.url, protocol).json())


@pytest.mark.parametrize("protocol", ASKED)
def test_compressed_body_is_read(server: Server, protocol: str) -> None:
    path, body = ASKED[protocol]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    plain_reply = server.client.post(path.format("small"), content=content, headers=BODY_HEADERS[protocol])
    for encoding, compressed in (
        ("gzip", gzip.compress(content)),
        ("GZip", gzip.compress(content)),
        ("deflate", zlib.compress(content)),
        ("identity", content),
    ):
        headers = {**BODY_HEADERS[protocol], "Content-Encoding": encoding}
        reply = server.client.post(path.format("small"), content=compressed, headers=headers)
        assert (reply.status_code, reply.json()) == (200, plain_reply.json())


@pytest.mark.parametrize("path", ["/v1/explain", "/explanations/small"])
def test_compressed_body_is_explained(server: Server, path: str) -> None:
    headers = {"Content-Encoding": "gzip"}
    reply = server.client.post(path, content=gzip.compress(make_jpeg()), headers=headers)
    assert (reply.status_code, reply.json()) == (200, server.client.post(path, content=make_jpeg()).json())


BAD_COMPRESSION = {
    "in another way": ("br", b"x", "the content encoding 'br'"),
    "twice": ("gzip, gzip", gzip.compress(gzip.compress(b"x")), "the content encoding 'gzip, gzip'"),
    "empty": ("gzip", b"", "ends too early"),
    "cut": ("gzip", gzip.compress(make_jpeg())[:-1], "ends too early"),
    "a byte more": ("gzip", gzip.compress(make_jpeg()) + b"x", "has more data after its end"),
    "many": ("deflate", zlib.compress(make_jpeg()) * 300, "has more data after its end"),
    "not at all": ("gzip", make_jpeg(), "malformed"),
    "another sum": ("deflate", zlib.compress(make_jpeg())[:-4] + b"sums", "malformed"),
}


@pytest.mark.parametrize("case", BAD_COMPRESSION)
def test_badly_compressed_body_is_refused(server: Server, case: str) -> None:
    encoding, content, message = BAD_COMPRESSION[case]
    reply = server.client.post("/predict", content=content, headers={"Content-Encoding": encoding})
    assert (reply.status_code, error_code(reply, "huggingface")) == (400, "bad_request")
    assert message in reply.json()["error"]


def test_size_limits_apply_to_the_decompressed_body(limited_server: Server) -> None:
    headers = {"Content-Encoding": "gzip"}
    reply = limited_server.client.post("/predict", content=gzip.compress(bytes(100_001)), headers=headers)
    assert (reply.status_code, error_code(reply, "huggingface")) == (413, "body_too_large")
    body = gzip.compress(b'{"inputs": "' + 20_000 * b"A" + b'"}')
    for path, protocol in (("/v1/models/small:predict", "tensorflow"), ("/v2/models/small/infer", "oip")):
        reply = limited_server.client.post(path, content=body, headers=headers)
        assert (reply.status_code, error_code(reply, protocol)) == (413, "body_too_large")
        assert "FOVEA_JSON_BYTES" in reply.json()["error"]


@pytest.mark.long
def test_decompressed_body_counts_towards_the_body_memory(small_zoo: Path) -> None:
    settings = {"FOVEA_BODY_BYTES": "100000", "FOVEA_BODIES_BYTES": "100000"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
        content = make_jpeg() + random.Random(0).randbytes(60_000)  # noqa: S311
        assert server.client.post("/predict", content=content).status_code == 200
        headers = {"Content-Encoding": "gzip"}
        reply = server.client.post("/predict", content=gzip.compress(content), headers=headers)
        assert (reply.status_code, error_code(reply, "huggingface")) == (503, "overloaded")


def test_deeply_nested_json_is_refused(server: Server) -> None:
    body = b'{"inputs": ' + 10_000 * b"[" + 10_000 * b"]" + b"}"
    reply = server.client.post("/", content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["code"]) == (400, "bad_request")


def test_slow_body_error_has_the_shape_of_the_protocol(limited_server: Server) -> None:
    with Wire(limited_server.url) as wire:
        wire.send(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        response = wire.read_response()
    assert (response.status, response.json["code"]) == (408, "body_timeout")


def test_broken_http_error_has_the_shape_of_the_protocol(limited_server: Server) -> None:
    with Wire(limited_server.url) as wire:
        wire.send(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n")
        response = wire.read_response()
    assert (response.status, response.json["code"], response.json["request_id"]) == (
        400,
        "bad_http",
        response.headers["x-request-id"],
    )
    limited_server.wait_for_metric(1, "fovea_requests_total", protocol="huggingface", status="400")


@pytest.mark.parametrize(
    ("path", "protocol"),
    [("/predict", "huggingface"), ("/explanations/small", "torchserve"), ("/v1/explain", "native")],
)
def test_disconnect_is_counted_with_status_0(server: Server, path: str, protocol: str) -> None:
    labels = {"protocol": protocol, "status": "0"}
    server.wait_for_metric(1, "fovea_requests_in_flight")  # those of other tests have ended
    before = server.read_metric("fovea_requests_total", **labels)
    with Wire(server.url) as wire:
        wire.send(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc" % path.encode())
        server.wait_for_metric(2, "fovea_requests_in_flight")  # the request and the scrape
    server.wait_for_metric(before + 1, "fovea_requests_total", **labels)


def test_expired_and_malformed_deadlines_are_refused(server: Server) -> None:
    late_reply = server.client.post("/", content=make_jpeg(), headers={"X-Deadline-Ms": "0.001"})
    assert (late_reply.status_code, late_reply.json()["code"]) == (504, "deadline_exceeded")
    bad_reply = server.client.post("/", content=make_jpeg(), headers={"X-Deadline-Ms": "soon"})
    assert (bad_reply.status_code, bad_reply.json()["code"]) == (400, "bad_request")


def test_requests_are_counted_by_protocol(server: Server) -> None:
    labels = {"protocol": "huggingface", "route": "/models/{name}", "model": "small", "status": "200"}
    requests_before = server.read_metric("fovea_requests_total", **labels)
    timings_before = server.read_metric("fovea_request_seconds_count", protocol="huggingface", model="small")
    server.client.post("/models/small", content=make_jpeg())
    assert server.read_metric("fovea_requests_total", **labels) == requests_before + 1
    timings_after = server.read_metric("fovea_request_seconds_count", protocol="huggingface", model="small")
    assert timings_after == timings_before + 1


@pytest.mark.long
def test_protocol_can_be_switched_off(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_PROTOCOLS="native, torchserve") as server:
        assert server.client.post("/v1/classify", content=make_jpeg()).status_code == 200
        assert server.client.post("/predict", content=make_jpeg()).json()["error"]["code"] == "not_found"
        assert "/predict" not in server.client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "native,torchserv",
            "FOVEA_PROTOCOLS is .*: there is no protocol 'torchserv'; the protocols are native, oip, ",
        ),
        ("native,", "there is no protocol ''; the protocols are native"),
        ("oip", "'native' is missing"),
    ],
)
def test_invalid_protocol_setting_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    monkeypatch.setenv("FOVEA_PROTOCOLS", value)
    with pytest.raises(SettingsError, match=message.replace("?", r"\?")):
        load_settings()

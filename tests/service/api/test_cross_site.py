"""Pages of other sites cannot change models, whatever the browser sends; other clients can."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tritonclient.http as triton

from fovea.service.errors import SettingsError
from fovea.service.settings import load_settings
from tests.raw import Wire
from tests.servers import Server
from tests.tools import require_tool

UNLOAD = "/v2/repository/models/small/unload"
LOAD = "/v2/repository/models/small/load"
JSON = "application/json"
PROXY_HEADERS = {"X-Forwarded-Host": "photos.example"}


@pytest.fixture(scope="module")
def managed_server(small_zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_MANAGEMENT="true", FOVEA_WATCH="0") as server:
        yield server


@pytest.fixture(scope="module")
def server_with_host_names(small_zoo: Path) -> Iterator[Server]:
    """A server with configured names and a trusted proxy."""
    hosts = {"FOVEA_MANAGEMENT_HOSTS": "Photos.example, *.lab.example", "FOVEA_TRUSTED_PROXIES": "127.0.0.1"}
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_MANAGEMENT="true", FOVEA_WATCH="0", **hosts) as server:
        yield server


def is_served(server: Server) -> bool:
    return bool(server.client.get("/v1/models").json()["models"])


def change_status(server: Server, headers: dict[str, str], path: str = UNLOAD) -> int:
    """Request a change with these headers, undo it, and return the status of the request."""
    port = server.url.rpartition(":")[2]
    sent_headers = {name: value.replace("PORT", port) for name, value in headers.items()}
    reply = server.client.post(path, headers=sent_headers)
    assert is_served(server) is (reply.status_code != 200 or path == LOAD)
    if reply.status_code == 200:
        assert server.client.post(LOAD).status_code == 200
    else:
        assert reply.json().keys() == {"error", "code", "request_id"}
        assert reply.json()["code"] == "forbidden"
    return reply.status_code


FOREIGN_HEADERS = {
    "a form's post": {"Origin": "https://evil.example", "Content-Type": "text/plain"},
    "all headers of a browser": {
        "Origin": "https://evil.example",
        "Sec-Fetch-Site": "cross-site",
        "Host": "evil.example",
        "Content-Type": "text/plain",
    },
    "no type": {"Origin": "https://evil.example"},
    "JSON": {"Origin": "https://evil.example", "Content-Type": JSON},
    "no origin": {"Sec-Fetch-Site": "cross-site"},
    "a neighbour": {"Sec-Fetch-Site": "same-site", "Content-Type": JSON},
    "another port": {"Origin": "http://127.0.0.1:1"},
    "no port": {"Origin": "http://127.0.0.1"},
    "a sandbox": {"Origin": "null"},
    "an extension": {"Origin": "chrome-extension://127.0.0.1:PORT"},
    "a name that begins alike": {"Origin": "http://127.0.0.1:PORT.evil.example"},
    "a user": {"Origin": "http://127.0.0.1:PORT@evil.example"},
    "text": {"Content-Type": "text/plain; charset=utf-8"},
    "a form with files": {"Content-Type": "multipart/form-data; boundary=x"},
    "a form of our own site": {
        "Origin": "http://127.0.0.1:PORT",
        "Content-Type": "application/x-www-form-urlencoded",
    },
    "rebinding": {"Origin": "http://evil.example:PORT", "Host": "evil.example:PORT"},
    "rebinding, with the site marked as its own": {
        "Origin": "https://evil.example",
        "Host": "evil.example",
        "Sec-Fetch-Site": "same-origin",
        "Content-Type": JSON,
    },
    "rebinding, with a dot": {"Origin": "http://evil.example.:PORT", "Host": "evil.example.:PORT"},
    "rebinding, to a name like an address": {
        "Origin": "http://127.0.0.1.evil.example",
        "Host": "127.0.0.1.evil.example",
    },
    "rebinding, without an origin": {"Host": "evil.example", "Sec-Fetch-Mode": "no-cors"},
    "a forwarded host from an untrusted sender": {
        "Origin": "https://evil.example",
        "X-Forwarded-Host": "evil.example",
    },
}


@pytest.mark.parametrize("case", FOREIGN_HEADERS)
def test_foreign_page_cannot_change_models(managed_server: Server, case: str) -> None:
    assert change_status(managed_server, FOREIGN_HEADERS[case]) == 403
    assert change_status(managed_server, FOREIGN_HEADERS[case], LOAD) == 403


ALLOWED_HEADERS: dict[str, dict[str, str]] = {
    "a program": {},
    "a program that sends JSON": {"Content-Type": f"{JSON}; charset=utf-8"},
    "curl -d": {"Content-Type": "application/x-www-form-urlencoded"},
    "our own documentation": {
        "Origin": "http://127.0.0.1:PORT",
        "Sec-Fetch-Site": "same-origin",
        "Content-Type": JSON,
    },
    "by another name of the host": {"Origin": "http://localhost:PORT", "Host": "LOCALHOST:PORT"},
    "over TLS": {"Origin": "https://[::1]", "Host": "[::1]:443"},
    "in a container": {"Host": "fovea:8000", "Origin": "http://fovea:8000"},
    "in a cluster": {
        "Host": "fovea.default.svc.cluster.local",
        "Origin": "http://fovea.default.svc.cluster.local",
    },
    "a program by any name": {"Host": "vision.example.com:8000"},
    "a program in another namespace": {"Host": "fovea.vision"},
}


@pytest.mark.parametrize("case", ALLOWED_HEADERS)
def test_other_clients_can_change_models(managed_server: Server, case: str) -> None:
    assert change_status(managed_server, ALLOWED_HEADERS[case]) == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "photos.example", "Origin": "https://photos.example"}, 200),
        ({"Host": "gpu.lab.example", "Origin": "https://gpu.lab.example"}, 200),
        ({"Host": "internal:8000", "Origin": "https://photos.example", **PROXY_HEADERS}, 200),
        ({"Host": "internal:8000", "Origin": "https://photos.example"}, 200),
        ({"Host": "internal:8000", "Origin": "https://evil.example", **PROXY_HEADERS}, 403),
        ({"Host": "lab.example", "Origin": "https://lab.example"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "photos.example", "Sec-Fetch-Site": "cross-site"}, 403),
        ({}, 200),
    ],
)
def test_host_names_can_be_configured(
    server_with_host_names: Server, headers: dict[str, str], status: int
) -> None:
    assert change_status(server_with_host_names, headers) == status


def test_request_without_host_is_allowed(managed_server: Server) -> None:
    with Wire(managed_server.url) as wire:
        wire.send(b"POST ", LOAD.encode(), b" HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
        assert wire.read_response().status == 200


def test_triton_and_curl_can_manage_models(managed_server: Server) -> None:
    client = triton.InferenceServerClient(managed_server.url.removeprefix("http://"))
    client.unload_model("small")
    assert not is_served(managed_server)
    client.load_model("small")
    assert client.is_model_ready("small")
    for options, path in ((["-X", "POST"], UNLOAD), (["-d", "{}"], LOAD)):
        arguments = [require_tool("curl"), "--silent", *options, f"{managed_server.url}{path}"]
        assert isinstance(json.loads(subprocess.run(arguments, capture_output=True, check=True).stdout), list)
    assert is_served(managed_server)


def test_foreign_request_is_refused_before_its_body(managed_server: Server) -> None:
    with Wire(managed_server.url) as wire:
        wire.send(b"POST ", LOAD.encode(), b" HTTP/1.1\r\nHost: x\r\nOrigin: https://evil.example\r\n")
        wire.send(b"Content-Length: 1000\r\n\r\n")
        assert wire.read_response().status == 403


def test_foreign_page_gets_no_cors_headers(managed_server: Server) -> None:
    """Another site's page gets no answer to read: there is no CORS header."""
    headers = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    for reply in (
        managed_server.client.get("/v1/models", headers=headers),
        managed_server.client.post("/v2/repository/index", headers=headers),
    ):
        assert reply.status_code == 200
        assert not [name for name in reply.headers if name.startswith("access-control-")]
    assert httpx.options(f"{managed_server.url}{UNLOAD}", headers=headers).status_code == 405


@pytest.mark.parametrize("value", ["https://photos.example", "photos.example:8000", "*", "a b"])
def test_invalid_host_name_setting_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FOVEA_MANAGEMENT_HOSTS", value)
    with pytest.raises(SettingsError, match="is not a host name"):
        load_settings()

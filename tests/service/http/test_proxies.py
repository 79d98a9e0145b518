"""Trusted proxies: the client's address, and the address of the service itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from fovea.service.errors import SettingsError
from fovea.service.http.proxies import Origin, TrustedProxies
from fovea.service.settings import load_settings
from tests.pictures import make_jpeg
from tests.raw import Wire
from tests.servers import ROOT, Server

CLASSIFY = "/v1/classify"
NETWORKS = ("10.0.0.0/8", "127.0.0.1", "fd00::/8")


def find_client_address(peer: str, *forwarded_for: str, networks: Sequence[str] = NETWORKS) -> str:
    """Return the client's address according to these headers."""
    headers = [(b"x-forwarded-for", value.encode("latin-1")) for value in forwarded_for]
    return TrustedProxies(networks).resolve_origin(peer, headers).client


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "expected"),
    [
        ("10.0.0.1", ["203.0.113.7"], "203.0.113.7"),
        ("127.0.0.1", ["203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.9, 203.0.113.7"], "203.0.113.7"),
        ("10.0.0.1", ["198.51.100.9, 203.0.113.7, 10.2.3.4"], "203.0.113.7"),
        ("10.0.0.1", ["198.51.100.9, 203.0.113.7", "10.2.3.4, 10.9.9.9"], "203.0.113.7"),
        ("10.0.0.1", ["10.5.5.5, 10.2.3.4"], "10.5.5.5"),
        ("10.0.0.1", ["198.51.100.9, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.9, unknown, 10.2.3.4"], "10.2.3.4"),
        ("10.0.0.1", ["203.0.113.7:4711"], "203.0.113.7"),
        ("10.0.0.1", ["[2001:db8::1]:4711"], "2001:db8::1"),
        ("10.0.0.1", ["[2001:DB8:0::1]"], "2001:db8::1"),
        ("10.0.0.1", ["2001:db8::1"], "2001:db8::1"),
        ("fd00::1", ["2001:db8::1"], "2001:db8::1"),
        ("::ffff:10.0.0.1", ["203.0.113.7"], "203.0.113.7"),
        ("::ffff:203.0.113.7", ["198.51.100.9"], "203.0.113.7"),
        ("10.0.0.1", ["203.0.113.7, ::ffff:10.2.3.4"], "203.0.113.7"),
        ("10.0.0.1", ["203.0.113.7, " * 5000 + "10.2.3.4"], "203.0.113.7"),
        ("10.0.0.1", ["<script>"], "10.0.0.1"),
        ("10.0.0.1", ["caf\xe9"], "10.0.0.1"),
        ("203.0.113.7", ["198.51.100.9"], "203.0.113.7"),
        ("", ["198.51.100.9"], ""),
    ],
)
def test_client_is_the_last_untrusted_address(peer: str, forwarded_for: list[str], expected: str) -> None:
    assert find_client_address(peer, *forwarded_for) == expected
    assert find_client_address(peer, *forwarded_for, networks=()) == peer.removeprefix("::ffff:")


def test_public_url_is_taken_only_from_trusted_proxies() -> None:
    headers = [
        (b"x-forwarded-prefix", b"/vision/"),
        (b"x-forwarded-proto", b"HTTPS, http"),
        (b"x-forwarded-host", b"photos.example:8443"),
    ]
    assert (
        TrustedProxies(NETWORKS).resolve_origin("10.0.0.1", headers).url
        == "https://photos.example:8443/vision"
    )
    assert TrustedProxies(NETWORKS).resolve_origin("10.0.0.1", headers[:1]).url == "/vision"
    assert TrustedProxies(NETWORKS).resolve_origin("203.0.113.7", headers) == Origin(
        "203.0.113.7", "203.0.113.7"
    )
    for prefix in (
        b'/"><script>',
        b"//evil.example",
        b"/a//b",
        b"https://evil.example",
        b"vision",
        b"/",
        b"/a b",
    ):
        assert (
            TrustedProxies(NETWORKS).resolve_origin("10.0.0.1", [(b"x-forwarded-prefix", prefix)]).prefix
            == ""
        )
    for host in (b"evil.example/path", b"a b", b'"', b"user@evil.example", b"[::1"):
        assert TrustedProxies(NETWORKS).resolve_origin("10.0.0.1", [(b"x-forwarded-host", host)]).host == ""
    assert (
        TrustedProxies(NETWORKS).resolve_origin("10.0.0.1", [(b"x-forwarded-proto", b"javascript")]).scheme
        == ""
    )


@pytest.mark.parametrize("value", ["10.0.0.1/8", "localhost", "10.0.0.0/33", "10.0.0.1,*"])
def test_invalid_trusted_network_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FOVEA_TRUSTED_PROXIES", value)
    with pytest.raises(SettingsError, match=r"FOVEA_TRUSTED_PROXIES is .*such as 10.0.0.0/8,::1"):
        load_settings()


# --- the log -------------------------------------------------------------------------------------

FORWARDED_HEADERS = {"X-Forwarded-For": "198.51.100.9, 203.0.113.7"}


def read_request_lines(log: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.splitlines()]
    return [line for line in lines if line["event"] == "request"]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("networks", [pytest.param("", marks=pytest.mark.long), "127.0.0.0/8"])
def test_log_names_the_client_address(small_zoo: Path, workers: str, networks: str) -> None:
    """This holds for answers with and without ASGI, for refusals, and for input that is not HTTP."""
    settings = {"FOVEA_WORKERS": workers, "FOVEA_TRUSTED_PROXIES": networks, "FOVEA_RUNNERS": "1"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
        for content in (make_jpeg(), iter([make_jpeg()]), b"nonsense"):
            httpx.post(f"{server.url}{CLASSIFY}", content=content, headers=FORWARDED_HEADERS)
        httpx.get(f"{server.url}/nothing/", headers=FORWARDED_HEADERS)
        with Wire(server.url) as wire:
            wire.send(b"POST /predict HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 203.0.113.7\r\n")
            wire.send(b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n")
            assert wire.read_response().status == 400
        with Wire(server.url) as wire:
            wire.send(b"GET nonsense\r\n\r\n")
            assert wire.read_response().status == 400
    lines = read_request_lines(server.log)  # in any order: each worker writes its own
    expected = ("203.0.113.7", "127.0.0.1") if networks else ("127.0.0.1", None)
    origins = Counter((line["client"], line.get("peer")) for line in lines)
    assert origins == Counter([expected] * 5) + Counter([("127.0.0.1", None)])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_log_stream_setting_sends_the_log_to_stdout(small_zoo: Path, tmp_path: Path, workers: str) -> None:
    """Standard output has nothing but the log, so that its reader can parse every line as JSON."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}
    settings = {"FOVEA_MODELS": str(small_zoo), "FOVEA_PORT": "0", "FOVEA_DRAIN_GRACE": "0"}
    log = tmp_path / "log"
    with (
        log.open("w") as stdout,
        subprocess.Popen(
            [sys.executable, "-m", "fovea.service"],
            env={**environment, **settings, "FOVEA_LOG_STREAM": "stdout", "FOVEA_WORKERS": workers},
            cwd=ROOT,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stderr
        greeting = [process.stderr.readline() for _ in range(3)]
        url = re.findall(r"http://\S+", greeting[0])[0]
        assert "curl -T" in greeting[1]
        assert httpx.post(f"{url}{CLASSIFY}", content=make_jpeg()).status_code == 200
        process.terminate()
        assert process.stderr.read() == ""
    assert len(read_request_lines(log.read_text())) == 1


# --- links ---------------------------------------------------------------------------------------


PUBLIC_ADDRESS = {"Prefix": "/vision", "Proto": "https", "Host": "photos.example"}


@pytest.fixture(scope="module")
def proxied_server(small_zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_TRUSTED_PROXIES="127.0.0.1") as server:
        yield server


def test_links_have_the_prefix_of_a_trusted_proxy(proxied_server: Server, server: Server) -> None:
    headers = {f"X-Forwarded-{name}": value for name, value in PUBLIC_ADDRESS.items()}
    for path in ("/", "/docs", "/docs/"):
        reply = proxied_server.client.get(path, headers=headers)
        links = re.findall(r'(?:href|src)="([^"#]+)"', reply.text)
        assert links
        assert all(link.startswith("/vision/") for link in links)
        assert re.findall(r'(?:href|src)="(/[^"]*)"', server.client.get(path, headers=headers).text) == []
        policy = "content-security-policy"
        assert reply.headers.get(policy) == server.client.get(path).headers.get(policy)
    document = proxied_server.client.get("/openapi.json", headers=headers).json()
    assert document["servers"] == [{"url": "https://photos.example/vision"}]
    assert server.client.get("/openapi.json", headers=headers).json()["servers"] == [{"url": "."}]

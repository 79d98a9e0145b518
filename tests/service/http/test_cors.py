"""Cross-origin requests: pages of named origins may call every route, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fovea.service.errors import SettingsError
from fovea.service.http.cors import CorsPolicy
from fovea.service.settings import load_settings
from tests.pictures import make_jpeg
from tests.servers import Server
from tests.service.api.test_keys import bearer, write_keys

APP = "https://app.example.com"
PREFLIGHT = {
    "Origin": APP,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
PATHS = ("/", "/v1/classify", "/v1/models", "/v2/models/small/infer", "/metrics", "/page/main.js", "/none")


@pytest.fixture(scope="module")
def cors_server(small_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys that pages of one origin may call."""
    with Server(
        FOVEA_MODELS=str(small_zoo),
        FOVEA_CORS_ORIGINS=f"{APP}, http://localhost:5173",
        FOVEA_KEYS=str(write_keys(tmp_path_factory.mktemp("keys") / "keys")),
        FOVEA_MANAGEMENT="true",
        FOVEA_BODY_BYTES="100000",
    ) as server:
        yield server


@pytest.mark.parametrize("path", PATHS)
def test_preflight_is_answered_on_every_route_without_a_key(cors_server: Server, path: str) -> None:
    reply = cors_server.client.options(path, headers=PREFLIGHT)
    assert (reply.status_code, reply.content) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == APP
    assert reply.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert reply.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "https://app.example.com.evil", "null", APP + "/"]
)
def test_other_origins_get_no_permission(cors_server: Server, origin: str) -> None:
    for reply in (
        cors_server.client.options("/v1/classify", headers={**PREFLIGHT, "Origin": origin}),
        cors_server.client.get("/v1/models", headers={"Origin": origin, **bearer("classify")}),
    ):
        assert "access-control-allow-origin" not in reply.headers
        assert "access-control-allow-methods" not in reply.headers
        assert reply.headers["vary"] == "Origin"


def test_every_kind_of_answer_names_the_origin(cors_server: Server) -> None:
    client, headers = cors_server.client, {"Origin": APP, **bearer("everything")}
    image = make_jpeg()
    answers = {
        "fast": client.post("/v1/classify", content=image, headers=headers),
        "asgi": client.post("/v1/classify", content=iter([image]), headers=headers),
        "models": client.get("/v1/models", headers=headers),
        "cached": client.get("/v1/models", headers=headers),
        "bad image": client.post("/v1/classify", content=b"x", headers=headers),
        "no key": client.post("/v1/classify", content=image, headers={"Origin": APP}),
        "not found": client.get("/none", headers=headers),
        "wrong method": client.delete("/v1/classify", headers=headers),
        "too large": client.post("/v1/classify", content=bytes(200_000), headers=headers),
    }
    statuses = {name: reply.status_code for name, reply in answers.items()}
    assert statuses == {
        "fast": 200,
        "asgi": 200,
        "models": 200,
        "cached": 200,
        "bad image": 415,
        "no key": 401,
        "not found": 404,
        "wrong method": 405,
        "too large": 413,
    }
    for name, reply in answers.items():
        assert reply.headers.get_list("access-control-allow-origin") == [APP], name
        assert reply.headers["access-control-expose-headers"] == "*", name


def test_cached_answer_is_not_shared_between_origins(cors_server: Server) -> None:
    for origin in (APP, "http://localhost:5173", None, "https://evil.example"):
        headers = {**bearer("classify"), **({"Origin": origin} if origin else {})}
        reply = cors_server.client.get("/v1/models", headers=headers)
        allowed = origin if origin and "evil" not in origin else None
        assert reply.headers.get("access-control-allow-origin") == allowed


def test_management_stays_closed_to_other_sites(cors_server: Server) -> None:
    """A page of an allowed origin may classify, and may not load or unload models."""
    for extra in ({}, {"Sec-Fetch-Site": "cross-site"}):
        reply = cors_server.client.post(
            "/v2/repository/models/small/unload",
            headers={"Origin": APP, "Content-Type": "application/json", **bearer("manage"), **extra},
        )
        assert reply.status_code == 403
        assert "page" in reply.json()["error"]


def test_preflight_is_refused_by_default(server: Server) -> None:
    reply = server.client.options("/v1/classify", headers=PREFLIGHT)
    assert reply.status_code == 405
    reply = httpx.post(server.url + "/v1/classify", content=make_jpeg(), headers={"Origin": APP})
    assert reply.status_code == 200
    assert not [name for name in reply.headers if name.startswith("access-control") or name == "vary"]


def test_star_allows_every_origin() -> None:
    policy = CorsPolicy(["*"])
    assert policy.build_lines(b"https://any.example").startswith(b"access-control-allow-origin: *\r\n")
    assert policy.build_lines(None) == b""


def test_requested_headers_cannot_inject_headers() -> None:
    policy = CorsPolicy([APP])
    headers = {b"origin": APP.encode(), b"access-control-request-method": b"POST"}
    for names in (b"x\r\nset-cookie: a", b"x y", b"x;y", b"a" * 2000, b"\xff"):
        answer = policy.build_preflight_headers({**headers, b"access-control-request-headers": names})
        assert answer is not None
        assert "access-control-allow-headers" not in answer
    assert policy.build_preflight_headers({b"origin": APP.encode()}) is None


@pytest.mark.parametrize(
    "value", ["app.example.com", "https://app.example.com/", "null", "ftp://a", "https://*.a"]
)
def test_malformed_origin_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FOVEA_CORS_ORIGINS", value)
    with pytest.raises(SettingsError, match="is not an origin; give scheme, host and port"):
        load_settings()


def test_pages_have_security_headers(server: Server) -> None:
    for path in ("/", "/docs", "/page/fovea.svg"):  # a browser can open an SVG file as a page
        headers = server.client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"], path
        assert "frame-ancestors 'none'" in headers["content-security-policy"], path
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["x-frame-options"] == "DENY", path
        assert headers["referrer-policy"] == "no-referrer", path
        assert headers["cross-origin-opener-policy"] == "same-origin", path
        assert "geolocation=()" in headers["permissions-policy"], path
    assert "unsafe-inline" not in server.client.get("/").headers["content-security-policy"]
    for path in ("/page/main.js", "/page/base.css", "/docs/swagger/start.js"):
        headers = server.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["cross-origin-resource-policy"] == "same-origin", path

"""API keys: every route has a scope, and both paths of HTTP check it."""

from __future__ import annotations

import json
import os
import signal
import time
import tracemalloc
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from fovea.bench.keys import rotate_under_load
from fovea.service.access.access_control import AccessControl, Credential
from fovea.service.access.caller import Scope
from fovea.service.access.caller_table import CallerTable
from fovea.service.access.keys_file import ApiKey, hash_key
from fovea.service.access.refusal_pace import RefusalPace
from fovea.service.api.route_scopes import find_scope
from fovea.service.api.router import Router
from fovea.service.app import create_app
from fovea.service.errors import MissingScope, PacedRefusal, SettingsError, Unauthorized
from fovea.service.settings import PROTOCOLS, Settings, load_service_settings
from tests.pictures import make_jpeg
from tests.raw import CLASSIFY_HEAD, Wire
from tests.servers import Server, list_children, run_service, wait_until
from tests.service.api.test_protocols import error_code, post_request

KEYS = {scope.value: f"key-of-{scope.value}" for scope in Scope} | {"everything": "key-of-everything"}
"""Keys by their names; each has the scope of its name."""

ANYBODY = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
"""A client without a key."""

OPEN_ROUTES = {
    "GET /",
    "GET /docs",
    "GET /execution-parameters",
    "GET /health",
    "GET /health/live",
    "GET /health/ready",
    "GET /my-health",
    "GET /openapi.json",
    "GET /ping",
    "GET /v2",
    "GET /v2/health/live",
    "GET /v2/health/ready",
    "MOUNT /docs/swagger",
    "MOUNT /page",
    "OPTIONS /",
}
"""Every route that needs no key, whatever keys there are."""


NEW_KEY = {"Authorization": "Bearer key-of-new"}


def write_keys(path: Path, *extra_lines: str) -> Path:
    keys = [ApiKey(scope, frozenset({scope}), hash_key(f"key-of-{scope}".encode())) for scope in Scope]
    keys.append(ApiKey("everything", frozenset(Scope), hash_key(b"key-of-everything")))
    path.write_text("".join(f"{line}\n" for line in [*(key.to_line() for key in keys), *extra_lines]))
    return path


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    expired = ApiKey("old", frozenset(Scope), hash_key(b"key-of-old")).to_line() + ":2020-02-29"
    return write_keys(tmp_path_factory.mktemp("keys") / "keys", expired)


@pytest.fixture(scope="module")
def closed_server(small_zoo: Path, keys_file: Path) -> Iterator[Server]:
    """A server that needs keys and offers everything."""
    with Server(
        FOVEA_MODELS=str(small_zoo),
        FOVEA_KEYS=str(keys_file),
        FOVEA_MANAGEMENT="true",
        FOVEA_LOG_LEVEL="debug",
        FOVEA_HEALTH_ROUTE="/my-health",
        FOVEA_PREDICT_ROUTE="/my-predict",
    ) as server:
        server.client.headers.update(bearer("everything"))
        yield server


@pytest.fixture(scope="module")
def routes(small_zoo: Path, keys_file: Path) -> dict[str, Scope | None]:
    """Return the scope of every route of a service that offers everything."""
    settings = Settings(
        models=small_zoo,
        keys=keys_file,
        management=True,
        health_route="/my-health",
        predict_route="/my-predict",
    )
    router = create_app(settings, registry=CollectorRegistry()).fast_app
    assert isinstance(router, Router)
    app: Any = router._app
    assert isinstance(app, FastAPI)
    return {
        f"{method} {route.path}": find_scope(route)  # type: ignore[attr-defined]
        for route in app.routes
        for method in getattr(route, "methods", ("MOUNT",))
    }


@pytest.fixture(scope="module")
def patient_server(small_zoo: Path, keys_file: Path) -> Iterator[Server]:
    """A server behind a proxy."""
    settings = {"FOVEA_KEYS": str(keys_file), "FOVEA_TRUSTED_PROXIES": "127.0.0.1"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
        yield server


def ask(server: Server, route: str, model: str = "small", **headers: str) -> httpx.Response:
    """Send a request to a route, without a key unless `headers` have one."""
    method, path = route.split(" ")
    path = path.replace("{name}", model).replace("{version}", "1")
    if method == "MOUNT":
        method, path = "GET", path + {"/page": "/main.js", "/docs/swagger": "/swagger-ui.css"}[path]
    return ANYBODY.request(method, server.url + path, headers=headers)


def test_only_the_named_routes_are_open(routes: dict[str, Scope | None]) -> None:
    assert {route for route, scope in routes.items() if scope is None} == OPEN_ROUTES
    assert {scope for scope in routes.values() if scope} == set(Scope)
    assert routes["POST /my-predict"] is Scope.CLASSIFY


def test_every_route_answers_as_its_scope_says(
    closed_server: Server, routes: dict[str, Scope | None]
) -> None:
    for route, scope in routes.items():
        reply = ask(closed_server, route)
        if scope is None:
            assert reply.status_code == 200, route
            continue
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, 'Bearer realm="fovea"'), route
        wrong_scope = Scope.EXPLAIN if scope is not Scope.EXPLAIN else Scope.CLASSIFY
        refused = ask(closed_server, route, **bearer(wrong_scope))
        assert refused.status_code == 403, route
        assert scope.value in refused.text, route
        assert f'scope="{scope}"' in refused.headers["www-authenticate"], route
        accepted = ask(closed_server, route, model="unknown", **bearer(scope))
        # TorchServe's protocol refuses `POST /models` in any case.
        assert accepted.status_code in ((403,) if route == "POST /models" else (200, 400, 404)), route
        assert "www-authenticate" not in accepted.headers, route


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_errors_have_the_shape_of_their_protocol(closed_server: Server, protocol: str) -> None:
    reply = post_request(closed_server.url, protocol)
    assert (reply.status_code, error_code(reply, protocol)) == (401, "unauthorized")
    reply = post_request(closed_server.url, protocol, **bearer("metrics"))
    assert (reply.status_code, error_code(reply, protocol)) == (403, "missing_scope")
    assert post_request(closed_server.url, protocol, **bearer("classify")).status_code == 200
    assert post_request(closed_server.url, protocol, **{"X-API-Key": KEYS["classify"]}).status_code == 200


CREDENTIALS: dict[str, tuple[int, list[tuple[str, str]]]] = {
    "none": (401, []),
    "right": (200, [("Authorization", "Bearer key-of-classify")]),
    "any case of the scheme": (200, [("authorization", "bEARER key-of-classify")]),
    "several spaces": (200, [("Authorization", "Bearer   key-of-classify ")]),
    "own header": (200, [("X-API-Key", "key-of-classify")]),
    "both equal": (200, [("X-API-Key", "key-of-classify"), ("Authorization", "Bearer key-of-classify")]),
    "both different": (401, [("X-API-Key", "key-of-explain"), ("Authorization", "Bearer key-of-classify")]),
    "proxy's scheme beside own header": (
        200,
        [("Authorization", "Basic YTpi"), ("X-API-Key", "key-of-classify")],
    ),
    "other scheme": (401, [("Authorization", "Basic a2V5LW9mLWNsYXNzaWZ5")]),
    "no scheme": (401, [("Authorization", "key-of-classify")]),
    "scheme without a key": (401, [("Authorization", "Bearer")]),
    "scheme and a space": (401, [("Authorization", "Bearer ")]),
    "empty": (401, [("Authorization", "")]),
    "empty own header": (401, [("X-API-Key", "")]),
    "wrong": (401, [("Authorization", "Bearer key-of-classifx")]),
    "prefix": (401, [("Authorization", "Bearer key-of-classif")]),
    "digest instead of key": (
        401,
        [("Authorization", f"Bearer {hash_key(b'key-of-classify').hex()}")],
    ),
    "expired": (401, [("Authorization", "Bearer key-of-old")]),
    "doubled": (401, 2 * [("Authorization", "Bearer key-of-classify")]),
    "doubled own header": (401, 2 * [("X-API-Key", "key-of-classify")]),
    "list in one header": (401, [("Authorization", "Bearer key-of-classify, Bearer key-of-classify")]),
    "not ASCII": (401, [("Authorization", "Bearer clé")]),
    "long": (401, [("Authorization", "Bearer " + 513 * "k")]),
    "very long": (431, [("Authorization", "Bearer " + (1 << 20) * "k")]),
    "other scope": (403, [("Authorization", "Bearer key-of-explain")]),
}
"""Status and headers of a classification by what a caller sends."""


@pytest.mark.parametrize("case", CREDENTIALS)
@pytest.mark.parametrize("path", ["fast", "asgi", "cached"])
def test_credentials(closed_server: Server, case: str, path: str) -> None:
    status, headers = CREDENTIALS[case]
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers).encode() + b"\r\n"
    image = make_jpeg()
    with Wire(closed_server.url) as wire:
        if path == "cached":  # the reply is in the cache of the fast path
            closed_server.client.get("/v1/models")
            wire.send(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", lines)
        elif path == "fast":
            wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n" % len(image), lines, image)
        else:
            chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(image), image)
            wire.send(CLASSIFY_HEAD, b"Transfer-Encoding: chunked\r\n", lines, chunk)
        reply = wire.read_response()
    assert reply.status == status, reply.body
    if status == 401:
        assert ('error="invalid_token"' in reply.headers["www-authenticate"]) == bool(headers)
        assert b"key-of-" not in reply.body


PATHS = ("fast", "asgi", "cached", "fastapi", "wrong scope")


@pytest.mark.parametrize("path", PATHS)
def test_refusals_of_a_caller_that_tries_again_and_again_are_delayed(
    patient_server: Server, path: str
) -> None:
    headers = {"X-Forwarded-For": f"192.0.2.{PATHS.index(path)}"}
    url = {"cached": "/v1/models", "fastapi": "/runtime"}.get(path, "/v1/classify")
    image = make_jpeg()

    def send(key: dict[str, str]) -> int:
        if url != "/v1/classify":
            return patient_server.client.get(url, headers={**headers, **key}).status_code
        content: Any = iter([image]) if path == "asgi" else image
        return patient_server.client.post(url, content=content, headers={**headers, **key}).status_code

    assert send(bearer("everything")) == 200
    started_at = time.monotonic()
    wrong = bearer("metrics") if path == "wrong scope" else {"Authorization": "Bearer wrong"}
    statuses = [send(wrong) for _ in range(20 + 10)]
    assert time.monotonic() - started_at > 0.4  # 20 refusals are immediate, and 10 leave at 20 per second
    assert statuses == 30 * [403 if path == "wrong scope" else 401]
    assert send(bearer("everything")) == 200


def test_refusals_are_delayed_for_each_address_or_key_alone() -> None:
    key = ApiKey("app", frozenset({Scope.CLASSIFY}), hash_key(b"key-of-app"))
    pace = RefusalPace(CallerTable.create(), clock=lambda: 1e6)
    access = AccessControl([key], pace=pace)
    wrong, right = (access.identify([(b"x-api-key", value)]) for value in (b"wrong", b"key-of-app"))

    def get_delay(credential: Credential, address: str) -> float:
        with pytest.raises((Unauthorized, MissingScope)) as caught:
            access.authorize(Scope.MANAGE, credential, address)
        assert isinstance(caught.value, PacedRefusal)
        return caught.value.delay

    delays = [get_delay(wrong, "192.0.2.1") for _ in range(200)]
    assert delays[:20] == pytest.approx([0.0] * 20, abs=0.001)
    assert delays[40] > 1.0
    assert max(delays) == pytest.approx(4.0)
    assert get_delay(wrong, "192.0.2.2") == 0.0
    assert get_delay(right, "192.0.2.1") == 0.0
    access.authorize(Scope.CLASSIFY, right, "192.0.2.1")


def test_headers_whose_key_was_found_are_checked_again_for_every_request() -> None:
    """The search for a key is remembered, and neither its expiry nor its removal is."""
    now = 0.0
    lasting, expiring = (
        ApiKey(name, frozenset({Scope.CLASSIFY}), hash_key(f"key-of-{name}".encode()), last_day)
        for name, last_day in (("lasting", None), ("expiring", date(2020, 1, 1)))
    )
    access = AccessControl([lasting, expiring], read_clock=lambda: now)
    long_space = b"Bearer" + 5000 * b" " + b"key-of-lasting"
    for _ in range(3):
        assert access.identify([(b"x-api-key", b"key-of-expiring")]).key == expiring
        assert access.identify([(b"authorization", b"Bearer key-of-lasting")]).key == lasting
        assert access.identify([(b"authorization", long_space)]).key == lasting
        # A value is known as that of its header only.
        assert access.identify([(b"authorization", b"key-of-expiring")]).key is None
        assert access.identify([(b"x-api-key", b"Bearer key-of-lasting")]).key is None
    now = expiring.expires_at
    assert access.identify([(b"x-api-key", b"key-of-expiring")]).key is None
    access.replace_keys([expiring])
    assert access.identify([(b"authorization", b"Bearer key-of-lasting")]).key is None


def test_remembered_headers_take_limited_memory() -> None:
    key = ApiKey("app", frozenset({Scope.CLASSIFY}), hash_key(b"key-of-app"))
    access = AccessControl([key])
    tracemalloc.start()
    try:
        for number in range(20_000):  # any number of headers beside the key is accepted
            other = b"Basic %d " % number + 2000 * b"x" * (number % 2)
            assert access.identify([(b"authorization", other), (b"x-api-key", b"key-of-app")]).key == key
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 1 << 20


def test_refused_request_reads_no_body_and_asks_no_model(closed_server: Server) -> None:
    with Wire(closed_server.url) as wire:
        wire.send(CLASSIFY_HEAD, b"Content-Length: 60000000\r\n\r\n", b"x" * 100)
        assert wire.read_response().status == 401
    reply = ANYBODY.post(closed_server.url + "/v1/models/unknown/classify", content=make_jpeg())
    assert reply.status_code == 401  # not 404, which would tell which models there are


def test_pages_hold_no_data_of_the_models(closed_server: Server) -> None:
    document = ANYBODY.get(closed_server.url + "/openapi.json").text
    assert "small" not in document
    schemes = json.loads(document)["components"]["securitySchemes"]
    assert set(schemes) == {"bearer", "header"}


def test_metrics_close_with_a_key_of_their_scope_and_the_log_names_callers(
    small_zoo: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(ApiKey("app", frozenset({Scope.CLASSIFY}), hash_key(b"key")).to_line() + "\n")
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_KEYS=str(file), FOVEA_LOG_LEVEL="debug") as server:
        assert ANYBODY.get(server.url + "/metrics").status_code == 200
        write_keys(file)
        wait_until(lambda: ANYBODY.get(server.url + "/metrics").status_code == 401)
        assert ANYBODY.get(server.url + "/metrics", headers=bearer("metrics")).status_code == 200
        assert post_request(server.url, "native", **bearer("classify")).status_code == 200
        assert post_request(server.url, "oip", **bearer("explain")).status_code == 403
        assert post_request(server.url, "native", Authorization="Bearer key-of-nobody").status_code == 401
    lines = [json.loads(line) for line in server.log.splitlines() if '"request"' in line]
    seen = [(line.get("caller"), line["status"]) for line in lines if line["method"] == "POST"]
    assert seen == [("classify", 200), ("explain", 403), (None, 401)]
    assert "key-of" not in server.log


def test_requests_are_counted_by_the_name_of_the_key(closed_server: Server) -> None:
    before = closed_server.read_metric("fovea_caller_requests_total", caller="classify", status="200")
    refused = closed_server.read_metric("fovea_caller_requests_total", caller="anonymous", status="401")
    assert post_request(closed_server.url, "native", **bearer("classify")).status_code == 200
    assert post_request(closed_server.url, "native").status_code == 401
    text = closed_server.client.get("/metrics").text
    assert closed_server.read_metric("fovea_caller_requests_total", caller="classify", status="200") == (
        before + 1
    )
    assert closed_server.read_metric("fovea_caller_requests_total", caller="anonymous", status="401") == (
        refused + 1
    )
    assert "key-of" not in text


def test_service_does_not_start_without_valid_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# keys\napp:classify:secret\n")
    result = run_service(FOVEA_KEYS=str(file))
    assert result.returncode == 2
    assert f"FOVEA_KEYS is {str(file)!r}: line 2: the third field is not a SHA-256" in result.stderr
    assert "secret" not in result.stderr


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_rotation_under_load_fails_no_request(tmp_path: Path, workers: int) -> None:
    """`make bench-keys` does the same with 20,000 requests."""
    result = rotate_under_load(tmp_path / "keys", requests=200, rotations=1, workers=workers)
    assert result.rotations == 1
    assert result.statuses == {200: result.sent}, result.errors


@pytest.mark.long
def test_dead_worker_is_replaced_while_the_file_is_broken(small_zoo: Path, tmp_path: Path) -> None:
    file = write_keys(tmp_path / "keys")
    settings = {"FOVEA_WORKERS": "2", "FOVEA_RUNNERS": "1"}
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_KEYS=str(file), **settings) as server:
        server.client.headers.update({**bearer("everything"), "Connection": "close"})

        def has_workers(dead: set[int]) -> bool:
            try:
                pids = {server.client.get("/runtime").json()["pid"] for _ in range(4)}
            except httpx.TransportError:  # the worker of the connection has died
                return False
            return len(pids) == 2 and not pids & dead

        wait_until(lambda: has_workers(set()))
        file.write_text("broken")
        pids = set(list_children(server.process.pid))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: has_workers(pids))
        assert post_request(server.url, "native", **bearer("classify")).status_code == 200
        wait_until(lambda: server.read_metric("fovea_keys_reloads_total", result="failed") >= 1)
        write_keys(file, ApiKey("new", frozenset(Scope), hash_key(b"key-of-new")).to_line())
        for _ in range(2):  # each connection goes to another worker
            wait_until(lambda: ANYBODY.get(server.url + "/runtime", headers=NEW_KEY).status_code == 200)
    assert "keys from before stay in force" in server.log
    assert "could not start" not in server.log


def test_service_refuses_the_variable_of_clients_instead_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_KEY", "/run/secrets/keys")
    with pytest.raises(SettingsError, match="FOVEA_KEY is the key of a client"):
        load_service_settings()
    monkeypatch.setenv("FOVEA_KEYS", "")
    monkeypatch.delenv("FOVEA_KEY")
    with pytest.raises(SettingsError, match="FOVEA_KEYS is empty"):
        load_service_settings()
    monkeypatch.setenv("FOVEA_KEY", "fovea_key")
    monkeypatch.setenv("FOVEA_KEYS", "/run/secrets/keys")
    assert load_service_settings().keys == Path("/run/secrets/keys")

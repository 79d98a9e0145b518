"""Models are loaded and unloaded on request."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.graphs import add_to_repository, build_model
from tests.raw import Wire
from tests.servers import Server, run_service, wait_until
from tests.zoo import classify_pictures, get_served_version, get_status, publish_variant

INDEX = "/v2/repository/index"
LOAD = "/v2/repository/models/small/load"
UNLOAD = "/v2/repository/models/small/unload"


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return add_to_repository(build_model(), tmp_path / "zoo")


@pytest.fixture(params=["1", pytest.param("2", marks=pytest.mark.long)])
def managed_server(zoo: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with one worker or with two, which reads the repository only on request."""
    settings = {"FOVEA_WORKERS": request.param, "FOVEA_WATCH": "0", "FOVEA_MANAGEMENT": "true"}
    with Server(FOVEA_MODELS=str(zoo), **settings) as server:
        yield server


def model_states(reply: httpx.Response) -> list[tuple[str, str, str]]:
    assert reply.status_code == 200, reply.text
    return [(model["name"], model["version"], model["state"]) for model in reply.json()]


def status_and_code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["code"]


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
def test_management_is_off_by_default(server: Server, path: str) -> None:
    reply = server.client.post(path)
    assert status_and_code(reply) == (403, "forbidden")
    assert "FOVEA_MANAGEMENT" in reply.json()["error"]


@pytest.mark.long
def test_index_requires_management_or_oip(small_zoo: Path) -> None:
    for settings, status in (
        ({}, 200),
        ({"FOVEA_PROTOCOLS": "native"}, 403),
        ({"FOVEA_PROTOCOLS": "native", "FOVEA_MANAGEMENT": "true"}, 200),
    ):
        with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
            assert server.client.post(INDEX).status_code == status


@pytest.mark.parametrize("body", [b"{", b'{"ready": 1}', b'{"steady": true}'])
def test_malformed_index_request_is_refused(server: Server, body: bytes) -> None:
    assert status_and_code(server.client.post(INDEX, content=body)) == (400, "bad_request")


@pytest.mark.parametrize("managed_server", ["1", pytest.param("2", marks=pytest.mark.long)], indirect=True)
def test_version_is_loaded_and_rolled_back(managed_server: Server, zoo: Path) -> None:
    first = classify_pictures(managed_server)
    assert publish_variant(zoo, seed=1) == "2"
    assert get_served_version(managed_server) == "1"
    assert model_states(managed_server.client.post(LOAD)) == [("small", "2", "READY")]
    assert get_served_version(managed_server) == "2"
    assert model_states(managed_server.client.post(LOAD, json={"parameters": {"version": "1"}})) == [
        ("small", "1", "READY")
    ]
    assert classify_pictures(managed_server) == first
    assert model_states(managed_server.client.post(INDEX)) == [("small", "1", "READY")]


@pytest.mark.long
def test_watcher_keeps_the_version_after_a_rollback(zoo: Path) -> None:
    publish_variant(zoo, seed=1)
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0.1", FOVEA_MANAGEMENT="true") as server:
        server.client.post(LOAD, json={"parameters": {"version": "1"}})
        publish_variant(zoo, seed=2)
        publish_variant(zoo, seed=2, name="other")
        server.wait_for_metric(1, "fovea_model_info", model="other")  # the watcher has looked
        assert get_served_version(server) == "1"
        server.client.post(LOAD)
        assert get_served_version(server) == "3"


@pytest.mark.long
def test_failing_file_of_a_requested_version_is_tried_once(zoo: Path) -> None:
    publish_variant(zoo, seed=1)
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0.1", FOVEA_MANAGEMENT="true") as server:
        assert server.client.post(LOAD, json={"parameters": {"version": "2"}}).status_code == 200
        new_path = zoo.parent / "bad.onnx"
        new_path.write_bytes(b"no model")
        new_path.replace(zoo / "small" / "2" / "model.onnx")
        wait_until(lambda: server.client.get("/v1/models").json()["refused"])
        for version in ("1", "2"):
            publish_variant(zoo, seed=2, name="other")
            server.wait_for_metric(1, "fovea_model_info", model="other", version=version)
        assert server.read_metric("fovea_model_changes_total", model="small", result="refused") == 1
        assert get_served_version(server) == "2"


def test_unloaded_model_gets_404_until_it_is_loaded(managed_server: Server, zoo: Path) -> None:
    before = classify_pictures(managed_server)
    assert model_states(managed_server.client.post(UNLOAD)) == []
    assert get_status(managed_server, "/v1/models/small/classify") == 404
    assert model_states(managed_server.client.post(INDEX)) == [("small", "1", "UNAVAILABLE")]
    assert model_states(managed_server.client.post(INDEX, json={"ready": True})) == []
    assert managed_server.client.get("/health/ready").status_code == 200
    assert status_and_code(managed_server.client.post(UNLOAD)) == (404, "model_not_found")
    assert model_states(managed_server.client.post(LOAD)) == [("small", "1", "READY")]
    assert classify_pictures(managed_server) == before


@pytest.mark.long
def test_watcher_does_not_reload_an_unloaded_model(zoo: Path) -> None:
    publish_variant(zoo, seed=0, name="other")
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0.1", FOVEA_MANAGEMENT="true") as server:
        assert server.client.post(UNLOAD).status_code == 200
        publish_variant(zoo, seed=1)
        publish_variant(zoo, seed=1, name="other")
        server.wait_for_metric(1, "fovea_model_info", model="other", version="2")  # the watcher has looked
        assert get_status(server, "/v1/models/small/classify") == 404


def test_bad_load_request_is_refused(managed_server: Server, zoo: Path) -> None:
    reply = managed_server.client.post("/v2/repository/models/nothing/load")
    assert status_and_code(reply) == (404, "model_not_found")
    reply = managed_server.client.post(LOAD, json={"parameters": {"version": "9"}})
    assert status_and_code(reply) == (404, "model_not_found")
    assert "version 9 of small does not exist; there are 1" in reply.json()["error"]
    add_to_repository(build_model(), zoo.parent.parent, zoo.parent.name, "7")
    add_to_repository(build_model(), zoo, ".hidden")
    with Wire(managed_server.url) as wire:
        for name in (b"..", b"%2E%2E", b".", b".hidden", b"..%2F..%2Fetc", b"x" * 300):
            wire.send(b"POST /v2/repository/models/%s/load HTTP/1.1\r\nHost: x\r\n" % name)
            wire.send(b"Content-Length: 0\r\n\r\n")
            assert wire.read_response().status == 404, name
    bodies: list[Any] = [
        {"parameters": {"config": "x"}},
        {"version": "1"},
        [],
        {"parameters": {"version": 1}},
    ]
    for body in bodies:
        assert status_and_code(managed_server.client.post(LOAD, json=body)) == (400, "bad_request"), body
    assert status_and_code(managed_server.client.post(LOAD, content=b" " * 5000)) == (413, "body_too_large")
    (zoo / "small" / "2").mkdir()
    (zoo / "small" / "2" / "model.onnx").write_bytes(b"no model at all")
    assert status_and_code(managed_server.client.post(LOAD)) == (409, "swap_refused")
    assert get_served_version(managed_server) == "1"


@pytest.mark.long
def test_pin_ends_when_its_version_is_deleted(zoo: Path) -> None:
    publish_variant(zoo, seed=1)
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0.1", FOVEA_MANAGEMENT="true") as server:
        server.client.post(LOAD, json={"parameters": {"version": "1"}})
        shutil.rmtree(zoo / "small" / "1")
        wait_until(lambda: get_served_version(server) == "2")


@pytest.mark.long
def test_single_file_is_served_by_name_of_its_contract(zoo: Path) -> None:
    path = zoo / "small" / "1" / "model.onnx"
    with Server(FOVEA_MODELS=str(path), FOVEA_WATCH="0", FOVEA_MANAGEMENT="true") as server:
        assert get_status(server, "/v1/models/small/versions/1/classify") == 200
        assert get_status(server, "/v1/models/small/versions/99/classify") == 404
        assert get_status(server, "/v1/models/other/classify") == 404
        assert model_states(server.client.post(LOAD)) == [("small", "1", "READY")]
        path.write_bytes(b"no model")
        assert status_and_code(server.client.post(LOAD)) == (409, "swap_refused")
        assert server.read_metric("fovea_model_changes_total", model="small", result="refused") == 1
    result = run_service(FOVEA_MODELS=str(path.parent.parent.parent), FOVEA_DEFAULT_MODEL="other")
    assert result.returncode == 2


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_unloaded_single_file_can_be_loaded_again(zoo: Path, workers: str) -> None:
    path = zoo / "small" / "1" / "model.onnx"
    settings = {"FOVEA_WATCH": "0", "FOVEA_MANAGEMENT": "true", "FOVEA_WORKERS": workers}
    with Server(FOVEA_MODELS=str(path), **settings) as server:
        before = classify_pictures(server)
        for _ in range(2):
            assert model_states(server.client.post(UNLOAD)) == []
            assert model_states(server.client.post(INDEX)) == [("small", "", "UNAVAILABLE")]
            assert get_status(server, "/v1/classify") == 404
            assert status_and_code(server.client.post("/v2/repository/models/other/load"))[0] == 404
            assert model_states(server.client.post(LOAD)) == [("small", "1", "READY")]
            assert classify_pictures(server) == before
            assert get_status(server, "/v1/classify") == 200


@pytest.mark.long
def test_restarted_worker_does_not_load_unloaded_models(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WORKERS="2", FOVEA_MANAGEMENT="true") as server:
        assert server.client.post(UNLOAD).status_code == 200
        pid = server.client.get("/runtime").json()["pid"]
        os.kill(pid, signal.SIGKILL)
        server.client.close()
        server.client = httpx.Client(base_url=server.url, timeout=30)
        server.wait_for_metric(2, "fovea_runners")  # one for each worker
        for _ in range(4):
            with httpx.Client(base_url=server.url, timeout=30) as client:
                assert client.get("/v1/models").json()["models"] == []
        assert model_states(server.client.post(LOAD)) == [("small", "1", "READY")]


def test_concurrent_loads_leave_one_version(managed_server: Server, zoo: Path) -> None:
    publish_variant(zoo, seed=1)
    with ThreadPoolExecutor(6) as pool:
        versions = ["1", "2"] * 3
        bodies = ({"parameters": {"version": version}} for version in versions)
        replies = list(
            pool.map(lambda body: httpx.post(managed_server.url + LOAD, json=body, timeout=60), bodies)
        )
    assert {reply.status_code for reply in replies} == {200}
    last = model_states(managed_server.client.post(INDEX))[0][1]
    assert all(get_served_version(managed_server) == last for _ in range(4))


@pytest.mark.long
def test_restarted_worker_serves_the_pinned_version(zoo: Path) -> None:
    """After the rollback to version 1, the repository alone would select version 2."""
    publish_variant(zoo, seed=1)
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WORKERS="2", FOVEA_MANAGEMENT="true") as server:
        assert server.client.post(LOAD, json={"parameters": {"version": "1"}}).status_code == 200
        first_pid, second_pid = (server.client.get("/runtime").json()["pid"] for _ in range(2))
        with httpx.Client(base_url=server.url, timeout=60) as client:
            pids = {first_pid, second_pid, client.get("/runtime").json()["pid"]}
            assert len(pids) == 2
        os.kill(first_pid, signal.SIGKILL)
        seen_pids: set[int] = set()
        while len(seen_pids - pids) == 0:
            with httpx.Client(base_url=server.url, timeout=30) as client:
                seen_pids.add(client.get("/runtime").json()["pid"])
                assert client.get("/v1/models").json()["models"][0]["version"] == "1"

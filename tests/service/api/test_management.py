"""Models loaded and unloaded by request."""

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


@pytest.fixture(params=["1", "2"])
def managed(zoo: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with one worker, and one with two; the repository is read only on request."""
    settings = {"FOVEA_WORKERS": request.param, "FOVEA_WATCH": "0", "FOVEA_MANAGEMENT": "true"}
    with Server(FOVEA_MODELS=str(zoo), **settings) as running:
        yield running


def model_states(reply: httpx.Response) -> list[tuple[str, str, str]]:
    assert reply.status_code == 200, reply.text
    return [(one["name"], one["version"], one["state"]) for one in reply.json()]


def status_and_code(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["code"]


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
def test_it_is_off_unless_switched_on(server: Server, path: str) -> None:
    reply = server.client.post(path)
    assert status_and_code(reply) == (403, "forbidden")
    assert "FOVEA_MANAGEMENT" in reply.json()["error"]


@pytest.mark.long
def test_the_index_is_there_where_one_of_both_is_on(small_zoo: Path) -> None:
    for settings, status in (
        ({}, 200),
        ({"FOVEA_PROTOCOLS": "native"}, 403),
        ({"FOVEA_PROTOCOLS": "native", "FOVEA_MANAGEMENT": "true"}, 200),
    ):
        with Server(FOVEA_MODELS=str(small_zoo), **settings) as running:
            assert running.client.post(INDEX).status_code == status


@pytest.mark.parametrize("body", [b"{", b'{"ready": 1}', b'{"steady": true}'])
def test_an_index_that_is_not_asked_for_rightly(server: Server, body: bytes) -> None:
    assert status_and_code(server.client.post(INDEX, content=body)) == (400, "bad_request")


def test_a_version_is_loaded_and_rolled_back(managed: Server, zoo: Path) -> None:
    first = classify_pictures(managed)
    assert publish_variant(zoo, seed=1) == "2"
    assert get_served_version(managed) == "1"
    assert model_states(managed.client.post(LOAD)) == [("small", "2", "READY")]
    assert get_served_version(managed) == "2"
    assert model_states(managed.client.post(LOAD, json={"parameters": {"version": "1"}})) == [
        ("small", "1", "READY")
    ]
    assert classify_pictures(managed) == first
    assert model_states(managed.client.post(INDEX)) == [("small", "1", "READY")]


def test_a_version_that_was_rolled_back_is_not_taken_up_again(zoo: Path) -> None:
    publish_variant(zoo, seed=1)
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0.1", FOVEA_MANAGEMENT="true") as running:
        running.client.post(LOAD, json={"parameters": {"version": "1"}})
        publish_variant(zoo, seed=2)
        publish_variant(zoo, seed=2, name="other")
        running.wait_for_metric(1, "fovea_model_info", model="other")  # it has looked
        assert get_served_version(running) == "1"
        running.client.post(LOAD)
        assert get_served_version(running) == "3"


def test_a_model_is_unloaded_until_it_is_loaded(managed: Server, zoo: Path) -> None:
    before = classify_pictures(managed)
    assert model_states(managed.client.post(UNLOAD)) == []
    assert get_status(managed, "/v1/models/small/classify") == 404
    assert model_states(managed.client.post(INDEX)) == [("small", "1", "UNAVAILABLE")]
    assert model_states(managed.client.post(INDEX, json={"ready": True})) == []
    assert managed.client.get("/health/ready").status_code == 200
    assert status_and_code(managed.client.post(UNLOAD)) == (404, "model_not_found")
    assert model_states(managed.client.post(LOAD)) == [("small", "1", "READY")]
    assert classify_pictures(managed) == before


@pytest.mark.long
def test_a_model_that_was_unloaded_is_not_taken_up_again(zoo: Path) -> None:
    publish_variant(zoo, seed=0, name="other")
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0.1", FOVEA_MANAGEMENT="true") as running:
        assert running.client.post(UNLOAD).status_code == 200
        publish_variant(zoo, seed=1)
        publish_variant(zoo, seed=1, name="other")
        running.wait_for_metric(1, "fovea_model_info", model="other", version="2")  # it has looked
        assert get_status(running, "/v1/models/small/classify") == 404


def test_what_is_not_there_or_not_right_is_refused(managed: Server, zoo: Path) -> None:
    reply = managed.client.post("/v2/repository/models/nothing/load")
    assert status_and_code(reply) == (404, "model_not_found")
    reply = managed.client.post(LOAD, json={"parameters": {"version": "9"}})
    assert status_and_code(reply) == (404, "model_not_found")
    assert "version 9 of small does not exist; there are 1" in reply.json()["error"]
    add_to_repository(build_model(), zoo.parent.parent, zoo.parent.name, "7")
    add_to_repository(build_model(), zoo, ".hidden")
    with Wire(managed.url) as wire:
        for outside in (b"..", b"%2E%2E", b".", b".hidden", b"..%2F..%2Fetc", b"x" * 300):
            wire.send(b"POST /v2/repository/models/%s/load HTTP/1.1\r\nHost: x\r\n" % outside)
            wire.send(b"Content-Length: 0\r\n\r\n")
            assert wire.read_response().status == 404, outside
    bodies: list[Any] = [
        {"parameters": {"config": "x"}},
        {"version": "1"},
        [],
        {"parameters": {"version": 1}},
    ]
    for body in bodies:
        assert status_and_code(managed.client.post(LOAD, json=body)) == (400, "bad_request"), body
    assert status_and_code(managed.client.post(LOAD, content=b" " * 5000)) == (413, "body_too_large")
    (zoo / "small" / "2").mkdir()
    (zoo / "small" / "2" / "model.onnx").write_bytes(b"no model at all")
    assert status_and_code(managed.client.post(LOAD)) == (409, "swap_refused")
    assert get_served_version(managed) == "1"


@pytest.mark.long
def test_a_pin_goes_with_its_version(zoo: Path) -> None:
    publish_variant(zoo, seed=1)
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0.1", FOVEA_MANAGEMENT="true") as running:
        running.client.post(LOAD, json={"parameters": {"version": "1"}})
        shutil.rmtree(zoo / "small" / "1")
        wait_until(lambda: get_served_version(running) == "2")


@pytest.mark.long
def test_a_single_file_is_called_by_what_it_says(zoo: Path) -> None:
    path = zoo / "small" / "1" / "model.onnx"
    with Server(FOVEA_MODELS=str(path), FOVEA_WATCH="0", FOVEA_MANAGEMENT="true") as running:
        assert get_status(running, "/v1/models/small/versions/1/classify") == 200
        assert get_status(running, "/v1/models/small/versions/99/classify") == 404
        assert get_status(running, "/v1/models/other/classify") == 404
        assert model_states(running.client.post(LOAD)) == [("small", "1", "READY")]
        path.write_bytes(b"no model")
        assert status_and_code(running.client.post(LOAD)) == (409, "swap_refused")
        assert running.read_metric("fovea_model_changes_total", model="small", result="refused") == 1
    ended = run_service(FOVEA_MODELS=str(path.parent.parent.parent), FOVEA_DEFAULT_MODEL="other")
    assert ended.returncode == 2


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_single_file_that_was_unloaded_can_be_loaded(zoo: Path, workers: str) -> None:
    path = zoo / "small" / "1" / "model.onnx"
    settings = {"FOVEA_WATCH": "0", "FOVEA_MANAGEMENT": "true", "FOVEA_WORKERS": workers}
    with Server(FOVEA_MODELS=str(path), **settings) as running:
        before = classify_pictures(running)
        for _ in range(2):
            assert model_states(running.client.post(UNLOAD)) == []
            assert model_states(running.client.post(INDEX)) == [("small", "", "UNAVAILABLE")]
            assert get_status(running, "/v1/classify") == 404
            assert status_and_code(running.client.post("/v2/repository/models/other/load"))[0] == 404
            assert model_states(running.client.post(LOAD)) == [("small", "1", "READY")]
            assert classify_pictures(running) == before
            assert get_status(running, "/v1/classify") == 200


@pytest.mark.long
def test_a_worker_that_comes_back_when_nothing_is_served_serves_nothing(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WORKERS="2", FOVEA_MANAGEMENT="true") as running:
        assert running.client.post(UNLOAD).status_code == 200
        first = running.client.get("/runtime").json()["pid"]
        os.kill(first, signal.SIGKILL)
        running.client.close()
        running.client = httpx.Client(base_url=running.url, timeout=30)
        running.wait_for_metric(2, "fovea_runners")  # one each
        for _ in range(4):
            with httpx.Client(base_url=running.url, timeout=30) as fresh:
                assert fresh.get("/v1/models").json()["models"] == []
        assert model_states(running.client.post(LOAD)) == [("small", "1", "READY")]


def test_many_who_load_at_once_wait_for_each_other(managed: Server, zoo: Path) -> None:
    publish_variant(zoo, seed=1)
    with ThreadPoolExecutor(6) as pool:
        versions = ["1", "2"] * 3
        bodies = ({"parameters": {"version": version}} for version in versions)
        replies = list(pool.map(lambda body: httpx.post(managed.url + LOAD, json=body, timeout=60), bodies))
    assert {reply.status_code for reply in replies} == {200}
    last = model_states(managed.client.post(INDEX))[0][1]
    assert all(get_served_version(managed) == last for _ in range(4))


@pytest.mark.long
def test_a_worker_that_comes_back_serves_what_the_others_serve(zoo: Path) -> None:
    """After the rollback to version 1, the repository alone would select version 2."""
    publish_variant(zoo, seed=1)
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WORKERS="2", FOVEA_MANAGEMENT="true") as running:
        assert running.client.post(LOAD, json={"parameters": {"version": "1"}}).status_code == 200
        first, second = (running.client.get("/runtime").json()["pid"] for _ in range(2))
        with httpx.Client(base_url=running.url) as other:
            pids = {first, second, other.get("/runtime").json()["pid"]}
            assert len(pids) == 2
        os.kill(first, signal.SIGKILL)
        seen: set[int] = set()
        while len(seen - pids) == 0:
            with httpx.Client(base_url=running.url, timeout=30) as fresh:
                seen.add(fresh.get("/runtime").json()["pid"])
                assert fresh.get("/v1/models").json()["models"][0]["version"] == "1"

"""A version that fails its checks stays refused, does not stop a start, and can be accepted by request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest

from fovea.service.artifact.repository import ModelVersion
from fovea.service.rollout.refusals import Refusals
from tests.graphs import add_to_repository, build_model
from tests.servers import Server, run_service, wait_until
from tests.zoo import PICTURES, classify_pictures, get_served_version, get_status, publish_variant

pytestmark = pytest.mark.long

LOAD = "/v2/repository/models/small/load"
INDEX = "/v2/repository/index"
CLASSIFY = "/v1/models/small/classify"


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return add_to_repository(build_model(), tmp_path / "zoo")


@contextmanager
def run_server(zoo: Path, **settings: str) -> Iterator[Server]:
    base_settings = {"FOVEA_WATCH": "0.1", "FOVEA_LOG_REQUESTS": "0", "FOVEA_MANAGEMENT": "true"}
    with Server(FOVEA_MODELS=str(zoo), **{**base_settings, **settings}) as server:
        yield server


def write_garbage(zoo: Path, version: str, name: str = "small") -> Path:
    folder = zoo / name / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(b"no model at all")
    return folder


def fetch_refusals(server: Server) -> dict[tuple[str, str], str]:
    entries = server.client.get("/v1/models").json()["refused"]
    return {(one["name"], one["version"]): one["reason"] for one in entries}


def wait_until_refused(server: Server, version: str = "2") -> None:
    wait_until(lambda: ("small", version) in fetch_refusals(server))


def publish_refused(zoo: Path, server: Server) -> None:
    """Put a version that gives many of the last images another label, and wait until it is refused."""
    for picture in PICTURES * 5:
        classify_pictures(server, picture)
    publish_variant(zoo, seed=1)
    wait_until_refused(server)
    assert get_served_version(server) == "1"


FLIPS = {"FOVEA_SWAP_FLIPS": "0.1"}

both = pytest.mark.parametrize("workers", ["1", "2"])


# --- what is broken ------------------------------------------------------------------------------


@both
def test_garbage_that_was_refused_harms_no_restart(zoo: Path, workers: str) -> None:
    add_to_repository(build_model(seed=5), zoo, "other")
    with run_server(zoo, FOVEA_WORKERS=workers) as running:
        write_garbage(zoo, "2")
        wait_until_refused(running)
        assert get_served_version(running) == "1"
        assert running.read_metric("fovea_versions_refused", model="small") == 1
    with run_server(zoo, FOVEA_WORKERS=workers) as again:
        assert get_served_version(again) == "1"
        assert get_served_version(again, "other") == "1"
        assert "cannot load the model" in fetch_refusals(again)["small", "2"]
        assert again.read_metric("fovea_versions_refused", model="small") == 1
        index = {(one["name"], one["version"]): one for one in again.client.post(INDEX).json()}
        assert index["small", "2"]["state"] == "UNAVAILABLE"
        assert "cannot load the model" in index["small", "2"]["reason"]
    assert "model small version 2 is not served" in again.log


@both
def test_garbage_that_comes_before_the_start_takes_nobody_down(zoo: Path, workers: str) -> None:
    add_to_repository(build_model(seed=5), zoo, "other")
    publish_variant(zoo, seed=1)
    write_garbage(zoo, "3")
    write_garbage(zoo, "4")
    write_garbage(zoo, "1", "hopeless")
    with run_server(zoo, FOVEA_WORKERS=workers) as running:
        assert get_served_version(running) == "2"
        assert get_served_version(running, "other") == "1"
        assert {("small", "3"), ("small", "4"), ("hopeless", "1")} == fetch_refusals(running).keys()
        reply = running.client.post("/v1/models/hopeless/classify", content=PICTURES[0])
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
        assert running.client.get("/health/ready").status_code == 200
        onnx.save(build_model(seed=7), zoo / "hopeless" / "1" / "model.onnx")
        wait_until(lambda: get_status(running, "/v1/models/hopeless/classify") == 200)
        assert ("hopeless", "1") not in fetch_refusals(running)


def test_a_strict_start_ends_with_one_line(zoo: Path) -> None:
    write_garbage(zoo, "2")
    ended = run_service(FOVEA_MODELS=str(zoo), FOVEA_STRICT="true")
    assert ended.returncode == 2
    assert ended.stderr.startswith("fovea: ")
    assert ended.stderr.count("\n") == 1


def test_a_version_that_is_configured_has_no_substitute(zoo: Path) -> None:
    add_to_repository(build_model(seed=5), zoo, "other")
    write_garbage(zoo, "2")
    (zoo / "small" / "config.toml").write_text('versions = ["2"]\n')
    with run_server(zoo) as running:
        assert get_status(running, CLASSIFY) == 503
        assert get_status(running, "/v1/classify") in (404, 503), "the other is not the default for that"
        assert get_served_version(running, "other") == "1"
        (zoo / "small" / "config.toml").write_text('versions = ["1", "2"]\n')
        wait_until(lambda: ("small", "2") in fetch_refusals(running))
        assert get_status(running, CLASSIFY) == 503
        (zoo / "small" / "config.toml").unlink()
        wait_until(lambda: get_status(running, CLASSIFY) == 200)
        assert get_served_version(running) == "1"


def test_of_versions_side_by_side_the_good_one_answers_for_itself(zoo: Path) -> None:
    write_garbage(zoo, "2")
    (zoo / "small" / "config.toml").write_text('versions = ["1", "2"]\n')
    with run_server(zoo) as running:
        assert get_status(running, "/v1/models/small/versions/1/classify") == 200
        assert get_status(running, CLASSIFY) == 503, "version 2 would have answered"


def test_a_config_that_cannot_be_read_is_of_one_model(zoo: Path) -> None:
    add_to_repository(build_model(seed=5), zoo, "other")
    (zoo / "small" / "config.toml").write_text("batch_size = 4\n")
    with run_server(zoo) as running:
        assert get_status(running, CLASSIFY) == 503
        assert get_served_version(running, "other") == "1"
        assert "batch_size" in fetch_refusals(running)["small", ""]
        (zoo / "small" / "config.toml").unlink()
        wait_until(lambda: get_status(running, CLASSIFY) == 200)
        assert fetch_refusals(running) == {}


# --- an empty repository -------------------------------------------------------------------------


@both
@pytest.mark.parametrize("watch", ["0.1", "0"])
def test_an_empty_repository_is_waited_for(tmp_path: Path, workers: str, watch: str) -> None:
    zoo = tmp_path / "zoo"
    (zoo / "small" / "1").mkdir(parents=True)
    with run_server(zoo, FOVEA_WORKERS=workers, FOVEA_WATCH=watch) as running:
        reply = running.client.get("/health/ready")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
        assert running.client.get("/health/live").status_code == 200
        assert get_status(running, CLASSIFY) == 503
        assert get_status(running, "/v1/classify") in (404, 503)
        content = build_model().SerializeToString()
        (zoo / "small" / "1" / "model.onnx").write_bytes(content[: len(content) // 2])
        wait_until(lambda: ("small", "1") in fetch_refusals(running))
        (zoo / "small" / "1" / "model.onnx").write_bytes(content)
        wait_until(lambda: running.client.get("/health/ready").status_code == 200)
        wait_until(lambda: get_served_version(running) == "1")


# --- what may be served, and is not to be --------------------------------------------------------


@both
def test_a_refusal_is_kept_over_a_restart_until_the_file_changes(zoo: Path, workers: str) -> None:
    with run_server(zoo, FOVEA_WORKERS=workers, **FLIPS) as running:
        publish_refused(zoo, running)
    record = json.loads((zoo / "small" / "2" / "trial.json").read_text())
    assert record["accepted"] is False
    assert "would get another label" in record["reason"]
    with run_server(zoo, FOVEA_WORKERS=workers) as again:  # whatever the limit is now
        assert get_served_version(again) == "1"
        assert "would get another label" in fetch_refusals(again)["small", "2"]
        onnx.save(build_model(seed=2), zoo / "small" / "fresh.onnx")
        (zoo / "small" / "fresh.onnx").replace(zoo / "small" / "2" / "model.onnx")
        wait_until(lambda: get_served_version(again) == "2")
        assert fetch_refusals(again) == {}


@both
def test_somebody_may_let_it_in_for_good(zoo: Path, workers: str) -> None:
    with run_server(zoo, FOVEA_WORKERS=workers, **FLIPS) as running:
        publish_refused(zoo, running)
        reply = running.client.post(LOAD, json={"parameters": {"version": "2"}})
        assert reply.status_code == 200, reply.text
        assert get_served_version(running) == "2"
        assert fetch_refusals(running) == {}
    with run_server(zoo, FOVEA_WORKERS=workers, **FLIPS) as again:
        assert get_served_version(again) == "2"


def test_what_is_broken_cannot_be_let_in(zoo: Path) -> None:
    with run_server(zoo) as running:
        write_garbage(zoo, "2")
        wait_until_refused(running)
        for _ in range(2):
            reply = running.client.post(LOAD, json={"parameters": {"version": "2"}})
            assert (reply.status_code, reply.json()["code"]) == (409, "swap_refused")
        assert get_served_version(running) == "1"


def test_a_record_that_is_deleted_has_the_version_tried_again(zoo: Path) -> None:
    with run_server(zoo, **FLIPS) as running:
        publish_refused(zoo, running)
        before = running.read_metric("fovea_model_changes_total", model="small", result="refused")
        (zoo / "small" / "2" / "trial.json").unlink()
        running.wait_for_metric(before + 1, "fovea_model_changes_total", model="small", result="refused")
        assert get_served_version(running) == "1"
    (zoo / "small" / "2" / "trial.json").unlink()
    with run_server(zoo) as again:
        assert get_served_version(again) == "2"


def test_without_a_place_for_it_the_start_gives_the_same_verdict(zoo: Path) -> None:
    """A folder at the verdict's path simulates a repository that cannot be written."""
    with run_server(zoo, **FLIPS) as running:
        for picture in PICTURES * 5:
            classify_pictures(running, picture)
        (zoo / "small" / "2" / "trial.json").mkdir(parents=True)
        onnx.save(build_model(seed=1), zoo / "small" / "2" / "model.onnx")
        wait_until_refused(running)
    assert "set FOVEA_STATE to a writable folder" in running.log
    with run_server(zoo, FOVEA_SWAP_FLIPS="0") as again:
        assert get_served_version(again) == "1"
        assert "would get another label" in fetch_refusals(again)["small", "2"]
    with run_server(zoo, FOVEA_SWAP_FLIPS="0.99") as lenient:
        assert get_served_version(lenient) == "2"


def test_services_that_share_their_verdicts_serve_the_same(zoo: Path, tmp_path: Path) -> None:
    """Only one of the services has seen images for which the versions differ."""
    settings = {**FLIPS, "FOVEA_STATE": str(tmp_path / "state"), "FOVEA_REPLAY_IMAGES": "64"}
    with run_server(zoo, **settings) as one, run_server(zoo, **settings) as other:
        for picture in PICTURES * 5:
            classify_pictures(one, picture)
        publish_variant(zoo, seed=1)
        wait_until_refused(one)
        wait_until_refused(other)
        wait_until(lambda: get_served_version(other) == "1")
        assert get_served_version(one) == "1"
        record = tmp_path / "state" / "small" / "2.json"
        assert json.loads(record.read_text())["accepted"] is False
        assert not (zoo / "small" / "2" / "trial.json").exists()
        assert one.client.post(LOAD, json={"parameters": {"version": "2"}}).status_code == 200
        wait_until(lambda: get_served_version(other) == "2")


def test_a_resting_model_falls_back_too(zoo: Path) -> None:
    add_to_repository(build_model(seed=5), zoo, "another")
    settings: dict[str, Any] = {"FOVEA_MODELS_LOADED": "1", "FOVEA_DEFAULT_MODEL": "another"}
    write_garbage(zoo, "2")
    with run_server(zoo, FOVEA_WATCH="0", **settings) as running:
        assert get_status(running, CLASSIFY) == 503
        wait_until(lambda: get_status(running, CLASSIFY) == 200)
        assert get_served_version(running) == "1"


def test_the_start_does_not_blame_a_version_for_the_machine(zoo: Path) -> None:
    ended = run_service(FOVEA_MODELS=str(zoo), FOVEA_PROVIDER="cuda")
    assert ended.returncode == 2
    assert "FOVEA_PROVIDER is cuda" in ended.stderr
    assert not (zoo / "small" / "1" / "trial.json").exists()


@pytest.mark.parametrize("field", ["sha256", "accepted", "reason", "nesting", "kind"])
def test_a_damaged_verdict_is_no_verdict(zoo: Path, field: str) -> None:
    found = ModelVersion.from_path(zoo / "small" / "1" / "model.onnx", "small", "1")
    Refusals().refuse(found, "it failed", lasting=True)
    assert Refusals().find_reason(found) == "it failed"
    path = zoo / "small" / "1" / "trial.json"
    record = json.loads(path.read_text())
    damaged: dict[str, object] = {
        "nesting": "[" * 50_000,
        "kind": json.dumps([record]),
    }
    path.write_text(str(damaged.get(field) or json.dumps({**record, field: {"accepted": False}})))
    verdicts = Refusals()
    assert verdicts.find_reason(found) is None
    assert not verdicts.is_accepted(found)

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
    return {(entry["name"], entry["version"]): entry["reason"] for entry in entries}


def wait_until_refused(server: Server, version: str = "2") -> None:
    wait_until(lambda: ("small", version) in fetch_refusals(server))


def publish_refused_version(zoo: Path, server: Server) -> None:
    """Put a version that gives many of the last images another label, and wait until it is refused."""
    for picture in PICTURES * 5:
        classify_pictures(server, picture)
    publish_variant(zoo, seed=1)
    wait_until_refused(server)
    assert get_served_version(server) == "1"


FLIP_LIMIT = {"FOVEA_SWAP_FLIPS": "0.1"}

one_and_two_workers = pytest.mark.parametrize("workers", ["1", "2"])


# --- broken versions -----------------------------------------------------------------------------


@one_and_two_workers
def test_refused_garbage_does_not_prevent_restart(zoo: Path, workers: str) -> None:
    add_to_repository(build_model(seed=5), zoo, "other")
    with run_server(zoo, FOVEA_WORKERS=workers) as server:
        write_garbage(zoo, "2")
        wait_until_refused(server)
        assert get_served_version(server) == "1"
        assert server.read_metric("fovea_versions_refused", model="small") == 1
    with run_server(zoo, FOVEA_WORKERS=workers) as restarted_server:
        assert get_served_version(restarted_server) == "1"
        assert get_served_version(restarted_server, "other") == "1"
        assert "cannot load the model" in fetch_refusals(restarted_server)["small", "2"]
        assert restarted_server.read_metric("fovea_versions_refused", model="small") == 1
        index = {
            (entry["name"], entry["version"]): entry for entry in restarted_server.client.post(INDEX).json()
        }
        assert index["small", "2"]["state"] == "UNAVAILABLE"
        assert "cannot load the model" in index["small", "2"]["reason"]
    assert "model small version 2 is not served" in restarted_server.log


@one_and_two_workers
def test_start_with_garbage_versions_serves_valid_ones(zoo: Path, workers: str) -> None:
    add_to_repository(build_model(seed=5), zoo, "other")
    publish_variant(zoo, seed=1)
    write_garbage(zoo, "3")
    write_garbage(zoo, "4")
    write_garbage(zoo, "1", "hopeless")
    with run_server(zoo, FOVEA_WORKERS=workers) as server:
        assert get_served_version(server) == "2"
        assert get_served_version(server, "other") == "1"
        assert {("small", "3"), ("small", "4"), ("hopeless", "1")} == fetch_refusals(server).keys()
        reply = server.client.post("/v1/models/hopeless/classify", content=PICTURES[0])
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
        assert server.client.get("/health/ready").status_code == 200
        onnx.save(build_model(seed=7), zoo / "hopeless" / "1" / "model.onnx")
        wait_until(lambda: get_status(server, "/v1/models/hopeless/classify") == 200)
        assert ("hopeless", "1") not in fetch_refusals(server)


def test_strict_start_with_garbage_ends_with_one_line(zoo: Path) -> None:
    write_garbage(zoo, "2")
    result = run_service(FOVEA_MODELS=str(zoo), FOVEA_STRICT="true")
    assert result.returncode == 2
    assert result.stderr.startswith("fovea: ")
    assert result.stderr.count("\n") == 1


def test_broken_configured_version_has_no_fallback(zoo: Path) -> None:
    add_to_repository(build_model(seed=5), zoo, "other")
    write_garbage(zoo, "2")
    (zoo / "small" / "config.toml").write_text('versions = ["2"]\n')
    with run_server(zoo) as server:
        assert get_status(server, CLASSIFY) == 503
        assert get_status(server, "/v1/classify") in (404, 503), "the other is not the default for that"
        assert get_served_version(server, "other") == "1"
        (zoo / "small" / "config.toml").write_text('versions = ["1", "2"]\n')
        wait_until(lambda: ("small", "2") in fetch_refusals(server))
        assert get_status(server, CLASSIFY) == 503
        (zoo / "small" / "config.toml").unlink()
        wait_until(lambda: get_status(server, CLASSIFY) == 200)
        assert get_served_version(server) == "1"


def test_valid_version_beside_broken_one_answers_at_its_url(zoo: Path) -> None:
    write_garbage(zoo, "2")
    (zoo / "small" / "config.toml").write_text('versions = ["1", "2"]\n')
    with run_server(zoo) as server:
        assert get_status(server, "/v1/models/small/versions/1/classify") == 200
        assert get_status(server, CLASSIFY) == 503, "version 2 would have answered"


def test_unreadable_config_affects_only_its_model(zoo: Path) -> None:
    add_to_repository(build_model(seed=5), zoo, "other")
    (zoo / "small" / "config.toml").write_text("batch_size = 4\n")
    with run_server(zoo) as server:
        assert get_status(server, CLASSIFY) == 503
        assert get_served_version(server, "other") == "1"
        assert "batch_size" in fetch_refusals(server)["small", ""]
        (zoo / "small" / "config.toml").unlink()
        wait_until(lambda: get_status(server, CLASSIFY) == 200)
        assert fetch_refusals(server) == {}


# --- an empty repository -------------------------------------------------------------------------


@one_and_two_workers
@pytest.mark.parametrize("watch", ["0.1", "0"])
def test_service_waits_for_a_model_in_empty_repository(tmp_path: Path, workers: str, watch: str) -> None:
    zoo = tmp_path / "zoo"
    (zoo / "small" / "1").mkdir(parents=True)
    with run_server(zoo, FOVEA_WORKERS=workers, FOVEA_WATCH=watch) as server:
        reply = server.client.get("/health/ready")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
        assert server.client.get("/health/live").status_code == 200
        assert get_status(server, CLASSIFY) == 503
        assert get_status(server, "/v1/classify") in (404, 503)
        content = build_model().SerializeToString()
        (zoo / "small" / "1" / "model.onnx").write_bytes(content[: len(content) // 2])
        wait_until(lambda: ("small", "1") in fetch_refusals(server))
        (zoo / "small" / "1" / "model.onnx").write_bytes(content)
        wait_until(lambda: server.client.get("/health/ready").status_code == 200)
        wait_until(lambda: get_served_version(server) == "1")


# --- refused versions ----------------------------------------------------------------------------


@one_and_two_workers
def test_refusal_outlasts_restart_until_file_changes(zoo: Path, workers: str) -> None:
    with run_server(zoo, FOVEA_WORKERS=workers, **FLIP_LIMIT) as server:
        publish_refused_version(zoo, server)
    record = json.loads((zoo / "small" / "2" / "trial.json").read_text())
    assert record["accepted"] is False
    assert "would get another label" in record["reason"]
    with run_server(zoo, FOVEA_WORKERS=workers) as restarted_server:  # with the default limit of flips
        assert get_served_version(restarted_server) == "1"
        assert "would get another label" in fetch_refusals(restarted_server)["small", "2"]
        onnx.save(build_model(seed=2), zoo / "small" / "fresh.onnx")
        (zoo / "small" / "fresh.onnx").replace(zoo / "small" / "2" / "model.onnx")
        wait_until(lambda: get_served_version(restarted_server) == "2")
        assert fetch_refusals(restarted_server) == {}


@one_and_two_workers
def test_accepted_version_stays_served_after_restart(zoo: Path, workers: str) -> None:
    with run_server(zoo, FOVEA_WORKERS=workers, **FLIP_LIMIT) as server:
        publish_refused_version(zoo, server)
        reply = server.client.post(LOAD, json={"parameters": {"version": "2"}})
        assert reply.status_code == 200, reply.text
        assert get_served_version(server) == "2"
        assert fetch_refusals(server) == {}
    with run_server(zoo, FOVEA_WORKERS=workers, **FLIP_LIMIT) as restarted_server:
        assert get_served_version(restarted_server) == "2"


def test_broken_version_cannot_be_accepted(zoo: Path) -> None:
    with run_server(zoo) as server:
        write_garbage(zoo, "2")
        wait_until_refused(server)
        for _ in range(2):
            reply = server.client.post(LOAD, json={"parameters": {"version": "2"}})
            assert (reply.status_code, reply.json()["code"]) == (409, "swap_refused")
        assert get_served_version(server) == "1"


def test_version_with_deleted_verdict_is_tried_again(zoo: Path) -> None:
    with run_server(zoo, **FLIP_LIMIT) as server:
        publish_refused_version(zoo, server)
        refusal_count = server.read_metric("fovea_model_changes_total", model="small", result="refused")
        (zoo / "small" / "2" / "trial.json").unlink()
        server.wait_for_metric(
            refusal_count + 1, "fovea_model_changes_total", model="small", result="refused"
        )
        assert get_served_version(server) == "1"
    (zoo / "small" / "2" / "trial.json").unlink()
    with run_server(zoo) as restarted_server:
        assert get_served_version(restarted_server) == "2"


def test_unwritten_verdict_is_repeated_at_start(zoo: Path) -> None:
    """A folder at the verdict's path simulates a repository that cannot be written."""
    with run_server(zoo, **FLIP_LIMIT) as server:
        for picture in PICTURES * 5:
            classify_pictures(server, picture)
        (zoo / "small" / "2" / "trial.json").mkdir(parents=True)
        onnx.save(build_model(seed=1), zoo / "small" / "2" / "model.onnx")
        wait_until_refused(server)
    assert "set FOVEA_STATE to a writable folder" in server.log
    with run_server(zoo, FOVEA_SWAP_FLIPS="0") as restarted_server:
        assert get_served_version(restarted_server) == "1"
        assert "would get another label" in fetch_refusals(restarted_server)["small", "2"]
    with run_server(zoo, FOVEA_SWAP_FLIPS="0.99") as lenient_server:
        assert get_served_version(lenient_server) == "2"


def test_services_sharing_verdicts_serve_same_version(zoo: Path, tmp_path: Path) -> None:
    """Only one of the services has seen images for which the versions differ."""
    settings = {**FLIP_LIMIT, "FOVEA_STATE": str(tmp_path / "state"), "FOVEA_REPLAY_IMAGES": "64"}
    with run_server(zoo, **settings) as first_server, run_server(zoo, **settings) as second_server:
        for picture in PICTURES * 5:
            classify_pictures(first_server, picture)
        publish_variant(zoo, seed=1)
        wait_until_refused(first_server)
        wait_until_refused(second_server)
        wait_until(lambda: get_served_version(second_server) == "1")
        assert get_served_version(first_server) == "1"
        record = tmp_path / "state" / "small" / "2.json"
        assert json.loads(record.read_text())["accepted"] is False
        assert not (zoo / "small" / "2" / "trial.json").exists()
        assert first_server.client.post(LOAD, json={"parameters": {"version": "2"}}).status_code == 200
        wait_until(lambda: get_served_version(second_server) == "2")


def test_resting_model_falls_back_to_older_version(zoo: Path) -> None:
    add_to_repository(build_model(seed=5), zoo, "another")
    settings: dict[str, Any] = {"FOVEA_MODELS_LOADED": "1", "FOVEA_DEFAULT_MODEL": "another"}
    write_garbage(zoo, "2")
    with run_server(zoo, FOVEA_WATCH="0", **settings) as server:
        assert get_status(server, CLASSIFY) == 503
        wait_until(lambda: get_status(server, CLASSIFY) == 200)
        assert get_served_version(server) == "1"


def test_missing_cuda_at_start_does_not_refuse_version(zoo: Path) -> None:
    result = run_service(FOVEA_MODELS=str(zoo), FOVEA_PROVIDER="cuda")
    assert result.returncode == 2
    assert "FOVEA_PROVIDER is cuda" in result.stderr
    assert not (zoo / "small" / "1" / "trial.json").exists()


@pytest.mark.parametrize("field", ["sha256", "accepted", "reason", "nesting", "kind"])
def test_damaged_verdict_is_ignored(zoo: Path, field: str) -> None:
    version = ModelVersion.from_path(zoo / "small" / "1" / "model.onnx", "small", "1")
    Refusals().refuse(version, "it failed", lasting=True)
    assert Refusals().find_reason(version) == "it failed"
    path = zoo / "small" / "1" / "trial.json"
    record = json.loads(path.read_text())
    damaged_texts: dict[str, object] = {
        "nesting": "[" * 50_000,
        "kind": json.dumps([record]),
    }
    path.write_text(str(damaged_texts.get(field) or json.dumps({**record, field: {"accepted": False}})))
    refusals = Refusals()
    assert refusals.find_reason(version) is None
    assert not refusals.is_accepted(version)

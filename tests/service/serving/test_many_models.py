"""Many models in one service: side by side, loaded on demand, and with fair shares."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from fovea.service.artifact.contract import Task
from tests import hostile
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.raw import Wire
from tests.runner_code import write_runner_code
from tests.servers import Server, run_service, wait_until
from tests.zoo import classify_pictures, get_status, publish_variant

pytestmark = pytest.mark.long

PICTURE = make_jpeg()


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    for name, seed in (("ants", 0), ("bees", 1), ("cows", 2)):
        add_to_repository(build_model(seed=seed), tmp_path / "zoo", name)
    return tmp_path / "zoo"


def read_loaded_models(server: Server) -> set[str]:
    return {model["name"] for model in server.client.get("/v1/models").json()["models"]}


def read_resting_models(server: Server) -> set[str]:
    return {model["name"] for model in server.client.get("/v1/models").json()["resting"]}


# --- on demand -----------------------------------------------------------------------------------


def test_models_load_on_demand_and_least_recent_is_unloaded(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as full_server:
        expected_answers = {
            name: classify_pictures(full_server, name=name) for name in ("ants", "bees", "cows")
        }
        assert (read_loaded_models(full_server), read_resting_models(full_server)) == (
            set(expected_answers),
            set(),
        )
    with Server(FOVEA_MODELS=str(zoo), FOVEA_MODELS_LOADED="2", FOVEA_DEFAULT_MODEL="bees") as server:
        assert (read_loaded_models(server), read_resting_models(server)) == ({"ants", "bees"}, {"cows"})
        for name in ("ants", "bees", "cows"):
            assert classify_pictures(server, name=name) == expected_answers[name]
        assert (read_loaded_models(server), read_resting_models(server)) == ({"bees", "cows"}, {"ants"})
        for name in ("bees", "ants"):
            assert classify_pictures(server, name=name) == expected_answers[name]
        assert read_resting_models(server) == {"cows"}
        assert server.client.get("/v1/models/cows/contract").json()["name"] == "cows"
        assert read_resting_models(server) == {"bees"}
        assert server.read_metric("fovea_model_info", model="bees") == 0
        assert server.client.post("/v1/classify", content=PICTURE).json()["model"]["name"] == "bees"


def test_concurrent_requests_load_resting_model_once(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_MODELS_LOADED="1") as server:
        with ThreadPoolExecutor(8) as pool:
            statuses = pool.map(lambda _: get_status(server, "/v1/models/cows/classify"), range(8))
            assert set(statuses) == {200}
        assert server.read_metric("fovea_model_changes_total", model="cows", result="loaded") == 1


def test_unloadable_model_gives_503_and_others_answer(zoo: Path) -> None:
    (zoo / "cows" / "1" / "model.onnx").write_bytes(b"\0")
    with Server(FOVEA_MODELS=str(zoo), FOVEA_MODELS_LOADED="2") as server:
        reply = server.client.post("/v1/models/cows/classify", content=PICTURE)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
        assert str(zoo) not in reply.text
        assert int(reply.headers["Retry-After"]) > 0
        assert read_loaded_models(server) == {"ants", "bees"}, "nobody had to go for it"
        assert get_status(server, "/v1/models/ants/classify") == 200
    assert "model cows cannot be loaded" in server.log


def test_concurrent_requests_try_unloadable_model_once(zoo: Path) -> None:
    hostile.write_endless_loop(zoo / "cows" / "1" / "model.onnx")
    with Server(FOVEA_MODELS=str(zoo), FOVEA_MODELS_LOADED="2", FOVEA_TRIAL_SECONDS="1") as server:
        with ThreadPoolExecutor(8) as pool:
            statuses = pool.map(lambda _: get_status(server, "/v1/models/cows/classify"), range(8))
            assert set(statuses) == {503}
        assert server.read_metric("fovea_model_changes_total", model="cows", result="refused") == 1


def test_concurrent_requests_to_models_in_turn_all_succeed(zoo: Path) -> None:
    """With room for one model, each model is unloaded for the next one, but only after it has answered."""
    names = ["ants", "bees", "cows"]
    with Server(FOVEA_MODELS=str(zoo), FOVEA_MODELS_LOADED="1", FOVEA_DEADLINE_MS="30000") as server:
        for name in names:
            assert classify_pictures(server, name=name)  # each model has been tried once
        with ThreadPoolExecutor(6) as pool:
            paths = [f"/v1/models/{name}/classify" for name in names * 10]
            assert set(pool.map(lambda path: get_status(server, path), paths)) == {200}
        assert server.read_metric("fovea_images_in_flight") == 0


def test_latest_version_answers_if_an_older_one_is_loaded(zoo: Path) -> None:
    publish_variant(zoo, seed=7, name="ants")
    (zoo / "ants" / "config.toml").write_text('versions = ["1", "2"]\n')
    with Server(FOVEA_MODELS=str(zoo), FOVEA_MODELS_LOADED="1", FOVEA_DEFAULT_MODEL="ants") as server:
        for version in ("2", "1"):
            path = f"/v1/models/ants/versions/{version}/classify"
            assert server.client.post(path, content=PICTURE).json()["model"]["version"] == version
        assert classify_pictures(server, name="ants")["model"]["version"] == "2"


def test_deadline_ends_wait_for_resting_model(zoo: Path) -> None:
    hostile.write_endless_loop(zoo / "cows" / "1" / "model.onnx")
    with Server(FOVEA_MODELS=str(zoo), FOVEA_MODELS_LOADED="2", FOVEA_TRIAL_SECONDS="3") as server:
        headers = {"X-Deadline-Ms": "200"}
        reply = server.client.post("/v1/models/cows/classify", content=PICTURE, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")


def test_new_version_of_resting_model_loads_on_demand(zoo: Path) -> None:
    settings = {"FOVEA_MODELS_LOADED": "1", "FOVEA_WATCH": "0.1"}
    with Server(FOVEA_MODELS=str(zoo), **settings) as server:
        publish_variant(zoo, seed=5, name="cows")
        wait_until(
            lambda: {"name": "cows", "version": "2"} in server.client.get("/v1/models").json()["resting"]
        )
        assert read_loaded_models(server) == {"ants"}
        assert classify_pictures(server, name="cows")["model"] == {"name": "cows", "version": "2"}


def test_failing_version_does_not_replace_resting_one(zoo: Path) -> None:
    settings = {"FOVEA_MODELS_LOADED": "1", "FOVEA_WATCH": "0.1", "FOVEA_MANAGEMENT": "true"}
    with Server(FOVEA_MODELS=str(zoo), **settings) as server:
        (zoo / "cows" / "2").mkdir()
        (zoo / "cows" / "2" / "model.onnx").write_bytes(b"no model at all")
        wait_until(lambda: server.client.get("/v1/models").json()["refused"])
        assert read_resting_models(server) == {"bees", "cows"}
        assert server.client.post("/v2/repository/models/cows/load").status_code == 409
        assert classify_pictures(server, name="cows")["model"] == {"name": "cows", "version": "1"}
        assert unload_model(server, "cows") == 200
        assert server.client.post("/v2/repository/models/cows/load").status_code == 409
        assert get_status(server, "/v1/models/cows/classify") == 404


def unload_model(server: Server, name: str) -> int:
    return server.client.post(f"/v2/repository/models/{name}/unload").status_code


SLOW_RUNNER_CODE = """
import os, time

from fovea.service.runners import process

load = process._Runner._load_model

def load_slowly(self, command):
    while os.path.exists({gate!r}):
        open({began!r}, "w").close()
        time.sleep(0.01)
    load(self, command)

process._Runner._load_model = load_slowly
"""
"""Code for runners that waits with loading another model while a gate file exists."""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_model_unloaded_while_loading_stays_unloaded(zoo: Path, tmp_path: Path, workers: str) -> None:
    gate, begin_mark = tmp_path / "gate", tmp_path / "began"
    settings = {
        "FOVEA_MODELS_LOADED": "2",
        "FOVEA_MANAGEMENT": "true",
        "FOVEA_WATCH": "0",
        "FOVEA_WORKERS": workers,
        **write_runner_code(tmp_path, SLOW_RUNNER_CODE.format(gate=str(gate), began=str(begin_mark))),
    }
    with Server(FOVEA_MODELS=str(zoo), **settings) as server, ThreadPoolExecutor(1) as pool:
        gate.touch()
        pending_status = pool.submit(get_status, server, "/v1/models/cows/classify")
        wait_until(begin_mark.exists)
        with httpx.Client(base_url=server.url, timeout=60) as other_client:
            assert other_client.post("/v2/repository/models/cows/unload").status_code == 200
        gate.unlink()
        assert pending_status.result() == 404
        assert get_status(server, "/v1/models/cows/classify") == 404
        assert "cows" not in read_loaded_models(server)
        assert unload_model(server, "cows") == 404


def test_loaded_versions_do_not_exceed_the_limit(zoo: Path) -> None:
    settings = {"FOVEA_MODELS_LOADED": "2", "FOVEA_MANAGEMENT": "true", "FOVEA_WATCH": "0"}
    for name in ("bees", "cows"):
        shutil.rmtree(zoo / name)
    with Server(FOVEA_MODELS=str(zoo), **settings) as server:

        def load_versions(name: str) -> list[tuple[str, str]]:
            assert server.client.post(f"/v2/repository/models/{name}/load").status_code == 200
            listing = server.client.get("/v1/models").json()
            return [(model["name"], model["version"]) for model in listing["models"]]

        for seed in range(4):
            publish_variant(zoo, seed=seed, name="dogs")
        (zoo / "dogs" / "config.toml").write_text('versions = ["1", "2", "3", "4"]\n')
        assert load_versions("dogs") == [("ants", "1"), ("dogs", "4")]
        for seed in range(2):
            publish_variant(zoo, seed=seed, name="ants")
        (zoo / "ants" / "config.toml").write_text('versions = ["1", "2", "3"]\n')
        loaded_versions = load_versions("ants")
        assert len(loaded_versions) == 2
        assert ("ants", "3") in loaded_versions


# --- versions and settings of each model ---------------------------------------------------------


def test_versions_side_by_side_answer_at_their_own_urls(zoo: Path) -> None:
    publish_variant(zoo, seed=7, name="ants")
    (zoo / "ants" / "config.toml").write_text('versions = ["1", "2"]\n')
    with Server(FOVEA_MODELS=str(zoo)) as server:
        urls = [
            "/v1/models/ants/classify",
            *(f"/v1/models/ants/versions/{number}/classify" for number in (1, 2)),
        ]
        latest, first, second = (server.client.post(url, content=PICTURE).json() for url in urls)
        assert (latest, first["model"]["version"]) == (second, "1")
        assert first["predictions"] != second["predictions"]
        listed_versions = [
            (model["name"], model["version"]) for model in server.client.get("/v1/models").json()["models"]
        ]
        assert listed_versions == [("ants", "1"), ("ants", "2"), ("bees", "1"), ("cows", "1")]
        reply = server.client.post("/v1/models/ants/versions/3/classify", content=PICTURE)
        assert "has no version '3'; it has '1', '2'" in reply.json()["error"]["message"]


def test_unreadable_config_stops_only_a_strict_start(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0.1") as server:
        (zoo / "ants" / "config.toml").write_text("batch_size = 4\n")
        publish_variant(zoo, seed=7, name="bees")
        wait_until(lambda: classify_pictures(server, name="bees")["model"]["version"] == "2")
        assert classify_pictures(server, name="ants")["model"]["version"] == "1"
    assert server.log.count("batch_size: unknown name") == 1
    result = run_service(FOVEA_MODELS=str(zoo), FOVEA_STRICT="true")
    assert result.returncode == 2
    assert "batch_size: unknown name" in result.stderr


def test_model_config_sets_batch_size_and_provider(zoo: Path) -> None:
    (zoo / "ants" / "config.toml").write_text("batch_max = 1\nthreads = 2\n")
    with Server(FOVEA_MODELS=str(zoo), FOVEA_RUNNERS="1") as server:
        files = [("image", PICTURE)] * 8
        for name, calls in (("ants", 8), ("bees", 2)):
            old_count = server.read_metric("fovea_batch_images_count")
            assert server.client.post(f"/v1/models/{name}/classify", files=files).status_code == 200
            assert server.read_metric("fovea_batch_images_count") - old_count >= calls
        assert server.read_metric("fovea_batch_images_bucket", le="1.0") >= 8
    (zoo / "cows" / "config.toml").write_text('provider = "cuda"\n')
    result = run_service(FOVEA_MODELS=str(zoo), FOVEA_STRICT="true")
    assert "ONNX Runtime has no CUDA" in result.stderr


# --- fair shares ---------------------------------------------------------------------------------


def test_queue_places_are_reserved_for_each_model(zoo: Path) -> None:
    """Each of three models has two of the 12 places reserved, and any model may take the other six."""
    settings = {"FOVEA_QUEUE_IMAGES": "12", "FOVEA_REQUEST_IMAGES": "12", "FOVEA_DEADLINE_MS": "60000"}
    with Server(FOVEA_MODELS=str(zoo), **settings) as server:

        def post_images(name: str, images: int) -> int:
            files = [("image", PICTURE)] * images
            return server.client.post(f"/v1/models/{name}/classify", files=files).status_code

        assert (post_images("ants", 8), post_images("ants", 9)) == (200, 503)
    (zoo / "ants" / "config.toml").write_text("queue_images = 3\n")
    with Server(FOVEA_MODELS=str(zoo), **settings) as server:
        assert (post_images("ants", 3), post_images("ants", 4), post_images("bees", 8)) == (200, 503, 200)
        reply = server.client.post("/v1/models/ants/classify", files=[("image", PICTURE)] * 4)
        assert "at most 3 images of this model" in reply.json()["error"]["message"]


def test_a_flood_for_one_model_does_not_starve_another(zoo: Path) -> None:
    """Many callers fill the places of one model; the single caller of another model is still answered."""
    stop = threading.Event()
    files = [("image", make_jpeg(640, 480))] * 16

    def send_flood(server: Server) -> int:
        answer_count = 0
        while not stop.is_set():
            answer_count += server.client.post("/v1/models/ants/classify", files=files).status_code == 200
        return answer_count

    with Server(FOVEA_MODELS=str(zoo), FOVEA_RUNNERS="1") as server, ThreadPoolExecutor(9) as pool:
        senders = [pool.submit(send_flood, server) for _ in range(9)]
        try:
            wait_until(lambda: server.read_metric("fovea_queue_images") > 64)
            for _ in range(10):
                queue_length = server.read_metric("fovea_queue_images")
                old_count = server.read_metric("fovea_images_total", model="ants")
                assert get_status(server, "/v1/models/bees/classify") == 200
                answers_between = server.read_metric("fovea_images_total", model="ants") - old_count
                assert answers_between < max(64, queue_length), "the whole queue went first"
        finally:
            stop.set()
        assert sum(sender.result() for sender in senders)


def test_removed_model_answers_its_open_requests(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0.1") as server, Wire(server.url) as wire:
        body = PICTURE
        path = b"/v1/models/ants/classify"
        wire.send(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path, len(body)), body[:10])
        server.wait_for_metric(2, "fovea_requests_in_flight")  # this request and the scrape
        shutil.rmtree(zoo / "ants")
        wait_until(lambda: get_status(server, "/v1/models/ants/classify") == 404)
        wire.send(body[10:])
        assert wire.read_response().status == 200


def test_tasks_of_all_kinds_are_served_together(zoo: Path) -> None:
    add_to_repository(build_model(Task.BINARY, ("cat", "dog")), zoo, "pets")
    add_to_repository(build_model(Task.MULTILABEL, ("sand", "sea")), zoo, "beach")
    with Server(FOVEA_MODELS=str(zoo)) as server:
        for name, labels in (("pets", 2), ("beach", 2), ("ants", 4)):
            assert len(classify_pictures(server, name=name)["predictions"]) == labels

"""Many models in one service: side by side, loaded on demand, and with fair shares."""

from __future__ import annotations

import os
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
from tests.servers import ROOT, Server, run_service, wait_until
from tests.zoo import classify_pictures, get_status, publish_variant

pytestmark = pytest.mark.long

PICTURE = make_jpeg()


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    for name, seed in (("ants", 0), ("bees", 1), ("cows", 2)):
        add_to_repository(build_model(seed=seed), tmp_path / "zoo", name)
    return tmp_path / "zoo"


def loaded_models(server: Server) -> set[str]:
    return {model["name"] for model in server.client.get("/v1/models").json()["models"]}


def resting_models(server: Server) -> set[str]:
    return {model["name"] for model in server.client.get("/v1/models").json()["resting"]}


# --- on demand -----------------------------------------------------------------------------------


def test_models_load_when_asked_for_and_the_least_recently_used_goes(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo)) as all_of_them:
        right = {name: classify_pictures(all_of_them, name=name) for name in ("ants", "bees", "cows")}
        assert (loaded_models(all_of_them), resting_models(all_of_them)) == (set(right), set())
    with Server(FOVEA_MODELS=str(zoo), FOVEA_MODELS_LOADED="2", FOVEA_DEFAULT_MODEL="bees") as running:
        assert (loaded_models(running), resting_models(running)) == ({"ants", "bees"}, {"cows"})
        for name in ("ants", "bees", "cows"):
            assert classify_pictures(running, name=name) == right[name]
        assert (loaded_models(running), resting_models(running)) == ({"bees", "cows"}, {"ants"})
        for name in ("bees", "ants"):
            assert classify_pictures(running, name=name) == right[name]
        assert resting_models(running) == {"cows"}
        assert running.client.get("/v1/models/cows/contract").json()["name"] == "cows"
        assert resting_models(running) == {"bees"}
        assert running.read_metric("fovea_model_info", model="bees") == 0
        assert running.client.post("/v1/classify", content=PICTURE).json()["model"]["name"] == "bees"


def test_many_who_ask_at_once_for_a_model_that_rests_load_it_once(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_MODELS_LOADED="1") as running:
        with ThreadPoolExecutor(8) as pool:
            statuses = pool.map(lambda _: get_status(running, "/v1/models/cows/classify"), range(8))
            assert set(statuses) == {200}
        assert running.read_metric("fovea_model_changes_total", model="cows", result="loaded") == 1


def test_a_model_that_cannot_be_loaded_is_503_and_the_others_answer(zoo: Path) -> None:
    (zoo / "cows" / "1" / "model.onnx").write_bytes(b"\0")
    with Server(FOVEA_MODELS=str(zoo), FOVEA_MODELS_LOADED="2") as running:
        reply = running.client.post("/v1/models/cows/classify", content=PICTURE)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
        assert str(zoo) not in reply.text
        assert int(reply.headers["Retry-After"]) > 0
        assert loaded_models(running) == {"ants", "bees"}, "nobody had to go for it"
        assert get_status(running, "/v1/models/ants/classify") == 200
    assert "model cows cannot be loaded" in running.log


def test_many_who_ask_at_once_for_a_model_that_cannot_be_loaded_have_it_tried_once(zoo: Path) -> None:
    hostile.write_endless_loop(zoo / "cows" / "1" / "model.onnx")
    with Server(FOVEA_MODELS=str(zoo), FOVEA_MODELS_LOADED="2", FOVEA_TRIAL_SECONDS="1") as running:
        with ThreadPoolExecutor(8) as pool:
            statuses = pool.map(lambda _: get_status(running, "/v1/models/cows/classify"), range(8))
            assert set(statuses) == {503}
        assert running.read_metric("fovea_model_changes_total", model="cows", result="refused") == 1


def test_models_that_are_asked_for_in_turn_by_many_all_answer(zoo: Path) -> None:
    """With room for one model, each model is unloaded for the next one, but only after it has answered."""
    names = ["ants", "bees", "cows"]
    with Server(FOVEA_MODELS=str(zoo), FOVEA_MODELS_LOADED="1", FOVEA_DEADLINE_MS="30000") as running:
        for name in names:
            assert classify_pictures(running, name=name)  # tried once
        with ThreadPoolExecutor(6) as pool:
            paths = [f"/v1/models/{name}/classify" for name in names * 10]
            assert set(pool.map(lambda path: get_status(running, path), paths)) == {200}
        assert running.read_metric("fovea_images_in_flight") == 0


def test_the_latest_version_answers_even_if_an_older_one_is_loaded(zoo: Path) -> None:
    publish_variant(zoo, seed=7, name="ants")
    (zoo / "ants" / "config.toml").write_text('versions = ["1", "2"]\n')
    with Server(FOVEA_MODELS=str(zoo), FOVEA_MODELS_LOADED="1", FOVEA_DEFAULT_MODEL="ants") as running:
        for version in ("2", "1"):
            path = f"/v1/models/ants/versions/{version}/classify"
            assert running.client.post(path, content=PICTURE).json()["model"]["version"] == version
        assert classify_pictures(running, name="ants")["model"]["version"] == "2"


def test_who_cannot_wait_for_a_model_that_rests_is_told_so(zoo: Path) -> None:
    hostile.write_endless_loop(zoo / "cows" / "1" / "model.onnx")
    with Server(FOVEA_MODELS=str(zoo), FOVEA_MODELS_LOADED="2", FOVEA_TRIAL_SECONDS="3") as running:
        headers = {"X-Deadline-Ms": "200"}
        reply = running.client.post("/v1/models/cows/classify", content=PICTURE, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")


def test_a_new_version_of_a_model_that_rests_waits_until_it_is_asked_for(zoo: Path) -> None:
    settings = {"FOVEA_MODELS_LOADED": "1", "FOVEA_WATCH": "0.1"}
    with Server(FOVEA_MODELS=str(zoo), **settings) as running:
        publish_variant(zoo, seed=5, name="cows")
        wait_until(
            lambda: {"name": "cows", "version": "2"} in running.client.get("/v1/models").json()["resting"]
        )
        assert loaded_models(running) == {"ants"}
        assert classify_pictures(running, name="cows")["model"] == {"name": "cows", "version": "2"}


def unload_model(server: Server, name: str) -> int:
    return server.client.post(f"/v2/repository/models/{name}/unload").status_code


SLOW = """
import os, sys, time

if "runners.process" in " ".join(sys.orig_argv):
    from fovea.service.runners import process

    load = process._Runner._load_model

    def slow(self, wanted):
        while os.path.exists({gate!r}):
            open({began!r}, "w").close()
            time.sleep(0.01)
        load(self, wanted)

    process._Runner._load_model = slow
"""
"""Code for runners that waits with loading another model while a gate file exists."""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_model_that_is_unloaded_while_it_wakes_stays_unloaded(
    zoo: Path, tmp_path: Path, workers: str
) -> None:
    gate, began = tmp_path / "gate", tmp_path / "began"
    (tmp_path / "sitecustomize.py").write_text(SLOW.format(gate=str(gate), began=str(began)))
    settings = {
        "FOVEA_MODELS_LOADED": "2",
        "FOVEA_MANAGEMENT": "true",
        "FOVEA_WATCH": "0",
        "FOVEA_WORKERS": workers,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
    }
    with Server(FOVEA_MODELS=str(zoo), **settings) as running, ThreadPoolExecutor(1) as pool:
        gate.touch()
        asking = pool.submit(get_status, running, "/v1/models/cows/classify")
        wait_until(began.exists)
        with httpx.Client(base_url=running.url, timeout=60) as other:
            assert other.post("/v2/repository/models/cows/unload").status_code == 200
        gate.unlink()
        assert asking.result() == 404
        assert get_status(running, "/v1/models/cows/classify") == 404
        assert "cows" not in loaded_models(running)
        assert unload_model(running, "cows") == 404


def test_no_more_versions_are_loaded_than_there_is_room_for(zoo: Path) -> None:
    settings = {"FOVEA_MODELS_LOADED": "2", "FOVEA_MANAGEMENT": "true", "FOVEA_WATCH": "0"}
    for name in ("bees", "cows"):
        shutil.rmtree(zoo / name)
    with Server(FOVEA_MODELS=str(zoo), **settings) as running:

        def load(name: str) -> list[tuple[str, str]]:
            assert running.client.post(f"/v2/repository/models/{name}/load").status_code == 200
            listed = running.client.get("/v1/models").json()
            return [(one["name"], one["version"]) for one in listed["models"]]

        for seed in range(4):
            publish_variant(zoo, seed=seed, name="dogs")
        (zoo / "dogs" / "config.toml").write_text('versions = ["1", "2", "3", "4"]\n')
        assert load("dogs") == [("ants", "1"), ("dogs", "4")]
        for seed in range(2):
            publish_variant(zoo, seed=seed, name="ants")
        (zoo / "ants" / "config.toml").write_text('versions = ["1", "2", "3"]\n')
        after = load("ants")
        assert len(after) == 2
        assert ("ants", "3") in after


# --- each its own --------------------------------------------------------------------------------


def test_versions_side_by_side_answer_each_for_itself(zoo: Path) -> None:
    publish_variant(zoo, seed=7, name="ants")
    (zoo / "ants" / "config.toml").write_text('versions = ["1", "2"]\n')
    with Server(FOVEA_MODELS=str(zoo)) as running:
        urls = ["/v1/models/ants/classify", *(f"/v1/models/ants/versions/{one}/classify" for one in (1, 2))]
        latest, first, second = (running.client.post(url, content=PICTURE).json() for url in urls)
        assert (latest, first["model"]["version"]) == (second, "1")
        assert first["predictions"] != second["predictions"]
        listed = [(one["name"], one["version"]) for one in running.client.get("/v1/models").json()["models"]]
        assert listed == [("ants", "1"), ("ants", "2"), ("bees", "1"), ("cows", "1")]
        reply = running.client.post("/v1/models/ants/versions/3/classify", content=PICTURE)
        assert "has no version '3'; it has '1', '2'" in reply.json()["error"]["message"]


def test_a_config_that_cannot_be_read_stops_a_strict_start_and_no_running_service(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0.1") as running:
        (zoo / "ants" / "config.toml").write_text("batch_size = 4\n")
        publish_variant(zoo, seed=7, name="bees")
        wait_until(lambda: classify_pictures(running, name="bees")["model"]["version"] == "2")
        assert classify_pictures(running, name="ants")["model"]["version"] == "1"
    assert running.log.count("batch_size: unknown name") == 1
    ended = run_service(FOVEA_MODELS=str(zoo), FOVEA_STRICT="true")
    assert ended.returncode == 2
    assert "batch_size: unknown name" in ended.stderr


def test_a_model_has_its_own_batch_and_provider(zoo: Path) -> None:
    (zoo / "ants" / "config.toml").write_text("batch_max = 1\nthreads = 2\n")
    with Server(FOVEA_MODELS=str(zoo), FOVEA_RUNNERS="1") as running:
        files = [("image", PICTURE)] * 8
        for name, calls in (("ants", 8), ("bees", 2)):
            before = running.read_metric("fovea_batch_images_count")
            assert running.client.post(f"/v1/models/{name}/classify", files=files).status_code == 200
            assert running.read_metric("fovea_batch_images_count") - before >= calls
        assert running.read_metric("fovea_batch_images_bucket", le="1.0") >= 8
    (zoo / "cows" / "config.toml").write_text('provider = "cuda"\n')
    strict = run_service(FOVEA_MODELS=str(zoo), FOVEA_STRICT="true")
    assert "ONNX Runtime has no CUDA" in strict.stderr


# --- none at another's cost ----------------------------------------------------------------------


def test_places_are_kept_for_models_that_few_ask_for(zoo: Path) -> None:
    """Each of three models has two of the 12 places reserved, and any model may take the other six."""
    settings = {"FOVEA_QUEUE_IMAGES": "12", "FOVEA_REQUEST_IMAGES": "12", "FOVEA_DEADLINE_MS": "60000"}
    with Server(FOVEA_MODELS=str(zoo), **settings) as running:

        def status(name: str, images: int) -> int:
            files = [("image", PICTURE)] * images
            return running.client.post(f"/v1/models/{name}/classify", files=files).status_code

        assert (status("ants", 8), status("ants", 9)) == (200, 503)
    (zoo / "ants" / "config.toml").write_text("queue_images = 3\n")
    with Server(FOVEA_MODELS=str(zoo), **settings) as running:
        assert (status("ants", 3), status("ants", 4), status("bees", 8)) == (200, 503, 200)
        reply = running.client.post("/v1/models/ants/classify", files=[("image", PICTURE)] * 4)
        assert "at most 3 images of this model" in reply.json()["error"]["message"]


def test_a_flood_for_one_model_does_not_starve_another(zoo: Path) -> None:
    """Many callers fill the places of one model; the single caller of another model is still answered."""
    enough = threading.Event()
    flood = [("image", make_jpeg(640, 480))] * 16

    def pour(running: Server) -> int:
        answered = 0
        while not enough.is_set():
            answered += running.client.post("/v1/models/ants/classify", files=flood).status_code == 200
        return answered

    with Server(FOVEA_MODELS=str(zoo), FOVEA_RUNNERS="1") as running, ThreadPoolExecutor(9) as pool:
        pouring = [pool.submit(pour, running) for _ in range(9)]
        try:
            wait_until(lambda: running.read_metric("fovea_queue_images") > 64)
            for _ in range(10):
                waiting = running.read_metric("fovea_queue_images")
                answered = running.read_metric("fovea_images_total", model="ants")
                assert get_status(running, "/v1/models/bees/classify") == 200
                between = running.read_metric("fovea_images_total", model="ants") - answered
                assert between < max(64, waiting), "the whole queue went first"
        finally:
            enough.set()
        assert sum(one.result() for one in pouring)


def test_a_model_that_goes_answers_what_it_was_asked_first(zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0.1") as running, Wire(running.url) as wire:
        body = PICTURE
        path = b"/v1/models/ants/classify"
        wire.send(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path, len(body)), body[:10])
        running.wait_for_metric(2, "fovea_requests_in_flight")  # it, and the scrape
        shutil.rmtree(zoo / "ants")
        wait_until(lambda: get_status(running, "/v1/models/ants/classify") == 404)
        wire.send(body[10:])
        assert wire.read_response().status == 200


def test_tasks_of_all_kinds_are_served_together(zoo: Path) -> None:
    add_to_repository(build_model(Task.BINARY, ("cat", "dog")), zoo, "pets")
    add_to_repository(build_model(Task.MULTILABEL, ("sand", "sea")), zoo, "beach")
    with Server(FOVEA_MODELS=str(zoo)) as running:
        for name, labels in (("pets", 2), ("beach", 2), ("ants", 4)):
            assert len(classify_pictures(running, name=name)["predictions"]) == labels

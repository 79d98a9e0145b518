"""A new version replaces an old version while requests arrive."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import onnx
import pytest

from tests import hostile
from tests.graphs import add_to_repository, build_model, read_contract, with_contract
from tests.runner_code import write_runner_code
from tests.servers import Server, wait_until
from tests.zoo import PICTURES, classify_pictures, get_served_version, get_status, publish_variant

pytestmark = pytest.mark.long

WATCH_SETTINGS = {"FOVEA_WATCH": "0.1", "FOVEA_LOG_REQUESTS": "0"}
CALLERS = 4


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return add_to_repository(build_model(), tmp_path / "zoo")


@contextmanager
def run_server(zoo: Path, **settings: str) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(zoo), **{**WATCH_SETTINGS, **settings}) as server:
        yield server


def wait_for_version(server: Server, version: str) -> None:
    wait_until(lambda: get_served_version(server) == version)


def wait_for_log(server: Server, log: list[str], words: str) -> None:
    """Wait until the service has logged these words."""
    wait_until(lambda: any(words in line for line in log))


@contextmanager
def run_logged_server(zoo: Path, **settings: str) -> Iterator[tuple[Server, list[str]]]:
    """Run a server and yield it with the growing list of its log lines."""
    with run_server(zoo, **settings) as server:
        lines: list[str] = []
        stream = server.process.stderr
        assert stream
        reader = threading.Thread(target=lambda: lines.extend(iter(stream.readline, "")), daemon=True)
        reader.start()
        try:
            yield server, lines
        finally:
            server.process.terminate()
            reader.join()


# --- a new model ---------------------------------------------------------------------------------


def ask_workers(server: Server, request: Callable[[httpx.Client], Any]) -> set[Any]:
    """Return the answers of all workers: connections that are open at the same time spread over them."""
    with ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=server.url, timeout=30)) for _ in range(4)]
        return {request(client) for client in clients}


def read_default_names(server: Server) -> set[str]:
    """Return the name of the default model, or an empty name if there is none."""

    def ask_default(client: httpx.Client) -> str:
        reply = client.post("/v1/classify", content=PICTURES[0]).json()
        return str(reply["model"]["name"]) if "model" in reply else ""

    return ask_workers(server, ask_default)


def read_worker_pids(server: Server) -> set[int]:
    return ask_workers(server, lambda client: client.get("/runtime").json()["pid"])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_second_model_does_not_change_the_default(zoo: Path, workers: str) -> None:
    """The first model stays the default until the repository changes it, also for a later worker."""
    with run_logged_server(zoo, FOVEA_WORKERS=workers) as (server, log):
        add_to_repository(build_model(), zoo, "later")
        wait_until(lambda: get_status(server, "/v1/models/later/classify") == 200)
        assert read_default_names(server) == {"small"}
        (zoo / "default").write_text("nowhere\n")
        wait_for_log(server, log, f"{zoo}/default is 'nowhere', which is not served")
        assert read_default_names(server) == {"small"}
        (zoo / "default").write_text("later\n")
        wait_until(lambda: read_default_names(server) == {"later"})
        (zoo / "default").unlink()
        if workers == "2":
            killed_pid = read_worker_pids(server).pop()
            os.kill(killed_pid, signal.SIGKILL)
            wait_until(lambda: len(read_worker_pids(server) - {killed_pid}) == 2)
        assert read_default_names(server) == {"later"}
        shutil.rmtree(zoo / "later")
        wait_until(lambda: read_default_names(server) == {"small"})


# --- a new version -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2"])
def test_new_version_replaces_old_one(zoo: Path, workers: str) -> None:
    with run_server(zoo, FOVEA_WORKERS=workers) as server:
        for picture in PICTURES:
            classify_pictures(server, picture)
        version = publish_variant(zoo, seed=1)
        wait_for_version(server, version)
        server.wait_for_metric(0, "fovea_model_info", model="small", version="1")
        server.wait_for_metric(int(workers), "fovea_model_changes_total", model="small", result="loaded")
        assert server.read_metric("fovea_model_info", model="small", version="2") == 1
        assert get_status(server, "/v1/models/small/versions/1/classify") == 404
        expected = classify_pictures(server, *PICTURES)["results"]
    with run_server(zoo) as fresh_server:
        assert classify_pictures(fresh_server, *PICTURES)["results"] == expected


def test_new_version_is_compared_on_recent_images(zoo: Path) -> None:
    with run_logged_server(zoo) as (server, log):
        for picture in PICTURES:
            classify_pictures(server, picture)
        publish_variant(zoo, seed=0)
        wait_for_version(server, "2")
        assert server.read_metric("fovea_swap_flip_ratio", model="small") == 0
        old_labels = {
            index: classify_pictures(server, PICTURES[index])["predictions"][0]["label"] for index in range(4)
        }
        publish_variant(zoo, seed=1)
        wait_for_version(server, "3")
        new_labels = {
            index: classify_pictures(server, PICTURES[index])["predictions"][0]["label"] for index in range(4)
        }
        flip_count = sum(old_labels[index] != new_labels[index] for index in old_labels)
        assert flip_count > 0
        assert 0 < server.read_metric("fovea_swap_flip_ratio", model="small") <= 1
        assert 0.1 < server.read_metric("fovea_swap_slowdown_ratio", model="small") < 10
    assert any("of the last" in line and "another label than version 1" in line for line in log)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_version_with_too_many_flips_is_refused(zoo: Path, workers: str) -> None:
    with run_logged_server(zoo, FOVEA_SWAP_FLIPS="0.2", FOVEA_WORKERS=workers) as (server, log):
        for picture in PICTURES * 5:
            classify_pictures(server, picture)
        publish_variant(zoo, seed=1)
        wait_for_log(server, log, "would get another label")
        assert get_served_version(server) == "1"
        assert server.read_metric("fovea_model_changes_total", model="small", result="refused") >= 1
        publish_variant(zoo, seed=0)
        wait_for_version(server, "3")
        refusal_count = server.read_metric("fovea_model_changes_total", model="small", result="refused")
        assert 1 <= refusal_count <= int(workers), "once, and not at each look"


def test_too_slow_version_is_refused(zoo: Path) -> None:
    with run_logged_server(zoo, FOVEA_SWAP_SLOWDOWN="0.01") as (server, log):
        classify_pictures(server)
        publish_variant(zoo, seed=0)
        wait_for_log(server, log, "times as long; at most 0.01 (FOVEA_SWAP_SLOWDOWN)")
        assert get_served_version(server) == "1"


def test_version_is_accepted_without_recent_images(zoo: Path) -> None:
    with run_server(zoo, FOVEA_REPLAY_IMAGES="0", FOVEA_SWAP_FLIPS="0") as server:
        for picture in PICTURES:
            classify_pictures(server, picture)
        publish_variant(zoo, seed=1)
        wait_for_version(server, "2")


# --- removed versions ----------------------------------------------------------------------------


def test_removed_version_falls_back_to_previous_one(zoo: Path) -> None:
    publish_variant(zoo, seed=1)
    with run_server(zoo) as server:
        assert get_served_version(server) == "2"
        shutil.rmtree(zoo / "small" / "2")
        wait_for_version(server, "1")


def test_config_rolls_version_back_and_forward(zoo: Path) -> None:
    publish_variant(zoo, seed=1)
    with run_server(zoo) as server:
        (zoo / "small" / "config.toml").write_text('versions = ["1"]\n')
        wait_for_version(server, "1")
        (zoo / "small" / "config.toml").write_text('versions = ["1", "2"]\n')
        wait_for_version(server, "2")
        assert get_status(server, "/v1/models/small/versions/1/classify") == 200
        (zoo / "small" / "config.toml").unlink()
        server.wait_for_metric(0, "fovea_model_info", model="small", version="1")


def test_removed_folder_ends_model_but_lost_repository_does_not(
    zoo: Path,
) -> None:
    publish_variant(zoo, seed=1, name="other")
    with run_logged_server(zoo) as (server, log):
        assert classify_pictures(server, name="other")
        shutil.rmtree(zoo / "other")
        wait_until(lambda: get_status(server, "/v1/models/other/classify") == 404)
        (zoo / "small").rename(zoo.with_name("kept"))
        wait_for_log(server, log, "is empty; the served models stay")
        zoo.with_name("kept").rename(zoo / "small")
        zoo.rename(zoo.with_name("away"))
        wait_for_log(server, log, "cannot read the repository")
        assert get_served_version(server) == "1"
        zoo.with_name("away").rename(zoo)
        publish_variant(zoo, seed=2)
        wait_for_version(server, "2")


def test_replaced_file_is_loaded_under_same_version(zoo: Path) -> None:
    with run_server(zoo) as server:
        old_results = classify_pictures(server, *PICTURES)["results"]
        new_path = zoo.parent / "fresh.onnx"
        onnx.save(build_model(seed=3), new_path)
        new_path.replace(zoo / "small" / "1" / "model.onnx")
        wait_until(lambda: classify_pictures(server, *PICTURES)["results"] != old_results)
        assert server.read_metric("fovea_model_info", model="small", version="1") == 1


# --- files that must not be served ---------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2"])
def test_single_file_may_get_another_name(tmp_path: Path, workers: str) -> None:
    path, new_path = tmp_path / "weights.onnx", tmp_path / "new.onnx"
    model = build_model()
    onnx.save(model, path)
    with run_server(path, FOVEA_WORKERS=workers) as server:
        assert read_default_names(server) == {"small"}
        onnx.save(with_contract(model, replace(read_contract(model), name="other")), new_path)
        new_path.replace(path)
        wait_until(lambda: read_default_names(server) == {"other"})
        assert get_status(server, "/v1/models/small/classify") == 404
        assert [one["default"] for one in server.client.get("/v1/models").json()["models"]] == [True]
        server.wait_for_metric(1, "fovea_model_versions")  # a version counts under one name


def test_incomplete_file_is_never_loaded(zoo: Path) -> None:
    """The file is written in pieces, with pauses longer than the time between two scans."""
    content = build_model(seed=1).SerializeToString()
    with run_logged_server(zoo) as (server, log):
        (zoo / "small" / "2").mkdir()
        with (zoo / "small" / "2" / "model.onnx").open("wb", buffering=0) as file:
            for start in range(0, len(content), len(content) // 3):
                file.write(content[start : start + len(content) // 3])
                time.sleep(0.5)
                assert get_served_version(server) in ("1", "2")
        wait_for_version(server, "2")
    assert not any("Traceback" in line for line in log)


def test_growing_file_is_not_tried_until_it_is_stable(zoo: Path) -> None:
    content = build_model(seed=1).SerializeToString()
    with run_server(zoo) as server:
        (zoo / "small" / "2").mkdir()
        with (zoo / "small" / "2" / "model.onnx").open("wb", buffering=0) as file:
            for start in range(0, len(content), len(content) // 50):
                file.write(content[start : start + len(content) // 50])
                time.sleep(0.02)
        wait_for_version(server, "2")
        assert server.read_metric("fovea_model_changes_total", model="small", result="refused") == 0


HOSTILE = {
    "outside": (hostile.make_external_weight("../../secret.bin"), "External data path"),
    "absolute": (hostile.make_external_weight("/dev/null/secret.bin"), "Absolute path"),
    "beside": (hostile.make_external_weight("weights.bin"), "External data path"),
    "custom operator": (
        hostile.write_custom_operator,
        "com.example:Conv(-1) is not a registered function/op",
    ),
    "truncated": (hostile.write_truncated, "protobuf parsing failed"),
    "zeros": (hostile.write_zeros, "an ONNX file has at most 2147483647"),
    "no model": (lambda path: path.write_bytes(bytes(1000)), "the file is not an ONNX model"),
    "hungry": (hostile.write_huge_tensor, "the graph does not run"),
    "without contract": (hostile.write_without_contract, "the model has no contract"),
    "endless": (hostile.write_endless_loop, "it could not be tried within 1 s (FOVEA_TRIAL_SECONDS)"),
}


def test_hostile_files_are_refused_without_harm(zoo: Path) -> None:
    limits = {"FOVEA_TRIAL_SECONDS": "1", "FOVEA_MANAGEMENT": "true"}
    with run_server(zoo, **limits) as server:
        classify_pictures(server)
        runner_pids = server.runner_pids
        for number, (name, (write, message)) in enumerate(HOSTILE.items(), 2):
            folder = zoo / "small" / str(number)
            folder.mkdir()
            write(folder / "model.onnx")
            reply = server.client.post("/v2/repository/models/small/load")
            assert (reply.status_code, reply.json()["code"]) == (409, "swap_refused"), name
            assert message in reply.json()["error"], name
            assert "\n" not in reply.json()["error"]
            assert get_served_version(server) == "1"
            shutil.rmtree(folder)
        assert runner_pids == server.runner_pids
        assert server.read_metric("fovea_runner_deaths_total") == 0
        publish_variant(zoo, seed=1)
        wait_for_version(server, "2")


DYING_RUNNER_CODE = """
import os

from fovea.service.runners import process

load = process._Runner._load_model

def die_once(self, command):
    try:
        os.mkdir({once!r})
    except FileExistsError:
        load(self, command)
    else:
        os._exit(9)

process._Runner._load_model = die_once
"""


@pytest.mark.parametrize(("workers", "runners"), [("1", "1"), ("1", "2"), ("2", "2")])
def test_runner_death_during_load_does_not_stop_change(
    zoo: Path, tmp_path: Path, workers: str, runners: str
) -> None:
    """The other runners load the model, and so does the replacement."""
    environment = write_runner_code(tmp_path, DYING_RUNNER_CODE.format(once=str(tmp_path / "once")))
    settings = {**environment, "FOVEA_WORKERS": workers, "FOVEA_RUNNERS": runners}
    with run_logged_server(zoo, **settings) as (server, log):
        publish_variant(zoo, seed=1)
        wait_for_version(server, "2")
        server.wait_for_metric(0, "fovea_model_info", model="small", version="1")
        assert server.read_metric("fovea_model_changes_total", model="small", result="refused") == 0
        server.wait_for_metric(int(workers) * int(runners), "fovea_runners")
        assert {get_served_version(server) for _ in range(8)} == {"2"}
    assert any("died while it loaded the model" in line for line in log)
    assert not any("stays as it is" in line for line in log)


KILLED_RUNNERS_CODE = DYING_RUNNER_CODE.replace(
    "os.mkdir({once!r})", "os.mkdir(os.path.join({once!r}, str(os.getpid())))"
)
"""Code for runners that ends each runner when it loads another model."""


def test_model_that_kills_runners_leaves_old_version_served(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    environment = write_runner_code(tmp_path, KILLED_RUNNERS_CODE.format(once=str(tmp_path / "once")))
    with run_logged_server(zoo, **environment, FOVEA_RUNNERS="2") as (server, log):
        publish_variant(zoo, seed=1)
        wait_for_log(server, log, "model small stays as it is: runner")
        server.wait_for_metric(2, "fovea_runners")
        assert get_served_version(server) == "1"


def test_new_runner_loads_served_file_not_refused_one(zoo: Path) -> None:
    """The refused file replaces the old one by a rename; a new runner still loads the served file."""
    with run_logged_server(zoo, FOVEA_SWAP_FLIPS="0", FOVEA_RUNNERS="1") as (server, log):
        old_results = classify_pictures(server, *PICTURES)["results"]
        new_path = zoo.parent / "fresh.onnx"
        onnx.save(build_model(seed=3), new_path)
        new_path.replace(zoo / "small" / "1" / "model.onnx")
        wait_for_log(server, log, "would get another label")
        (pid,) = server.runner_pids
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: server.runner_pids and server.runner_pids != {pid})
        assert classify_pictures(server, *PICTURES)["results"] == old_results


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_long_refusal_message_does_not_block_next_version(zoo: Path, workers: str) -> None:
    """A library quotes the content of a hostile file; messages between workers have a size limit."""
    model = build_model()
    model.graph.node[3].domain = "x" * 70_000
    model.opset_import.append(onnx.helper.make_opsetid("x" * 70_000, 1))
    with run_logged_server(zoo, FOVEA_WORKERS=workers) as (server, log):
        (zoo / "small" / "2").mkdir()
        onnx.save(model, zoo / "small" / "2" / "model.onnx")
        wait_for_log(server, log, "stays as it is")
        publish_variant(zoo, seed=1)
        wait_for_version(server, "3")


@pytest.mark.slow
def test_metric_series_of_unloaded_versions_are_limited(zoo: Path) -> None:
    with run_server(zoo, FOVEA_MANAGEMENT="true", FOVEA_WATCH="0") as server:
        for _ in range(25):
            publish_variant(zoo, seed=0)
            assert server.client.post("/v2/repository/models/small/load").status_code == 200
        shown_versions = set(
            re.findall(r'model="small",.*version="(\d+)"', server.client.get("/metrics").text)
        )
    assert shown_versions == {str(version) for version in range(6, 27)}


# --- under load ----------------------------------------------------------------------------------


def read_answers_by_version(zoo: Path, seeds: int) -> dict[str, list[Any]]:
    """Return each version's answers to the pictures, from an idle service."""
    answers = {}
    for version in range(1, seeds + 1):
        (zoo / "small" / "config.toml").write_text(f'versions = ["{version}"]\n')
        with run_server(zoo) as server:
            answers[str(version)] = classify_pictures(server, *PICTURES)["results"]
    (zoo / "small" / "config.toml").unlink()
    return answers


def send_load(
    url: str, expected: dict[str, list[Any]], stop: threading.Event
) -> tuple[Counter[str], list[float]]:
    """Send requests until `stop` is set; return the count of each answer and all durations in seconds."""
    outcomes: Counter[str] = Counter()
    durations = []
    with httpx.Client(base_url=url, timeout=30) as client:
        while not stop.is_set():
            started_at = time.monotonic()
            try:
                files = [("image", picture) for picture in PICTURES]
                reply = client.post("/v1/models/small/classify?top_k=0", files=files)
            except httpx.HTTPError as error:
                outcomes[repr(error)] += 1
                continue
            durations.append(time.monotonic() - started_at)
            if reply.status_code != 200:
                outcomes[f"{reply.status_code} {reply.text}"] += 1
            else:
                version = reply.json()["model"]["version"]
                outcomes[version if reply.json()["results"] == expected[version] else "mixed"] += 1
    return outcomes, durations


@pytest.mark.parametrize("workers", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_no_request_is_lost_or_mixed_while_versions_change(zoo: Path, workers: str) -> None:
    publish_variant(zoo, seed=1)
    expected_answers = read_answers_by_version(zoo, 2)
    stop = threading.Event()
    with run_server(zoo, FOVEA_WORKERS=workers) as server, ThreadPoolExecutor(CALLERS) as pool:
        callers = [pool.submit(send_load, server.url, expected_answers, stop) for _ in range(CALLERS)]
        try:
            for version in ("1", "2", "1"):
                (zoo / "small" / "config.toml").write_text(f'versions = ["{version}"]\n')
                wait_for_version(server, version)
        finally:
            stop.set()
        outcomes = sum((caller.result()[0] for caller in callers), Counter[str]())
    assert set(outcomes) == {"1", "2"}, outcomes

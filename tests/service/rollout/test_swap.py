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
from pathlib import Path
from typing import Any

import httpx
import onnx
import pytest

from tests import hostile
from tests.graphs import add_to_repository, build_model
from tests.servers import ROOT, Server, wait_until
from tests.zoo import PICTURES, classify_pictures, get_served_version, get_status, publish_variant

pytestmark = pytest.mark.long

WATCHED = {"FOVEA_WATCH": "0.1", "FOVEA_LOG_REQUESTS": "0"}
CALLERS = 4


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    return add_to_repository(build_model(), tmp_path / "zoo")


@contextmanager
def run_server(zoo: Path, **settings: str) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(zoo), **{**WATCHED, **settings}) as server:
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


# --- a model comes -------------------------------------------------------------------------------


def ask_workers(server: Server, request: Callable[[httpx.Client], Any]) -> set[Any]:
    """Return the answers of all workers: connections that are open at the same time spread over them."""
    with ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=server.url, timeout=30)) for _ in range(4)]
        return {request(client) for client in clients}


def default_names(server: Server) -> set[str]:
    """Return the name of the default model, or an empty name if there is none."""

    def ask_default(client: httpx.Client) -> str:
        reply = client.post("/v1/classify", content=PICTURES[0]).json()
        return str(reply["model"]["name"]) if "model" in reply else ""

    return ask_workers(server, ask_default)


def worker_pids(server: Server) -> set[int]:
    return ask_workers(server, lambda one: one.get("/runtime").json()["pid"])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_second_model_takes_nothing_from_the_first(zoo: Path, workers: str) -> None:
    """The first model stays the default until the repository changes it, also for a later worker."""
    with run_logged_server(zoo, FOVEA_WORKERS=workers) as (running, log):
        add_to_repository(build_model(), zoo, "later")
        wait_until(lambda: get_status(running, "/v1/models/later/classify") == 200)
        assert default_names(running) == {"small"}
        (zoo / "default").write_text("nowhere\n")
        wait_for_log(running, log, f"{zoo}/default is 'nowhere', which is not served")
        assert default_names(running) == {"small"}
        (zoo / "default").write_text("later\n")
        wait_until(lambda: default_names(running) == {"later"})
        (zoo / "default").unlink()
        if workers == "2":
            killed = worker_pids(running).pop()
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: len(worker_pids(running) - {killed}) == 2)
        assert default_names(running) == {"later"}
        shutil.rmtree(zoo / "later")
        wait_until(lambda: default_names(running) == {"small"})


# --- a version comes -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_version_that_appears_is_served_and_the_old_one_unloaded(zoo: Path, workers: str) -> None:
    with run_server(zoo, FOVEA_WORKERS=workers) as running:
        for picture in PICTURES:
            classify_pictures(running, picture)
        version = publish_variant(zoo, seed=1)
        wait_for_version(running, version)
        running.wait_for_metric(0, "fovea_model_info", model="small", version="1")
        running.wait_for_metric(int(workers), "fovea_model_changes_total", model="small", result="loaded")
        assert running.read_metric("fovea_model_info", model="small", version="2") == 1
        assert get_status(running, "/v1/models/small/versions/1/classify") == 404
        expected = classify_pictures(running, *PICTURES)["results"]
    with run_server(zoo) as fresh:
        assert classify_pictures(fresh, *PICTURES)["results"] == expected


def test_the_new_version_is_compared_on_the_last_images(zoo: Path) -> None:
    with run_logged_server(zoo) as (running, log):
        for picture in PICTURES:
            classify_pictures(running, picture)
        publish_variant(zoo, seed=0)
        wait_for_version(running, "2")
        assert running.read_metric("fovea_swap_flip_ratio", model="small") == 0
        before = {
            answer: classify_pictures(running, PICTURES[answer])["predictions"][0]["label"]
            for answer in range(4)
        }
        publish_variant(zoo, seed=1)
        wait_for_version(running, "3")
        after = {
            answer: classify_pictures(running, PICTURES[answer])["predictions"][0]["label"]
            for answer in range(4)
        }
        flipped = sum(before[answer] != after[answer] for answer in before)
        assert flipped > 0
        assert 0 < running.read_metric("fovea_swap_flip_ratio", model="small") <= 1
        assert 0.1 < running.read_metric("fovea_swap_slowdown_ratio", model="small") < 10
    assert any("of the last" in line and "another label than version 1" in line for line in log)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_version_that_flips_too_many_labels_is_refused(zoo: Path, workers: str) -> None:
    with run_logged_server(zoo, FOVEA_SWAP_FLIPS="0.2", FOVEA_WORKERS=workers) as (running, log):
        for picture in PICTURES * 5:
            classify_pictures(running, picture)
        publish_variant(zoo, seed=1)
        wait_for_log(running, log, "would get another label")
        assert get_served_version(running) == "1"
        assert running.read_metric("fovea_model_changes_total", model="small", result="refused") >= 1
        publish_variant(zoo, seed=0)
        wait_for_version(running, "3")
        refused = running.read_metric("fovea_model_changes_total", model="small", result="refused")
        assert 1 <= refused <= int(workers), "once, and not at each look"


def test_a_version_that_is_too_slow_is_refused(zoo: Path) -> None:
    with run_logged_server(zoo, FOVEA_SWAP_SLOWDOWN="0.01") as (running, log):
        classify_pictures(running)
        publish_variant(zoo, seed=0)
        wait_for_log(running, log, "times as long; at most 0.01 (FOVEA_SWAP_SLOWDOWN)")
        assert get_served_version(running) == "1"


def test_no_image_is_kept_if_none_is_to_be(zoo: Path) -> None:
    with run_server(zoo, FOVEA_REPLAY_IMAGES="0", FOVEA_SWAP_FLIPS="0") as running:
        for picture in PICTURES:
            classify_pictures(running, picture)
        publish_variant(zoo, seed=1)
        wait_for_version(running, "2")


# --- and goes ------------------------------------------------------------------------------------


def test_a_version_that_is_removed_gives_way_to_the_one_before(zoo: Path) -> None:
    publish_variant(zoo, seed=1)
    with run_server(zoo) as running:
        assert get_served_version(running) == "2"
        shutil.rmtree(zoo / "small" / "2")
        wait_for_version(running, "1")


def test_a_config_rolls_back_and_forth(zoo: Path) -> None:
    publish_variant(zoo, seed=1)
    with run_server(zoo) as running:
        (zoo / "small" / "config.toml").write_text('versions = ["1"]\n')
        wait_for_version(running, "1")
        (zoo / "small" / "config.toml").write_text('versions = ["1", "2"]\n')
        wait_for_version(running, "2")
        assert get_status(running, "/v1/models/small/versions/1/classify") == 200
        (zoo / "small" / "config.toml").unlink()
        running.wait_for_metric(0, "fovea_model_info", model="small", version="1")


def test_a_folder_that_goes_ends_its_model_and_a_repository_that_goes_ends_nothing(
    zoo: Path,
) -> None:
    publish_variant(zoo, seed=1, name="other")
    with run_logged_server(zoo) as (running, log):
        assert classify_pictures(running, name="other")
        shutil.rmtree(zoo / "other")
        wait_until(lambda: get_status(running, "/v1/models/other/classify") == 404)
        (zoo / "small").rename(zoo.with_name("kept"))
        wait_for_log(running, log, "is empty; the served models stay")
        zoo.with_name("kept").rename(zoo / "small")
        zoo.rename(zoo.with_name("away"))
        wait_for_log(running, log, "cannot read the repository")
        assert get_served_version(running) == "1"
        zoo.with_name("away").rename(zoo)
        publish_variant(zoo, seed=2)
        wait_for_version(running, "2")


def test_a_file_that_is_replaced_is_another_version_of_itself(zoo: Path) -> None:
    with run_server(zoo) as running:
        before = classify_pictures(running, *PICTURES)["results"]
        fresh = zoo.parent / "fresh.onnx"
        onnx.save(build_model(seed=3), fresh)
        fresh.replace(zoo / "small" / "1" / "model.onnx")
        wait_until(lambda: classify_pictures(running, *PICTURES)["results"] != before)
        assert running.read_metric("fovea_model_info", model="small", version="1") == 1


# --- what must not be served ---------------------------------------------------------------------


def test_half_a_file_is_never_loaded(zoo: Path) -> None:
    """The file is written in pieces, with pauses longer than the time between two scans."""
    content = build_model(seed=1).SerializeToString()
    with run_logged_server(zoo) as (running, log):
        (zoo / "small" / "2").mkdir()
        with (zoo / "small" / "2" / "model.onnx").open("wb", buffering=0) as file:
            for start in range(0, len(content), len(content) // 3):
                file.write(content[start : start + len(content) // 3])
                time.sleep(0.5)
                assert get_served_version(running) in ("1", "2")
        wait_for_version(running, "2")
    assert not any("Traceback" in line for line in log)


def test_a_file_that_grows_is_not_tried_before_it_has_settled(zoo: Path) -> None:
    content = build_model(seed=1).SerializeToString()
    with run_server(zoo) as running:
        (zoo / "small" / "2").mkdir()
        with (zoo / "small" / "2" / "model.onnx").open("wb", buffering=0) as file:
            for start in range(0, len(content), len(content) // 50):
                file.write(content[start : start + len(content) // 50])
                time.sleep(0.02)
        wait_for_version(running, "2")
        assert running.read_metric("fovea_model_changes_total", model="small", result="refused") == 0


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


def test_hostile_files_are_refused_and_harm_nobody(zoo: Path) -> None:
    limits = {"FOVEA_TRIAL_SECONDS": "1", "FOVEA_MANAGEMENT": "true"}
    with run_server(zoo, **limits) as running:
        classify_pictures(running)
        runners = running.runner_pids
        for number, (name, (write, message)) in enumerate(HOSTILE.items(), 2):
            folder = zoo / "small" / str(number)
            folder.mkdir()
            write(folder / "model.onnx")
            reply = running.client.post("/v2/repository/models/small/load")
            assert (reply.status_code, reply.json()["code"]) == (409, "swap_refused"), name
            assert message in reply.json()["error"], name
            assert "\n" not in reply.json()["error"]
            assert get_served_version(running) == "1"
            shutil.rmtree(folder)
        assert runners == running.runner_pids
        assert running.read_metric("fovea_runner_deaths_total") == 0
        publish_variant(zoo, seed=1)
        wait_for_version(running, "2")


DYING = """
import os, sys

if "runners.process" in " ".join(sys.orig_argv):
    from fovea.service.runners import process

    load = process._Runner._load_model

    def dying(self, wanted):
        try:
            os.mkdir({once!r})
        except FileExistsError:
            load(self, wanted)
        else:
            os._exit(9)

    process._Runner._load_model = dying
"""


@pytest.mark.parametrize(("workers", "runners"), [("1", "1"), ("1", "2"), ("2", "2")])
def test_a_runner_that_dies_meanwhile_costs_no_change(
    zoo: Path, tmp_path: Path, workers: str, runners: str
) -> None:
    """The other runners load the model, and so does the replacement."""
    (tmp_path / "sitecustomize.py").write_text(DYING.format(once=str(tmp_path / "once")))
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    settings = {"PYTHONPATH": paths, "FOVEA_WORKERS": workers, "FOVEA_RUNNERS": runners}
    with run_logged_server(zoo, **settings) as (running, log):
        publish_variant(zoo, seed=1)
        wait_for_version(running, "2")
        running.wait_for_metric(0, "fovea_model_info", model="small", version="1")
        assert running.read_metric("fovea_model_changes_total", model="small", result="refused") == 0
        running.wait_for_metric(int(workers) * int(runners), "fovea_runners")
        assert {get_served_version(running) for _ in range(8)} == {"2"}
    assert any("died while it loaded the model" in line for line in log)
    assert not any("stays as it is" in line for line in log)


KILLER = DYING.replace("os.mkdir({once!r})", "os.mkdir(os.path.join({once!r}, str(os.getpid())))")
"""Code for runners that kills each runner which loads another model."""


def test_a_model_that_kills_runners_is_given_up_and_the_old_version_answers(
    zoo: Path, tmp_path: Path
) -> None:
    (tmp_path / "once").mkdir()
    (tmp_path / "sitecustomize.py").write_text(KILLER.format(once=str(tmp_path / "once")))
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    with run_logged_server(zoo, PYTHONPATH=paths, FOVEA_RUNNERS="2") as (running, log):
        publish_variant(zoo, seed=1)
        wait_for_log(running, log, "model small stays as it is: runner")
        running.wait_for_metric(2, "fovea_runners")
        assert get_served_version(running) == "1"


def test_a_file_that_was_written_over_and_refused_is_not_loaded_by_a_new_runner(zoo: Path) -> None:
    """The refused file replaces the old one by a rename; a new runner still loads the served file."""
    with run_logged_server(zoo, FOVEA_SWAP_FLIPS="0", FOVEA_RUNNERS="1") as (running, log):
        before = classify_pictures(running, *PICTURES)["results"]
        fresh = zoo.parent / "fresh.onnx"
        onnx.save(build_model(seed=3), fresh)
        fresh.replace(zoo / "small" / "1" / "model.onnx")
        wait_for_log(running, log, "would get another label")
        (pid,) = running.runner_pids
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: running.runner_pids and running.runner_pids != {pid})
        assert classify_pictures(running, *PICTURES)["results"] == before


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_refusal_may_be_as_long_as_it_likes(zoo: Path, workers: str) -> None:
    """A library quotes the content of a hostile file; messages between workers have a size limit."""
    model = build_model()
    model.graph.node[3].domain = "x" * 70_000
    model.opset_import.append(onnx.helper.make_opsetid("x" * 70_000, 1))
    with run_logged_server(zoo, FOVEA_WORKERS=workers) as (running, log):
        (zoo / "small" / "2").mkdir()
        onnx.save(model, zoo / "small" / "2" / "model.onnx")
        wait_for_log(running, log, "stays as it is")
        publish_variant(zoo, seed=1)
        wait_for_version(running, "3")


@pytest.mark.slow
def test_series_of_versions_that_have_gone_do_not_pile_up(zoo: Path) -> None:
    with run_server(zoo, FOVEA_MANAGEMENT="true", FOVEA_WATCH="0") as running:
        for _ in range(25):
            publish_variant(zoo, seed=0)
            assert running.client.post("/v2/repository/models/small/load").status_code == 200
        shown = set(re.findall(r'model="small",.*version="(\d+)"', running.client.get("/metrics").text))
    assert shown == {str(version) for version in range(6, 27)}


# --- under load ----------------------------------------------------------------------------------


def answers_by_version(zoo: Path, seeds: int) -> dict[str, list[Any]]:
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
    right = answers_by_version(zoo, 2)
    enough = threading.Event()
    with run_server(zoo, FOVEA_WORKERS=workers) as running, ThreadPoolExecutor(CALLERS) as pool:
        callers = [pool.submit(send_load, running.url, right, enough) for _ in range(CALLERS)]
        try:
            for version in ("1", "2", "1"):
                (zoo / "small" / "config.toml").write_text(f'versions = ["{version}"]\n')
                wait_for_version(running, version)
        finally:
            enough.set()
        seen = sum((caller.result()[0] for caller in callers), Counter[str]())
    assert set(seen) == {"1", "2"}, seen

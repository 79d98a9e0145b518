"""Runners that die, hang or raise, and their replacement."""

from __future__ import annotations

import base64
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from fovea.service.inference.engine import Engine
from fovea.service.inference.preprocess import decode_image
from fovea.service.runners.batch_messages import Answer
from fovea.service.runners.batch_messages import Image as Encoded
from fovea.service.runners.connection import _count_suspects, _PendingBatch
from fovea.service.runners.lane import Lane
from tests.graphs import add_to_repository, build_model, build_nan_for_black
from tests.pictures import draw_picture, encode_image, make_jpeg
from tests.poison import EXIT_IMAGE, RAISE_IMAGE, BlockingImage, make_poison_environment
from tests.raw import Wire, classify_request
from tests.servers import ROOT, Server, is_running, is_running_module, list_children, wait_until
from tests.zoo import get_served_version, get_status, publish_variant

PICTURE = make_jpeg()


def _wait_until_ready(server: Server, runners: int) -> None:
    server.wait_for_metric(runners, "fovea_runners")
    assert server.client.get("/health/ready").status_code == 200


def _wait_until_not_ready(server: Server) -> httpx.Response:
    while (reply := server.client.get("/health/ready")).status_code == 200:
        pass
    return reply


def _wait_until_busy(server: Server) -> None:
    server.wait_for_metric(1, "fovea_images_in_flight")
    server.wait_for_metric(0, "fovea_queue_images")


@pytest.fixture
def gate(tmp_path: Path) -> BlockingImage:
    return BlockingImage(tmp_path / "gate")


@pytest.fixture
def poisoned(small_zoo: Path, tmp_path: Path) -> Iterator[Server]:
    """A service with one runner that reacts to the images of `tests.poison`."""
    with Server(
        FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="1", **make_poison_environment(tmp_path)
    ) as running:
        yield running


def _send_one_batch(server: Server, gate: BlockingImage, *images: bytes) -> list[int]:
    """Send requests of one image each while the runner is busy, so that they share a batch.

    Return their status codes.
    """
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.url)) for _ in range(len(images) + 1)]
        wires[0].send(classify_request(gate.image))
        _wait_until_busy(server)
        for waiting, (wire, image) in enumerate(zip(wires[1:], images, strict=True), 1):
            wire.send(classify_request(image))
            server.wait_for_metric(waiting, "fovea_queue_images")
        gate.release()
        assert wires[0].read_response().error_code == "unsupported_format"
        return [wire.read_response().status for wire in wires[1:]]


# --- one dies ------------------------------------------------------------------------------------


def test_no_request_fails_when_a_runner_is_killed_under_load(small_zoo: Path) -> None:
    def ask(url: str) -> set[int]:
        with httpx.Client(base_url=url, timeout=60) as client:
            return {client.post("/v1/classify", content=PICTURE).status_code for _ in range(60)}

    with (
        Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="2") as running,
        ThreadPoolExecutor(6) as pool,
    ):
        asking = [pool.submit(ask, running.url) for _ in range(6)]
        wait_until(lambda: running.read_metric("fovea_images_total") >= 50)
        os.kill(min(running.runner_pids), signal.SIGKILL)
        assert set().union(*(one.result() for one in asking)) == {200}
        _wait_until_ready(running, 2)
        assert running.read_metric("fovea_runner_deaths_total") == 1
        assert running.read_metric("fovea_errors_total") == 0
    assert "died, exit status -9; it is replaced" in running.log


def test_the_batch_of_a_killed_runner_is_run_again(poisoned: Server, gate: BlockingImage) -> None:
    with Wire(poisoned.url) as wire:
        wire.send(classify_request(gate.image))
        _wait_until_busy(poisoned)
        (first,) = poisoned.runner_pids
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not is_running(first))
        gate.release()
        assert wire.read_response().error_code == "unsupported_format"
        (second,) = poisoned.runner_pids
        assert second != first
        assert poisoned.read_metric("fovea_runner_deaths_total") == 1


@pytest.mark.long
def test_all_killed_at_once_is_not_ready_and_requests_wait(small_zoo: Path) -> None:
    with (
        Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="2") as running,
        Wire(running.url) as first,
        Wire(running.url) as second,
    ):
        for pid in running.runner_pids:
            os.kill(pid, signal.SIGKILL)
        reply = _wait_until_not_ready(running)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
        assert reply.headers["Retry-After"] == "1"
        assert running.client.get("/health/live").status_code == 200
        for wire in (first, second):
            wire.send(classify_request(PICTURE))
        assert (first.read_response().status, second.read_response().status) == (200, 200)
        _wait_until_ready(running, 2)
        assert running.read_metric("fovea_runner_deaths_total") == 2


# --- images that harm ----------------------------------------------------------------------------


def test_an_image_that_kills_runners_harms_no_neighbour(poisoned: Server, gate: BlockingImage) -> None:
    assert _send_one_batch(poisoned, gate, PICTURE, EXIT_IMAGE, PICTURE) == [200, 500, 200]
    assert poisoned.read_metric("fovea_runner_deaths_total") == 2
    assert poisoned.read_metric("fovea_errors_total", reason="internal") == 1
    _wait_until_ready(poisoned, 1)


def test_nor_the_other_images_of_its_request(poisoned: Server) -> None:
    files = [("file", ("a.jpg", image)) for image in (PICTURE, EXIT_IMAGE, PICTURE)]
    reply = poisoned.client.post("/v1/classify", files=files)
    assert reply.status_code == 200
    good, bad, also_good = reply.json()["results"]
    assert bad["error"] == {
        "code": "internal",
        "message": "two processes died while they worked on this image",
    }
    assert "predictions" in good
    assert "predictions" in also_good


def test_what_raises_in_a_runner_fails_its_batch_alone(poisoned: Server, gate: BlockingImage) -> None:
    statuses = _send_one_batch(poisoned, gate, PICTURE, RAISE_IMAGE, PICTURE, PICTURE)
    assert statuses == [200, 500, 200, 200]  # what was run together is then run apart
    reply = poisoned.client.post("/v1/classify", content=RAISE_IMAGE)
    assert reply.json()["error"]["code"] == "internal"
    assert "on purpose" not in reply.text
    assert poisoned.client.post("/v1/classify", content=PICTURE).status_code == 200
    assert poisoned.read_metric("fovea_runner_deaths_total") == 0
    assert poisoned.read_metric("fovea_errors_total", reason="internal") == 2
    poisoned.__exit__(None, None, None)
    assert "ArithmeticError: raised on purpose" in poisoned.log


# --- one hangs -----------------------------------------------------------------------------------


@pytest.mark.long
def test_a_runner_that_is_stopped_is_replaced(small_zoo: Path) -> None:
    settings = {"FOVEA_RUNNERS": "1", "FOVEA_BATCH_TIMEOUT": "1.5"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running:
        (pid,) = running.runner_pids
        os.kill(pid, signal.SIGSTOP)
        assert running.client.post("/v1/classify", content=PICTURE).status_code == 200
        assert not is_running(pid)
        assert running.read_metric("fovea_runner_deaths_total") == 1
    assert f"runner {pid} has not answered for 1.5 s (FOVEA_BATCH_TIMEOUT); it is killed" in running.log


@pytest.mark.long
def test_an_image_that_hangs_runners_is_given_up(
    small_zoo: Path, tmp_path: Path, gate: BlockingImage
) -> None:
    settings = {"FOVEA_RUNNERS": "1", "FOVEA_BATCH_TIMEOUT": "1", **make_poison_environment(tmp_path)}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running:
        reply = running.client.post("/v1/classify", content=gate.image)
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
        assert running.client.post("/v1/classify", content=PICTURE).status_code == 200
        assert running.read_metric("fovea_runner_deaths_total") == 2


# --- none can be started -------------------------------------------------------------------------


@pytest.mark.long
def test_a_model_file_that_is_gone_is_no_loss(small_zoo: Path, tmp_path: Path) -> None:
    """The service keeps the file open while it serves the model."""
    zoo = tmp_path / "zoo"
    shutil.copytree(small_zoo, zoo)
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0") as running:
        before = running.read_metric("fovea_runners")
        shutil.rmtree(zoo / "small")
        for pid in running.runner_pids:
            os.kill(pid, signal.SIGKILL)
        running.wait_for_metric(
            before, "fovea_runner_deaths_total"
        )  # no batch was given to one that is dying
        assert running.client.post("/v1/classify", content=PICTURE).status_code == 200
        _wait_until_ready(running, int(before))
        assert running.read_metric("fovea_runner_deaths_total") == before
        assert running.read_metric("fovea_runner_start_failures_total") == 0


@pytest.mark.long
def test_a_model_file_that_was_written_over_is_waited_for(small_zoo: Path, tmp_path: Path) -> None:
    zoo, log = tmp_path / "zoo", tmp_path / "log"
    shutil.copytree(small_zoo, zoo)
    model = zoo / "small" / "1" / "model.onnx"
    content, when = model.read_bytes(), model.stat().st_mtime_ns
    settings = {"FOVEA_MODELS": str(zoo), "FOVEA_WATCH": "0"}
    with log.open("w") as stderr, Server({"stderr": stderr}, **settings) as running:
        before = running.read_metric("fovea_runners")
        model.write_bytes(b"damaged")
        for pid in running.runner_pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "a runner cannot be replaced, next try in 2 s" in log.read_text())
        assert "the file has changed since it was found" in log.read_text()
        assert _wait_until_not_ready(running).json()["error"]["code"] == "not_ready"
        assert running.read_metric("fovea_runner_start_failures_total", reason="other") >= 1
        model.write_bytes(content)
        os.utime(model, ns=(when, when))
        assert running.client.post("/v1/classify", content=PICTURE).status_code == 200
        _wait_until_ready(running, int(before))
        assert running.read_metric("fovea_runner_deaths_total") == before


@pytest.mark.long
def test_work_waits_for_a_runner_and_is_refused_at_last(small_zoo: Path, tmp_path: Path) -> None:
    """No runner can be started any more: each one hangs before it reads its setup."""
    flag = tmp_path / "flag"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        f"if 'runners.process' in ' '.join(sys.orig_argv) and os.path.exists({str(flag)!r}):\n"
        "    time.sleep(600)\n"
    )
    settings = {
        "FOVEA_RUNNERS": "2",
        "FOVEA_RUNNER_WAIT": "1.5",
        "FOVEA_RUNNER_ABSENCE": "3",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
    }
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running:
        assert running.read_metric("fovea_runners_expected") == 2
        flag.touch()
        for pid in running.runner_pids:
            os.kill(pid, signal.SIGKILL)
        running.wait_for_metric(0, "fovea_runners")
        assert running.client.get("/health/live").status_code == 200
        files = [("image", PICTURE)] * 3
        for body in ({"content": PICTURE}, {"files": files}):  # alone, and several
            asked = time.monotonic()
            reply = running.client.post("/v1/classify", **body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
            assert int(reply.headers["Retry-After"]) >= 1
            assert 1.4 < time.monotonic() - asked < 20
        with Wire(running.url) as early:
            reply = running.client.post("/v1/classify", content=PICTURE, headers={"X-Deadline-Ms": "200"})
            assert reply.status_code == 504
            early.send(classify_request(PICTURE))
            assert early.read_response().status == 503
        assert running.read_metric("fovea_images_in_flight") == 0
        assert running.read_metric("fovea_queue_images") == 0
        for path in ("/health/live", "/v2/health/live"):
            wait_until(lambda path=path: running.client.get(path).status_code == 503)  # type: ignore[misc]
        assert "FOVEA_RUNNER_ABSENCE" in running.client.get("/health/live").text


def _descendant_pids(pid: int, module: str) -> set[int]:
    """Return the pids of descendants of the process `pid` that run a module of the service."""
    children = list_children(pid)
    own = {child for child in children if is_running_module(child, module)}
    return own.union(*(_descendant_pids(child, module) for child in children))


def _damage_file(model: Path) -> None:
    """Overwrite bytes in place, so that processes that have the file open see the damage too."""
    with model.open("r+b") as file:
        file.write(b"damaged")


def _kill_runners(server: Server) -> None:
    for pid in server.runner_pids:
        os.kill(pid, signal.SIGKILL)
    server.wait_for_metric(0, "fovea_runners")


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_another_version_revives_what_was_lost_with_all_runners(tmp_path: Path, workers: str) -> None:
    """This happens although the repository is not watched, and although the served file is damaged."""
    zoo = add_to_repository(build_model(seed=1), tmp_path / "zoo")
    publish_variant(zoo, seed=2)
    settings = {"FOVEA_WATCH": "0", "FOVEA_RUNNERS": "1", "FOVEA_WORKERS": workers}
    with Server(FOVEA_MODELS=str(zoo), **settings) as running:
        assert get_served_version(running) == "2"
        _damage_file(zoo / "small" / "2" / "model.onnx")
        for pid in _descendant_pids(running.process.pid, "runners.process"):
            os.kill(pid, signal.SIGKILL)

        def is_back() -> bool:
            reply = running.client.post("/v1/models/small/classify", content=PICTURE)
            return reply.status_code == 200 and reply.json()["model"]["version"] == "1"

        wait_until(is_back)
        assert running.client.get("/health/ready").status_code == 200
        listed = running.client.get("/v1/models").json()["refused"]
        assert [(one["name"], one["version"]) for one in listed] == [("small", "2")]


@pytest.mark.long
def test_another_version_revives_workers_that_cannot_start_any_more(tmp_path: Path) -> None:
    """All workers are killed, and the file that they had loaded is damaged."""
    zoo = add_to_repository(build_model(seed=1), tmp_path / "zoo")
    publish_variant(zoo, seed=2)
    settings = {"FOVEA_WATCH": "0", "FOVEA_RUNNERS": "1", "FOVEA_WORKERS": "2"}
    with Server(FOVEA_MODELS=str(zoo), **settings) as running:
        assert get_served_version(running) == "2"
        _damage_file(zoo / "small" / "2" / "model.onnx")
        tasks = Path(f"/proc/{running.process.pid}/task").glob("*/children")
        for pid in {int(child) for task in tasks for child in task.read_text().split()}:
            os.kill(pid, signal.SIGKILL)
        with httpx.Client(base_url=running.url, timeout=120) as fresh:
            reply = fresh.post("/v1/models/small/classify", content=PICTURE)
        assert (reply.status_code, reply.json()["model"]["version"]) == (200, "1")


@pytest.mark.long
def test_a_damaged_file_takes_no_other_model_down(tmp_path: Path) -> None:
    zoo = add_to_repository(build_model(seed=1), tmp_path / "zoo", "ants")
    add_to_repository(build_model(seed=2), zoo, "bees")
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0", FOVEA_RUNNERS="2") as running:
        content = (zoo / "bees" / "1" / "model.onnx").read_bytes()
        before = running.client.post("/v1/models/bees/classify", content=PICTURE).json()["predictions"]
        _damage_file(zoo / "bees" / "1" / "model.onnx")
        _kill_runners(running)
        assert get_status(running, "/v1/models/ants/classify") in (200, 503)
        wait_until(lambda: get_status(running, "/v1/models/ants/classify") == 200)
        running.wait_for_metric(2, "fovea_runners")
        reply = running.client.post("/v1/models/bees/classify", content=PICTURE)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
        (zoo / "bees" / "1" / "model.onnx").write_bytes(content)
        wait_until(lambda: get_status(running, "/v1/models/bees/classify") == 200)
        after = running.client.post("/v1/models/bees/classify", content=PICTURE).json()["predictions"]
        assert after == before


@pytest.mark.long
def test_a_single_file_that_was_damaged_revives_too(tmp_path: Path) -> None:
    path = add_to_repository(build_model(seed=1), tmp_path / "zoo") / "small" / "1" / "model.onnx"
    with Server(FOVEA_MODELS=str(path), FOVEA_WATCH="0", FOVEA_RUNNERS="1") as running:
        content, when = path.read_bytes(), path.stat().st_mtime_ns
        _damage_file(path)
        _kill_runners(running)
        wait_until(lambda: "no model is loaded" in running.client.get("/health/ready").text)
        assert running.client.post("/v1/classify", content=PICTURE).status_code == 503
        path.write_bytes(content)
        os.utime(path, ns=(when, when))
        wait_until(lambda: running.client.get("/health/ready").status_code == 200)
        assert running.client.post("/v1/classify", content=PICTURE).status_code == 200


# --- loads ---------------------------------------------------------------------------------------

LOAD = "/v2/repository/models/small/load"

GATED = """
import os, sys, time

if "runners.process" in " ".join(sys.orig_argv):
    from fovea.service.runners import process

    load = process._Runner._load_model

    def gated(self, wanted):
        open({began!r}, "w").close()
        while not os.path.exists({gate!r}):
            time.sleep(0.01)
        load(self, wanted)

    process._Runner._load_model = gated
"""
"""Code for a runner: create the file `began` when a further load begins; load once the file `gate` exists."""


def _gated_settings(tmp_path: Path, **settings: str) -> tuple[dict[str, str], Path, Path]:
    started_file, gate_file = tmp_path / "began", tmp_path / "gate"
    (tmp_path / "sitecustomize.py").write_text(GATED.format(began=str(started_file), gate=str(gate_file)))
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    management = {"FOVEA_WATCH": "0", "FOVEA_MANAGEMENT": "true", "PYTHONPATH": paths}
    return {**management, **settings}, started_file, gate_file


@pytest.mark.long
def test_a_load_goes_on_when_a_runner_dies_that_has_not_begun(tmp_path: Path) -> None:
    zoo = add_to_repository(build_model(), tmp_path / "zoo")
    settings, began, gate = _gated_settings(tmp_path, FOVEA_RUNNERS="2")
    with Server(FOVEA_MODELS=str(zoo), **settings) as running, ThreadPoolExecutor(1) as pool:
        publish_variant(zoo, seed=1)
        loading = pool.submit(running.client.post, LOAD)
        wait_until(began.exists)
        second = max(running.runner_pids)
        os.kill(second, signal.SIGKILL)
        running.wait_for_metric(1, "fovea_runner_deaths_total")
        gate.touch()
        assert loading.result().status_code == 200
        running.wait_for_metric(2, "fovea_runners")
        assert {get_served_version(running) for _ in range(8)} == {"2"}


@pytest.mark.long
def test_a_runner_that_hangs_while_it_loads_is_replaced(tmp_path: Path) -> None:
    """The limit of a load is ten times FOVEA_TRIAL_SECONDS."""
    zoo = add_to_repository(build_model(), tmp_path / "zoo")
    settings, began, gate = _gated_settings(tmp_path, FOVEA_RUNNERS="2", FOVEA_TRIAL_SECONDS="0.5")
    with Server(FOVEA_MODELS=str(zoo), **settings) as running, ThreadPoolExecutor(1) as pool:
        publish_variant(zoo, seed=1)
        loading = pool.submit(running.client.post, LOAD)
        wait_until(began.exists)
        running.wait_for_metric(1, "fovea_runner_deaths_total")
        gate.touch()
        assert loading.result().status_code == 200
        running.wait_for_metric(2, "fovea_runners")
        assert get_served_version(running) == "2"
    assert "has not loaded a model within 5 s (10 times FOVEA_TRIAL_SECONDS); it is killed" in running.log


@pytest.mark.long
def test_a_runner_that_hangs_at_its_start_is_replaced(small_zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "started = Path(__file__).with_name('started')\n"
        "if 'runners.process' in ' '.join(sys.orig_argv):\n"
        "    count = len(started.read_text()) if started.exists() else 0\n"
        "    started.write_text('x' * (count + 1))\n"
        "    if count == 1: time.sleep(600)\n"
    )
    settings = {"FOVEA_RUNNERS": "1", "FOVEA_TRIAL_SECONDS": "0.5", "PYTHONPATH": str(tmp_path)}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running:
        (runner,) = running.runner_pids
        os.kill(runner, signal.SIGKILL)
        running.wait_for_metric(1, "fovea_runner_start_failures_total", reason="other")
        wait_until(lambda: running.client.get("/health/ready").status_code == 200)
        assert running.client.post("/v1/classify", content=PICTURE).status_code == 200
    assert "has not loaded its models within 20 s" in running.log


WRONG = """
import os, sys

if "runners.process" in " ".join(sys.orig_argv) and os.path.exists({flag!r}):
    from fovea.service.inference.engine import Engine

    compute_logits = Engine.compute_logits
    Engine.compute_logits = lambda *arguments, **named: compute_logits(*arguments, **named) + 1
"""


@pytest.mark.long
def test_a_host_that_fails_the_golden_set_takes_no_work_and_is_counted(
    small_zoo: Path, tmp_path: Path
) -> None:
    """The host computes correctly when the service starts, and wrongly when the runner is replaced."""
    flag = tmp_path / "flag"
    (tmp_path / "sitecustomize.py").write_text(WRONG.format(flag=str(flag)))
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="1", PYTHONPATH=paths) as running:
        assert running.read_metric("fovea_runner_start_failures_total", reason="golden") == 0
        flag.touch()
        (runner,) = running.runner_pids
        os.kill(runner, signal.SIGKILL)
        running.wait_for_metric(1, "fovea_runner_start_failures_total", reason="golden")
        assert _wait_until_not_ready(running).json()["error"]["code"] == "not_ready"


def test_how_long_runners_are_at_work_is_counted(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="1") as running:
        started = time.monotonic()
        for _ in range(20):
            running.client.post("/v1/classify", content=PICTURE)
        passed = time.monotonic() - started
        worked = sum(
            running.read_metric("fovea_stage_seconds_sum", stage=one) for one in ("decode", "inference")
        )
        assert worked < running.read_metric("fovea_runner_busy_seconds_total") < passed


@pytest.mark.long
def test_one_that_had_done_nothing_is_replaced_after_a_while(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="1") as running:
        (runner,) = running.runner_pids
        killed = time.monotonic()
        os.kill(runner, signal.SIGKILL)
        running.wait_for_metric(1, "fovea_runner_deaths_total")
        running.wait_for_metric(1, "fovea_runners")
        assert time.monotonic() - killed >= 1.0


@pytest.mark.long
def test_files_for_a_new_one_are_waited_for(small_zoo: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    settings = {"FOVEA_MODELS": str(small_zoo), "FOVEA_RUNNERS": "1"}
    with log.open("w") as stderr, Server({"stderr": stderr}, **settings) as running:
        (runner,) = running.runner_pids
        assert running.client.get("/health/ready").status_code == 200
        soft, hard = resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (3, hard))
        os.kill(runner, signal.SIGKILL)
        wait_until(lambda: "a runner cannot be started: Too many open files" in log.read_text())
        assert running.client.get("/health/ready").status_code == 503
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert running.client.post("/v1/classify", content=PICTURE).status_code == 200


@pytest.mark.long
def test_one_that_dies_while_it_loads_is_tried_again(small_zoo: Path, tmp_path: Path) -> None:
    """The runner dies before it has read its setup, so the socket is reset."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "started = Path(__file__).with_name('started')\n"
        "if 'runners.process' in ' '.join(sys.orig_argv):\n"
        "    count = len(started.read_text()) if started.exists() else 0\n"
        "    started.write_text('x' * (count + 1))\n"
        "    if count == 1: os._exit(3)\n"
    )
    settings = {"FOVEA_RUNNERS": "1", "PYTHONPATH": str(tmp_path)}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running:
        (runner,) = running.runner_pids
        os.kill(runner, signal.SIGKILL)
        assert running.client.post("/v1/classify", content=PICTURE).status_code == 200
        assert running.read_metric("fovea_runner_deaths_total") == 1
    assert "a runner died while it loaded the models, exit status 3" in running.log


# --- the service itself --------------------------------------------------------------------------


def test_no_runner_outlives_a_killed_service(poisoned: Server, gate: BlockingImage) -> None:
    (runner,) = poisoned.runner_pids
    with Wire(poisoned.url) as wire:
        wire.send(classify_request(gate.image))
        _wait_until_busy(poisoned)
        poisoned.process.kill()
        poisoned.process.wait()
        gate.release()  # it finishes its batch, and finds nobody to tell
        wait_until(lambda: not is_running(runner))


@pytest.mark.long
def test_runners_give_memory_back_unless_told_otherwise(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), MALLOC_TRIM_THRESHOLD_="1000000") as running:
        for pid in running.runner_pids:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            assert b"MALLOC_MMAP_THRESHOLD_=4194304" in environment
            assert b"MALLOC_TRIM_THRESHOLD_=1000000" in environment


@pytest.mark.long
def test_no_idle_runner_outlives_a_killed_service(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="3") as running:
        runners = running.runner_pids
        assert len(runners) == 3
        running.process.kill()
        running.process.wait()
        wait_until(lambda: not any(map(is_running, runners)))


def test_padding_in_the_middle_of_a_large_image_is_refused(server: Server) -> None:
    for text in ("AA==" * 100_000, "A" * 262_140 + "AA==" + "AAAA", "A" * 300_001):
        reply = server.client.post("/v1/classify", json={"images": [{"b64": text}]})
        assert reply.json()["error"]["code"] == "bad_request"
        assert "images.0.b64 is not base64" in reply.json()["error"]["message"]


def test_large_images_reach_a_runner_whole(server: Server, small_zoo: Path) -> None:
    """The messages are written in pieces, whenever the socket has room."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 180, 3), dtype=np.uint8)
    images = [encode_image(Image.fromarray(noise + shade), "PNG", compress_level=0) for shade in range(4)]
    assert len(images[0]) > 200_000
    engine = Engine.load(small_zoo / "small" / "1" / "model.onnx", provider="cpu", threads=1)
    files = [("file", ("a.png", BytesIO(image))) for image in images]
    results = server.client.post("/v1/classify?top_k=0", files=files).json()["results"]
    encoded = [{"b64": base64.b64encode(image).decode()} for image in images[:3]]
    reply = server.client.post("/v1/classify?top_k=0", json={"images": encoded})
    assert reply.json()["results"] == results[:3]
    for image, result in zip(images, results, strict=True):
        pixels = decode_image(image, engine.contract.input, max_pixels=10**6).pixels
        wanted = engine.run(pixels[None])[0]
        given = {one["index"]: one["probability"] for one in result["predictions"]}
        assert [given[index] for index in range(len(wanted))] == pytest.approx(list(wanted), abs=1e-5)


# --- who is suspected ----------------------------------------------------------------------------


def _begin_batch(lane: Lane[Encoded, Answer], *images: bytes, apart: bool = False) -> _PendingBatch:
    return _PendingBatch(lambda _outcome: None, lane, images, apart)


def test_suspects_are_what_the_runner_may_have_put_together() -> None:
    """No other batch is a suspect, because an image is given up when it is a suspect twice."""
    ours, others = (Lane[Encoded, Answer](model_id=i, batch_max=4, weight_max=100, weigh=len) for i in (0, 1))
    one, large = _begin_batch(ours, b"x"), _begin_batch(ours, b"x" * 99)
    assert _count_suspects([]) == 0
    assert _count_suspects([one]) == 1
    assert _count_suspects([one, one, one, one, one]) == 4
    assert _count_suspects([_begin_batch(ours, b"x", b"x", b"x"), _begin_batch(ours, b"x", b"x")]) == 1
    assert _count_suspects([one, large, one]) == 2
    assert _count_suspects([_begin_batch(ours, b"x" * 1000), one]) == 1
    assert _count_suspects([one, _begin_batch(others, b"x"), one]) == 1
    assert _count_suspects([one, _begin_batch(ours, b"x", apart=True), one]) == 1
    assert _count_suspects([_begin_batch(ours, b"x", apart=True), one]) == 1


def test_runners_stand_back_behind_the_service(server: Server) -> None:
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in server.runner_pids} == {
        os.getpriority(os.PRIO_PROCESS, server.process.pid) + 5
    }


@pytest.mark.long
def test_answers_that_are_not_finite_are_answered_and_take_no_place(tmp_path: Path) -> None:
    """The model gives NaN for black pictures: only these get an error."""
    zoo = add_to_repository(build_nan_for_black(), tmp_path / "zoo")
    black = encode_image(Image.new("RGB", (32, 32)), "PNG")
    places = {"FOVEA_QUEUE_IMAGES": "8", "FOVEA_REQUEST_IMAGES": "8"}
    with Server(FOVEA_MODELS=str(zoo), **places) as running:
        for _ in range(9):
            reply = running.client.post("/v1/classify", content=black)
            assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
            assert "not finite" in reply.json()["error"]["message"]
        both = running.client.post("/v1/classify", files=[("image", black), ("image", PICTURE)])
        assert both.status_code == 200
        assert [set(one) & {"error", "predictions"} for one in both.json()["results"]] == [
            {"error"},
            {"predictions"},
        ]
        assert running.client.post("/v1/classify", content=PICTURE).status_code == 200
        assert running.client.post("/v1/explain", content=black).status_code == 500
        assert running.client.post("/v1/explain", content=PICTURE).status_code == 200
        assert running.read_metric("fovea_images_in_flight") == 0
        assert running.read_metric("fovea_runner_deaths_total") == 0
        assert running.read_metric("fovea_errors_total", reason="internal") == 11
    assert "could not be counted" not in running.log


@pytest.mark.long
def test_images_of_much_memory_wait_in_the_queue_and_not_in_a_runner(small_zoo: Path) -> None:
    """Together the images need more memory than there is: all are decoded, and cheap ones need not wait."""
    large = encode_image(draw_picture(2000, 1500), "PNG", compress_level=0)  # 84 MB by its header, of 150
    limits = {"FOVEA_DECODE_BYTES": "200000000", "FOVEA_RUNNERS": "4"}
    with (
        Server(FOVEA_MODELS=str(small_zoo), **limits) as running,
        ThreadPoolExecutor(8) as pool,
    ):

        def ask(image: bytes) -> int:
            return httpx.post(f"{running.url}/v1/classify", content=image, timeout=60).status_code

        asking = [pool.submit(ask, large) for _ in range(8)]
        wait_until(lambda: running.read_metric("fovea_decode_reserved_bytes") > 0)
        assert ask(PICTURE) == 200
        assert {one.result() for one in asking} == {200}
        running.wait_for_metric(0, "fovea_decode_reserved_bytes")
        assert running.read_metric("fovea_runner_deaths_total") == 0
        assert running.read_metric("fovea_queue_costly_images") == 0


@pytest.mark.long
def test_the_most_expensive_images_may_have_a_quarter_of_the_places(small_zoo: Path) -> None:
    giant = encode_image(Image.new("RGB", (7000, 7000)), "WEBP", lossless=True, method=0)  # 2 KB
    limits = {"FOVEA_QUEUE_IMAGES": "8", "FOVEA_REQUEST_IMAGES": "8", "FOVEA_RUNNERS": "1"}
    with Server(FOVEA_MODELS=str(small_zoo), **limits) as running, ExitStack() as stack:
        wires = [stack.enter_context(Wire(running.url)) for _ in range(4)]
        wires[0].send(classify_request(giant))
        _wait_until_busy(running)
        for wire in wires[1:]:
            wire.send(classify_request(giant))
        answers = sorted(wire.read_response().status for wire in wires)
        assert answers == [200, 200, 200, 503]  # one at work, two that wait
        assert running.client.post("/v1/classify", content=PICTURE).status_code == 200

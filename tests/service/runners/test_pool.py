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
from tests.runner_code import write_runner_code
from tests.servers import Server, is_running, is_running_module, list_children, wait_until
from tests.zoo import get_served_version, get_status, publish_variant

PICTURE = make_jpeg()
PATIENCE = {"FOVEA_RUNNER_WAIT": "60"}
"""Settings for a machine on which the start of another runner takes long."""


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
def blocking_image(tmp_path: Path) -> BlockingImage:
    return BlockingImage(tmp_path / "gate")


@pytest.fixture
def poisoned_server(small_zoo: Path, tmp_path: Path) -> Iterator[Server]:
    """A service with one runner that reacts to the images of `tests.poison`."""
    environment = make_poison_environment(tmp_path)
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="1", **PATIENCE, **environment) as instance:
        yield instance


def _send_one_batch(server: Server, blocking_image: BlockingImage, *images: bytes) -> list[int]:
    """Send requests of one image each while the runner is busy, so that they share a batch.

    Return their status codes.
    """
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.url)) for _ in range(len(images) + 1)]
        wires[0].send(classify_request(blocking_image.image))
        _wait_until_busy(server)
        for queue_length, (wire, image) in enumerate(zip(wires[1:], images, strict=True), 1):
            wire.send(classify_request(image))
            server.wait_for_metric(queue_length, "fovea_queue_images")
        blocking_image.release()
        assert wires[0].read_response().error_code == "unsupported_format"
        return [wire.read_response().status for wire in wires[1:]]


# --- death of a runner ---------------------------------------------------------------------------


def test_no_request_fails_when_a_runner_is_killed_under_load(small_zoo: Path) -> None:
    def send_pictures(url: str) -> set[int]:
        with httpx.Client(base_url=url, timeout=60) as client:
            return {client.post("/v1/classify", content=PICTURE).status_code for _ in range(60)}

    with (
        Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="2", **PATIENCE) as server,
        ThreadPoolExecutor(6) as pool,
    ):
        futures = [pool.submit(send_pictures, server.url) for _ in range(6)]
        wait_until(lambda: server.read_metric("fovea_images_total") >= 50)
        os.kill(min(server.runner_pids), signal.SIGKILL)
        assert set().union(*(future.result() for future in futures)) == {200}
        server.wait_for_metric(1, "fovea_runner_deaths_total")
        _wait_until_ready(server, 2)
        assert server.read_metric("fovea_errors_total") == 0
    assert "died, exit status -9; it is replaced" in server.log


def test_batch_of_a_killed_runner_is_run_again(
    poisoned_server: Server, blocking_image: BlockingImage
) -> None:
    with Wire(poisoned_server.url) as wire:
        wire.send(classify_request(blocking_image.image))
        _wait_until_busy(poisoned_server)
        (first_pid,) = poisoned_server.runner_pids
        os.kill(first_pid, signal.SIGKILL)
        wait_until(lambda: not is_running(first_pid))
        blocking_image.release()
        assert wire.read_response().error_code == "unsupported_format"
        (second_pid,) = poisoned_server.runner_pids
        assert second_pid != first_pid
        assert poisoned_server.read_metric("fovea_runner_deaths_total") == 1


@pytest.mark.long
def test_requests_wait_while_all_runners_are_replaced(small_zoo: Path) -> None:
    with (
        Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="2", **PATIENCE) as server,
        Wire(server.url) as first_wire,
        Wire(server.url) as second_wire,
    ):
        for pid in server.runner_pids:
            os.kill(pid, signal.SIGKILL)
        reply = _wait_until_not_ready(server)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
        assert reply.headers["Retry-After"] == "1"
        assert server.client.get("/health/live").status_code == 200
        for wire in (first_wire, second_wire):
            wire.send(classify_request(PICTURE))
        assert (first_wire.read_response().status, second_wire.read_response().status) == (200, 200)
        _wait_until_ready(server, 2)
        assert server.read_metric("fovea_runner_deaths_total") == 2


# --- harmful images ------------------------------------------------------------------------------


def test_image_that_kills_runners_fails_only_its_request(
    poisoned_server: Server, blocking_image: BlockingImage
) -> None:
    assert _send_one_batch(poisoned_server, blocking_image, PICTURE, EXIT_IMAGE, PICTURE) == [200, 500, 200]
    assert poisoned_server.read_metric("fovea_runner_deaths_total") == 2
    assert poisoned_server.read_metric("fovea_errors_total", reason="internal") == 1
    _wait_until_ready(poisoned_server, 1)


@pytest.mark.long
def test_image_that_kills_runners_fails_alone_in_its_request(poisoned_server: Server) -> None:
    files = [("file", ("a.jpg", image)) for image in (PICTURE, EXIT_IMAGE, PICTURE)]
    reply = poisoned_server.client.post("/v1/classify", files=files)
    assert reply.status_code == 200
    first_result, failed_result, third_result = reply.json()["results"]
    assert failed_result["error"] == {
        "code": "internal",
        "message": "two processes died while they worked on this image",
    }
    assert "predictions" in first_result
    assert "predictions" in third_result


def test_exception_in_a_runner_fails_only_its_image(
    poisoned_server: Server, blocking_image: BlockingImage
) -> None:
    statuses = _send_one_batch(poisoned_server, blocking_image, PICTURE, RAISE_IMAGE, PICTURE, PICTURE)
    assert statuses == [200, 500, 200, 200]  # a failed batch is run again, one by one
    reply = poisoned_server.client.post("/v1/classify", content=RAISE_IMAGE)
    assert reply.json()["error"]["code"] == "internal"
    assert "on purpose" not in reply.text
    assert poisoned_server.client.post("/v1/classify", content=PICTURE).status_code == 200
    assert poisoned_server.read_metric("fovea_runner_deaths_total") == 0
    assert poisoned_server.read_metric("fovea_errors_total", reason="internal") == 2
    poisoned_server.__exit__(None, None, None)
    assert "ArithmeticError: raised on purpose" in poisoned_server.log


# --- hanging runners -----------------------------------------------------------------------------


@pytest.mark.long
def test_stopped_runner_is_replaced(small_zoo: Path) -> None:
    settings = {**PATIENCE, "FOVEA_RUNNERS": "1", "FOVEA_BATCH_TIMEOUT": "1.5"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
        (pid,) = server.runner_pids
        os.kill(pid, signal.SIGSTOP)
        assert server.client.post("/v1/classify", content=PICTURE).status_code == 200
        wait_until(lambda: not is_running(pid))
        assert server.read_metric("fovea_runner_deaths_total") == 1
    assert f"runner {pid} has not answered for 1.5 s (FOVEA_BATCH_TIMEOUT); it is killed" in server.log


@pytest.mark.long
def test_image_that_hangs_runners_fails(
    small_zoo: Path, tmp_path: Path, blocking_image: BlockingImage
) -> None:
    settings = {"FOVEA_RUNNERS": "1", "FOVEA_BATCH_TIMEOUT": "1", **make_poison_environment(tmp_path)}
    with Server(FOVEA_MODELS=str(small_zoo), **PATIENCE, **settings) as server:
        reply = server.client.post("/v1/classify", content=blocking_image.image)
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
        assert server.client.post("/v1/classify", content=PICTURE).status_code == 200
        assert server.read_metric("fovea_runner_deaths_total") == 2


# --- failed restarts -----------------------------------------------------------------------------


@pytest.mark.long
def test_runners_restart_after_the_model_file_is_deleted(small_zoo: Path, tmp_path: Path) -> None:
    """The service keeps the file open while it serves the model."""
    zoo = tmp_path / "zoo"
    shutil.copytree(small_zoo, zoo)
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0", **PATIENCE) as server:
        runner_count = server.read_metric("fovea_runners")
        shutil.rmtree(zoo / "small")
        for pid in server.runner_pids:
            os.kill(pid, signal.SIGKILL)
        server.wait_for_metric(runner_count, "fovea_runner_deaths_total")  # no batch went to a dying runner
        assert server.client.post("/v1/classify", content=PICTURE).status_code == 200
        _wait_until_ready(server, int(runner_count))
        assert server.read_metric("fovea_runner_deaths_total") == runner_count
        assert server.read_metric("fovea_runner_start_failures_total") == 0


@pytest.mark.long
def test_runners_restart_when_an_overwritten_file_is_restored(small_zoo: Path, tmp_path: Path) -> None:
    zoo, log = tmp_path / "zoo", tmp_path / "log"
    shutil.copytree(small_zoo, zoo)
    model_path = zoo / "small" / "1" / "model.onnx"
    content, modified_ns = model_path.read_bytes(), model_path.stat().st_mtime_ns
    settings = {**PATIENCE, "FOVEA_MODELS": str(zoo), "FOVEA_WATCH": "0"}
    with log.open("w") as stderr, Server({"stderr": stderr}, **settings) as server:
        runner_count = server.read_metric("fovea_runners")
        model_path.write_bytes(b"damaged")
        for pid in server.runner_pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "a runner cannot be replaced, next try in 2 s" in log.read_text())
        assert "the file has changed since it was found" in log.read_text()
        assert _wait_until_not_ready(server).json()["error"]["code"] == "not_ready"
        assert server.read_metric("fovea_runner_start_failures_total", reason="other") >= 1
        model_path.write_bytes(content)
        os.utime(model_path, ns=(modified_ns, modified_ns))
        assert server.client.post("/v1/classify", content=PICTURE).status_code == 200
        _wait_until_ready(server, int(runner_count))
        assert server.read_metric("fovea_runner_deaths_total") == runner_count


@pytest.mark.long
def test_requests_without_runners_are_refused_after_a_wait(small_zoo: Path, tmp_path: Path) -> None:
    """No runner can be started any more: each one hangs before it reads its setup."""
    flag = tmp_path / "flag"
    code = f"import os, time\nif os.path.exists({str(flag)!r}): time.sleep(600)\n"
    settings = {
        "FOVEA_RUNNERS": "2",
        "FOVEA_RUNNER_WAIT": "1.5",
        "FOVEA_RUNNER_ABSENCE": "3",
        **write_runner_code(tmp_path, code),
    }
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
        assert server.read_metric("fovea_runners_expected") == 2
        flag.touch()
        for pid in server.runner_pids:
            os.kill(pid, signal.SIGKILL)
        server.wait_for_metric(0, "fovea_runners")
        assert server.client.get("/health/live").status_code == 200
        files = [("image", PICTURE)] * 3
        for body in ({"content": PICTURE}, {"files": files}):  # alone, and several
            started_at = time.monotonic()
            reply = server.client.post("/v1/classify", **body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
            assert int(reply.headers["Retry-After"]) >= 1
            assert 1.4 < time.monotonic() - started_at < 20
        with Wire(server.url) as wire:
            reply = server.client.post("/v1/classify", content=PICTURE, headers={"X-Deadline-Ms": "200"})
            assert reply.status_code == 504
            wire.send(classify_request(PICTURE))
            assert wire.read_response().status == 503
        assert server.read_metric("fovea_images_in_flight") == 0
        assert server.read_metric("fovea_queue_images") == 0
        for path in ("/health/live", "/v2/health/live"):
            wait_until(lambda path=path: server.client.get(path).status_code == 503)  # type: ignore[misc]
        assert "FOVEA_RUNNER_ABSENCE" in server.client.get("/health/live").text


def _list_descendants(pid: int, module: str) -> set[int]:
    """Return the pids of descendants of the process `pid` that run a module of the service."""
    children = list_children(pid)
    own = {child for child in children if is_running_module(child, module)}
    return own.union(*(_list_descendants(child, module) for child in children))


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
def test_previous_version_serves_if_runners_cannot_load_latest(tmp_path: Path, workers: str) -> None:
    """This happens although the repository is not watched, and although the served file is damaged."""
    zoo = add_to_repository(build_model(seed=1), tmp_path / "zoo")
    publish_variant(zoo, seed=2)
    settings = {"FOVEA_WATCH": "0", "FOVEA_RUNNERS": "1", "FOVEA_WORKERS": workers}
    with Server(FOVEA_MODELS=str(zoo), **settings) as server:
        assert get_served_version(server) == "2"
        _damage_file(zoo / "small" / "2" / "model.onnx")
        for pid in _list_descendants(server.process.pid, "runners.process"):
            os.kill(pid, signal.SIGKILL)

        def is_previous_served() -> bool:
            reply = server.client.post("/v1/models/small/classify", content=PICTURE)
            return reply.status_code == 200 and reply.json()["model"]["version"] == "1"

        wait_until(is_previous_served)
        assert server.client.get("/health/ready").status_code == 200
        refused_models = server.client.get("/v1/models").json()["refused"]
        assert [(model["name"], model["version"]) for model in refused_models] == [("small", "2")]


@pytest.mark.long
def test_previous_version_serves_if_workers_cannot_load_latest(tmp_path: Path) -> None:
    """All workers are killed, and the file that they had loaded is damaged."""
    zoo = add_to_repository(build_model(seed=1), tmp_path / "zoo")
    publish_variant(zoo, seed=2)
    settings = {"FOVEA_WATCH": "0", "FOVEA_RUNNERS": "1", "FOVEA_WORKERS": "2"}
    with Server(FOVEA_MODELS=str(zoo), **settings) as server:
        assert get_served_version(server) == "2"
        _damage_file(zoo / "small" / "2" / "model.onnx")
        for pid in list_children(server.process.pid):
            os.kill(pid, signal.SIGKILL)
        with httpx.Client(base_url=server.url, timeout=120) as client:
            reply = client.post("/v1/models/small/classify", content=PICTURE)
        assert (reply.status_code, reply.json()["model"]["version"]) == (200, "1")


@pytest.mark.long
def test_damaged_file_does_not_affect_other_models(tmp_path: Path) -> None:
    zoo = add_to_repository(build_model(seed=1), tmp_path / "zoo", "ants")
    add_to_repository(build_model(seed=2), zoo, "bees")
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WATCH="0", FOVEA_RUNNERS="2") as server:
        content = (zoo / "bees" / "1" / "model.onnx").read_bytes()
        reply = server.client.post("/v1/models/bees/classify", content=PICTURE)
        predictions_before = reply.json()["predictions"]
        _damage_file(zoo / "bees" / "1" / "model.onnx")
        _kill_runners(server)
        assert get_status(server, "/v1/models/ants/classify") in (200, 503)
        wait_until(lambda: get_status(server, "/v1/models/ants/classify") == 200)
        server.wait_for_metric(2, "fovea_runners")
        reply = server.client.post("/v1/models/bees/classify", content=PICTURE)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
        (zoo / "bees" / "1" / "model.onnx").write_bytes(content)
        wait_until(lambda: get_status(server, "/v1/models/bees/classify") == 200)
        reply = server.client.post("/v1/models/bees/classify", content=PICTURE)
        assert reply.json()["predictions"] == predictions_before


@pytest.mark.long
def test_repaired_single_model_file_is_served_again(tmp_path: Path) -> None:
    path = add_to_repository(build_model(seed=1), tmp_path / "zoo") / "small" / "1" / "model.onnx"
    with Server(FOVEA_MODELS=str(path), FOVEA_WATCH="0", FOVEA_RUNNERS="1") as server:
        content, modified_ns = path.read_bytes(), path.stat().st_mtime_ns
        _damage_file(path)
        _kill_runners(server)
        wait_until(lambda: "no model is loaded" in server.client.get("/health/ready").text)
        assert server.client.post("/v1/classify", content=PICTURE).status_code == 503
        path.write_bytes(content)
        os.utime(path, ns=(modified_ns, modified_ns))
        wait_until(lambda: server.client.get("/health/ready").status_code == 200)
        assert server.client.post("/v1/classify", content=PICTURE).status_code == 200


# --- loads ---------------------------------------------------------------------------------------

LOAD = "/v2/repository/models/small/load"

GATED_LOAD_CODE = """
import os, time

from fovea.service.runners import process

load = process._Runner._load_model

def load_when_released(self, command):
    open({began!r}, "w").close()
    while not os.path.exists({gate!r}):
        time.sleep(0.01)
    load(self, command)

process._Runner._load_model = load_when_released
"""
"""Code for a runner: create the file `began` when a further load begins; load once the file `gate` exists."""


def _make_gated_settings(tmp_path: Path, **settings: str) -> tuple[dict[str, str], Path, Path]:
    started_file, gate_file = tmp_path / "began", tmp_path / "gate"
    code = GATED_LOAD_CODE.format(began=str(started_file), gate=str(gate_file))
    management = {"FOVEA_WATCH": "0", "FOVEA_MANAGEMENT": "true", **write_runner_code(tmp_path, code)}
    return {**management, **settings}, started_file, gate_file


@pytest.mark.long
def test_load_continues_when_a_waiting_runner_dies(tmp_path: Path) -> None:
    zoo = add_to_repository(build_model(), tmp_path / "zoo")
    settings, started_file, gate_file = _make_gated_settings(tmp_path, FOVEA_RUNNERS="2")
    with Server(FOVEA_MODELS=str(zoo), **settings) as server, ThreadPoolExecutor(1) as pool:
        publish_variant(zoo, seed=1)
        load_future = pool.submit(server.client.post, LOAD)
        wait_until(started_file.exists)
        second_pid = max(server.runner_pids)
        os.kill(second_pid, signal.SIGKILL)
        server.wait_for_metric(1, "fovea_runner_deaths_total")
        gate_file.touch()
        assert load_future.result().status_code == 200
        server.wait_for_metric(2, "fovea_runners")
        assert {get_served_version(server) for _ in range(8)} == {"2"}


@pytest.mark.long
def test_runner_that_hangs_while_loading_is_replaced(tmp_path: Path) -> None:
    """The limit of a load is ten times FOVEA_TRIAL_SECONDS."""
    zoo = add_to_repository(build_model(), tmp_path / "zoo")
    settings, started_file, gate_file = _make_gated_settings(
        tmp_path, FOVEA_RUNNERS="2", FOVEA_TRIAL_SECONDS="0.5"
    )
    with Server(FOVEA_MODELS=str(zoo), **settings) as server, ThreadPoolExecutor(1) as pool:
        publish_variant(zoo, seed=1)
        load_future = pool.submit(server.client.post, LOAD)
        wait_until(started_file.exists)
        server.wait_for_metric(1, "fovea_runner_deaths_total")
        gate_file.touch()
        assert load_future.result().status_code == 200
        server.wait_for_metric(2, "fovea_runners")
        assert get_served_version(server) == "2"
    assert "has not loaded a model within 5 s (10 times FOVEA_TRIAL_SECONDS); it is killed" in server.log


@pytest.mark.long
def test_runner_that_hangs_at_start_is_replaced(small_zoo: Path, tmp_path: Path) -> None:
    code = (
        "import os, time\n"
        "from pathlib import Path\n"
        "started = Path(__file__).with_name('started')\n"
        "count = len(started.read_text()) if started.exists() else 0\n"
        "started.write_text('x' * (count + 1))\n"
        "if count == 1: time.sleep(600)\n"
    )
    settings = {"FOVEA_RUNNERS": "1", "FOVEA_TRIAL_SECONDS": "0.5", **write_runner_code(tmp_path, code)}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
        (runner_pid,) = server.runner_pids
        os.kill(runner_pid, signal.SIGKILL)
        server.wait_for_metric(1, "fovea_runner_start_failures_total", reason="other")
        wait_until(lambda: server.client.get("/health/ready").status_code == 200)
        assert server.client.post("/v1/classify", content=PICTURE).status_code == 200
    assert "has not loaded its models within 20 s" in server.log


WRONG_LOGITS_CODE = """
import os

if os.path.exists({flag!r}):
    from fovea.service.inference.engine import Engine

    compute_logits = Engine.compute_logits
    Engine.compute_logits = lambda *arguments, **named: compute_logits(*arguments, **named) + 1
"""


@pytest.mark.long
def test_runner_that_fails_the_golden_set_is_not_ready(small_zoo: Path, tmp_path: Path) -> None:
    """The host computes correctly when the service starts, and wrongly when the runner is replaced."""
    flag = tmp_path / "flag"
    environment = write_runner_code(tmp_path, WRONG_LOGITS_CODE.format(flag=str(flag)))
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="1", **environment) as server:
        assert server.read_metric("fovea_runner_start_failures_total", reason="golden") == 0
        flag.touch()
        (runner_pid,) = server.runner_pids
        os.kill(runner_pid, signal.SIGKILL)
        server.wait_for_metric(1, "fovea_runner_start_failures_total", reason="golden")
        assert _wait_until_not_ready(server).json()["error"]["code"] == "not_ready"


@pytest.mark.long
def test_busy_time_of_runners_is_counted(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="1") as server:
        started_at = time.monotonic()
        for _ in range(20):
            server.client.post("/v1/classify", content=PICTURE)
        elapsed_seconds = time.monotonic() - started_at
        stage_seconds = sum(
            server.read_metric("fovea_stage_seconds_sum", stage=stage) for stage in ("decode", "inference")
        )
        assert stage_seconds < server.read_metric("fovea_runner_busy_seconds_total") < elapsed_seconds


@pytest.mark.long
def test_idle_runner_is_replaced_after_a_delay(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="1") as server:
        (runner_pid,) = server.runner_pids
        killed_at = time.monotonic()
        os.kill(runner_pid, signal.SIGKILL)
        server.wait_for_metric(1, "fovea_runner_deaths_total")
        server.wait_for_metric(1, "fovea_runners")
        assert time.monotonic() - killed_at >= 1.0


@pytest.mark.long
def test_runner_start_waits_for_file_descriptors(small_zoo: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    settings = {**PATIENCE, "FOVEA_MODELS": str(small_zoo), "FOVEA_RUNNERS": "1"}
    with log.open("w") as stderr, Server({"stderr": stderr}, **settings) as server:
        (runner_pid,) = server.runner_pids
        assert server.client.get("/health/ready").status_code == 200
        soft_limit, hard_limit = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, hard_limit))
        os.kill(runner_pid, signal.SIGKILL)
        wait_until(lambda: "a runner cannot be started: Too many open files" in log.read_text())
        assert server.client.get("/health/ready").status_code == 503
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (soft_limit, hard_limit))
        assert server.client.post("/v1/classify", content=PICTURE).status_code == 200


@pytest.mark.long
def test_runner_that_dies_while_loading_is_restarted(small_zoo: Path, tmp_path: Path) -> None:
    """The runner dies before it has read its setup, so the socket is reset."""
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "started = Path(__file__).with_name('started')\n"
        "count = len(started.read_text()) if started.exists() else 0\n"
        "started.write_text('x' * (count + 1))\n"
        "if count == 1: os._exit(3)\n"
    )
    settings = {**PATIENCE, "FOVEA_RUNNERS": "1", **write_runner_code(tmp_path, code)}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
        (runner_pid,) = server.runner_pids
        os.kill(runner_pid, signal.SIGKILL)
        assert server.client.post("/v1/classify", content=PICTURE).status_code == 200
        assert server.read_metric("fovea_runner_deaths_total") == 1
    assert "a runner died while it loaded the models, exit status 3" in server.log


# --- the service itself --------------------------------------------------------------------------


def test_no_runner_outlives_a_killed_service(poisoned_server: Server, blocking_image: BlockingImage) -> None:
    (runner_pid,) = poisoned_server.runner_pids
    with Wire(poisoned_server.url) as wire:
        wire.send(classify_request(blocking_image.image))
        _wait_until_busy(poisoned_server)
        poisoned_server.process.kill()
        poisoned_server.process.wait()
        blocking_image.release()  # the runner finishes its batch; nobody reads the answer
        wait_until(lambda: not is_running(runner_pid))


@pytest.mark.long
def test_runner_environment_sets_malloc_thresholds(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), MALLOC_TRIM_THRESHOLD_="1000000") as server:
        for pid in server.runner_pids:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            assert b"MALLOC_MMAP_THRESHOLD_=4194304" in environment
            assert b"MALLOC_TRIM_THRESHOLD_=1000000" in environment


@pytest.mark.long
def test_no_idle_runner_outlives_a_killed_service(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="3") as server:
        runner_pids = server.runner_pids
        assert len(runner_pids) == 3
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not any(map(is_running, runner_pids)))


def test_invalid_base64_of_a_large_image_is_refused(server: Server) -> None:
    for text in ("AA==" * 100_000, "A" * 262_140 + "AA==" + "AAAA", "A" * 300_001):
        reply = server.client.post("/v1/classify", json={"images": [{"b64": text}]})
        assert reply.json()["error"]["code"] == "bad_request"
        assert "images.0.b64 is not base64" in reply.json()["error"]["message"]


def test_large_images_reach_a_runner_intact(server: Server, small_zoo: Path) -> None:
    """The messages are written in pieces, whenever the socket has room."""
    noise = np.random.default_rng(0).integers(0, 256, (400, 180, 3), dtype=np.uint8)
    images = [encode_image(Image.fromarray(noise + shade), "PNG", compress_level=0) for shade in range(4)]
    assert len(images[0]) > 200_000
    engine = Engine.load(small_zoo / "small" / "1" / "model.onnx", provider="cpu", threads=1)
    files = [("file", ("a.png", BytesIO(image))) for image in images]
    results = server.client.post("/v1/classify?top_k=0", files=files).json()["results"]
    json_images = [{"b64": base64.b64encode(image).decode()} for image in images[:3]]
    reply = server.client.post("/v1/classify?top_k=0", json={"images": json_images})
    assert reply.json()["results"] == results[:3]
    for image, result in zip(images, results, strict=True):
        pixels = decode_image(image, engine.contract.input, max_pixels=10**6).pixels
        expected = engine.run(pixels[None])[0]
        probabilities = {
            prediction["index"]: prediction["probability"] for prediction in result["predictions"]
        }
        assert [probabilities[index] for index in range(len(expected))] == pytest.approx(
            list(expected), abs=1e-5
        )


# --- suspects ------------------------------------------------------------------------------------


def _begin_batch(lane: Lane[Encoded, Answer], *images: bytes, apart: bool = False) -> _PendingBatch:
    return _PendingBatch(0, lambda _outcome: None, lane, images, apart)


def test_suspects_are_batches_the_runner_may_have_merged() -> None:
    """No other batch is a suspect, because an image is given up when it is a suspect twice."""
    lane, other_lane = (
        Lane[Encoded, Answer](model_id=i, batch_max=4, weight_max=100, weigh=len) for i in (0, 1)
    )
    small_batch, large_batch = _begin_batch(lane, b"x"), _begin_batch(lane, b"x" * 99)
    assert _count_suspects([]) == 0
    assert _count_suspects([small_batch]) == 1
    assert _count_suspects([small_batch, small_batch, small_batch, small_batch, small_batch]) == 4
    assert _count_suspects([_begin_batch(lane, b"x", b"x", b"x"), _begin_batch(lane, b"x", b"x")]) == 1
    assert _count_suspects([small_batch, large_batch, small_batch]) == 2
    assert _count_suspects([_begin_batch(lane, b"x" * 1000), small_batch]) == 1
    assert _count_suspects([small_batch, _begin_batch(other_lane, b"x"), small_batch]) == 1
    assert _count_suspects([small_batch, _begin_batch(lane, b"x", apart=True), small_batch]) == 1
    assert _count_suspects([_begin_batch(lane, b"x", apart=True), small_batch]) == 1


def test_runners_have_lower_priority_than_the_service(server: Server) -> None:
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in server.runner_pids} == {
        os.getpriority(os.PRIO_PROCESS, server.process.pid) + 5
    }


@pytest.mark.long
def test_non_finite_answers_are_errors_and_free_their_places(tmp_path: Path) -> None:
    """The model gives NaN for black pictures: only these get an error."""
    zoo = add_to_repository(build_nan_for_black(), tmp_path / "zoo")
    black = encode_image(Image.new("RGB", (32, 32)), "PNG")
    limits = {"FOVEA_QUEUE_IMAGES": "8", "FOVEA_REQUEST_IMAGES": "8"}
    with Server(FOVEA_MODELS=str(zoo), **limits) as server:
        for _ in range(9):
            reply = server.client.post("/v1/classify", content=black)
            assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
            assert "not finite" in reply.json()["error"]["message"]
        mixed_reply = server.client.post("/v1/classify", files=[("image", black), ("image", PICTURE)])
        assert mixed_reply.status_code == 200
        assert [set(result) & {"error", "predictions"} for result in mixed_reply.json()["results"]] == [
            {"error"},
            {"predictions"},
        ]
        assert server.client.post("/v1/classify", content=PICTURE).status_code == 200
        assert server.client.post("/v1/explain", content=black).status_code == 500
        assert server.client.post("/v1/explain", content=PICTURE).status_code == 200
        assert server.read_metric("fovea_images_in_flight") == 0
        assert server.read_metric("fovea_runner_deaths_total") == 0
        assert server.read_metric("fovea_errors_total", reason="internal") == 11
    assert "could not be counted" not in server.log


@pytest.mark.long
def test_memory_heavy_images_wait_in_the_queue(small_zoo: Path) -> None:
    """Together the images need more memory than there is: all are decoded, and cheap ones need not wait."""
    large = encode_image(draw_picture(2000, 1500), "PNG", compress_level=0)  # 84 MB by its header, of 150
    limits = {"FOVEA_DECODE_BYTES": "200000000", "FOVEA_RUNNERS": "4"}
    with (
        Server(FOVEA_MODELS=str(small_zoo), **limits) as server,
        ThreadPoolExecutor(8) as pool,
    ):

        def classify_image(image: bytes) -> int:
            return httpx.post(f"{server.url}/v1/classify", content=image, timeout=60).status_code

        futures = [pool.submit(classify_image, large) for _ in range(8)]
        wait_until(lambda: server.read_metric("fovea_decode_reserved_bytes") > 0)
        assert classify_image(PICTURE) == 200
        assert {future.result() for future in futures} == {200}
        server.wait_for_metric(0, "fovea_decode_reserved_bytes")
        assert server.read_metric("fovea_runner_deaths_total") == 0
        assert server.read_metric("fovea_queue_costly_images") == 0


@pytest.mark.long
def test_most_expensive_images_get_a_quarter_of_the_places(small_zoo: Path) -> None:
    giant = encode_image(Image.new("RGB", (7000, 7000)), "WEBP", lossless=True, method=0)  # 2 KB
    limits = {"FOVEA_QUEUE_IMAGES": "8", "FOVEA_REQUEST_IMAGES": "8", "FOVEA_RUNNERS": "1"}
    with Server(FOVEA_MODELS=str(small_zoo), **limits) as server, ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.url)) for _ in range(4)]
        wires[0].send(classify_request(giant))
        _wait_until_busy(server)
        for wire in wires[1:]:
            wire.send(classify_request(giant))
        statuses = sorted(wire.read_response().status for wire in wires)
        assert statuses == [200, 200, 200, 503]  # one at work, two that wait
        assert server.client.post("/v1/classify", content=PICTURE).status_code == 200

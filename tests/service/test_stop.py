"""Shutdown of the service: accepted, refused and finished work."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.raw import CLASSIFY_HEAD, LIVE_REQUEST, Wire, classify_request
from tests.servers import ROOT, Server, is_running, is_running_module, list_children, wait_until
from tests.tools import require_namespaces


def _wait_until_not_ready(server: Server) -> httpx.Response:
    while (reply := httpx.get(f"{server.url}/health/ready")).status_code == 200:
        pass
    return reply


def _wait_until_refused(server: Server) -> httpx.Response:
    while (reply := httpx.post(f"{server.url}/v1/classify", content=make_jpeg())).status_code == 200:
        pass
    return reply


def _send_request_start(server: Server, wire: Wire) -> bytes:
    """Send the start of a request and wait until it is accepted; return the rest of its body."""
    picture = make_jpeg()
    wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(picture), picture[:10])
    while server.read_metric("fovea_requests_in_flight") != 2:  # this one and the scrape
        pass
    return picture[10:]


@pytest.mark.long
def test_grace_time_is_not_ready_but_accepts_requests(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_GRACE="600") as server, Wire(server.url) as wire:
        wire.send(LIVE_REQUEST)
        assert not wire.read_response().is_closing
        server.process.send_signal(signal.SIGTERM)
        reply = _wait_until_not_ready(server)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
        assert (reply.headers["Retry-After"], reply.headers["Connection"]) == ("1", "close")
        assert httpx.head(f"{server.url}/health/ready").status_code == 503
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        wire.send(classify_request(make_jpeg()))
        answer = wire.read_response()
        assert (answer.status, answer.is_closing) == (200, True)
        server.process.send_signal(signal.SIGTERM)  # ends the grace time
        assert server.process.wait(timeout=60) == 0


def test_drain_refuses_new_and_finishes_accepted_requests(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo)) as server, Wire(server.url) as wire:
        remaining_body = _send_request_start(server, wire)
        server.process.send_signal(signal.SIGTERM)
        reply = _wait_until_refused(server)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
        assert (reply.headers["Retry-After"], reply.headers["Connection"]) == ("1", "close")
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        wire.send(remaining_body)
        answer = wire.read_response()
        assert (answer.status, answer.is_closing) == (200, True)
        assert wire.is_closed()
        assert server.process.wait(timeout=60) == 0
    assert "cancelled" not in server.log


@pytest.mark.long
def test_drain_answers_a_refused_large_body(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo)) as server, Wire(server.url) as wire:
        remaining_body = _send_request_start(server, wire)
        server.process.send_signal(signal.SIGTERM)
        _wait_until_refused(server)
        with Wire(server.url) as late_wire:
            late_wire.send(classify_request(b"x" * 20_000_000))
            answer = late_wire.read_response()
            assert (answer.status, answer.error_code, answer.is_closing) == (503, "draining", True)
        wire.send(remaining_body)
        assert wire.read_response().status == 200


@pytest.mark.long
def test_request_past_drain_limit_gets_503_and_is_logged(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_LIMIT="0.2") as server, Wire(server.url) as wire:
        _send_request_start(server, wire)
        server.process.send_signal(signal.SIGTERM)
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (503, "draining", True)
        assert answer.headers["retry-after"] == "1"
        assert server.process.wait(timeout=60) == 0
    assert "cancelled 1 requests that were not finished in time" in server.log
    assert "Traceback" not in server.log


@pytest.mark.long
def test_second_signal_cancels_open_requests(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_LIMIT="600") as server, Wire(server.url) as wire:
        _send_request_start(server, wire)
        server.process.send_signal(signal.SIGTERM)
        _wait_until_refused(server)
        server.process.send_signal(signal.SIGTERM)
        assert wire.read_response().error_code == "draining"
        assert server.process.wait(timeout=60) == 0
    assert "cancelled 1 requests" in server.log


@pytest.mark.long
def test_three_signals_skip_grace_time_and_drain_limit(small_zoo: Path) -> None:
    settings = {"FOVEA_DRAIN_GRACE": "600", "FOVEA_DRAIN_LIMIT": "600"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server, Wire(server.url) as wire:
        _send_request_start(server, wire)
        server.process.send_signal(signal.SIGTERM)
        _wait_until_not_ready(server)
        server.process.send_signal(signal.SIGTERM)
        _wait_until_refused(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0


@pytest.mark.long
def test_ctrl_c_skips_grace_time_and_finishes_requests(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_GRACE="600") as server, Wire(server.url) as wire:
        remaining_body = _send_request_start(server, wire)
        server.process.send_signal(signal.SIGINT)
        _wait_until_refused(server)
        wire.send(remaining_body)
        assert wire.read_response().status == 200
        assert server.process.wait(timeout=60) == 0


@pytest.mark.long
def test_idle_connections_do_not_delay_shutdown(small_zoo: Path) -> None:
    settings = {"FOVEA_DRAIN_LIMIT": "600", "FOVEA_KEEP_ALIVE": "600", "FOVEA_HEADER_TIMEOUT": "600"}
    with (
        Server(FOVEA_MODELS=str(small_zoo), **settings) as server,
        Wire(server.url) as idle_wire,
        Wire(server.url),
    ):
        idle_wire.send(LIVE_REQUEST)
        assert idle_wire.read_response().status == 200
        server.process.send_signal(signal.SIGTERM)
        assert idle_wire.is_closed()
        assert server.process.wait(timeout=60) == 0


@pytest.mark.long
@pytest.mark.parametrize("clients", [8])
def test_shutdown_resets_no_connection(small_zoo: Path, clients: int) -> None:
    """Every request gets an answer until the connection is refused: none is reset, none ends unanswered."""

    def send_requests(url: str) -> set[int]:
        statuses = set()
        with httpx.Client(base_url=url, timeout=30) as client:
            while True:
                try:
                    statuses.add(client.post("/v1/classify", content=make_jpeg()).status_code)
                except httpx.ConnectError:
                    return statuses

    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_GRACE="0.5") as server:
        with ThreadPoolExecutor(clients) as pool:
            futures = [pool.submit(send_requests, server.url) for _ in range(clients)]
            wait_until(
                lambda: server.read_metric("fovea_requests_total", route="/v1/classify", status="200") >= 100
            )
            server.process.send_signal(signal.SIGTERM)
            assert set().union(*(future.result() for future in futures)) <= {200, 503}
        assert server.process.wait(timeout=60) == 0


# --- signals during loading ----------------------------------------------------------------------


@pytest.fixture
def slow_environment(small_zoo: Path, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a service that creates the file `begun` and then loads for ten minutes."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'fovea.service.app':\n"
        f"            pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
        "            time.sleep(600)\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "FOVEA_PORT": "0", "FOVEA_MODELS": str(small_zoo)}


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_signal_during_loading_ends_service_at_once(
    slow_environment: dict[str, str], tmp_path: Path, workers: str, signal_number: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fovea.service"], env={**slow_environment, "FOVEA_WORKERS": workers}, cwd=ROOT,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until((tmp_path / "begun").exists)
    process.send_signal(signal_number)
    _, error_output = process.communicate(timeout=60)  # a tenth of the loading time
    assert process.returncode == (0 if workers == "2" else -signal_number)
    assert error_output == ""


def test_signal_during_loading_ends_process_1(slow_environment: dict[str, str], tmp_path: Path) -> None:
    """The kernel drops signals for which process 1 has no handler."""
    process = subprocess.Popen(
        [*require_namespaces(), sys.executable, "-m", "fovea.service"], env=slow_environment, cwd=ROOT
    )
    try:
        wait_until((tmp_path / "begun").exists)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children), signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        process.kill()


# --- other signals -------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_sighup_rescans_repository_and_other_signals_are_ignored(tmp_path: Path, workers: str) -> None:
    root = add_to_repository(build_model(), tmp_path / "zoo")
    settings = {"FOVEA_WORKERS": workers, "FOVEA_WATCH": "0"}
    popen_arguments = {"start_new_session": True}  # as for a daemon
    with Server(popen_arguments, FOVEA_MODELS=str(root), **settings) as server:
        shutil.copytree(root / "small" / "1", root / "small" / "2")
        for signal_number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGRTMIN, signal.SIGHUP):
            server.process.send_signal(signal_number)

        def is_new_version_served() -> bool:
            return bool(server.client.get("/v1/models").json()["models"][0]["version"] == "2")

        wait_until(is_new_version_served)
    assert server.process.returncode == 0


@pytest.mark.long
def test_closed_terminal_ends_service(small_zoo: Path) -> None:
    our_end, service_end = pty.openpty()
    program = (
        "import os, signal, sys; os.open(sys.argv[1], os.O_RDWR); "
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # the tests may run under nohup
        "os.execv(sys.executable, [sys.executable, '-m', 'fovea.service'])"
    )
    command = [sys.executable, "-c", program, os.ttyname(service_end)]
    popen_arguments = {"args": command, "start_new_session": True}
    with Server(popen_arguments, FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_GRACE="600") as server:
        os.close(service_end)
        os.close(our_end)
        assert server.process.wait(timeout=60) == 0


# --- time of a shutdown --------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_stop_with_hung_runners_ends_in_time(small_zoo: Path, workers: str) -> None:
    """The limit is grace, drain limit and 2.5 s: 30 s by default. No process of the service remains."""
    settings = {"FOVEA_WORKERS": workers, "FOVEA_DRAIN_LIMIT": "0.5", "FOVEA_RUNNERS": "1"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server, Wire(server.url) as wire:
        assert server.client.get("/health/live").status_code == 200
        parents = [server.process.pid]
        if workers == "2":
            parents = [*list_children(server.process.pid)]
        runners = [
            pid
            for parent in parents
            for pid in list_children(parent)
            if is_running_module(pid, "runners.process")
        ]
        assert len(runners) == int(workers)
        for pid in runners:
            os.kill(pid, signal.SIGSTOP)
        wire.send(classify_request(make_jpeg()))
        wait_until(lambda: server.read_metric("fovea_images_in_flight") == 1)
        start_time = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=60)
        assert time.monotonic() - start_time < 0.5 + 2.5 + 7.0  # 7 s for a busy machine
        wait_until(lambda: not any(is_running(pid) for pid in runners))

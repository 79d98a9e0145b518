"""The shutdown: work that is still accepted, refused and finished."""

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
from tests.servers import ROOT, Server, is_running, wait_until
from tests.tools import require_namespaces


def _wait_until_not_ready(server: Server) -> httpx.Response:
    while (reply := httpx.get(f"{server.url}/health/ready")).status_code == 200:
        pass
    return reply


def _wait_until_refused(server: Server) -> httpx.Response:
    while (reply := httpx.post(f"{server.url}/v1/classify", content=make_jpeg())).status_code == 200:
        pass
    return reply


def _begin_request(server: Server, wire: Wire) -> bytes:
    """Begin a request and have it accepted; what is still to be sent of it."""
    picture = make_jpeg()
    wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(picture), picture[:10])
    while server.read_metric("fovea_requests_in_flight") != 2:  # this one and the scrape
        pass
    return picture[10:]


@pytest.mark.long
def test_in_the_grace_time_it_is_not_ready_and_takes_everything(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_GRACE="600") as running, Wire(running.url) as idle:
        idle.send(LIVE_REQUEST)
        assert not idle.read_response().is_closing
        running.process.send_signal(signal.SIGTERM)
        reply = _wait_until_not_ready(running)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
        assert (reply.headers["Retry-After"], reply.headers["Connection"]) == ("1", "close")
        assert httpx.head(f"{running.url}/health/ready").status_code == 503
        assert httpx.get(f"{running.url}/health/live").status_code == 200
        idle.send(classify_request(make_jpeg()))
        answer = idle.read_response()
        assert (answer.status, answer.is_closing) == (200, True)
        running.process.send_signal(signal.SIGTERM)  # hurries
        assert running.process.wait(timeout=20) == 0


def test_after_it_new_work_is_refused_and_old_work_finished(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo)) as running, Wire(running.url) as wire:
        rest = _begin_request(running, wire)
        running.process.send_signal(signal.SIGTERM)
        reply = _wait_until_refused(running)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
        assert (reply.headers["Retry-After"], reply.headers["Connection"]) == ("1", "close")
        assert httpx.get(f"{running.url}/health/live").status_code == 200
        wire.send(rest)
        answer = wire.read_response()
        assert (answer.status, answer.is_closing) == (200, True)
        assert wire.is_closed()
        assert running.process.wait(timeout=20) == 0
    assert "cancelled" not in running.log


@pytest.mark.long
def test_a_large_body_that_is_refused_gets_its_answer(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo)) as running, Wire(running.url) as wire:
        rest = _begin_request(running, wire)
        running.process.send_signal(signal.SIGTERM)
        _wait_until_refused(running)
        with Wire(running.url) as late:
            late.send(classify_request(b"x" * 20_000_000))
            answer = late.read_response()
            assert (answer.status, answer.error_code, answer.is_closing) == (503, "draining", True)
        wire.send(rest)
        assert wire.read_response().status == 200


@pytest.mark.long
def test_what_is_not_finished_in_time_is_told_so_and_counted_in_the_log(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_LIMIT="0.2") as running, Wire(running.url) as wire:
        _begin_request(running, wire)
        running.process.send_signal(signal.SIGTERM)
        answer = wire.read_response()
        assert (answer.status, answer.error_code, answer.is_closing) == (503, "draining", True)
        assert answer.headers["retry-after"] == "1"
        assert running.process.wait(timeout=20) == 0
    assert "cancelled 1 requests that were not finished in time" in running.log
    assert "Traceback" not in running.log


@pytest.mark.long
def test_a_signal_too_many_cuts(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_LIMIT="600") as running, Wire(running.url) as wire:
        _begin_request(running, wire)
        running.process.send_signal(signal.SIGTERM)
        _wait_until_refused(running)
        running.process.send_signal(signal.SIGTERM)
        assert wire.read_response().error_code == "draining"
        assert running.process.wait(timeout=20) == 0
    assert "cancelled 1 requests" in running.log


@pytest.mark.long
def test_three_signals_cut_from_the_grace_time_on(small_zoo: Path) -> None:
    settings = {"FOVEA_DRAIN_GRACE": "600", "FOVEA_DRAIN_LIMIT": "600"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running, Wire(running.url) as wire:
        _begin_request(running, wire)
        running.process.send_signal(signal.SIGTERM)
        _wait_until_not_ready(running)
        running.process.send_signal(signal.SIGTERM)
        _wait_until_refused(running)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=20) == 0


@pytest.mark.long
def test_ctrl_c_has_no_grace_time_and_finishes_what_was_accepted(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_GRACE="600") as running, Wire(running.url) as wire:
        rest = _begin_request(running, wire)
        running.process.send_signal(signal.SIGINT)
        _wait_until_refused(running)
        wire.send(rest)
        assert wire.read_response().status == 200
        assert running.process.wait(timeout=20) == 0


@pytest.mark.long
def test_idle_connections_do_not_hold_it_up(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo)) as running, Wire(running.url) as idle, Wire(running.url):
        idle.send(LIVE_REQUEST)
        assert idle.read_response().status == 200
        started = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert idle.is_closed()
        assert running.process.wait(timeout=20) == 0
        assert time.monotonic() - started < 5


@pytest.mark.long
@pytest.mark.parametrize("clients", [8])
def test_nothing_is_reset_while_it_stops(small_zoo: Path, clients: int) -> None:
    """Every request gets an answer until the connection is refused: none is reset, none ends unanswered."""

    def ask(url: str) -> set[int]:
        seen = set()
        with httpx.Client(base_url=url, timeout=30) as client:
            while True:
                try:
                    seen.add(client.post("/v1/classify", content=make_jpeg()).status_code)
                except httpx.ConnectError:
                    return seen

    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_GRACE="0.5") as running:
        with ThreadPoolExecutor(clients) as pool:
            asking = [pool.submit(ask, running.url) for _ in range(clients)]
            while running.read_metric("fovea_requests_total", route="/v1/classify", status="200") < 100:
                pass
            running.process.send_signal(signal.SIGTERM)
            assert set().union(*(one.result() for one in asking)) <= {200, 503}
        assert running.process.wait(timeout=20) == 0


# --- before it is ready --------------------------------------------------------------------------


@pytest.fixture
def slow(small_zoo: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a service that takes a minute to load, and says by a file `begun` that it does."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'fovea.service.app':\n"
        f"            pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
        "            time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "FOVEA_PORT": "0", "FOVEA_MODELS": str(small_zoo)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_signal_while_it_loads_ends_it_at_once(
    slow: dict[str, str], tmp_path: Path, workers: str, number: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fovea.service"], env={**slow, "FOVEA_WORKERS": workers}, cwd=ROOT,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until((tmp_path / "begun").exists)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)  # a third of what the start would take
    assert process.returncode == (0 if workers == "2" else -number)
    assert said == ""


def test_process_1_of_a_container_is_ended_too_while_it_loads(slow: dict[str, str], tmp_path: Path) -> None:
    """The kernel drops signals for which process 1 has no handler."""
    process = subprocess.Popen(
        [*require_namespaces(), sys.executable, "-m", "fovea.service"], env=slow, cwd=ROOT
    )
    try:
        wait_until((tmp_path / "begun").exists)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children), signal.SIGTERM)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
    finally:
        process.kill()


# --- other signals -------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_sighup_looks_at_the_repository_and_signals_without_a_meaning_do_nothing(
    tmp_path: Path, workers: str
) -> None:
    root = add_to_repository(build_model(), tmp_path / "zoo")
    settings = {"FOVEA_WORKERS": workers, "FOVEA_WATCH": "0"}
    detached = {"start_new_session": True}  # as a daemon has it
    with Server(detached, FOVEA_MODELS=str(root), **settings) as running:
        shutil.copytree(root / "small" / "1", root / "small" / "2")
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGRTMIN, signal.SIGHUP):
            running.process.send_signal(number)

        def serves_the_new_one() -> bool:
            return bool(running.client.get("/v1/models").json()["models"][0]["version"] == "2")

        wait_until(serves_the_new_one)
    assert running.process.returncode == 0


@pytest.mark.long
def test_a_terminal_that_closes_ends_it(small_zoo: Path) -> None:
    ours, theirs = pty.openpty()
    attach = (
        "import os, sys; os.open(sys.argv[1], os.O_RDWR); "
        "os.execv(sys.executable, [sys.executable, '-m', 'fovea.service'])"
    )
    words = [sys.executable, "-c", attach, os.ttyname(theirs)]
    terminal = {"args": words, "start_new_session": True}
    with Server(terminal, FOVEA_MODELS=str(small_zoo), FOVEA_DRAIN_GRACE="600") as running:
        os.close(theirs)
        os.close(ours)
        assert running.process.wait(timeout=20) == 0


# --- how long it takes ---------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stop_ends_in_time_whatever_hangs(small_zoo: Path, workers: str) -> None:
    """The limit is grace, drain limit and 2.5 s: 30 s by default. No process of the service remains."""
    settings = {"FOVEA_WORKERS": workers, "FOVEA_DRAIN_LIMIT": "0.5", "FOVEA_RUNNERS": "1"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running, Wire(running.url) as wire:
        assert running.client.get("/health/live").status_code == 200
        parents = [running.process.pid]
        if workers == "2":
            parents = _list_children(running.process.pid)
        runners = [pid for parent in parents for pid in _list_children(parent)]
        assert len(runners) == int(workers)
        for pid in runners:
            os.kill(pid, signal.SIGSTOP)
        wire.send(classify_request(make_jpeg()))
        while running.read_metric("fovea_images_in_flight") != 1:
            pass
        started = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(timeout=20)
        assert time.monotonic() - started < 0.5 + 2.5 + 1.0  # the last for a busy machine
        wait_until(lambda: not any(is_running(pid) for pid in runners))


def _list_children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in tasks for child in path.read_text().split()]

"""Several workers share one port, are replaced when they die, and are counted as one service."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import onnx
import pytest

from fovea.service.artifact.repository import scan_repository
from fovea.service.http.listener import Listener
from fovea.service.rollout.refusals import Refusals
from fovea.service.runners import child_process
from fovea.service.settings import Settings
from fovea.service.supervisor import worker
from fovea.service.supervisor.channel import Channel, create_channel
from fovea.service.supervisor.messages import WORKER_MESSAGES, PrepareReply, StartingHeartbeat
from fovea.service.supervisor.supervisor import Supervisor
from tests.graphs import add_to_repository, build_model
from tests.pictures import make_jpeg
from tests.raw import CLASSIFY_HEAD, LIVE_REQUEST, Wire, classify_request
from tests.servers import (
    ROOT,
    Server,
    is_running,
    list_children,
    read_open_files,
    run_service,
    wait_until,
)
from tests.tools import require_namespaces
from tests.zoo import publish_variant

pytestmark = pytest.mark.long

RUNTIME = b"GET /runtime HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def two_worker_server(small_zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2") as server:
        yield server


def _read_answering_pid(wire: Wire) -> int:
    wire.send(RUNTIME)
    return int(wire.read_response().json["pid"])


def _list_worker_pids(server: Server) -> set[int]:
    pid = server.process.pid
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _kill_worker(server: Server, pid: int) -> None:
    """Kill a worker, and wait until another answers in its place."""
    old_pids = _list_worker_pids(server)
    os.kill(pid, signal.SIGKILL)
    while True:
        with ExitStack() as stack:
            pids = {_read_answering_pid(stack.enter_context(Wire(server.url))) for _ in range(4)}
        if len(pids - {pid}) == 2 and pids - old_pids:
            return


def _list_open_files(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/fd").iterdir())


def _list_metric_files(pid: int) -> dict[str, list[Path]]:
    """Return the memory files of metrics that a process has open, by name."""
    files: dict[str, list[Path]] = {}
    for path, target in read_open_files(pid).items():
        name = target.removeprefix("/memfd:").removesuffix(" (deleted)")
        if name.startswith("fovea-"):
            files.setdefault(name, []).append(path)
    return files


def test_connection_goes_to_worker_with_fewest_connections(two_worker_server: Server) -> None:
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(two_worker_server.url)) for _ in range(8)]
        pids = [_read_answering_pid(wire) for wire in wires]
        assert Counter(pids) == dict.fromkeys(_list_worker_pids(two_worker_server), 4)
        for wire, pid in zip(wires, pids, strict=True):
            if pid == pids[0]:
                wire.socket.close()

        def are_new_connections_on_freed_worker() -> bool:
            time.sleep(0.1)  # gives the supervisor time to see the closed connections
            with ExitStack() as new_wires:
                return {
                    _read_answering_pid(new_wires.enter_context(Wire(two_worker_server.url)))
                    for _ in range(4)
                } == {pids[0]}

        wait_until(are_new_connections_on_freed_worker)


def test_workers_share_the_processors(two_worker_server: Server, server: Server) -> None:
    single_runtime = server.client.get("/runtime").json()
    shared_runtime = two_worker_server.client.get("/runtime").json()
    assert (single_runtime["workers"], shared_runtime["workers"]) == (1, 2)
    assert shared_runtime["threads"]["cpus"] == single_runtime["threads"]["cpus"] / 2


def test_requests_are_counted_once_despite_worker_deaths(two_worker_server: Server) -> None:
    def send_requests(times: int) -> None:
        for _ in range(times):
            assert httpx.post(f"{two_worker_server.url}/v1/classify", content=make_jpeg()).status_code == 200

    def read_counts() -> list[float]:
        return [
            two_worker_server.read_metric("fovea_requests_total", route="/v1/classify", status="200"),
            two_worker_server.read_metric("fovea_request_seconds_count", route="/v1/classify"),
            two_worker_server.read_metric("fovea_stage_seconds_bucket", stage="decode", le="+Inf"),
            two_worker_server.read_metric("fovea_images_total"),
        ]

    send_requests(21)
    assert read_counts() == [21] * 4
    with Wire(two_worker_server.url) as wire:
        for round_ in range(1, 4):
            pid = two_worker_server.client.get("/runtime").json()["pid"]
            other_pid = next(iter(_list_worker_pids(two_worker_server) - {pid}))
            _kill_worker(two_worker_server, other_pid)
            assert read_counts() == [21 + 10 * (round_ - 1)] * 4
            send_requests(10)
            assert read_counts() == [21 + 10 * round_] * 4
        wire.socket.close()
    assert two_worker_server.read_metric("fovea_requests_in_flight") == 1
    assert two_worker_server.read_metric("fovea_model_info") == 1
    assert two_worker_server.read_metric("process_cpu_seconds_total") > 0
    assert two_worker_server.read_metric("process_resident_memory_bytes") > 50e6


def test_worker_death_loses_only_its_own_requests(two_worker_server: Server) -> None:
    picture = make_jpeg()
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(two_worker_server.url)) for _ in range(8)]
        pids = [_read_answering_pid(wire) for wire in wires]
        for wire in wires:
            wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(picture), picture[:10])
        wait_until(lambda: two_worker_server.read_metric("fovea_requests_in_flight") == 9)
        _kill_worker(two_worker_server, pids[0])
        for wire, pid in zip(wires, pids, strict=True):
            if pid == pids[0]:
                with pytest.raises((EOFError, ConnectionError)):
                    wire.send(picture[10:])
                    wire.read_response()
            else:
                wire.send(picture[10:])
                assert wire.read_response().status == 200
    two_worker_server.__exit__(None, None, None)
    assert "was ended by signal 9; it is replaced" in two_worker_server.log


def test_files_of_dead_workers_are_closed(two_worker_server: Server) -> None:
    pid = two_worker_server.process.pid
    open_file_count = len(_list_open_files(pid))
    for _ in range(3):
        _kill_worker(two_worker_server, next(iter(_list_worker_pids(two_worker_server))))
    wait_until(lambda: len(_list_open_files(pid)) <= open_file_count)


def test_metrics_are_kept_in_memory_files(small_zoo: Path, tmp_path: Path) -> None:
    """A full, small, read-only or cleaned folder can neither remove metrics nor end a worker by SIGBUS."""
    environment = {"TMPDIR": str(tmp_path / "missing"), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "missing")}
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2", **environment) as server:
        httpx.post(f"{server.url}/v1/classify", content=make_jpeg())
        assert server.read_metric("fovea_images_total") == 1
        for pid in (server.process.pid, *_list_worker_pids(server)):
            shared_mappings = [
                line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if " rw-s " in line
            ]
            assert all("/memfd:" in line for line in shared_mappings)
            assert {"fovea-counter", "fovea-histogram"} <= _list_metric_files(pid).keys()


def test_a_worker_with_damaged_metrics_is_replaced(two_worker_server: Server) -> None:
    httpx.post(f"{two_worker_server.url}/v1/classify", content=make_jpeg())
    for pid in list(_list_worker_pids(two_worker_server)):
        for name in ("fovea-counter", "fovea-histogram"):
            with _list_metric_files(pid)[name][0].open("r+b") as file:
                file.seek(8)
                file.write(b"\xff" * 4096)
        _kill_worker(two_worker_server, pid)
    httpx.post(f"{two_worker_server.url}/v1/classify", content=make_jpeg())
    assert two_worker_server.read_metric("fovea_images_total") == 1
    assert two_worker_server.read_metric("fovea_worker_deaths_total", reason="signal") == 2
    assert (
        two_worker_server.read_metric("fovea_workers")
        == two_worker_server.read_metric("fovea_workers_expected")
        == 2
    )
    two_worker_server.__exit__(None, None, None)
    assert "the metrics of one worker cannot be read" in two_worker_server.log


def test_a_worker_that_cannot_be_started_is_tried_again(two_worker_server: Server) -> None:
    pid, workers = two_worker_server.process.pid, _list_worker_pids(two_worker_server)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(_list_open_files(pid)) + 1, hard))
    first, second = workers
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: "a worker cannot be started" in _read_log_line(two_worker_server))
    assert _list_worker_pids(two_worker_server) == {second}
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    wait_until(lambda: len(_list_worker_pids(two_worker_server)) == 2)
    two_worker_server.wait_for_metric(2, "fovea_workers")


def _read_log_line(server: Server) -> str:
    """Return the next line of the server's log; fail after a minute without one."""
    assert server.process.stderr is not None
    alarm = threading.Timer(60, server.process.kill)
    alarm.start()
    try:
        line = str(server.process.stderr.readline())
    finally:
        alarm.cancel()
    assert line, "the log says nothing more"
    return line


@pytest.mark.parametrize("packet", [b'{"taken": "many"}', PrepareReply(1, None).to_bytes()])
def test_worker_with_invalid_message_is_replaced(small_zoo: Path, tmp_path: Path, packet: bytes) -> None:
    trigger = tmp_path / "now"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, socket, sys, threading, time\n"
        "def say():\n"
        f"    while not os.path.exists({str(trigger)!r}):\n"
        "        time.sleep(0.01)\n"
        "    channel = sys.orig_argv[sys.orig_argv.index('--worker') + 2]\n"
        f"    socket.socket(fileno=os.dup(int(channel))).send({packet!r})\n"
        "if '--worker' in sys.orig_argv and not os.path.exists("
        f"{str(trigger)!r}):\n"
        "    threading.Thread(target=say, daemon=True).start()\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2", PYTHONPATH=path) as server:
        old_pids = _list_worker_pids(server)
        trigger.touch()
        wait_until(lambda: len(_list_worker_pids(server) - old_pids) == 2)
        server.wait_for_metric(2, "fovea_workers")
        assert httpx.post(f"{server.url}/v1/classify", content=make_jpeg()).status_code == 200
    assert "is killed, because its message is invalid" in server.log


def test_workers_answer_open_requests_before_they_stop(small_zoo: Path) -> None:
    settings = {"FOVEA_WORKERS": "2", "FOVEA_DRAIN_GRACE": "600"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server, ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.url)) for _ in range(4)]
        assert len({_read_answering_pid(wire) for wire in wires}) == 2
        picture = make_jpeg()
        for wire in wires:
            wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(picture), picture[:10])
        wait_until(lambda: server.read_metric("fovea_requests_in_flight") == 5)
        server.process.send_signal(signal.SIGTERM)
        for _ in range(2):  # one for each worker
            wait_until(lambda: httpx.get(f"{server.url}/health/ready").status_code != 200)
        assert httpx.post(f"{server.url}/v1/classify", content=picture).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.post(f"{server.url}/v1/classify", content=picture).status_code != 200)
        for wire in wires:
            wire.send(picture[10:])
            assert wire.read_response().status == 200
        assert server.process.wait(timeout=60) == 0
    assert "is replaced" not in server.log


def test_signal_to_process_group_counts_once(small_zoo: Path) -> None:
    """A terminal's Ctrl-C and systemd's stop reach the workers too."""
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2") as server, Wire(server.url) as wire:
        picture = make_jpeg()
        wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(picture), picture[:10])
        wait_until(lambda: server.read_metric("fovea_requests_in_flight") == 2)
        for pid in (*_list_worker_pids(server), server.process.pid):
            os.kill(pid, signal.SIGINT)
        wait_until(lambda: httpx.post(f"{server.url}/v1/classify", content=picture).status_code != 200)
        wire.send(picture[10:])
        assert wire.read_response().status == 200
        assert server.process.wait(timeout=60) == 0
    assert "cancelled" not in server.log


def test_workers_do_not_outlive_their_supervisor(two_worker_server: Server) -> None:
    workers = _list_worker_pids(two_worker_server)
    two_worker_server.process.kill()
    two_worker_server.process.wait()
    wait_until(lambda: not any(map(is_running, workers)))


def test_process_1_leaves_no_zombies(small_zoo: Path) -> None:
    """The runners of a killed worker become children of process 1, which must wait for them."""
    popen_arguments = {"args": [*require_namespaces(), sys.executable, "-m", "fovea.service"]}
    with Server(popen_arguments, FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2", FOVEA_RUNNERS="1") as server:
        (supervisor,) = _list_worker_pids(server)
        first, second = list_children(supervisor)
        orphans = list_children(first)
        assert len(orphans) == 2, "a runner and the fork server"
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not any(Path(f"/proc/{orphan}").exists() for orphan in orphans))
        wait_until(lambda: len(list_children(supervisor) - {first, second}) == 1)
        os.kill(supervisor, signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0
    assert "was ended by signal 9; it is replaced" in server.log


_TRIAL_CODE = """
import os, signal, socket, sys, threading
from pathlib import Path
from fovea.service.artifact.repository import scan_repository
from fovea.service.http.listener import Listener
from fovea.service.observability.multiprocess import SharedMetrics
from fovea.service.rollout.refusals import Refusals
from fovea.service.settings import Settings
from fovea.service.supervisor.supervisor import Supervisor
from tests.servers import is_running_module, list_children

assert os.getpid() == 1
root = Path(sys.argv[1])
state, refusals = scan_repository(root), Refusals()
with socket.socket() as listening_socket:
    supervisor = Supervisor(
        [], {}, Settings(models=root), listener=Listener(listening_socket, 1, print), metrics=SharedMetrics(),
        serving_state=state, refusals=refusals, on_listening=print,
    )
version = state.versions_by_model["small"][0]
thread = threading.Thread(target=supervisor._is_broken, args=[version])
thread.start()
is_killed = False
while thread.is_alive():
    supervisor._reap_orphans()
    for pid in list_children(1):
        if not is_killed and is_running_module(pid, "rollout.trial_process"):
            os.kill(pid, signal.SIGKILL)
            is_killed = True
print(refusals.find_reason(version))
assert not list_children(1)
orphan = os.spawnv(os.P_NOWAIT, "/bin/true", ["true"])
while Path(f"/proc/{orphan}").exists():
    supervisor._reap_orphans()
"""
"""Code for process 1: a supervisor that reaps orphans all the time while a trial of a version is killed."""


def test_process_1_leaves_the_exit_status_of_a_trial(small_zoo: Path) -> None:
    """Otherwise a trial that lacked memory would look like one that ended by itself, and be final."""
    command = [*require_namespaces(), sys.executable, "-c", _TRIAL_CODE, str(small_zoo)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "its trial process was killed: there was not enough memory" in result.stdout


def test_supervisor_keeps_no_fork_server(tmp_path: Path) -> None:
    """It needs one to try versions, at the start and when a worker cannot load them."""
    zoo = add_to_repository(build_model(), tmp_path / "zoo")
    add_to_repository(build_model(seed=5), zoo, "other")
    publish_variant(zoo, seed=1)
    settings = {"FOVEA_SWAP_FLIPS": "0.99", "FOVEA_WATCH": "60", "FOVEA_RUNNERS": "1"}
    with Server(FOVEA_MODELS=str(zoo), FOVEA_WORKERS="2", **settings) as server:
        assert not server.child_pids("runners.fork_server_process")
        pids = _list_worker_pids(server)
        assert len(pids) == 2
        onnx.save(build_model(seed=2), zoo / "small" / "2" / "model.onnx")
        os.kill(pids.pop(), signal.SIGKILL)
        wait_until(lambda: len(_list_worker_pids(server) - pids) == 1)
        wait_until(lambda: "new workers cannot load" in _read_log_line(server))
        wait_until(lambda: server.read_metric("fovea_workers") == 2)
        assert not server.child_pids("runners.fork_server_process")


def test_heartbeat_of_a_starting_worker_does_not_wait_for_a_trial(small_zoo: Path) -> None:
    """The trial of a version may wait a second for its fork server, and a minute if the fork server hangs."""
    unused: Any = None
    with socket.socket() as listening_socket:
        supervisor = Supervisor(
            [], {}, Settings(models=small_zoo), listener=Listener(listening_socket, 1, print),
            metrics=unused, serving_state=scan_repository(small_zoo), refusals=Refusals(), on_listening=print,
        )  # fmt: skip
        arguments = unused, StartingHeartbeat()
        thread = threading.Thread(target=supervisor._handle_message, args=arguments, daemon=True)
        with child_process._FORK_SERVER._lock:
            thread.start()
            thread.join(60)
            assert not thread.is_alive()


def test_wait_for_workers_that_cannot_be_killed_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that waits for an unresponsive disk ends with the disk; here the signal does not reach it."""
    monkeypatch.setattr(worker, "_EXIT_TIMEOUT", 0.2)
    own_socket, other_socket = create_channel()
    with own_socket, other_socket, subprocess.Popen(["sleep", "60"]) as process:
        try:
            with monkeypatch.context() as context:
                context.setattr(subprocess.Popen, "kill", lambda self: None)
                worker.kill_workers([worker.WorkerProcess(process, Channel(own_socket, WORKER_MESSAGES))])
            assert process.poll() is None
        finally:
            process.kill()


def test_failed_start_prints_one_line_and_exits_with_2(small_zoo: Path) -> None:
    result = run_service(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2", FOVEA_DEFAULT_MODEL="other")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "fovea: FOVEA_DEFAULT_MODEL is 'other'; there are small\n"


def test_worker_crash_at_start_ends_the_service(small_zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, os\nif '--worker' in sys.orig_argv: os._exit(3)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = run_service(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2", PYTHONPATH=path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "fovea: a worker ended with exit code 3 while it started\n"


@pytest.mark.needs("promtool")
def test_promtool_accepts_the_metrics_of_workers(two_worker_server: Server) -> None:
    two_worker_server.client.post("/v1/classify", content=make_jpeg())
    text = two_worker_server.client.get("/metrics").text
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_workers_export_same_metrics_as_one_process(two_worker_server: Server, server: Server) -> None:
    def read_metric_names(instance: Server) -> set[str]:
        assert instance.client.post("/v1/models/small/classify", content=make_jpeg()).status_code == 200
        assert instance.client.post("/v1/models/small/classify").status_code == 400
        lines = instance.client.get("/metrics").text.splitlines()
        return {line.split()[2] for line in lines if line.startswith("# TYPE fovea_")}

    later_metrics = {  # several workers do not export series without a value
        "fovea_drift_psi", "fovea_drift_chance_psi", "fovea_swap_flip_ratio", "fovea_swap_slowdown_ratio",
        "fovea_unknown_images_total", "fovea_versions_refused",
    }  # fmt: skip
    assert read_metric_names(two_worker_server) == read_metric_names(server) - later_metrics


@pytest.mark.parametrize("starved_count", [1, 2])
def test_worker_without_descriptors_loses_no_connections(small_zoo: Path, starved_count: int) -> None:
    """The kernel drops a descriptor that a process has no room for, but the supervisor still has it."""
    settings = {"FOVEA_WORKERS": "2", "FOVEA_CONNECTIONS": "40"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as server:
        assert server.client.get("/health/live").status_code == 200
        server.client.close()
        limits = {}
        for pid in list(_list_worker_pids(server))[:starved_count]:
            limits[pid] = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(_list_open_files(pid)) + 4, limits[pid][1]))
        with ExitStack() as stack:
            wires = [stack.enter_context(Wire(server.url)) for _ in range(30)]
            for wire in wires:
                wire.send(LIVE_REQUEST)
            wait_until(lambda: "has no file descriptor left" in _read_log_line(server))
            if starved_count == 1:
                for wire in wires:
                    assert wire.read_response().status == 200
            for pid, limit in limits.items():
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
            if starved_count == 2:
                for wire in wires:
                    assert wire.read_response().status == 200
        with ExitStack() as stack:  # the capacity is restored
            wires = [stack.enter_context(Wire(server.url)) for _ in range(40)]
            for wire in wires:
                wire.send(LIVE_REQUEST)
            for wire in wires:
                assert wire.read_response().status == 200
        with httpx.Client(base_url=server.url, timeout=60) as server.client:
            assert server.read_metric("fovea_connections_starved_total") >= 1


def test_stopped_worker_gets_no_connections_and_is_replaced(two_worker_server: Server) -> None:
    def ask_pids(count: int) -> set[int]:
        with ExitStack() as stack:
            wires = [stack.enter_context(Wire(two_worker_server.url)) for _ in range(count)]
            for wire in wires:
                wire.send(RUNTIME)
            return {int(wire.read_response().json["pid"]) for wire in wires}

    two_worker_server.client.close()
    with Wire(two_worker_server.url) as live_wire, Wire(two_worker_server.url) as stopped_wire:
        live_pid, stopped_pid = _read_answering_pid(live_wire), _read_answering_pid(stopped_wire)
        assert _list_worker_pids(two_worker_server) == {live_pid, stopped_pid}
        os.kill(stopped_pid, signal.SIGSTOP)
        metrics = b""
        while b"\nfovea_workers 1.0\n" not in metrics:
            live_wire.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            metrics = live_wire.read_response().body
        assert ask_pids(20) == {live_pid}  # at once, while the stopped worker still exists
        assert stopped_pid in _list_worker_pids(two_worker_server)
        wait_until(lambda: stopped_pid not in _list_worker_pids(two_worker_server))
        with pytest.raises((EOFError, ConnectionError)):
            stopped_wire.read_response()
    wait_until(lambda: len(ask_pids(4)) == 2)
    with httpx.Client(base_url=two_worker_server.url, timeout=60) as two_worker_server.client:
        assert two_worker_server.read_metric("fovea_worker_deaths_total", reason="hung") == 1
        assert two_worker_server.read_metric("fovea_workers") == 2
    two_worker_server.__exit__(None, None, None)
    assert (
        f"worker {stopped_pid} has sent no message for 2 s, and gets no more connections"
        in two_worker_server.log
    )
    assert f"worker {stopped_pid} has sent no message for 10 s, and is killed" in two_worker_server.log
    assert "was killed because it sent no messages; it is replaced" in two_worker_server.log


def test_briefly_stopped_worker_is_kept(two_worker_server: Server) -> None:
    stopped_pid = next(iter(_list_worker_pids(two_worker_server)))
    os.kill(stopped_pid, signal.SIGSTOP)
    wait_until(lambda: "gets no more connections" in _read_log_line(two_worker_server))
    os.kill(stopped_pid, signal.SIGCONT)
    wait_until(lambda: "sends messages again" in _read_log_line(two_worker_server))
    two_worker_server.wait_for_metric(2, "fovea_workers")
    assert stopped_pid in _list_worker_pids(two_worker_server)


@pytest.mark.slow
def test_stopped_supervisor_replaces_no_worker(two_worker_server: Server) -> None:
    workers = _list_worker_pids(two_worker_server)
    os.kill(two_worker_server.process.pid, signal.SIGSTOP)
    with Wire(two_worker_server.url) as wire:  # the kernel accepts the connection
        wire.socket.settimeout(11)
        wire.send(RUNTIME)
        with pytest.raises(TimeoutError):
            wire.read_response()
        os.kill(two_worker_server.process.pid, signal.SIGCONT)
        wire.socket.settimeout(30)
        assert wire.read_response().status == 200
    assert _list_worker_pids(two_worker_server) == workers
    two_worker_server.__exit__(None, None, None)
    assert "has sent no message" not in two_worker_server.log


def test_a_connection_waits_for_a_worker_when_all_have_died(two_worker_server: Server) -> None:
    for pid in _list_worker_pids(two_worker_server):
        os.kill(pid, signal.SIGKILL)
    with Wire(two_worker_server.url) as wire:
        wire.send(classify_request(make_jpeg()), LIVE_REQUEST)
        assert wire.read_response().status == 200


def test_connection_not_taken_by_worker_goes_to_another(two_worker_server: Server) -> None:
    stopped_pid, live_pid = _list_worker_pids(two_worker_server)
    os.kill(stopped_pid, signal.SIGSTOP)
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(two_worker_server.url)) for _ in range(4)]
        for wire in wires:
            wire.send(RUNTIME)
        os.kill(stopped_pid, signal.SIGKILL)
        assert {int(wire.read_response().json["pid"]) for wire in wires} & {live_pid}

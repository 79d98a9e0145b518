"""Several workers behind one port: even, replaced when they die, and counted as one."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.pictures import make_jpeg
from tests.raw import CLASSIFY_HEAD, LIVE_REQUEST, Wire, classify_request
from tests.servers import Server, run_service, wait_until
from tests.tools import require_namespaces

pytestmark = pytest.mark.long

RUNTIME = b"GET /runtime HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def pair(small_zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2") as running:
        yield running


def _list_children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in tasks for child in path.read_text().split()]


def _answering_pid(wire: Wire) -> int:
    wire.send(RUNTIME)
    return int(wire.read_response().json["pid"])


def _worker_pids(server: Server) -> set[int]:
    pid = server.process.pid
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _kill_worker(server: Server, pid: int) -> None:
    """Kill a worker, and wait until another answers in its place."""
    before = _worker_pids(server)
    os.kill(pid, signal.SIGKILL)
    while True:
        with ExitStack() as stack:
            pids = {_answering_pid(stack.enter_context(Wire(server.url))) for _ in range(4)}
        if len(pids - {pid}) == 2 and pids - before:
            return


def _list_open_files(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/fd").iterdir())


def _list_metric_files(pid: int) -> dict[str, list[Path]]:
    """The memory files of the metrics that a process has open, by name."""
    files: dict[str, list[Path]] = {}
    for path in _list_open_files(pid):
        try:
            name = str(path.readlink()).removeprefix("/memfd:").removesuffix(" (deleted)")
        except FileNotFoundError:  # it has just been closed
            continue
        if name.startswith("fovea-"):
            files.setdefault(name, []).append(path)
    return files


def test_a_connection_goes_to_the_worker_with_the_fewest(pair: Server) -> None:
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(pair.url)) for _ in range(8)]
        pids = [_answering_pid(wire) for wire in wires]
        assert Counter(pids) == dict.fromkeys(_worker_pids(pair), 4)
        for wire, pid in zip(wires, pids, strict=True):
            if pid == pids[0]:
                wire.socket.close()

        def come_where_four_have_left() -> bool:
            time.sleep(0.1)  # for the supervisor to hear of those who left
            with ExitStack() as further:
                return {_answering_pid(further.enter_context(Wire(pair.url))) for _ in range(4)} == {pids[0]}

        wait_until(come_where_four_have_left)


def test_the_processors_are_shared_out(pair: Server, server: Server) -> None:
    alone = server.client.get("/runtime").json()
    shared = pair.client.get("/runtime").json()
    assert (alone["workers"], shared["workers"]) == (1, 2)
    assert shared["threads"]["cpus"] == alone["threads"]["cpus"] / 2


def test_every_request_is_counted_once_whoever_dies(pair: Server) -> None:
    def send_requests(times: int) -> None:
        for _ in range(times):
            assert httpx.post(f"{pair.url}/v1/classify", content=make_jpeg()).status_code == 200

    def counts() -> list[float]:
        return [
            pair.read_metric("fovea_requests_total", route="/v1/classify", status="200"),
            pair.read_metric("fovea_request_seconds_count", route="/v1/classify"),
            pair.read_metric("fovea_stage_seconds_bucket", stage="decode", le="+Inf"),
            pair.read_metric("fovea_images_total"),
        ]

    send_requests(21)
    assert counts() == [21] * 4
    with Wire(pair.url) as wire:
        for round_ in range(1, 4):
            pid = pair.client.get("/runtime").json()["pid"]
            other = next(iter(_worker_pids(pair) - {pid}))
            _kill_worker(pair, other)
            assert counts() == [21 + 10 * (round_ - 1)] * 4
            send_requests(10)
            assert counts() == [21 + 10 * round_] * 4
        wire.socket.close()
    assert pair.read_metric("fovea_requests_in_flight") == 1
    assert pair.read_metric("fovea_model_info") == 1
    assert pair.read_metric("process_cpu_seconds_total") > 0
    assert pair.read_metric("process_resident_memory_bytes") > 50e6


def test_only_the_requests_of_the_dead_are_lost(pair: Server) -> None:
    picture = make_jpeg()
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(pair.url)) for _ in range(8)]
        pids = [_answering_pid(wire) for wire in wires]
        for wire in wires:
            wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(picture), picture[:10])
        while pair.read_metric("fovea_requests_in_flight") != 9:
            pass
        _kill_worker(pair, pids[0])
        for wire, pid in zip(wires, pids, strict=True):
            if pid == pids[0]:
                with pytest.raises((EOFError, ConnectionError)):
                    wire.send(picture[10:])
                    wire.read_response()
            else:
                wire.send(picture[10:])
                assert wire.read_response().status == 200
    pair.__exit__(None, None, None)
    assert "was ended by signal 9; it is replaced" in pair.log


def test_files_of_the_dead_do_not_pile_up(pair: Server) -> None:
    pid = pair.process.pid
    before = len(_list_open_files(pid))
    for _ in range(3):
        _kill_worker(pair, next(iter(_worker_pids(pair))))
    wait_until(lambda: len(_list_open_files(pid)) <= before)


def test_nothing_of_the_metrics_lies_in_a_file_system(small_zoo: Path, tmp_path: Path) -> None:
    """No full, small, read-only or swept folder can take them away, nor end a worker by SIGBUS."""
    environment = {"TMPDIR": str(tmp_path / "missing"), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "missing")}
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2", **environment) as running:
        httpx.post(f"{running.url}/v1/classify", content=make_jpeg())
        assert running.read_metric("fovea_images_total") == 1
        for pid in (running.process.pid, *_worker_pids(running)):
            writable = [
                line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if " rw-s " in line
            ]
            assert all("/memfd:" in line for line in writable)
            assert {"fovea-counter", "fovea-histogram"} <= _list_metric_files(pid).keys()


def test_a_worker_with_damaged_metrics_is_replaced(pair: Server) -> None:
    httpx.post(f"{pair.url}/v1/classify", content=make_jpeg())
    for pid in list(_worker_pids(pair)):
        for name in ("fovea-counter", "fovea-histogram"):
            with _list_metric_files(pid)[name][0].open("r+b") as file:
                file.seek(8)
                file.write(b"\xff" * 4096)
        _kill_worker(pair, pid)
    httpx.post(f"{pair.url}/v1/classify", content=make_jpeg())
    assert pair.read_metric("fovea_images_total") == 1
    assert pair.read_metric("fovea_worker_deaths_total", reason="signal") == 2
    assert pair.read_metric("fovea_workers") == pair.read_metric("fovea_workers_expected") == 2
    pair.__exit__(None, None, None)
    assert "the metrics of one worker cannot be read" in pair.log


def test_a_worker_that_cannot_be_started_is_tried_again(pair: Server) -> None:
    pid, workers = pair.process.pid, _worker_pids(pair)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(_list_open_files(pid)) + 1, hard))
    first, second = workers
    os.kill(first, signal.SIGKILL)
    while "a worker cannot be started" not in _read_log_line(pair):
        pass
    assert _worker_pids(pair) == {second}
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    wait_until(lambda: len(_worker_pids(pair)) == 2)
    pair.wait_for_metric(2, "fovea_workers")


def _read_log_line(server: Server) -> str:
    """The next line of its log; fails after a minute without one."""
    assert server.process.stderr is not None
    alarm = threading.Timer(60, server.process.kill)
    alarm.start()
    try:
        line = str(server.process.stderr.readline())
    finally:
        alarm.cancel()
    assert line, "the log says nothing more"
    return line


def test_a_worker_that_says_nonsense_is_replaced(small_zoo: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "now"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, socket, sys, threading, time\n"
        "def say():\n"
        f"    while not os.path.exists({str(trigger)!r}):\n"
        "        time.sleep(0.01)\n"
        "    channel = sys.orig_argv[sys.orig_argv.index('--worker') + 1]\n"
        '    socket.socket(fileno=os.dup(int(channel))).send(b\'{"taken": "many"}\')\n'
        "if '--worker' in sys.orig_argv and not os.path.exists("
        f"{str(trigger)!r}):\n"
        "    threading.Thread(target=say, daemon=True).start()\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2", PYTHONPATH=path) as running:
        before = _worker_pids(running)
        trigger.touch()
        wait_until(lambda: len(_worker_pids(running) - before) == 2)
        running.wait_for_metric(2, "fovea_workers")
        assert httpx.post(f"{running.url}/v1/classify", content=make_jpeg()).status_code == 200
    assert "is killed, because its message is invalid" in running.log


def test_both_stop_in_order(small_zoo: Path) -> None:
    settings = {"FOVEA_WORKERS": "2", "FOVEA_DRAIN_GRACE": "600"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running, ExitStack() as stack:
        wires = [stack.enter_context(Wire(running.url)) for _ in range(4)]
        assert len({_answering_pid(wire) for wire in wires}) == 2
        picture = make_jpeg()
        for wire in wires:
            wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(picture), picture[:10])
        while running.read_metric("fovea_requests_in_flight") != 5:
            pass
        running.process.send_signal(signal.SIGTERM)
        for _ in range(2):  # one each
            while httpx.get(f"{running.url}/health/ready").status_code == 200:
                pass
        assert httpx.post(f"{running.url}/v1/classify", content=picture).status_code == 200
        running.process.send_signal(signal.SIGTERM)
        while httpx.post(f"{running.url}/v1/classify", content=picture).status_code == 200:
            pass
        for wire in wires:
            wire.send(picture[10:])
            assert wire.read_response().status == 200
        assert running.process.wait(timeout=20) == 0
    assert "is replaced" not in running.log


def test_a_signal_to_the_whole_group_counts_once(small_zoo: Path) -> None:
    """As a terminal's Ctrl-C and systemd's stop: workers get it too."""
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2") as running, Wire(running.url) as wire:
        picture = make_jpeg()
        wire.send(CLASSIFY_HEAD, b"Content-Length: %d\r\n\r\n" % len(picture), picture[:10])
        while running.read_metric("fovea_requests_in_flight") != 2:
            pass
        for pid in (*_worker_pids(running), running.process.pid):
            os.kill(pid, signal.SIGINT)
        while httpx.post(f"{running.url}/v1/classify", content=picture).status_code == 200:
            pass
        wire.send(picture[10:])
        assert wire.read_response().status == 200
        assert running.process.wait(timeout=20) == 0
    assert "cancelled" not in running.log


def test_workers_do_not_outlive_their_supervisor(pair: Server) -> None:
    workers = _worker_pids(pair)
    pair.process.kill()
    pair.process.wait()
    for pid in workers:
        while _is_running(pid):
            pass


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_as_process_1_it_leaves_no_zombie(small_zoo: Path) -> None:
    """The runners of a worker that was killed become its children: nobody else waits for them."""
    alone = {"args": [*require_namespaces(), sys.executable, "-m", "fovea.service"]}
    with Server(alone, FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2", FOVEA_RUNNERS="1") as running:
        (supervisor,) = _worker_pids(running)
        first, second = _list_children(supervisor)
        (orphan,) = _list_children(first)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{orphan}").exists())
        wait_until(lambda: len(set(_list_children(supervisor)) - {first, second}) == 1)
        os.kill(supervisor, signal.SIGTERM)
        assert running.process.wait(timeout=20) == 0
    assert "was ended by signal 9; it is replaced" in running.log


def test_workers_that_cannot_start_are_one_line_and_exit_code_2(small_zoo: Path) -> None:
    ended = run_service(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2", FOVEA_DEFAULT_MODEL="other")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "fovea: FOVEA_DEFAULT_MODEL is 'other'; there are small\n"


def test_a_worker_that_crashes_at_its_start_ends_it(small_zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, os\nif '--worker' in sys.orig_argv: os._exit(3)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = run_service(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2", PYTHONPATH=path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "fovea: a worker ended with exit code 3 while it started\n"


@pytest.mark.needs("promtool")
def test_promtool_accepts_the_metrics_of_workers(pair: Server) -> None:
    pair.client.post("/v1/classify", content=make_jpeg())
    text = pair.client.get("/metrics").text
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_the_same_metrics_as_of_one_process(pair: Server, server: Server) -> None:
    def names(instance: Server) -> set[str]:
        assert instance.client.post("/v1/models/small/classify", content=make_jpeg()).status_code == 200
        assert instance.client.post("/v1/models/small/classify").status_code == 400
        lines = instance.client.get("/metrics").text.splitlines()
        return {line.split()[2] for line in lines if line.startswith("# TYPE fovea_")}

    of_later = {  # of workers nothing is told that has no value
        "fovea_drift_psi", "fovea_drift_chance_psi", "fovea_swap_flip_ratio", "fovea_swap_slowdown_ratio",
        "fovea_versions_refused",
    }  # fmt: skip
    assert names(pair) == names(server) - of_later


@pytest.mark.parametrize("starved", [1, 2])
def test_a_worker_without_file_descriptors_loses_no_connection_and_no_capacity(
    small_zoo: Path, starved: int
) -> None:
    """The kernel drops a descriptor that a process has no room for: the supervisor has it still."""
    settings = {"FOVEA_WORKERS": "2", "FOVEA_CONNECTIONS": "40"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running:
        assert running.client.get("/health/live").status_code == 200
        running.client.close()
        limits = {}
        for pid in list(_worker_pids(running))[:starved]:
            limits[pid] = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(_list_open_files(pid)) + 4, limits[pid][1]))
        with ExitStack() as stack:
            wires = [stack.enter_context(Wire(running.url)) for _ in range(30)]
            for wire in wires:
                wire.send(LIVE_REQUEST)
            while "has no file descriptor left" not in _read_log_line(running):
                pass
            if starved == 1:
                for wire in wires:
                    assert wire.read_response().status == 200
            for pid, limit in limits.items():
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
            if starved == 2:
                for wire in wires:
                    assert wire.read_response().status == 200
        with ExitStack() as stack:  # as many as before
            wires = [stack.enter_context(Wire(running.url)) for _ in range(40)]
            for wire in wires:
                wire.send(LIVE_REQUEST)
            for wire in wires:
                assert wire.read_response().status == 200
        with httpx.Client(base_url=running.url) as running.client:
            assert running.read_metric("fovea_connections_starved_total") >= 1


def test_a_worker_that_is_stopped_gets_no_more_connections_and_is_replaced(pair: Server) -> None:
    def ask_pids(count: int) -> set[int]:
        with ExitStack() as stack:
            wires = [stack.enter_context(Wire(pair.url)) for _ in range(count)]
            for wire in wires:
                wire.send(RUNTIME)
            return {int(wire.read_response().json["pid"]) for wire in wires}

    pair.client.close()
    with Wire(pair.url) as own, Wire(pair.url) as held:
        other, stopped = _answering_pid(own), _answering_pid(held)
        assert _worker_pids(pair) == {other, stopped}
        os.kill(stopped, signal.SIGSTOP)
        metrics = b""
        while b"\nfovea_workers 1.0\n" not in metrics:
            own.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            metrics = own.read_response().body
        assert ask_pids(20) == {other}  # at once, while the stopped one is still there
        assert stopped in _worker_pids(pair)
        wait_until(lambda: stopped not in _worker_pids(pair))
        with pytest.raises((EOFError, ConnectionError)):
            held.read_response()
    wait_until(lambda: len(ask_pids(4)) == 2)
    with httpx.Client(base_url=pair.url) as pair.client:
        assert pair.read_metric("fovea_worker_deaths_total", reason="hung") == 1
        assert pair.read_metric("fovea_workers") == 2
    pair.__exit__(None, None, None)
    assert f"worker {stopped} has sent no message for 2 s, and gets no more connections" in pair.log
    assert f"worker {stopped} has sent no message for 10 s, and is killed" in pair.log
    assert "was killed because it sent no messages; it is replaced" in pair.log


def test_a_worker_that_is_stopped_for_a_moment_goes_on(pair: Server) -> None:
    stopped = next(iter(_worker_pids(pair)))
    os.kill(stopped, signal.SIGSTOP)
    while "gets no more connections" not in _read_log_line(pair):
        pass
    os.kill(stopped, signal.SIGCONT)
    while "sends messages again" not in _read_log_line(pair):
        pass
    pair.wait_for_metric(2, "fovea_workers")
    assert stopped in _worker_pids(pair)


@pytest.mark.slow
def test_a_supervisor_that_was_stopped_blames_no_worker(pair: Server) -> None:
    workers = _worker_pids(pair)
    os.kill(pair.process.pid, signal.SIGSTOP)
    with Wire(pair.url) as wire:  # the kernel takes it
        wire.socket.settimeout(11)
        wire.send(RUNTIME)
        with pytest.raises(TimeoutError):
            wire.read_response()
        os.kill(pair.process.pid, signal.SIGCONT)
        wire.socket.settimeout(30)
        assert wire.read_response().status == 200
    assert _worker_pids(pair) == workers
    pair.__exit__(None, None, None)
    assert "has sent no message" not in pair.log


def test_a_connection_waits_for_a_worker_when_all_have_died(pair: Server) -> None:
    for pid in _worker_pids(pair):
        os.kill(pid, signal.SIGKILL)
    with Wire(pair.url) as wire:
        wire.send(classify_request(make_jpeg()), LIVE_REQUEST)
        assert wire.read_response().status == 200


def test_a_connection_that_a_worker_has_not_taken_goes_to_another(pair: Server) -> None:
    stopped, other = _worker_pids(pair)
    os.kill(stopped, signal.SIGSTOP)
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(pair.url)) for _ in range(4)]
        for wire in wires:
            wire.send(RUNTIME)
        os.kill(stopped, signal.SIGKILL)
        assert {int(wire.read_response().json["pid"]) for wire in wires} & {other}

"""Several workers behind one port: even, replaced when they die, and counted as one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.pictures import jpeg
from tests.raw import CLASSIFY, LIVE, Wire, post
from tests.servers import Server, run_service, until

RUNTIME = b"GET /runtime HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def pair(small_zoo: Path) -> Iterator[Server]:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2") as running:
        yield running


def _pid(wire: Wire) -> int:
    wire.send(RUNTIME)
    return int(wire.answer().json["pid"])


def _workers(running: Server) -> set[int]:
    pid = running.process.pid
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _kill(running: Server, pid: int) -> None:
    """Kill a worker, and wait until another answers in its place."""
    before = _workers(running)
    os.kill(pid, signal.SIGKILL)
    while True:
        with ExitStack() as stack:
            pids = {_pid(stack.enter_context(Wire(running.url))) for _ in range(4)}
        if len(pids - {pid}) == 2 and pids - before:
            return


def _folder(running: Server) -> Path:
    """Where the workers' metrics lie."""
    environment = Path(f"/proc/{next(iter(_workers(running)))}/environ").read_text().split("\0")
    return Path(dict(line.split("=", 1) for line in environment if line)["PROMETHEUS_MULTIPROC_DIR"])


def test_a_connection_goes_to_the_worker_with_the_fewest(pair: Server) -> None:
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(pair.url)) for _ in range(8)]
        pids = [_pid(wire) for wire in wires]
        assert Counter(pids) == dict.fromkeys(_workers(pair), 4)
        for wire, pid in zip(wires, pids, strict=True):
            if pid == pids[0]:
                wire.socket.close()

        def come_where_four_have_left() -> bool:
            time.sleep(0.1)  # for the supervisor to hear of those who left
            with ExitStack() as further:
                return {_pid(further.enter_context(Wire(pair.url))) for _ in range(4)} == {pids[0]}

        until(come_where_four_have_left)


def test_the_processors_are_shared_out(pair: Server, server: Server) -> None:
    alone = server.client.get("/runtime").json()
    shared = pair.client.get("/runtime").json()
    assert (alone["workers"], shared["workers"]) == (1, 2)
    assert shared["threads"]["cpus"] == alone["threads"]["cpus"] / 2


def test_every_request_is_counted_once_whoever_dies(pair: Server) -> None:
    def asked(times: int) -> None:
        for _ in range(times):
            assert httpx.post(f"{pair.url}/v1/classify", content=jpeg()).status_code == 200

    def counts() -> list[float]:
        return [
            pair.metric("fovea_requests_total", route="/v1/classify", status="200"),
            pair.metric("fovea_request_seconds_count", route="/v1/classify"),
            pair.metric("fovea_stage_seconds_bucket", stage="decode", le="+Inf"),
            pair.metric("fovea_images_total"),
        ]

    asked(21)
    assert counts() == [21] * 4
    with Wire(pair.url) as wire:
        for round_ in range(1, 4):
            pid = pair.client.get("/runtime").json()["pid"]
            other = next(iter(_workers(pair) - {pid}))
            _kill(pair, other)
            assert counts() == [21 + 10 * (round_ - 1)] * 4
            asked(10)
            assert counts() == [21 + 10 * round_] * 4
        wire.socket.close()
    assert pair.metric("fovea_requests_in_flight") == 1
    assert pair.metric("fovea_model_info") == 1
    assert pair.metric("process_cpu_seconds_total") > 0
    assert pair.metric("process_resident_memory_bytes") > 50e6


def test_only_the_requests_of_the_dead_are_lost(pair: Server) -> None:
    picture = jpeg()
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(pair.url)) for _ in range(8)]
        pids = [_pid(wire) for wire in wires]
        for wire in wires:
            wire.send(CLASSIFY, b"Content-Length: %d\r\n\r\n" % len(picture), picture[:10])
        while pair.metric("fovea_requests_in_flight") != 9:
            pass
        _kill(pair, pids[0])
        for wire, pid in zip(wires, pids, strict=True):
            if pid == pids[0]:
                with pytest.raises((EOFError, ConnectionError)):
                    wire.send(picture[10:])
                    wire.answer()
            else:
                wire.send(picture[10:])
                assert wire.answer().status == 200
    pair.__exit__(None, None, None)
    assert "was ended by signal 9; another takes its place" in pair.log


def test_files_of_the_dead_do_not_pile_up(pair: Server) -> None:
    folder = _folder(pair)
    for _ in range(3):
        _kill(pair, next(iter(_workers(pair))))
    living = _workers(pair)
    owners = {path.stem.rsplit("_", 1)[1] for path in folder.glob("*.db")}
    assert owners == {"dead", *map(str, living)}
    pair.__exit__(None, None, None)
    assert not folder.exists()


def test_both_stop_in_order(small_zoo: Path) -> None:
    settings = {"FOVEA_WORKERS": "2", "FOVEA_DRAIN_GRACE": "600"}
    with Server(FOVEA_MODELS=str(small_zoo), **settings) as running, ExitStack() as stack:
        wires = [stack.enter_context(Wire(running.url)) for _ in range(4)]
        assert len({_pid(wire) for wire in wires}) == 2
        picture = jpeg()
        for wire in wires:
            wire.send(CLASSIFY, b"Content-Length: %d\r\n\r\n" % len(picture), picture[:10])
        while running.metric("fovea_requests_in_flight") != 5:
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
            assert wire.answer().status == 200
        assert running.process.wait(timeout=20) == 0
    assert "another" not in running.log


def test_a_signal_to_the_whole_group_counts_once(small_zoo: Path) -> None:
    """As a terminal's Ctrl-C and systemd's stop: workers get it too."""
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_WORKERS="2") as running, Wire(running.url) as wire:
        picture = jpeg()
        wire.send(CLASSIFY, b"Content-Length: %d\r\n\r\n" % len(picture), picture[:10])
        while running.metric("fovea_requests_in_flight") != 2:
            pass
        for pid in (*_workers(running), running.process.pid):
            os.kill(pid, signal.SIGINT)
        while httpx.post(f"{running.url}/v1/classify", content=picture).status_code == 200:
            pass
        wire.send(picture[10:])
        assert wire.answer().status == 200
        assert running.process.wait(timeout=20) == 0
    assert "cancelled" not in running.log


def test_workers_do_not_outlive_their_supervisor(pair: Server) -> None:
    workers, folder = _workers(pair), _folder(pair)
    pair.process.kill()
    pair.process.wait()
    for pid in workers:
        while _runs(pid):
            pass
    assert not folder.exists()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


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
    assert ended.stderr == "fovea: a worker ended with exit code 3 at its start\n"


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is in Debian's prometheus package")
def test_promtool_accepts_the_metrics_of_workers(pair: Server) -> None:
    pair.client.post("/v1/classify", content=jpeg())
    text = pair.client.get("/metrics").text
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_the_same_metrics_as_of_one_process(pair: Server, server: Server) -> None:
    def names(running: Server) -> set[str]:
        assert running.client.post("/v1/models/small/classify", content=jpeg()).status_code == 200
        assert running.client.post("/v1/models/small/classify").status_code == 400
        lines = running.client.get("/metrics").text.splitlines()
        return {line.split()[2] for line in lines if line.startswith("# TYPE fovea_")}

    of_later = {  # of workers nothing is told that has no value
        "fovea_drift_psi", "fovea_drift_chance_psi", "fovea_swap_flip_ratio", "fovea_swap_slowdown_ratio",
    }  # fmt: skip
    assert names(pair) == names(server) - of_later


def test_a_connection_waits_for_a_worker_when_all_have_died(pair: Server) -> None:
    for pid in _workers(pair):
        os.kill(pid, signal.SIGKILL)
    with Wire(pair.url) as wire:
        wire.send(post(jpeg()), LIVE)
        assert wire.answer().status == 200


def test_a_connection_that_a_worker_has_not_taken_goes_to_another(pair: Server) -> None:
    stopped, other = _workers(pair)
    os.kill(stopped, signal.SIGSTOP)
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(pair.url)) for _ in range(4)]
        for wire in wires:
            wire.send(RUNTIME)
        os.kill(stopped, signal.SIGKILL)
        assert {int(wire.answer().json["pid"]) for wire in wires} & {other}

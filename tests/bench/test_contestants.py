"""The contestants of the benchmark against real servers."""

from __future__ import annotations

import asyncio
import http.client
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from fovea.bench import peers
from fovea.bench.contestants import FoveaVersion, check_answers, compute_reference, wait_until_ready
from fovea.bench.minimal_server import MinimalProtocol
from fovea.bench.peers import PEERS, Configuration, Peer, install_peer, start_peer
from fovea.bench.processes import (
    find_process_tree,
    pause_tree,
    read_command_line,
    resume_tree,
    start_process,
)
from fovea.bench.workloads import WORKLOADS, BenchError
from tests.servers import wait_until
from tests.tools import SYSTEM_REASON


def test_minimal_server_reads_the_body_and_answers_200_bytes() -> None:
    async def ask() -> list[int]:
        server = await asyncio.get_running_loop().create_server(MinimalProtocol, "127.0.0.1", 0)
        async with server:
            return await asyncio.to_thread(post, server.sockets[0].getsockname()[1])

    def post(port: int) -> list[int]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        sizes = []
        for size in (0, 10, 300_000):
            connection.request("POST", "/classify", b"x" * size)
            sizes.append(len(connection.getresponse().read()))
        connection.close()
        return sizes

    assert asyncio.run(ask()) == [200, 200, 200]


def test_paused_tree_stands_still_and_can_be_ended() -> None:
    script = "import subprocess; subprocess.run(['sleep', '60'])"
    with start_process([sys.executable, "-c", script]) as process:
        # A parent whose child does not run its own program yet cannot be stopped (vfork(2)).
        wait_until(lambda: b"sleep\x0060\0" in map(read_command_line, find_process_tree(process.pid)))
        pids = find_process_tree(process.pid)
        pause_tree(process.pid)
        wait_until(lambda: [read_state(pid) for pid in pids] == ["T", "T"])  # a signal takes a moment
        resume_tree(process.pid)
        wait_until(lambda: "T" not in map(read_state, pids))
        pause_tree(process.pid)
    assert process.returncode == -signal.SIGTERM  # not SIGKILL, which would come after 15 s
    wait_until(lambda: have_ended(pids))  # the child ends a moment later


def have_ended(pids: list[int]) -> bool:
    """Return whether no process runs. Perhaps nobody has asked for its exit status."""
    return {"Z", ""}.issuperset(map(read_state, pids))


def read_state(pid: int) -> str:
    """Return the state of a process as in proc(5), such as T for stopped; empty if there is no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_version_of_fovea_can_have_models_of_its_own() -> None:
    version = FoveaVersion.parse("int8=,FOVEA_MODELS=/models/int8")
    assert version.has_own_models
    assert version.name == "int8"
    assert not FoveaVersion.parse("old=/tree,FOVEA_LOG_REQUESTS=0").has_own_models


def test_configurations_of_a_peer_have_names_of_their_own() -> None:
    for peer in PEERS.values():
        assert len(set(map(str, peer.configurations))) == len(peer.configurations)
        assert set(peer.short_list) <= set(peer.configurations)
    assert str(Configuration(2, 1, "/inference", 4, 1)) == "2 processes, 1 thread, batch 4, wait 1 ms"


@pytest.mark.long
def test_peer_that_cannot_be_installed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "CACHE", tmp_path)
    peer = Peer("nobody", ("nobody @ file:///nowhere",), (), (), ())
    with pytest.raises(BenchError, match=r"^nobody cannot be installed: \S.*$"):
        install_peer(peer)
    assert not (tmp_path / "peers" / "nobody" / "requirements.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_peers_answer_as_the_bare_loop_does(name: str) -> None:
    peer = PEERS[name]
    if not (peer.folder / "requirements.txt").exists():
        pytest.skip(f"{SYSTEM_REASON}has no environment of {name}: `make bench-quick` makes it")
    workload = WORKLOADS["thumbnails"]
    expected_labels = dict(list(compute_reference(workload).items())[:50])
    for configuration in (peer.configurations[0], peer.configurations[-1]):
        with start_peer(peer, configuration, workload) as server:
            wait_until_ready(server, workload)
            pids = find_process_tree(server.process.pid)
            assert check_answers(server, expected_labels, agreement=1.0) == 1.0
        wait_until(partial(have_ended, pids))  # grandchildren may take a moment to die

"""The fork server: its children are the service's own, and nothing is lost or left when it dies."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from fovea.service.runners import child_process, fork_server
from fovea.service.runners.child_process import ChildProcess
from fovea.service.runners.fork_server import ForkServer
from tests.open_files import list_open_files
from tests.pictures import make_jpeg
from tests.servers import (
    ROOT,
    Server,
    is_running,
    is_running_module,
    list_children,
    read_open_files,
    wait_until,
)

FORK_SERVER = "runners.fork_server_process"

_PR_GET_CHILD_SUBREAPER = 37


@pytest.fixture
def starter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    """A fork server for the children of this test alone."""
    starter = ForkServer()
    monkeypatch.setattr(child_process, "_FORK_SERVER", starter)
    yield starter
    starter.close()


def _get_pid(starter: ForkServer) -> int:
    assert starter._process
    return starter._process.pid


def _replace_fork(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let new fork servers run `code` first, which sets `process._fork_orphan`, now `fork_orphan`."""
    code = f"\nimport os\nfork_orphan = process._fork_orphan\n{code}\nprocess.main("
    process_code = fork_server._PROCESS_CODE.replace(
        "process.main(", code.replace("{", "{{").replace("}", "}}")
    )
    monkeypatch.setattr(fork_server, "_PROCESS_CODE", process_code)


def _read_parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_child_belongs_to_the_service(starter: ForkServer) -> None:
    process = ChildProcess("explain.process")
    assert _read_parent(process.pid) == os.getpid()
    assert os.getpgid(process.pid) == process.pid, "Ctrl-C would reach it"
    wait_until(lambda: is_running_module(process.pid, "explain.process"))
    assert not process.has_exited
    assert process.kill_and_wait() == -signal.SIGKILL
    assert process.has_exited


def test_child_inherits_nothing_but_its_descriptors(starter: ForkServer) -> None:
    file = os.memfd_create("shared")
    process = ChildProcess("runners.process", descriptors=(file, file))
    wait_until(
        lambda: len(list(Path(f"/proc/{process.pid}/fd").iterdir())) == 6
    )  # and three standard streams
    assert sum("memfd:shared" in name for name in read_open_files(process.pid).values()) == 2
    streams = [Path(f"/proc/{process.pid}/fd/{number}").readlink() for number in (0, 1)]
    assert streams == [Path(os.devnull)] * 2, "the service's own input and output"
    process.stop()
    assert process.wait_exit() == 0
    os.close(file)


def test_environment_of_the_service_comes_first(starter: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PILLOW_BLOCKS_MAX", "0")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    starter.start()
    environment = Path(f"/proc/{_get_pid(starter)}/environ")
    wait_until(lambda: environment.read_bytes() != b"")  # the file is empty for a moment after `exec`
    variables = environment.read_bytes().split(b"\0")
    assert {b"PILLOW_BLOCKS_MAX=0", b"OPENBLAS_NUM_THREADS=1"} <= set(variables)


def test_quiet_child_writes_no_errors(starter: ForkServer) -> None:
    loud, quiet = (ChildProcess("explain.process", quiet=is_quiet) for is_quiet in (False, True))
    null_device = Path(os.devnull)
    wait_until(lambda: Path(f"/proc/{quiet.pid}/fd/2").readlink() == null_device)
    assert Path(f"/proc/{loud.pid}/fd/2").readlink() != null_device
    for process in (loud, quiet):
        process.stop()


@pytest.mark.long
def test_fork_server_keeps_no_files_of_its_children(starter: ForkServer) -> None:
    counts = []
    for _ in range(3):
        ChildProcess("explain.process").stop()
        counts.append(len(list(Path(f"/proc/{_get_pid(starter)}/fd").iterdir())))
    assert len(set(counts)) == 1


def test_child_starts_where_its_addresses_are_hidden() -> None:
    """A sandbox may show zeros; a write to such an address would end the process."""
    code = (
        "from fovea.service.runners import fork_server_process as process; "
        "process.Path.read_text = lambda path: '1 (python) ' + '0 ' * 50; "
        "process._set_command_line('fovea.service.explain.process 5')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_forks_have_one_thread_and_the_libraries(starter: ForkServer) -> None:
    """A fork of a process with several threads could copy a lock that nobody releases."""
    process = ChildProcess("explain.process")
    pid = _get_pid(starter)
    assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
    for one in (pid, process.pid):
        assert "onnxruntime" in Path(f"/proc/{one}/maps").read_text()
    process.stop()


def test_orphans_are_adopted_only_during_a_fork(starter: ForkServer) -> None:
    ChildProcess("explain.process").stop()
    value = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(value), 0, 0, 0)
    assert value.value == 0


@pytest.mark.long
def test_end_of_the_fork_server_waits_for_a_fork(starter: ForkServer) -> None:
    ChildProcess("explain.process").stop()
    pid = _get_pid(starter)
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        child = pool.submit(ChildProcess, "explain.process")
        wait_until(starter._lock.locked)
        end = pool.submit(starter.close)
        assert not wait([end], timeout=0.2).done
        os.kill(pid, signal.SIGCONT)
        end.result()
        child.result().stop()
    assert not starter._process, "a second fork server was started"


@pytest.mark.long
def test_children_start_where_their_end_is_ignored(starter: ForkServer) -> None:
    """The system then waits for children itself, and nobody gets their exit status."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        process = ChildProcess("explain.process")
        assert not process.has_exited
        process.stop()
        assert process.wait_exit() == 0
        starter.close()
    finally:
        signal.signal(signal.SIGCHLD, handler)


@pytest.mark.long
def test_child_that_has_ended_before_its_start_is_reported(
    starter: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _replace_fork(
        monkeypatch,
        """
def fork_and_end():
    pid, error_number = fork_orphan()
    if not pid:
        os._exit(0)
    while os.path.exists(f"/proc/{pid}"):
        pass
    return pid, error_number
process._fork_orphan = fork_and_end""",
    )
    handler = signal.signal(
        signal.SIGCHLD, signal.SIG_IGN
    )  # else its id stays until the service waits for it
    try:
        process = ChildProcess("explain.process")
        process.stop()
        assert process.wait_exit() == 0
    finally:
        signal.signal(signal.SIGCHLD, handler)


@pytest.mark.long
def test_first_fork_that_is_killed_is_an_error(starter: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "fork = os.fork; os.fork = lambda: fork() or os.kill(os.getpid(), 9)"
    _replace_fork(monkeypatch, code)
    with pytest.raises(OSError, match=os.strerror(errno.EAGAIN)):
        ChildProcess("explain.process")


def test_missing_file_descriptors_are_reported(starter: ForkServer) -> None:
    """The system drops descriptors for which a message has no room."""
    with socket.socket() as one, pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        starter.fork_child(
            "explain.process", [one.fileno()] * (fork_server.MAX_DESCRIPTORS + 1), [], is_quiet=False
        )


# --- death ---------------------------------------------------------------------------------------


def test_dead_fork_server_is_replaced_and_its_children_live(starter: ForkServer) -> None:
    first = ChildProcess("explain.process")
    pid = _get_pid(starter)
    os.kill(pid, signal.SIGKILL)
    second = ChildProcess("explain.process")
    assert _get_pid(starter) != pid
    assert not is_running(pid)
    for process in (first, second):
        assert not process.has_exited
        process.stop()
        assert process.wait_exit() == 0


@pytest.mark.long
def test_silent_fork_server_is_replaced(starter: ForkServer) -> None:
    ChildProcess("explain.process").stop()
    pid = _get_pid(starter)
    starter._socket.settimeout(0.2)
    os.kill(pid, signal.SIGSTOP)
    ChildProcess("explain.process").stop()
    assert not is_running(pid)


def test_fork_server_that_does_not_get_ready_is_an_error(
    starter: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "_REPLY_TIMEOUT", 0.2)
    monkeypatch.setattr(fork_server, "_PROCESS_CODE", "import time; time.sleep(60)")
    with pytest.raises(OSError, match=r"has not answered for 0.2 s, exit status -9"):
        ChildProcess("explain.process")


def test_signals_for_the_service_do_not_end_the_fork_server(starter: ForkServer) -> None:
    """Terminals and systemd send them to all processes; the service ends its children in order."""
    process = ChildProcess("explain.process")
    pid = _get_pid(starter)
    for number in (signal.SIGINT, signal.SIGTERM):
        for one in (pid, process.pid):
            os.kill(one, number)
    process.stop()
    assert process.wait_exit() == 0
    ChildProcess("explain.process").stop()
    assert _get_pid(starter) == pid


@pytest.mark.long
def test_child_of_a_dying_fork_server_is_no_orphan(
    starter: ForkServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The fork server is killed after it has forked, and before the service knows the child."""
    _replace_fork(
        monkeypatch,
        f"""
def fork_and_die():
    outcome = fork_orphan()
    if outcome != (0, 0) and not os.path.exists({str(tmp_path / "once")!r}):
        open({str(tmp_path / "once")!r}, "w").write(str(outcome[0]))
        os.kill(os.getpid(), 9)
    return outcome
process._fork_orphan = fork_and_die""",
    )
    before = list_children(os.getpid())
    process = ChildProcess("explain.process")
    lost_child = int((tmp_path / "once").read_text())
    assert lost_child != process.pid
    assert not Path(f"/proc/{lost_child}").exists()
    assert list_children(os.getpid()) - before == {process.pid, _get_pid(starter)}
    process.stop()


@pytest.mark.long
def test_unfinished_fork_of_a_silent_fork_server_is_waited_for(
    starter: ForkServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The fork server hangs between its two forks. Its memory is free before another one takes its place."""
    _replace_fork(
        monkeypatch,
        f"""
def fork_and_hang():
    if os.path.exists({str(tmp_path / "once")!r}):
        return fork_orphan()
    pid = os.fork()
    if pid:
        open({str(tmp_path / "once")!r}, "w").write(str(pid))
    signal.pause()
process._fork_orphan = fork_and_hang""",
    )
    starter.start()
    starter._receive(fork_server.ForkServerReady)
    starter._is_ready = True
    starter._socket.settimeout(1)
    waited_pids, waitpid = [], os.waitpid

    def record_waitpid(pid: int, options: int) -> tuple[int, int]:
        waited_pid, status = waitpid(pid, options)
        waited_pids.append(waited_pid)
        return waited_pid, status

    monkeypatch.setattr(os, "waitpid", record_waitpid)
    ChildProcess("explain.process").stop()
    assert int((tmp_path / "once").read_text()) in waited_pids


@pytest.mark.long
def test_wait_for_a_child_that_cannot_be_killed_has_a_limit(
    starter: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that waits for an unresponsive disk ends with the disk; here the signal does not reach it."""
    monkeypatch.setattr(fork_server, "_EXIT_TIMEOUT", 0.5)
    starter.start()
    pid = _get_pid(starter)
    with subprocess.Popen(["sleep", "60"], process_group=pid) as child:
        try:
            with monkeypatch.context() as context:
                context.setattr(os, "killpg", os.kill)
                starter.close()
            assert not is_running(pid)
            assert child.poll() is None
        finally:
            child.kill()


@pytest.mark.long
def test_wait_for_a_fork_server_that_cannot_be_killed_has_a_limit(
    starter: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "_EXIT_TIMEOUT", 0.2)
    starter.start()
    process = starter._process
    assert process
    os.kill(process.pid, signal.SIGSTOP)
    with monkeypatch.context() as context:
        context.setattr(os, "killpg", lambda *_: None)
        starter.close()
    assert process.returncode is None
    process.kill()
    process.wait()


def test_fork_server_that_cannot_start_is_an_error(
    starter: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "_PROCESS_CODE", "raise SystemExit(3)")
    with pytest.raises(OSError, match="the fork server has died, exit status 3"):
        ChildProcess("explain.process")


@pytest.mark.long
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("kind(number + 1, *values)", "answered request 3 instead of 2"),
        ("type('Damaged', (), {'to_bytes': lambda self: b'damaged'})()", "sent an incomplete message"),
    ],
)
def test_wrong_reply_counts_as_a_lost_fork_server(
    starter: ForkServer, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    _replace_fork(monkeypatch, f"process.ForkReply = lambda number, *values, kind=process.ForkReply: {code}")
    children = list_children(os.getpid())
    with pytest.raises(OSError, match=message):
        ChildProcess("explain.process")
    assert list_children(os.getpid()) <= children  # those of other tests may just be ending


def test_failed_start_leaves_no_socket(starter: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list_open_files()
    with monkeypatch.context() as context:
        context.setattr(sys, "executable", "/nowhere")
        with pytest.raises(FileNotFoundError):
            starter.start()
    assert list_open_files() <= before


@pytest.mark.long
def test_stopped_fork_server_ends_with_its_process() -> None:
    """It would not see that its socket is closed."""
    code = (
        "import os, signal; from fovea.service.runners.fork_server import ForkServer; "
        "starter = ForkServer(); starter.start(); pid = starter._process.pid; "
        "os.kill(pid, signal.SIGSTOP); print(pid)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wait_until(lambda: not is_running(int(result.stdout)))


def test_closed_fork_server_leaves_nothing_behind() -> None:
    before = list_open_files()
    starter = ForkServer()
    starter.start()
    starter.close()
    reference = weakref.ref(starter)
    del starter
    assert reference() is None
    assert list_open_files() <= before


def test_fork_server_without_file_descriptors_reports_it(starter: ForkServer) -> None:
    ChildProcess("explain.process").stop()
    pid = _get_pid(starter)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        ChildProcess("explain.process")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    ChildProcess("explain.process").stop()
    assert _get_pid(starter) == pid


@pytest.mark.long
def test_closed_fork_server_starts_again(starter: ForkServer) -> None:
    starter.start()
    pid = _get_pid(starter)
    starter.close()
    assert not is_running(pid)
    first, second = socket.socketpair()
    with first, second:
        child = starter.fork_child("explain.process", [second.fileno()], [], is_quiet=False)
        second.close()
        first.close()
        os.waitpid(child, 0)


@pytest.mark.long
def test_service_survives_its_fork_server(small_zoo: Path) -> None:
    with Server(FOVEA_MODELS=str(small_zoo), FOVEA_RUNNERS="2", FOVEA_RUNNER_WAIT="60") as server:
        (pid,) = server.child_pids(FORK_SERVER)
        os.kill(pid, signal.SIGKILL)
        runners = server.runner_pids
        assert server.client.post("/v1/classify", content=make_jpeg()).status_code == 200
        assert server.runner_pids == runners
        for runner in runners:
            os.kill(runner, signal.SIGKILL)
        # An image that both of them had would be given up.
        server.wait_for_metric(2, "fovea_runner_deaths_total")
        assert server.client.post("/v1/classify", content=make_jpeg()).status_code == 200
        server.wait_for_metric(2, "fovea_runners")
        assert not server.runner_pids & runners
        remaining = [*server.runner_pids, *server.child_pids(FORK_SERVER)]
        assert len(remaining) == 3
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not any(map(is_running, remaining)))


@pytest.mark.long
def test_idle_children_map_no_code_that_they_used_once(starter: ForkServer) -> None:
    """Imports alone touch 9 MB of ONNX Runtime's code."""
    process = ChildProcess("explain.process")
    assert _read_resident_code(_get_pid(starter), "onnxruntime_pybind11_state") < 1 << 20
    process.stop()


def _read_resident_code(pid: int, name: str) -> int:
    """Return the resident bytes of the mapped code of a library."""
    is_code, size = False, 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            is_code = values[0] == "r-xp" and name in line
        elif is_code and key == "Rss:":
            size += int(values[0]) << 10
    return size

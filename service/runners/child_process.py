"""Child processes of the service: runners, shadow tests, and explaining processes."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from fovea.service.errors import StartError
from fovea.service.runners.fork_server import ForkServer
from fovea.service.runners.frames import MAX_REPLY_BYTES, FrameError, receive_frame, set_time_limit
from fovea.service.runners.messages import Failure, NumberedMessage

Reply = TypeVar("Reply", bound=NumberedMessage)

LOAD_TIMEOUT_FACTOR: Final = 10
"""Time limit of a load or a trial, as a multiple of its limit of processor time: other processes run too."""

_EXIT_SECONDS: Final = 5.0
"""Seconds that a process has to exit after its socket is closed, or after SIGKILL."""

_POLL_SECONDS: Final = 0.005
"""Seconds between two checks whether a process has ended. A file descriptor of the process could be awaited
instead, but there may be none left."""

_FORK_SERVER: Final = ForkServer()
"""The process from which the children of this process are forked. It does not run before it is needed."""


def start_fork_server() -> None:
    """Start the fork server, so that its imports run in parallel to those of this process.

    Its environment is that of this process, which must be complete (`memory_plan.fit_to_memory`). Without
    this call it starts with the first child. Raises `StartError` when the system has no files, memory or
    processes left.
    """
    try:
        _FORK_SERVER.start()
    except OSError as error:
        raise StartError(f"the fork server cannot be started: {error.strerror}") from None


def stop_fork_server() -> None:
    """End the fork server in a process that needs no children for now. The next child starts another one."""
    _FORK_SERVER.close()


class ChildProcess:
    """A child process, and the service's end of the socket pair between them.

    The child ends when the service closes its end. Only one thread at a time may use the socket: `send` and
    `receive_reply` in a thread that may wait, or a `FrameStream` on the event loop. `kill`, `wait_exit` and
    `kill_and_wait` may be called from any thread. The owner decides whether another process takes the place
    of a dead one.
    """

    def __init__(
        self, module: str, *arguments: int, descriptors: Sequence[int] = (), quiet: bool = False
    ) -> None:
        """Run `main(socket descriptor, *descriptors, *arguments)` of a module of `fovea.service`.

        The process inherits its end of the socket pair and `descriptors`, perhaps under other numbers, and
        nothing else. With `quiet`, its standard error is discarded: native libraries may write when they
        crash. The call takes some milliseconds, or up to a second if the fork server has died. Raises
        `OSError` when the system has no files, memory or processes left.
        """
        self.socket, child_socket = socket.socketpair()
        try:
            # `with` closes the child's end in this process: otherwise the stream would not end when the child
            # dies.
            with child_socket:
                self.pid = _FORK_SERVER.fork_child(
                    module, (child_socket.fileno(), *descriptors), arguments, is_quiet=quiet
                )
        except BaseException:
            self.socket.close()
            raise
        self._exit_status: int | None = None
        # Guards the moment at which the process id may get a new owner.
        self._exit_lock = threading.Lock()

    @property
    def has_exited(self) -> bool:
        """True if the process has ended."""
        with self._exit_lock:
            return self._read_exit_status() is not None

    def _read_exit_status(self) -> int | None:
        """Return the exit status; None while the process runs. The caller holds `_exit_lock`."""
        if self._exit_status is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # the system waits for children where SIGCHLD is ignored
                pid, status = self.pid, 0
            if pid:
                self._exit_status = os.waitstatus_to_exitcode(status)
        return self._exit_status

    def send(self, pieces: Iterable[memoryview], deadline: float) -> None:
        """Block until a message is written. A dead process is no error: `receive_reply` finds the end.

        `deadline` is a time on the monotonic clock, in seconds. Raises `TimeoutError` when it has passed.
        """
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                set_time_limit(self.socket, deadline)
                self.socket.sendall(piece)

    def receive_reply(self, number: int, kind: type[Reply], deadline: float) -> Reply | Failure | None:
        """Block until the reply to a request has arrived; return None if the process has died.

        Raises `TimeoutError` when `deadline` has passed, and `FrameError` if another message arrives. The
        process must then be killed.
        """
        try:
            frame = receive_frame(self.socket, max_bytes=MAX_REPLY_BYTES, deadline=deadline)
        except TimeoutError:
            raise
        except OSError:  # reset, or closed by `kill_and_wait`
            frame = None
        if frame is None:
            return None
        reply: Reply | Failure = (Failure if frame.kind == Failure.__name__ else kind).from_frame(frame)
        if reply.number != number:
            raise FrameError(f"answered request {reply.number} instead of {number}")
        return reply

    def kill(self) -> None:
        """Kill the process without waiting for its end."""
        with self._exit_lock:
            if self._read_exit_status() is None:
                os.kill(self.pid, signal.SIGKILL)

    def wait_exit(self) -> int | None:
        """Wait for the end of the process, and return its exit status; None after `_EXIT_SECONDS` seconds.

        A process that waits for an unresponsive disk cannot be killed, so the wait has a limit.
        """
        deadline = time.monotonic() + _EXIT_SECONDS
        while not self.has_exited and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return self._exit_status

    def kill_and_wait(self) -> int | None:
        """Kill the process, close the socket, and return what `wait_exit` returns."""
        self.kill()
        # Another thread may wait in `receive_reply`. `shutdown` wakes it; `close` alone would not.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        return self.wait_exit()

    def stop(self) -> None:
        """Close the socket and wait for the process. Kill the process when it takes too long."""
        self.socket.close()
        if self.wait_exit() is None:
            self.kill_and_wait()


def prepare_child(
    niceness: int,
    *,
    is_expendable: bool = False,
    memory_bytes: int | None = None,
    cpu_seconds: int | None = None,
) -> None:
    """Prepare this process, a child of the service, before it reads anything.

    `niceness` is relative to the service. The kernel's out-of-memory killer selects an expendable process
    first. The kernel enforces the limits of memory and processor time from now on.
    """
    os.nice(niceness)
    if is_expendable:
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    if cpu_seconds is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

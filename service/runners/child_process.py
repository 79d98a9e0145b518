"""Child processes of the service: runners, shadow tests, and explaining processes."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from fovea.service.runners.frames import MAX_REPLY_BYTES, FrameError, receive_frame, set_time_limit
from fovea.service.runners.messages import Failure, NumberedMessage

Reply = TypeVar("Reply", bound=NumberedMessage)

ENVIRONMENT: Final = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "4194304",
    "MALLOC_TRIM_THRESHOLD_": "4194304",
    "PILLOW_BLOCKS_MAX": "4",
}
"""Environment variables of a new process, unless the service's own environment sets them.

By default glibc raises its thresholds with every large image and keeps blocks of up to 32 MB (mallopt(3)), so
memory would grow with the largest image. Instead, Pillow keeps four of its blocks of at most 16 MB: otherwise
the system's work on fresh pages takes an eighth of the decoding time of a phone's photograph.
"""

LOAD_TIMEOUT_FACTOR: Final = 10
"""Time limit of a load or a trial, as a multiple of its limit of processor time: other processes run too."""

_EXIT_SECONDS: Final = 5.0
"""Seconds that a process has to exit after its socket is closed, or after SIGKILL."""

_PROCESS_CODE: Final = (
    "import signal, sys; sys.path[:] = {path!r}; "
    "[signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)]; "
    "import fovea.service.{module} as process; process.main{arguments}"
)
"""Code for the new interpreter. It uses the same module path as this process.

SIGINT and SIGTERM may reach all processes of a container. The service ends its children itself, by closing
the sockets.
"""


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

        The process inherits its end of the socket pair and `descriptors` under the same numbers, and nothing
        else. With `quiet`, its standard error is discarded: native libraries may write when they crash.
        Raises `OSError` when the system has no files, memory or processes left.
        """
        self.socket, child_socket = socket.socketpair()
        descriptors = (child_socket.fileno(), *descriptors)
        code = _PROCESS_CODE.format(path=sys.path, module=module, arguments=(*descriptors, *arguments))
        try:
            # `with` closes the child's end in this process: otherwise the stream would not end when the child
            # dies.
            with child_socket:
                self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and code
                    [sys.executable, "-c", code],
                    pass_fds=descriptors,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL if quiet else None,
                    process_group=0,  # Ctrl-C in a terminal then reaches only the service
                    env={**ENVIRONMENT, **os.environ},
                )
        except BaseException:
            self.socket.close()
            raise
        self.pid = self._process.pid

    @property
    def has_exited(self) -> bool:
        """True if the process has ended."""
        return self._process.poll() is not None

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
        self._process.kill()

    def wait_exit(self) -> int | None:
        """Wait for the end of the process, and return its exit status; None after `_EXIT_SECONDS` seconds.

        A process that waits for an unresponsive disk cannot be killed, so the wait has a limit.
        """
        try:
            return self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return None

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

"""The handle of a runner process in the service: its start, its socket and its end."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from typing import Final

from fovea.service.errors import Interrupted, ModelError
from fovea.service.runners import spawn
from fovea.service.runners.frames import receive_message
from fovea.service.runners.load_messages import Failure, Setup, SetupReply

_EXIT_SECONDS: Final = 5.0
"""Seconds that a runner has to exit after its socket is closed."""


class RunnerProcess:
    """A runner process and its socket. The process loads the models in `setup` at once.

    Only one thread at a time may read the socket. `wait_ready` reads it first; then the socket belongs to a
    `RunnerConnection` on the event loop. `send_sigkill` and `kill_and_wait` may be called from any thread.
    """

    def __init__(self, setup: Setup, lock_descriptor: int, bodies_descriptor: int, *, timeout: float) -> None:
        """Start the process, which must be ready within `timeout` seconds.

        `lock_descriptor` and `bodies_descriptor` are the descriptors of files that all runners share.

        Raises `ModelError` when the system has no files, memory or processes left.
        """
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        try:
            self.socket, child_socket = socket.socketpair()
            with child_socket:
                # The child inherits its end. `with` closes the copy in this process: otherwise the stream
                # would not end when the child dies.
                self._process = spawn.start_process(
                    "runners.process", [child_socket.fileno(), lock_descriptor, bodies_descriptor]
                )
        except OSError as error:
            raise ModelError(f"a runner cannot be started: {error.strerror}") from None
        self.is_multi_threaded = any(load.plan.wide_threads > load.plan.threads for load in setup.models)
        self.pid = self._process.pid
        self.socket.settimeout(timeout)
        # Before the process can read: the socket buffer holds the message, so this rarely waits.
        with contextlib.suppress(OSError):  # dead or hanging: `wait_ready` reports it
            self.socket.sendall(setup.to_bytes())

    def wait_ready(self) -> SetupReply:
        """Block until the process has loaded its models. Call this once, in a thread that may wait.

        Raises `ModelError` when a model cannot be loaded. Raises `Interrupted` when the process dies or
        exceeds the time limit; the process is killed then.
        """
        try:
            self.socket.settimeout(max(0.001, self._deadline - time.monotonic()))
            frame = receive_message(self.socket)
        except TimeoutError:
            self.send_sigkill()
            raise Interrupted(
                f"runner {self.pid} has not loaded its models within {self._timeout:g} s (10 times "
                "FOVEA_TRIAL_SECONDS, once more for each further model, and the time to start); it is killed"
            ) from None
        except OSError:
            frame = None
        if frame is None:
            status = self._wait_exit()
            raise Interrupted(f"a runner died while it loaded the models, exit status {status}")
        reply = SetupReply.from_frame(frame)
        if isinstance(reply, Failure):
            raise reply.to_exception()
        return reply

    def stop(self) -> None:
        """Close the socket and wait for the process. Kill the process when it takes too long."""
        self.socket.close()
        try:
            self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._wait_exit()

    def kill_and_wait(self) -> int | None:
        """Kill the process and wait for it.

        Return its exit status; None when it does not end within `_EXIT_SECONDS` seconds.
        """
        self.send_sigkill()
        # Another thread may wait in `wait_ready`. `shutdown` wakes it; `close` alone would not.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        return self._wait_exit()

    def _wait_exit(self) -> int | None:
        """Return the exit status; None after `_EXIT_SECONDS` seconds.

        A process that waits for an unresponsive disk cannot be killed, so the wait has a limit.
        """
        try:
            return self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def send_sigkill(self) -> None:
        """Kill the process without waiting for its end."""
        self._process.kill()

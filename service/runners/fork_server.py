"""The service's side of the fork server, a process from which all children of the service are forked.

The fork server has imported the libraries that the children need (`service.runners.fork_server_process`). Its
children share the memory of these libraries, and start without importing them again.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from fovea.service.runners.frames import FrameDecoder, FrameError
from fovea.service.runners.messages import Message, NumberedMessage

_Received = TypeVar("_Received", bound=Message)

ENVIRONMENT: Final = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "4194304",
    "MALLOC_TRIM_THRESHOLD_": "4194304",
    "PILLOW_BLOCKS_MAX": "4",
}
"""Environment variables of the fork server and its children, unless the service's own environment sets them.

By default glibc raises its thresholds with every large image and keeps blocks of up to 32 MB (mallopt(3)), so
memory would grow with the largest image. Instead, Pillow keeps four of its blocks of at most 16 MB: otherwise
the system's work on fresh pages takes an eighth of the decoding time of a phone's photograph.
"""

MAX_DESCRIPTORS: Final = 8
"""Maximum number of file descriptors in one request."""

MAX_PACKET_BYTES: Final = 4096
"""Size limit of a request or reply, in bytes."""

_REPLY_TIMEOUT: Final = 60.0
"""Time limit in seconds for the start of the fork server, and for each reply.

A start takes about 0.5 s of processor time and a fork some milliseconds, but other processes may run too.
"""

_EXIT_TIMEOUT: Final = 5.0
"""Time limit in seconds for the end of the fork server, and of children that it has not reported, after
SIGKILL."""

_POLL_SECONDS: Final = 0.005
"""Seconds between two checks whether such a child has ended."""

_PROCESS_CODE: Final = (
    "import signal, sys; sys.path[:] = {path!r}; "
    "[signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)]; "
    "import fovea.service.runners.fork_server_process as process; process.main({descriptor})"
)
"""Code for the new interpreter. It uses the same module path as this process.

SIGINT and SIGTERM may reach all processes of a container. The service ends its children itself, by closing
the sockets.
"""

_PR_SET_CHILD_SUBREAPER: Final = 36
"""Option number of prctl(2)."""


@dataclass(frozen=True)
class ForkServerReady(Message):
    """First message of the fork server: it has imported the libraries."""


@dataclass(frozen=True)
class ForkRequest(NumberedMessage):
    """Request for a child that runs `main` of a module of `fovea.service`; its descriptors come with it."""

    module: str
    arguments: Sequence[int]
    descriptor_count: int
    is_quiet: bool
    """True to discard the child's standard error."""


@dataclass(frozen=True)
class ForkReply(NumberedMessage):
    """Reply to a `ForkRequest`: the child runs and is a child of the service, or it could not be started."""

    pid: int
    """Process id of the child; 0 if it could not be started."""
    error_number: int
    """Error number of the system (errno) if the child could not be started; else 0."""


class _ForkServerLost(Exception):
    """The fork server has ended, is silent, or breaks the protocol. The text says which."""


class ForkServer:
    """The fork server of this process, which is started when it is needed, and again when it has died.

    The fork server ends when this process ends, because its socket is closed then. Any thread may call the
    methods.
    """

    def __init__(self) -> None:
        """Have no process yet."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False
        self._last_number = 0

    def start(self) -> None:
        """Start the process, unless it was started before. It then imports its libraries in parallel.

        Raises `OSError` when the system has no files, memory or processes left.
        """
        with self._lock:
            self._start()

    def fork_child(
        self, module: str, descriptors: Sequence[int], arguments: Sequence[int], *, is_quiet: bool
    ) -> int:
        """Start a child of this process that runs `main` of a module, and return its process id.

        The arguments of `main` are the numbers that `descriptors` have in the child, and then `arguments`.
        The caller must wait for the end of the child, as for any child process.

        The call takes some milliseconds, or up to a second if the fork server must be started. Raises
        `OSError` when the child cannot be started.
        """
        with self._lock:
            for is_second_attempt in (False, True):
                self._last_number += 1
                request = ForkRequest(self._last_number, module, arguments, len(descriptors), is_quiet)
                try:
                    reply = self._send_request(request, descriptors)
                    break
                except _ForkServerLost as error:
                    status = self._end_process()
                    if is_second_attempt:
                        message = f"the fork server {error}, exit status {status}"
                        raise OSError(errno.ECHILD, message) from None
            if reply.error_number:
                raise OSError(reply.error_number, os.strerror(reply.error_number))
            # Until now the child was in the group of the fork server, which `_end_process` kills as a whole.
            with contextlib.suppress(OSError):  # it has ended already
                os.setpgid(reply.pid, reply.pid)
            return reply.pid

    def close(self) -> None:
        """End the process. Its children are not affected, and the next child starts another fork server."""
        with self._lock:
            self._end_process()

    def _start(self) -> None:
        if self._process:
            return
        self._socket, process_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_REPLY_TIMEOUT)
        code = _PROCESS_CODE.format(path=sys.path, descriptor=process_socket.fileno())
        try:
            # `with` closes the other end in this process: otherwise the stream would not end when the fork
            # server dies.
            with process_socket:
                self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and code
                    [sys.executable, "-c", code],
                    pass_fds=[process_socket.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    process_group=0,  # Ctrl-C in a terminal then reaches only the service
                    env={**ENVIRONMENT, **os.environ},
                )
        except BaseException:
            self._socket.close()
            raise
        atexit.register(self.close)

    def _send_request(self, request: ForkRequest, descriptors: Sequence[int]) -> ForkReply:
        """Send a request, and return the reply. Raises `_ForkServerLost`, and `OSError` as `start` does."""
        self._start()
        if not self._is_ready:
            self._receive(ForkServerReady)
            self._is_ready = True
        with _adopt_orphans():
            try:
                socket.send_fds(self._socket, [request.to_bytes()], descriptors)
            except OSError as error:
                raise _ForkServerLost(f"takes no request ({error.strerror})") from None
            reply = self._receive(ForkReply)
        if reply.number != request.number:
            raise _ForkServerLost(f"answered request {reply.number} instead of {request.number}")
        return reply

    def _receive(self, kind: type[_Received]) -> _Received:
        """Return the next message. Raises `_ForkServerLost`."""
        try:
            packet = self._socket.recv(MAX_PACKET_BYTES)
        except TimeoutError:
            raise _ForkServerLost(f"has not answered for {_REPLY_TIMEOUT:g} s") from None
        except OSError as error:
            raise _ForkServerLost(f"gives no answer ({error.strerror})") from None
        if not packet:
            raise _ForkServerLost("has died")
        try:
            return decode_packet(packet, kind)
        except FrameError as error:
            raise _ForkServerLost(str(error)) from None

    def _end_process(self) -> int | None:
        """Kill the process, and children that it has not reported.

        Return its exit status; None if there was no process, or if it cannot be killed.
        """
        process, self._process = self._process, None
        self._is_ready = False
        if process is None:
            return None
        atexit.unregister(self.close)
        self._socket.close()
        with _adopt_orphans():
            # The group exists as long as nobody has waited for its first process.
            with contextlib.suppress(ProcessLookupError):  # where SIGCHLD is ignored, nobody need wait for it
                os.killpg(process.pid, signal.SIGKILL)
            deadline = time.monotonic() + _EXIT_TIMEOUT
            try:
                status = process.wait(_EXIT_TIMEOUT)
            except subprocess.TimeoutExpired:  # it waits for an unresponsive disk
                return None
            with contextlib.suppress(ChildProcessError):  # raised when no child in the group is left
                while time.monotonic() < deadline:
                    pid, _ = os.waitpid(-process.pid, os.WNOHANG)
                    if not pid:
                        time.sleep(_POLL_SECONDS)
        return status


def decode_packet(packet: bytes, kind: type[_Received]) -> _Received:
    """Return the message in a packet. Raises `FrameError`."""
    for frame in FrameDecoder(MAX_PACKET_BYTES).feed(packet):
        return kind.from_frame(frame)
    raise FrameError("sent an incomplete message")


@contextlib.contextmanager
def _adopt_orphans() -> Iterator[None]:
    """Make this process the parent of descendants whose parent ends inside the block (prctl(2)).

    Raises `OSError` when the system does not allow it.
    """
    _set_subreaper(True)
    try:
        yield
    finally:
        _set_subreaper(False)


def _set_subreaper(value: bool) -> None:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_CHILD_SUBREAPER, *map(ctypes.c_ulong, (value, 0, 0, 0))):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

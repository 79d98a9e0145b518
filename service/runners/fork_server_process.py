"""The fork server: a process that has imported what runners need, and forks the children of the service.

The process has one thread, so that a fork copies a consistent state: it opens no ONNX Runtime session, which
would start threads, and never initializes a GPU. Children share its memory until they change it. They also
share its address layout and the seeds of its hashes; all of them run the same code for the same service.

A child is not a child of this process but of the service, which waits for it and gets its exit status: the
fork server forks twice, and the service adopts the second process when the first ends
(`fork_server._adopt_orphans`). So the end of the fork server concerns none of the children.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import os
import signal
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fovea.service import allocator
from fovea.service.runners import process as _preloaded  # noqa: F401 - the import that children share
from fovea.service.runners.fork_server import (
    MAX_DESCRIPTORS,
    MAX_PACKET_BYTES,
    ForkReply,
    ForkRequest,
    ForkServerReady,
    decode_packet,
)

_OUTCOME: Final = struct.Struct("<ii")
"""Outcome of a fork in the pipe of `_fork_orphan`: the process id, and the error number or 0."""

_COMMAND_FIELDS: Final = slice(45, 47)
"""Start and end of the command line in memory, in the fields of proc_pid_stat(5) behind the name."""


def main(descriptor: int) -> None:
    """Answer requests from the socket with this file descriptor until the service closes its end.

    `service.runners.fork_server` calls this in the new process, which never returns from the call. Each child
    returns from it when its own work is done, and then ends as any interpreter does.
    """
    # A service that was started with this signal ignored passes that on; `_fork_twice` waits for a process.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    service = socket.socket(fileno=descriptor)
    child = None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the service has ended
        child = _serve_requests(service)
    if child is None:
        os._exit(0)
    service.close()
    _run_child(*child)


def _serve_requests(service: socket.socket) -> tuple[ForkRequest, Sequence[int]] | None:
    """Fork children until the service closes its end of the socket, and return None.

    In a child, return its request and its descriptors.
    """
    # Before the first fork: a collection in a child would otherwise write to, and so copy, all shared pages.
    gc.collect()
    gc.freeze()
    allocator.trim_heap()
    allocator.release_code_pages()
    service.sendall(ForkServerReady().to_bytes())
    while True:
        packet, descriptors, _, _ = socket.recv_fds(service, MAX_PACKET_BYTES, MAX_DESCRIPTORS)
        if not packet:
            return None
        request = decode_packet(packet, ForkRequest)
        if len(descriptors) < request.descriptor_count:  # this process has no file descriptors left
            reply = ForkReply(request.number, 0, errno.EMFILE)
        else:
            pid, error_number = _fork_orphan()
            if not pid and not error_number:
                return request, descriptors
            reply = ForkReply(request.number, pid, error_number)
        for one in descriptors:
            os.close(one)
        service.sendall(reply.to_bytes())


def _fork_orphan() -> tuple[int, int]:
    """Fork a process whose parent ends at once.

    Return its process id and 0, or 0 and an error number of the system; (0, 0) in the new process.
    """
    try:
        read_end, write_end = os.pipe()
        try:
            return _fork_twice(read_end, write_end)
        finally:
            os.close(read_end)
            os.close(write_end)
    except OSError as error:
        return 0, error.errno or errno.EAGAIN


def _fork_twice(read_end: int, write_end: int) -> tuple[int, int]:
    """Return what `_fork_orphan` returns. Raises `OSError` when the first fork fails."""
    parent = os.fork()
    if parent:
        # The system gives the orphan to the service before this wait ends.
        os.waitpid(parent, 0)
        os.set_blocking(read_end, False)  # a parent that was killed has written nothing
        pid, error_number = _OUTCOME.unpack(os.read(read_end, _OUTCOME.size))
        return pid, error_number
    error_number = 0
    try:
        pid = os.fork()
    except OSError as error:
        pid, error_number = 0, error.errno or errno.EAGAIN
    if not pid and not error_number:
        return 0, 0
    try:
        os.write(write_end, _OUTCOME.pack(pid, error_number))
    finally:  # this process must never return from here: it would be another fork server
        os._exit(0)


def _run_child(request: ForkRequest, descriptors: Sequence[int]) -> None:
    """Run the module of a request in this process, which was forked for it."""
    if request.is_quiet:
        null_device = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null_device, 2)
        os.close(null_device)
    _set_command_line(f"fovea.service.{request.module} {' '.join(map(str, request.arguments))}")
    module = importlib.import_module(f"fovea.service.{request.module}")
    module.main(*descriptors, *request.arguments)


def _set_command_line(text: str) -> None:
    """Let ps(1) and /proc show `text` as the command line of this process."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    start, end = map(int, fields[_COMMAND_FIELDS])
    if not 0 < start < end:  # a sandbox may hide the addresses
        return
    content = text.encode()[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, content, len(content))

"""A test in the place of a child process."""

from __future__ import annotations

import os
import signal
import socket

from fovea.service.runners.child_process import ChildProcess


def replace_peer(process: ChildProcess) -> socket.socket:
    """Replace the child's end of the stream by a socket that the test has. The child itself stands still."""
    os.kill(process.pid, signal.SIGSTOP)
    process.socket.close()
    process.socket, peer = socket.socketpair()
    peer.settimeout(60)
    return peer

"""The listening socket and its limit on open connections."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import time
from collections.abc import Callable
from typing import Final, Protocol

from fovea.service.errors import StartError

log = logging.getLogger(__name__)

OnConnection = Callable[[socket.socket], None]
"""Callback that takes over an accepted connection. It runs on the event loop and must not raise."""

_BACKLOG: Final = 2048
"""Length of the kernel's queue of connections to accept. The kernel caps it at `net.core.somaxconn`."""

_MAX_ACCEPTS: Final = 64
"""Maximum number of connections accepted in one iteration of the event loop."""

_RETRY_DELAY: Final = 1.0
"""Time in seconds until the next attempt if the system has no room and no connection is closed before."""

_LOG_INTERVAL: Final = 60.0
"""Minimum time in seconds between two log lines about the lack of room."""

_RESERVED_FILES: Final = 64
"""Number of file descriptors reserved for other uses after the start: models, pipes, the event loop."""


class ConnectionSource(Protocol):
    """Interface of a source of connections: a listening socket, or a supervisor."""

    def start(self, on_connection: OnConnection) -> None:
        """Pass every new connection to `on_connection` from now on. Raises `StartError`."""

    def report_closed(self, count: int = 1) -> None:
        """Report that `count` connections have been closed."""

    async def stop(self) -> None:
        """Pass on the connections that have already arrived, and accept no more."""


class Listener:
    """A bound socket that passes on accepted connections, with at most `max_connections` open at a time.

    When the limit is reached, or the system has no room (`ulimit -n`), further connections wait in the
    kernel's backlog until a connection is closed.
    """

    def __init__(
        self, bound_socket: socket.socket, max_connections: int, on_starved: Callable[[], None]
    ) -> None:
        """Set the socket, the limit, and a callback for a lack of room.

        `on_starved` is called on the event loop when a connection must wait because the system has no room.
        """
        self._socket = bound_socket
        self._max_connections = max_connections
        self._on_starved = on_starved
        self._open_count = 0
        self._is_paused = True
        self._is_disabled = False
        self._next_log_time = 0.0
        self._retry_timer: asyncio.TimerHandle | None = None

    def start(self, on_connection: OnConnection) -> None:
        """Listen and pass every connection to `on_connection`, on the event loop. Raises `StartError`."""
        self._on_connection = on_connection
        self._loop = asyncio.get_running_loop()
        self._socket.setblocking(False)
        try:
            self._socket.listen(_BACKLOG)
        except OSError as error:  # another process began to listen after both had bound the address
            raise StartError(f"cannot listen: {error.strerror}") from None
        self._resume()

    def report_closed(self, count: int = 1) -> None:
        """Report that `count` connections have been closed."""
        self._open_count -= count
        self._resume()

    def accept_waiting(self) -> None:
        """Accept waiting connections at once, because a file descriptor has become free."""
        self._resume()

    def disable(self) -> None:
        """Stop accepting until `enable`, because nobody can take a connection."""
        self._is_disabled = True
        self._pause()

    def enable(self) -> None:
        """Accept connections again after `disable`."""
        self._is_disabled = False
        self._resume()

    async def stop(self) -> None:
        """Close the listener. This method is asynchronous because other sources need time to stop."""
        self.close()

    def close(self) -> None:
        """Accept the connections that have already arrived, up to the limit, then close the socket.

        The kernel resets the connections that are left in the backlog.
        """
        self._pause()
        while self._open_count < self._max_connections and self._accept_connection():
            pass
        # A failed accept has set a retry timer: cancel the timer before the socket is closed.
        self._pause()
        self._socket.close()

    def _resume(self) -> None:
        if (
            self._is_paused
            and self._open_count < self._max_connections
            and not self._is_disabled
            and self._socket.fileno() >= 0
        ):
            self._is_paused = False
            self._loop.add_reader(self._socket, self._accept_burst)

    def _pause(self) -> None:
        if self._retry_timer:
            self._retry_timer.cancel()
        if not self._is_paused:
            self._is_paused = True
            self._loop.remove_reader(self._socket)

    def _accept_burst(self) -> None:
        for _ in range(_MAX_ACCEPTS):
            if self._open_count >= self._max_connections or self._is_disabled:
                self._pause()
                return
            if not self._accept_connection():
                return

    def _accept_connection(self) -> bool:
        """Accept a connection and return whether there was one. Pause if the system has no room for it."""
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False
        except OSError as error:
            if time.monotonic() > self._next_log_time:
                self._next_log_time = time.monotonic() + _LOG_INTERVAL
                log.error("cannot accept connections: %s (%d are open)", error.strerror, self._open_count)
            self._pause()
            self._retry_timer = self._loop.call_later(_RETRY_DELAY, self._resume)
            self._on_starved()
            return False
        self._open_count += 1
        # From here on the callback owns the connection, and its owner reports the end with `report_closed`.
        # Count the connection first: the callback may report the end at once.
        self._on_connection(connection)
        return True


def get_connection_limit(connections: int, *, reserved_files: int = _RESERVED_FILES) -> int:
    """Return the number of connections that this process can hold open, at most `connections`.

    A smaller number is logged. `reserved_files` file descriptors are kept for other uses.
    """
    file_limit, needed_files = _raise_soft_limit(connections, reserved_files)
    max_connections = (
        connections
        if file_limit == resource.RLIM_INFINITY
        else max(1, min(connections, connections + file_limit - needed_files))
    )
    if max_connections < connections:
        log.warning(
            "at most %d connections, as `ulimit -n` is %d; FOVEA_CONNECTIONS=%d needs %d",
            max_connections,
            file_limit,
            connections,
            needed_files,
        )
    return max_connections


def raise_file_limit(connections: int) -> None:
    """Raise the file limit like `get_connection_limit`, in a worker that receives its connections."""
    _raise_soft_limit(connections, _RESERVED_FILES)


def _raise_soft_limit(connections: int, reserved_files: int) -> tuple[int, int]:
    """Raise the soft limit of open files, and return the new soft limit and the needed limit.

    The soft limit (`ulimit -Sn`) is raised as far as `connections` need it and the hard limit (`ulimit -Hn`)
    allows it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed_files = connections + reserved_files + len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone
    if soft != resource.RLIM_INFINITY and soft < needed_files:
        new_limit = needed_files if hard == resource.RLIM_INFINITY else min(needed_files, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (new_limit, hard))
            soft = new_limit
        except (OSError, ValueError) as error:  # something other than the hard limit forbids it
            log.warning("`ulimit -n` cannot be raised from %d to %d: %s", soft, new_limit, error)
    return soft, needed_files

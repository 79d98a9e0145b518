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

Take = Callable[[socket.socket], None]

_BACKLOG: Final = 2048
"""Length of the kernel's queue of connections to accept. The kernel caps it at `net.core.somaxconn`."""

_BURST: Final = 64
"""Maximum number of connections accepted in one turn of the event loop."""

_RETRY: Final = 1.0
"""Time in seconds until the next attempt if the system has no room and no connection of ours closes."""

_SILENCE: Final = 60.0
"""Minimum time in seconds between two log lines about the lack of room."""

_RESERVED: Final = 64
"""Number of file descriptors reserved for other uses after the start: models, pipes, the event loop."""


class Source(Protocol):
    """Interface of a source of connections: a listening socket, or a supervisor."""

    def start(self, take: Take) -> None:
        """Pass every new connection to `take` from now on. Raises `StartError`."""

    def released(self, count: int = 1) -> None:
        """Report that `count` connections have been closed."""

    async def stop(self) -> None:
        """Pass on the connections that have already arrived, and accept no more."""


class Listener:
    """A bound socket that passes on accepted connections, with at most `limit` open at a time.

    When the limit is reached, or the system has no room (`ulimit -n`), further connections wait in the
    kernel's backlog until a connection is closed.
    """

    def __init__(self, bound: socket.socket, limit: int, on_starved: Callable[[], None]) -> None:
        """Set the socket, the limit, and a callback for a lack of room.

        `on_starved` is called when a connection must wait because the system has no room.
        """
        self._socket = bound
        self._limit = limit
        self._on_starved = on_starved
        self._open = 0
        self._paused = True
        self._held = False
        self._silent_until = 0.0
        self._retry: asyncio.TimerHandle | None = None

    def start(self, take: Take) -> None:
        """Listen and pass every connection to `take`. Raises `StartError`."""
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._socket.setblocking(False)
        try:
            self._socket.listen(_BACKLOG)
        except OSError as error:  # another process began to listen after both had bound the address
            raise StartError(f"cannot listen: {error.strerror}") from None
        self._resume()

    def released(self, count: int = 1) -> None:
        """Report that `count` connections have been closed."""
        self._open -= count
        self._resume()

    def has_room(self) -> None:
        """Accept waiting connections at once, because a file descriptor has become free."""
        self._resume()

    def hold(self) -> None:
        """Stop accepting until `release`, because nobody can take a connection."""
        self._held = True
        self._pause()

    def release(self) -> None:
        """Accept connections again after `hold`."""
        self._held = False
        self._resume()

    async def stop(self) -> None:
        """Close the listener. This method is asynchronous because other sources need time to stop."""
        self.close()

    def close(self) -> None:
        """Accept the connections that have already arrived, then close the socket.

        The kernel resets the connections that are left in the backlog.
        """
        self._pause()
        while self._accept_one():
            pass
        self._pause()
        # A failed accept has set a retry timer: cancel the timer before the socket is closed.
        self._socket.close()

    def _resume(self) -> None:
        if self._paused and self._open < self._limit and not self._held and self._socket.fileno() >= 0:
            self._paused = False
            self._loop.add_reader(self._socket, self._accept)

    def _pause(self) -> None:
        if self._retry:
            self._retry.cancel()
        if not self._paused:
            self._paused = True
            self._loop.remove_reader(self._socket)

    def _accept(self) -> None:
        for _ in range(_BURST):
            if self._open >= self._limit or self._held:
                self._pause()
                return
            if not self._accept_one():
                return

    def _accept_one(self) -> bool:
        """Accept a connection and return whether there was one. Pause if the system has no room for it."""
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False
        except OSError as error:
            if time.monotonic() > self._silent_until:
                self._silent_until = time.monotonic() + _SILENCE
                log.error("cannot accept connections: %s (%d are open)", error.strerror, self._open)
            self._pause()
            self._retry = self._loop.call_later(_RETRY, self._resume)
            self._on_starved()
            return False
        self._open += 1
        # From here on `take` owns the connection and reports its end with `released`.
        self._take(connection)
        return True


def room(wanted: int, *, reserved: int = _RESERVED) -> int:
    """Return the number of connections that this process can hold open, at most `wanted`.

    A smaller number is logged. `reserved` file descriptors are kept for other uses.
    """
    limit, needed = _raise_file_limit(wanted, reserved)
    possible = wanted if limit == resource.RLIM_INFINITY else max(1, min(wanted, wanted + limit - needed))
    if possible < wanted:
        log.warning(
            "at most %d connections, as `ulimit -n` is %d; FOVEA_CONNECTIONS=%d needs %d",
            possible,
            limit,
            wanted,
            needed,
        )
    return possible


def prepare_room(wanted: int) -> None:
    """Raise the file limit like `room`, in a process that receives its connections from another process."""
    _raise_file_limit(wanted, _RESERVED)


def _raise_file_limit(connections: int, reserved: int) -> tuple[int, int]:
    """Raise the soft limit of open files, and return the new soft limit and the needed limit.

    The soft limit (`ulimit -Sn`) is raised as far as `connections` need it and the hard limit (`ulimit -Hn`)
    allows it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + reserved + len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
        except (OSError, ValueError) as error:  # something other than the hard limit forbids it
            log.warning("`ulimit -n` cannot be raised from %d to %d: %s", soft, most, error)
    return soft, needed

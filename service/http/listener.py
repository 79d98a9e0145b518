"""The listening socket, and how many connections it lets in."""

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
"""Connections that the kernel keeps until they are accepted; it allows `net.core.somaxconn` at most."""

_BURST: Final = 64
"""Connections accepted before anything else gets its turn."""

_RETRY: Final = 1.0
"""Seconds until the next attempt when the system had no room and none of our connections has closed."""

_SILENCE: Final = 60.0
"""Seconds between two lines in the log that say so."""

_RESERVED: Final = 64
"""Open files that are no connections and come after the start: models, pipes, the event loop."""


class Source(Protocol):
    """Where a server's connections come from: its own listening socket, or a supervisor."""

    def start(self, take: Take) -> None:
        """Hand every connection to `take` from now on. Raises `StartError`."""

    def released(self, count: int = 1) -> None:
        """So many connections have been closed."""

    async def stop(self) -> None:
        """Hand on what has come already, and let in nothing more."""


class Listener:
    """A bound socket that hands accepted connections on, at most `limit` at a time.

    Where that is reached, or the system has no room (`ulimit -n`), further ones wait in the kernel's
    backlog until one is closed.
    """

    def __init__(self, bound: socket.socket, limit: int, on_starved: Callable[[], None]) -> None:
        """`on_starved` is called when a connection has to wait because the system has no room."""
        self._socket = bound
        self._limit = limit
        self._on_starved = on_starved
        self._open = 0
        self._paused = True
        self._held = False
        self._silent_until = 0.0
        self._retry: asyncio.TimerHandle | None = None

    def start(self, take: Take) -> None:
        """Listen, and hand every connection to `take`. Raises `StartError`."""
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._socket.setblocking(False)
        try:
            self._socket.listen(_BACKLOG)
        except OSError as error:  # another process began to listen after both had bound
            raise StartError(f"cannot listen: {error.strerror}") from None
        self._resume()

    def released(self, count: int = 1) -> None:
        """So many connections have been closed."""
        self._open -= count
        self._resume()

    def has_room(self) -> None:
        """A file descriptor is free again: accept at once what had to wait for one."""
        self._resume()

    def hold(self) -> None:
        """Accept nothing until `release`: there is nobody to take it."""
        self._held = True
        self._pause()

    def release(self) -> None:
        """Accept again after `hold`."""
        self._held = False
        self._resume()

    async def stop(self) -> None:
        """See `close`; a source may need time for it."""
        self.close()

    def close(self) -> None:
        """Accept what has come already, and close: the kernel resets what is left in its backlog."""
        self._pause()
        while self._accept_one():
            pass
        self._pause()
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
        """Accept a connection if there is one. Where the system has no room for it, pause."""
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
        self._take(connection)
        return True


def room(wanted: int, *, reserved: int = _RESERVED) -> int:
    """Return how many connections one process can hold open, at most `wanted`; say so where it is less.

    `reserved` files are kept for what comes later beside connections.
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
    """Have as many files as `room`, in a process that another hands its connections."""
    _raise_file_limit(wanted, _RESERVED)


def _raise_file_limit(connections: int, reserved: int) -> tuple[int, int]:
    """Raise the soft limit of open files (`ulimit -Sn`) as far as so many connections need it and the hard
    one (`ulimit -Hn`) allows. Return what it is then, and what would be needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + reserved + len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
        except (OSError, ValueError) as error:  # something else than the hard limit forbids it
            log.warning("`ulimit -n` cannot be raised from %d to %d: %s", soft, most, error)
    return soft, needed

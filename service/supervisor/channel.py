"""What a supervisor and a worker say to each other, and how connections change hands.

Over one Unix socket that keeps messages apart. To the worker: a connection, with its file; a signal. To
the supervisor: ready, with what it serves; why it cannot start; how many connections it has received and
closed since its start, and which of them it could not take, every `BEAT` seconds at least; "no more". Both
ways: changes to what is served (`service.supervisor.participant`, `service.supervisor.coordinator`).
The end of the socket is the end of the other.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from fovea.service.http.listener import Take

CONNECTION: Final = b"connection"
NO_MORE: Final = b"no more"
BEAT: Final = 0.5
"""Seconds between two messages of a worker at most: one that is not heard of hangs, or has been stopped."""

_LONGEST: Final = 1 << 16
"""Bytes that are sent at once: Linux takes 200 KB at most."""

_MORE, _LAST = b"+", b"."
"""What pieces of a longer message begin with; no other message begins so."""

_MOST_UNSENT: Final = 10_000
"""Messages that may wait for a worker that does not read."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a channel."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def encode(**message: Any) -> bytes:
    """One message, other than a connection and the last, that is known to be short. Raises `OSError` when it
    is too long to be sent at once."""
    encoded = json.dumps(message).encode()
    if len(encoded) > _LONGEST:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    return encoded


def pieces(**message: Any) -> list[bytes]:
    """One message of any length, as what is sent for it: as it is, or in pieces that say whether more
    come."""
    encoded = json.dumps(message).encode()
    if len(encoded) <= _LONGEST:
        return [encoded]
    size = _LONGEST - 1
    parts = [encoded[start : start + size] for start in range(0, len(encoded), size)]
    return [*(_MORE + part for part in parts[:-1]), _LAST + parts[-1]]


class Inbox:
    """Puts the pieces of long messages together."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def whole(self, received: bytes) -> bytes | None:
        """Return a message once it is there; None for a piece with more behind it."""
        if received[:1] not in (_MORE, _LAST):
            return received
        self._parts.append(received[1:])
        if received[:1] == _MORE:
            return None
        parts, self._parts = self._parts, []
        return b"".join(parts)


class Outbox:
    """The only writer of the supervisor's end of a channel, but for connections: what a busy worker has no
    room for yet waits here, in order."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._unsent: deque[bytes] = deque()

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._unsent

    def send(self, **message: Any) -> None:
        """Send a message, now or when there is room for it. Raises `OSError` when the other end is gone, or
        has read nothing for so long that it can be taken for dead."""
        if len(self._unsent) > _MOST_UNSENT:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        self._unsent.extend(pieces(**message))
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                self._end.send(self._unsent[0])
                self._unsent.popleft()
        except BlockingIOError:
            asyncio.get_running_loop().add_writer(self._end, self._flush_or_drop)
            return
        except OSError:
            self._unsent.clear()
            raise

    def _flush_or_drop(self) -> None:
        """There is room again."""
        asyncio.get_running_loop().remove_writer(self._end)
        with suppress(OSError):  # the other end is gone; reading says so too
            self._flush()


def receive(end: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its files; empty at the end. Raises `BlockingIOError` when there is none yet.

    The files of a message are missing where this process has no descriptor left for them (MSG_CTRUNC).
    """
    try:
        message, files, _, _ = socket.recv_fds(end, _LONGEST, 1)
    except ConnectionResetError:
        return b"", []
    return message, files


@contextmanager
def heard(end: socket.socket) -> Iterator[None]:
    """Be heard of by the supervisor while models are loaded, which takes longer than `BEAT`.

    A thread does it. It shares the channel with the main thread: the kernel keeps messages whole and apart.
    """
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            try:
                end.send(encode(starting=True), socket.MSG_DONTWAIT)
            except BlockingIOError:  # the supervisor is busy
                continue
            except OSError:  # it is gone
                return

    threading.Thread(target=beat, name="beat", daemon=True).start()
    try:
        yield
    finally:
        over.set()


class Feed:
    """A worker's source of connections: its supervisor.

    `on_signal` is called with the signals that are meant for the server, `on_told` with all else, and
    `on_starved` when there is no file descriptor for a connection: the supervisor is told, and still has it.
    A supervisor that is gone is a SIGINT: the listening socket went with it, and no load balancer needs to be
    told.
    """

    def __init__(
        self,
        end: socket.socket,
        on_signal: Callable[[int], None],
        on_told: Callable[[dict[str, Any]], None],
        on_starved: Callable[[], None],
    ) -> None:
        self._end = end
        self._on_signal = on_signal
        self._on_told = on_told
        self._on_starved = on_starved
        self._unsaid: deque[bytes] = deque()
        self._inbox = Inbox()
        self._received = 0
        self._closed = 0
        self._missed: list[int] = []
        """Numbers of connections that could not be taken, until the supervisor has been told."""
        self._stopping = False
        self._ended = asyncio.Event()

    def start(self, take: Take) -> None:
        """Hand every connection to `take` from now on."""
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._end, self._read)
        self._beat()

    def ready(self, **about: Any) -> None:
        """Tell the supervisor that connections may come."""
        self.tell(ready=about)

    def tell(self, **message: Any) -> None:
        """Tell the supervisor something else."""
        self._unsaid.extend(pieces(**message))
        self._report()

    def released(self, count: int = 1) -> None:
        """Report closed connections: their number since the start, so that no report is missed."""
        self._closed += count
        self._report()

    async def stop(self) -> None:
        """Ask for no more, and take what was on its way."""
        self._stopping = True
        if not self._ended.is_set():
            self._unsaid.append(NO_MORE)
            self._report()
            await self._ended.wait()

    def _beat(self) -> None:
        """Be heard of by the supervisor, from the event loop: it must turn."""
        self._loop.call_later(BEAT, self._beat)
        self._report()

    def _report(self) -> None:
        try:
            self._end.send(encode(received=self._received, closed=self._closed, missed=self._missed))
            self._missed = []
            while self._unsaid:
                self._end.send(self._unsaid[0])
                self._unsaid.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._end, self._report)
            return
        except OSError:  # the supervisor is gone; reading says so too
            pass
        self._loop.remove_writer(self._end)

    def _read(self) -> None:
        while True:
            try:
                message, files = receive(self._end)
            except BlockingIOError:
                return
            if message == CONNECTION:
                if not files:
                    self._missed.append(self._received)
                self._received += 1
                self._report()
                for file in files:
                    self._take(socket.socket(fileno=file))
                if not files:
                    self._on_starved()
            elif message:
                whole = self._inbox.whole(message)
                if whole is None:
                    continue
                said = json.loads(whole)
                if "signal" in said:
                    self._on_signal(said["signal"])
                else:
                    self._on_told(said)
            else:
                self._loop.remove_reader(self._end)
                self._ended.set()
                self._on_told({"gone": True})
                if not self._stopping:
                    self._on_signal(signal.SIGINT)
                return

"""Messages between supervisor and worker, and the transfer of connections.

A channel is one Unix socket that preserves message boundaries.

* The supervisor sends connections, each with its file descriptor, and signals.
* The worker sends "ready" with the served model, or the reason why it cannot start. It reports the number of
  connections received and closed since its start, and the connections that it could not take. A report comes
  at least every `BEAT` seconds. "no more" asks for no further connections.
* Both send changes to the served models (`service.supervisor.participant`, `service.supervisor.coordinator`).

The end of the stream means that the other process has ended.
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
"""Maximum time in seconds between two messages of a worker. A silent worker hangs or is stopped."""

_LONGEST: Final = 1 << 16
"""Maximum size of a message in bytes. Linux allows 200 KB."""

_MORE, _LAST = b"+", b"."
"""Prefixes of the pieces of a longer message. No other message begins with them."""

_MOST_UNSENT: Final = 10_000
"""Maximum number of messages that wait for a worker that does not read."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a new channel: the supervisor's, which does not block, and the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def encode(**message: Any) -> bytes:
    """Encode a short message. Raises `OSError` when the message is too long to be sent at once."""
    encoded = json.dumps(message).encode()
    if len(encoded) > _LONGEST:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    return encoded


def pieces(**message: Any) -> list[bytes]:
    """Encode a message of any length, split into pieces if needed."""
    encoded = json.dumps(message).encode()
    if len(encoded) <= _LONGEST:
        return [encoded]
    size = _LONGEST - 1
    parts = [encoded[start : start + size] for start in range(0, len(encoded), size)]
    return [*(_MORE + part for part in parts[:-1]), _LAST + parts[-1]]


class Inbox:
    """Assembler of long messages from their pieces."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def whole(self, received: bytes) -> bytes | None:
        """Return a message once it is complete, or None if more pieces follow."""
        if received[:1] not in (_MORE, _LAST):
            return received
        self._parts.append(received[1:])
        if received[:1] == _MORE:
            return None
        parts, self._parts = self._parts, []
        return b"".join(parts)


class Outbox:
    """Queue of messages from the supervisor to a worker, in order.

    The outbox is the only writer of messages to the supervisor's end of a channel. Connections are sent past
    it, and only while it is empty.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._unsent: deque[bytes] = deque()

    @property
    def is_empty(self) -> bool:
        """Return whether no message waits."""
        return not self._unsent

    def send(self, **message: Any) -> None:
        """Send a message now, or when there is room for it.

        Raises `OSError` when the other end is closed, or has not read for so long that it counts as dead.
        """
        if len(self._unsent) > _MOST_UNSENT:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        self._unsent.extend(pieces(**message))
        self._flush()

    def _flush(self) -> None:
        """Send waiting messages until the socket is full."""
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
        """Send waiting messages because the socket has room again."""
        asyncio.get_running_loop().remove_writer(self._end)
        with suppress(OSError):  # the other end is closed; the reader notices that too
            self._flush()


def receive(end: socket.socket) -> tuple[bytes, list[int]]:
    """Return a message and its file descriptors. The message is empty at the end of the stream.

    Raises `BlockingIOError` when there is no message yet. The descriptors are missing if this process has no
    free descriptor for them (MSG_CTRUNC).
    """
    try:
        message, files, _, _ = socket.recv_fds(end, _LONGEST, 1)
    except ConnectionResetError:
        return b"", []
    return message, files


@contextmanager
def heard(end: socket.socket) -> Iterator[None]:
    """Send heartbeats to the supervisor while models are loaded, which takes longer than `BEAT`.

    The heartbeats come from a thread that shares the channel with the main thread. The kernel keeps their
    messages whole and separate.
    """
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            try:
                end.send(encode(starting=True), socket.MSG_DONTWAIT)
            except BlockingIOError:  # the supervisor is busy: skip this beat
                continue
            except OSError:  # the supervisor has ended
                return

    threading.Thread(target=beat, name="beat", daemon=True).start()
    try:
        yield
    finally:
        over.set()


class Feed:
    """Connections that a worker receives from its supervisor.

    `on_signal` is called with signals for the server, and `on_told` with all other messages. `on_starved` is
    called when there is no file descriptor for a connection. The supervisor is told, and still has that
    connection. The end of the supervisor counts as SIGINT: the listening socket is closed with it, so there
    is no load balancer to wait for.
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
        """Numbers of connections that could not be taken, until they are reported."""
        self._stopping = False
        self._ended = asyncio.Event()

    def start(self, take: Take) -> None:
        """Pass every new connection to `take`."""
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._end, self._read)
        self._beat()

    def ready(self, **about: Any) -> None:
        """Tell the supervisor that this worker can take connections."""
        self.tell(ready=about)

    def tell(self, **message: Any) -> None:
        """Send a message to the supervisor."""
        self._unsaid.extend(pieces(**message))
        self._report()

    def released(self, count: int = 1) -> None:
        """Report closed connections.

        The report has the total since the start, so that a lost report does no harm.
        """
        self._closed += count
        self._report()

    async def stop(self) -> None:
        """Ask for no more connections, and wait until those on their way have arrived."""
        self._stopping = True
        if not self._ended.is_set():
            self._unsaid.append(NO_MORE)
            self._report()
            await self._ended.wait()

    def _beat(self) -> None:
        """Report every `BEAT` seconds from the event loop, which shows that the loop is not blocked."""
        self._loop.call_later(BEAT, self._beat)
        self._report()

    def _report(self) -> None:
        """Send the counters and the waiting messages."""
        try:
            # If the send fails, the next report has newer totals. `_missed` is cleared only after the send.
            self._end.send(encode(received=self._received, closed=self._closed, missed=self._missed))
            self._missed = []
            while self._unsaid:
                self._end.send(self._unsaid[0])
                self._unsaid.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._end, self._report)
            return
        except OSError:  # the supervisor has ended; the reader notices that too
            pass
        self._loop.remove_writer(self._end)

    def _read(self) -> None:
        """Handle all messages that have arrived."""
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
                # Requests that wait for an answer of the supervisor must fail at once.
                self._on_told({"gone": True})
                if not self._stopping:
                    self._on_signal(signal.SIGINT)
                return

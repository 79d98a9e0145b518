"""Messages between supervisor and worker, and the transfer of connections.

A channel is one Unix socket that preserves message boundaries.

* The supervisor sends connections, each with its file descriptor, and signals.
* The worker sends "ready" with the served model, or the reason why it cannot start. It reports the number of
  connections received and closed since its start, and the connections that it could not take. A report comes
  at least every `HEARTBEAT_INTERVAL` seconds. "no more" asks for no further connections.
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

from fovea.service.http.listener import OnConnection

CONNECTION_MESSAGE: Final = b"connection"
NO_MORE_MESSAGE: Final = b"no more"
HEARTBEAT_INTERVAL: Final = 0.5
"""Maximum time in seconds between two messages of a worker. A silent worker hangs or is stopped."""

_MAX_MESSAGE_BYTES: Final = 1 << 16
"""Maximum size of a message in bytes. Linux allows 200 KB."""

_PIECE_PREFIX, _LAST_PIECE_PREFIX = b"+", b"."
"""Prefixes of the pieces of a longer message. No other message begins with them."""

_MAX_UNSENT_MESSAGES: Final = 10_000
"""Maximum number of messages that wait for a worker that does not read."""


def create_channel() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a new channel: the supervisor's, which does not block, and the worker's."""
    supervisor_socket, worker_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    supervisor_socket.setblocking(False)
    return supervisor_socket, worker_socket


def encode_message(**message: Any) -> bytes:
    """Encode a short message. Raises `OSError` when the message is too long to be sent at once."""
    encoded = json.dumps(message).encode()
    if len(encoded) > _MAX_MESSAGE_BYTES:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    return encoded


def split_message(**message: Any) -> list[bytes]:
    """Encode a message of any length, split into pieces if needed."""
    encoded = json.dumps(message).encode()
    if len(encoded) <= _MAX_MESSAGE_BYTES:
        return [encoded]
    size = _MAX_MESSAGE_BYTES - 1
    parts = [encoded[start : start + size] for start in range(0, len(encoded), size)]
    return [*(_PIECE_PREFIX + part for part in parts[:-1]), _LAST_PIECE_PREFIX + parts[-1]]


class Inbox:
    """Assembler of long messages from their pieces."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def add_piece(self, piece: bytes) -> bytes | None:
        """Return a message once it is complete, or None if more pieces follow."""
        if piece[:1] not in (_PIECE_PREFIX, _LAST_PIECE_PREFIX):
            return piece
        self._pieces.append(piece[1:])
        if piece[:1] == _PIECE_PREFIX:
            return None
        parts, self._pieces = self._pieces, []
        return b"".join(parts)


class Outbox:
    """Queue of messages from the supervisor to a worker, in order.

    The outbox is the only writer of messages to the supervisor's end of a channel. Connections are sent past
    it, and only while it is empty.
    """

    def __init__(self, channel_socket: socket.socket) -> None:
        self._channel_socket = channel_socket
        self._unsent_messages: deque[bytes] = deque()

    @property
    def is_empty(self) -> bool:
        """True if no message waits. Only then may a connection be sent past the outbox."""
        return not self._unsent_messages

    def send(self, **message: Any) -> None:
        """Send a message now, or when there is room for it.

        Raises `OSError` when the other end is closed, or has not read for so long that it counts as dead.
        """
        if len(self._unsent_messages) > _MAX_UNSENT_MESSAGES:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        self._unsent_messages.extend(split_message(**message))
        self._flush()

    def _flush(self) -> None:
        """Send waiting messages until the socket is full."""
        try:
            while self._unsent_messages:
                self._channel_socket.send(self._unsent_messages[0])
                self._unsent_messages.popleft()
        except BlockingIOError:
            asyncio.get_running_loop().add_writer(self._channel_socket, self._flush_when_writable)
            return
        except OSError:
            self._unsent_messages.clear()
            raise

    def _flush_when_writable(self) -> None:
        """Send waiting messages because the socket has room again."""
        asyncio.get_running_loop().remove_writer(self._channel_socket)
        with suppress(OSError):  # the other end is closed; the reader notices that too
            self._flush()


def receive_message(channel_socket: socket.socket) -> tuple[bytes, list[int]]:
    """Return a message and its file descriptors. The message is empty at the end of the stream.

    Raises `BlockingIOError` when there is no message yet. The descriptors are missing if this process has no
    free descriptor for them (MSG_CTRUNC).
    """
    try:
        message, descriptors, _, _ = socket.recv_fds(channel_socket, _MAX_MESSAGE_BYTES, 1)
    except ConnectionResetError:
        return b"", []
    return message, descriptors


@contextmanager
def send_heartbeats(channel_socket: socket.socket) -> Iterator[None]:
    """Send heartbeats to the supervisor while models are loaded.

    Loading takes longer than `HEARTBEAT_INTERVAL` and blocks the main thread, so the heartbeats come from a
    thread of their own. Both threads send on the same channel: the kernel keeps their messages whole and
    separate. Leave the block before `SupervisedSource` takes over the channel.
    """
    stop_event = threading.Event()

    def send_until_stopped() -> None:
        while not stop_event.wait(HEARTBEAT_INTERVAL):
            try:
                channel_socket.send(encode_message(starting=True), socket.MSG_DONTWAIT)
            except BlockingIOError:  # the supervisor is busy: skip this heartbeat
                continue
            except OSError:  # the supervisor has ended
                return

    threading.Thread(target=send_until_stopped, name="beat", daemon=True).start()
    try:
        yield
    finally:
        stop_event.set()


class SupervisedSource:
    """Connections that a worker receives from its supervisor.

    All callbacks run on the event loop of the worker. `on_signal` is called with signals for the server, and
    `on_message` with all other messages. `on_starved` is called when there is no file descriptor for a
    connection: the next report names the connection, and the supervisor, which still has it open, passes it
    on again. The end of the supervisor counts as SIGINT: the listening socket is closed with it, so there is
    no load balancer to wait for.
    """

    def __init__(
        self,
        channel_socket: socket.socket,
        on_signal: Callable[[int], None],
        on_message: Callable[[dict[str, Any]], None],
        on_starved: Callable[[], None],
    ) -> None:
        self._channel_socket = channel_socket
        self._on_signal = on_signal
        self._on_message = on_message
        self._on_starved = on_starved
        self._unsent_messages: deque[bytes] = deque()
        self._inbox = Inbox()
        self._received_count = 0
        self._closed_count = 0
        self._missed_numbers: list[int] = []
        """Numbers of connections that could not be taken, until they are reported."""
        self._is_stopping = False
        self._end_event = asyncio.Event()

    def start(self, on_connection: OnConnection) -> None:
        """Pass every new connection to `on_connection`."""
        self._on_connection = on_connection
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._channel_socket, self._read_messages)
        self._send_heartbeat()

    def report_ready(self, **description: Any) -> None:
        """Tell the supervisor that this worker can take connections."""
        self.send_message(ready=description)

    def send_message(self, **message: Any) -> None:
        """Send a message to the supervisor."""
        self._unsent_messages.extend(split_message(**message))
        self._send_report()

    def report_closed(self, count: int = 1) -> None:
        """Report closed connections.

        The report has the total since the start, so that a lost report does no harm.
        """
        self._closed_count += count
        self._send_report()

    async def stop(self) -> None:
        """Ask for no more connections, and wait until those on their way have arrived.

        The supervisor answers `NO_MORE_MESSAGE` by closing its side of the stream, which `_read_messages`
        sees after the last connection.
        """
        self._is_stopping = True
        if not self._end_event.is_set():
            self._unsent_messages.append(NO_MORE_MESSAGE)
            self._send_report()
            await self._end_event.wait()

    def _send_heartbeat(self) -> None:
        """Send a report every `HEARTBEAT_INTERVAL` seconds.

        A callback of the event loop sends the report, so that a blocked loop counts as silence.
        """
        self._loop.call_later(HEARTBEAT_INTERVAL, self._send_heartbeat)
        self._send_report()

    def _send_report(self) -> None:
        """Send the counters and the waiting messages."""
        try:
            # If the send fails, the next report has newer totals. `_missed_numbers` is cleared only after the
            # send.
            self._channel_socket.send(
                encode_message(
                    received=self._received_count, closed=self._closed_count, missed=self._missed_numbers
                )
            )
            self._missed_numbers = []
            while self._unsent_messages:
                self._channel_socket.send(self._unsent_messages[0])
                self._unsent_messages.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._channel_socket, self._send_report)
            return
        except OSError:  # the supervisor has ended; the reader notices that too
            pass
        self._loop.remove_writer(self._channel_socket)

    def _read_messages(self) -> None:
        """Handle all messages that have arrived."""
        while True:
            try:
                message, descriptors = receive_message(self._channel_socket)
            except BlockingIOError:
                return
            if message == CONNECTION_MESSAGE:
                if not descriptors:
                    self._missed_numbers.append(self._received_count)
                # Both processes number connections in the order of the channel. The report makes the
                # supervisor close its copy, so it is sent only after this process has its own descriptor.
                self._received_count += 1
                self._send_report()
                for descriptor in descriptors:
                    self._on_connection(socket.socket(fileno=descriptor))
                if not descriptors:
                    self._on_starved()
            elif message:
                encoded_message = self._inbox.add_piece(message)
                if encoded_message is None:
                    continue
                content = json.loads(encoded_message)
                if "signal" in content:
                    self._on_signal(content["signal"])
                else:
                    self._on_message(content)
            else:
                self._loop.remove_reader(self._channel_socket)
                self._end_event.set()
                # Requests that wait for an answer of the supervisor must fail at once.
                self._on_message({"gone": True})
                if not self._is_stopping:
                    self._on_signal(signal.SIGINT)
                return

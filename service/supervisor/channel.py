"""The channel between the supervisor and a worker, and the transfer of connections.

A channel is one Unix socket that preserves the boundaries of packets (`SOCK_SEQPACKET`). A file descriptor
belongs to the packet with which it was sent, so it always arrives with its own `PassedConnection`. On a byte
stream one read could return the bytes of several messages with the descriptor of one of them.

`service.supervisor.messages` describes the messages. Every message begins in a packet of its own, and a long
message continues in further packets. The end of the stream means that the other process has ended.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, Generic, TypeVar

from fovea.service.http.lifecycle import exit_after_internal_error
from fovea.service.http.listener import OnConnection
from fovea.service.runners.frames import FrameDecoder, FrameError
from fovea.service.runners.messages import Message
from fovea.service.supervisor.messages import (
    SUPERVISOR_MESSAGES,
    ConnectionReport,
    ModelMessage,
    NoMoreConnections,
    PassedConnection,
    StartingHeartbeat,
    StopSignal,
    SupervisorMessage,
    WorkerMessage,
)

log = logging.getLogger(__name__)

HEARTBEAT_INTERVAL: Final = 0.5
"""Maximum time in seconds between two messages of a worker. A silent worker hangs or is stopped."""

_PACKET_BYTES: Final = 1 << 16
"""Size of all packets of a message but the last, in bytes. Linux allows 200 KB."""

_MAX_UNSENT_PACKETS: Final = 10_000
"""Maximum number of packets that wait for a process that does not read."""

_CONNECTION_PACKET: Final = PassedConnection().to_bytes()

Received = TypeVar("Received", bound=Message)


def create_channel() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a new channel: the supervisor's and the worker's."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Channel(Generic[Received]):
    """One end of a channel on the event loop: the only reader and the only writer of its socket.

    All messages wait in one queue while the other end does not read. A connection is passed only while the
    queue is empty, so it never overtakes a message and never comes between two packets of one.
    """

    def __init__(
        self,
        channel_socket: socket.socket,
        received_types: Sequence[type[Received]],
        on_drained: Callable[[], None] = lambda: None,
    ) -> None:
        """Set the socket, the messages that the other end may send, and a callback.

        `on_drained` is called on the event loop when the messages that had to wait are sent.
        """
        channel_socket.setblocking(False)
        self.socket = channel_socket
        self._received_types = {one.__name__: one for one in received_types}
        self._on_drained = on_drained
        self._decoder = FrameDecoder()
        self._unsent_packets: deque[bytes] = deque()

    @property
    def has_unsent(self) -> bool:
        """True if messages wait until the other end reads."""
        return bool(self._unsent_packets)

    def send(self, message: Message) -> None:
        """Send a message now, or when there is room for it.

        Raises `OSError` when the other end is closed, or has not read for so long that it counts as dead.
        """
        if len(self._unsent_packets) > _MAX_UNSENT_PACKETS:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        encoded = message.to_bytes()
        starts = range(0, len(encoded), _PACKET_BYTES)
        self._unsent_packets.extend(encoded[start : start + _PACKET_BYTES] for start in starts)
        self._flush()

    def pass_connection(self, connection: socket.socket) -> bool:
        """Pass a connection now, or return False: the other end is busy or closed."""
        if self._unsent_packets:
            return False
        try:
            socket.send_fds(self.socket, [_CONNECTION_PACKET], [connection.fileno()])
        except OSError:
            return False
        return True

    def receive_packet(self) -> tuple[bytes, list[int]]:
        """Return a packet and its file descriptors. The packet is empty at the end of the stream.

        Raises `BlockingIOError` when there is no packet yet. The descriptors are missing if this process has
        no free descriptor for them (MSG_CTRUNC).
        """
        try:
            packet, descriptors, _, _ = socket.recv_fds(self.socket, _PACKET_BYTES, 1)
        except ConnectionResetError:
            return b"", []
        return packet, descriptors

    def decode(self, packet: bytes) -> Received | None:
        """Return the message that ends with this packet, or None if another packet follows.

        Raises `FrameError`. The next packet then counts as the first one of a message.
        """
        try:
            frames = list(self._decoder.feed(packet))
            if not frames and len(packet) == _PACKET_BYTES:
                return None
            if len(frames) != 1 or not self._decoder.is_between_frames:
                raise FrameError(f"sent a packet that ends {len(frames)} messages instead of one")
            if (received_type := self._received_types.get(frames[0].kind)) is None:
                raise FrameError(f"sent an unexpected message {frames[0].kind[:40]!r}")
            return received_type.from_frame(frames[0])
        except FrameError:
            self._decoder = FrameDecoder()
            raise

    def close(self) -> None:
        """Close this end of the channel."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.socket)
        loop.remove_writer(self.socket)
        self.socket.close()

    def _flush(self) -> None:
        """Send waiting packets until the socket is full."""
        try:
            while self._unsent_packets:
                self.socket.send(self._unsent_packets[0])
                self._unsent_packets.popleft()
        except BlockingIOError:
            asyncio.get_running_loop().add_writer(self.socket, self._flush_when_writable)
        except OSError:
            self._unsent_packets.clear()
            raise

    def _flush_when_writable(self) -> None:
        """Send waiting packets because the socket has room again."""
        asyncio.get_running_loop().remove_writer(self.socket)
        with suppress(OSError):  # the other end is closed; the reader notices that too
            self._flush()
        if not self._unsent_packets:
            self._on_drained()


@contextmanager
def send_heartbeats(channel_socket: socket.socket) -> Iterator[None]:
    """Send heartbeats to the supervisor while models are loaded.

    Loading takes longer than `HEARTBEAT_INTERVAL` and blocks the main thread, so the heartbeats come from a
    thread of their own. The thread has ended when the block is left, and nothing else may write within the
    block: the socket has one writer at any time.
    """
    stop_event = threading.Event()

    def send_until_stopped() -> None:
        while not stop_event.wait(HEARTBEAT_INTERVAL):
            try:
                channel_socket.send(StartingHeartbeat().to_bytes(), socket.MSG_DONTWAIT)
            except BlockingIOError:  # the supervisor is busy: skip this heartbeat
                continue
            except OSError:  # the supervisor has ended
                return

    thread = threading.Thread(target=send_until_stopped, name="beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop_event.set()
        thread.join()


class SupervisedSource:
    """Connections that a worker receives from its supervisor.

    All callbacks run on the event loop of the worker. `on_signal` is called with signals for the server, and
    `on_message` with the messages about models. `on_starved` is called when there is no file descriptor for a
    connection: the next report names the connection, and the supervisor, which still has it open, passes it
    on again. The end of the supervisor is passed to `on_gone`, and counts as SIGINT: the listening socket is
    closed with it, so there is no load balancer to wait for.
    """

    def __init__(
        self,
        channel_socket: socket.socket,
        *,
        on_signal: Callable[[int], None],
        on_message: Callable[[ModelMessage], None],
        on_starved: Callable[[], None],
        on_gone: Callable[[], None],
    ) -> None:
        self._channel: Channel[SupervisorMessage] = Channel(
            channel_socket, SUPERVISOR_MESSAGES, self._report_connections
        )
        self._on_signal = on_signal
        self._on_message = on_message
        self._on_starved = on_starved
        self._on_gone = on_gone
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
        self._loop.add_reader(self._channel.socket, self._read_messages)
        self._send_heartbeat()

    def send_message(self, message: WorkerMessage) -> None:
        """Send a message to the supervisor."""
        with suppress(OSError):  # the supervisor has ended; the reader notices that too
            self._channel.send(message)

    def report_closed(self, count: int = 1) -> None:
        """Report closed connections."""
        self._closed_count += count
        self._report_connections()

    async def stop(self) -> None:
        """Ask for no more connections, and wait until those on their way have arrived.

        The supervisor answers `NoMoreConnections` by closing its side of the stream, which `_read_messages`
        sees after the last connection.
        """
        self._is_stopping = True
        if not self._end_event.is_set():
            self.send_message(NoMoreConnections())
            await self._end_event.wait()

    def _send_heartbeat(self) -> None:
        """Send a report every `HEARTBEAT_INTERVAL` seconds.

        A callback of the event loop sends the report, so that a blocked loop counts as silence.
        """
        self._loop.call_later(HEARTBEAT_INTERVAL, self._send_heartbeat)
        self._report_connections()

    def _report_connections(self) -> None:
        """Report the counters, unless messages wait: the channel calls this again when they are sent."""
        if not self._channel.has_unsent:
            missed_numbers, self._missed_numbers = self._missed_numbers, []
            self.send_message(ConnectionReport(self._received_count, self._closed_count, missed_numbers))

    def _read_messages(self) -> None:
        """Handle all messages that have arrived."""
        while True:
            try:
                packet, descriptors = self._channel.receive_packet()
            except BlockingIOError:
                return
            if not packet:
                self._loop.remove_reader(self._channel.socket)
                self._end_event.set()
                self._on_gone()
                if not self._is_stopping:
                    self._on_signal(signal.SIGINT)
                return
            try:
                match self._channel.decode(packet):
                    case PassedConnection():
                        self._take_connection(descriptors)
                    case StopSignal(number):
                        self._on_signal(number)
                    case message if message is not None:
                        self._on_message(message)
            except FrameError:  # this worker may have missed a change that the other workers have made
                log.critical("the supervisor's message is invalid; this worker exits", exc_info=True)
                exit_after_internal_error()

    def _take_connection(self, descriptors: Sequence[int]) -> None:
        """Take over the connection that has arrived with these descriptors: one, or none."""
        if not descriptors:
            self._missed_numbers.append(self._received_count)
        # Both processes number connections in the order of the channel. The report makes the supervisor close
        # its copy, so it is sent only after this process has its own descriptor.
        self._received_count += 1
        self._report_connections()
        for descriptor in descriptors:
            self._on_connection(socket.socket(fileno=descriptor))
        if not descriptors:
            self._on_starved()

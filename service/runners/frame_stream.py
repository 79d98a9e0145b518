"""The service's end of the stream to a child process, on the event loop."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from fovea.service.runners.child_process import ChildProcess
from fovea.service.runners.frames import Frame, FrameDecoder, FrameError
from fovea.service.timer import Timer

_BUFFER_BYTES: Final = 64 << 10
"""Receive buffer size for one process, in bytes."""


class FrameStream(asyncio.BufferedProtocol, ABC):
    """A stream of messages to and from one process. All methods run on the event loop.

    All messages go through one queue, so no message begins between two pieces of another one, whoever gives
    up waiting meanwhile. A process that breaks the protocol or exceeds a time limit is killed (`give_up`),
    and `_handle_lost` informs all that wait for it.
    """

    def __init__(self, process: ChildProcess) -> None:
        """Prepare the stream to `process`. `connect` attaches the stream to the socket."""
        self.process = process
        self.is_given_up = False
        """True if the process gets no more work and is killed."""
        self._decoder = FrameDecoder()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._send_queue: deque[memoryview] = deque()
        self._is_paused = False
        self._watchdog = Timer(asyncio.get_running_loop())
        self._watched_since: float | None = None
        """Start of the watchdog on the monotonic clock in seconds; None while it is stopped."""

    async def connect(self) -> None:
        """Attach the stream to the socket of its process."""
        self.process.socket.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self, sock=self.process.socket)

    @property
    def is_lost(self) -> bool:
        """True if the process has ended or is about to end: it answers no more requests."""
        return self.is_given_up or bool(self._transport.is_closing())

    def send(self, pieces: Iterable[memoryview]) -> None:
        """Write one message, as soon as all messages before it are written."""
        self._send_queue.extend(pieces)
        self._write_next()

    def give_up(self) -> None:
        """Kill the process, and treat it as dead even if the system takes longer to end it."""
        self.is_given_up = True
        self.process.kill()
        # asyncio calls `connection_lost` in a later round of the event loop, also if the process hangs.
        self._transport.abort()

    def close(self) -> None:
        """Close the stream. asyncio calls `connection_lost` in a later round of the event loop."""
        self._transport.abort()

    # --- for subclasses ---

    @abstractmethod
    def _handle_frame(self, frame: Frame) -> None:
        """Handle one message. Raises `FrameError` if it does not fit; the process is killed then."""

    @abstractmethod
    def _handle_fault(self, error: FrameError | TimeoutError) -> None:
        """Report the reason why the process is killed now: a broken protocol, or the watchdog."""

    @abstractmethod
    def _handle_lost(self, watched_seconds: float) -> None:
        """Inform all that wait for the process. This is called once, when the stream has ended.

        `watched_seconds` is the time since the start of the watchdog, or 0 if it was stopped.
        """

    def _start_watchdog(self, seconds: float) -> None:
        """Give up the process after this time, unless the watchdog is stopped before."""
        self._watched_since = time.monotonic()
        self._watchdog.arm(seconds, self._handle_silence)

    def _stop_watchdog(self) -> float:
        """Stop the watchdog; return the seconds since its start, or 0 if it is stopped already."""
        if self._watched_since is None:
            return 0.0
        self._watchdog.disarm()
        started_at, self._watched_since = self._watched_since, None
        return time.monotonic() - started_at

    def _handle_silence(self) -> None:
        self._fail(TimeoutError())

    def _fail(self, error: FrameError | TimeoutError) -> None:
        self._handle_fault(error)
        self.give_up()

    def _write_next(self) -> None:
        """Write one piece of the queue. The next piece follows after other callbacks of the event loop."""
        if self._send_queue and not self._is_paused:
            self._transport.write(self._send_queue.popleft())
            if self._send_queue and not self._is_paused:
                asyncio.get_running_loop().call_soon(self._write_next)

    # --- callbacks of asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport. asyncio calls this once, before any other callback."""
        self._transport: Any = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the receive buffer. asyncio fills it and then calls `buffer_updated`."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Handle every message that is complete with these bytes. asyncio calls this after `get_buffer`."""
        try:
            # Copy the bytes: the transport fills the buffer again, while answers keep views of their frames.
            for frame in self._decoder.feed(bytes(self._buffer[:nbytes])):
                self._handle_frame(frame)
        except FrameError as error:
            self._fail(error)

    def pause_writing(self) -> None:
        """Stop writing. asyncio calls this when the socket buffer is full (backpressure)."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """Continue writing. asyncio calls this when the socket buffer has room again."""
        self._is_paused = False
        self._write_next()

    def connection_lost(self, _error: Exception | None) -> None:
        """Give up the process. asyncio calls this once, after the stream has ended or was aborted."""
        self.is_given_up = True
        self._send_queue.clear()
        watched_seconds = self._stop_watchdog()
        self._watchdog.close()
        self._handle_lost(watched_seconds)

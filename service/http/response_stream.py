"""The sending side of a connection: answers, and clients that read them slowly or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from fovea.service.resources.body_memory import BodyMemory, SlowReader

_PHRASES: Final = {status.value: status.phrase.encode() for status in HTTPStatus}

STATUS_LINES: Final = {
    status: b"HTTP/1.1 %d %b\r\n" % (status, _PHRASES.get(status, b"")) for status in range(100, 600)
}
"""Status lines by status."""

CONNECTION_CLOSE: Final = b"connection: close\r\n"
CONNECTION_KEEP_ALIVE: Final = b"connection: keep-alive\r\n"

SMALL_BYTES: Final = 64 << 10
"""Size in bytes up to which data is copied to share a packet: two packets cost twice as much. Also the amount
that a slow client must read within `_STALL_TIMEOUT` seconds."""

_STALL_TIMEOUT: Final = 30.0
"""Time in seconds for a client to read `SMALL_BYTES` bytes of its answer once the socket's buffers are full.
"""

_PREFIX: Final = b"HTTP/1.1 "
"""First bytes of every answer."""


class ResponseStream:
    """The sending side of a connection.

    What the client has not read is held in the memory account. A client that stops reading is disconnected.
    """

    def __init__(self, transport: asyncio.Transport, memory: BodyMemory, reader: SlowReader) -> None:
        """Create the stream; `reader` is the connection, which `memory` may cut off."""
        self._transport = transport
        self._memory = memory
        self._reader: SlowReader | None = reader
        self._writable_event: asyncio.Event | None = None
        """Event that is set when the client has read what was sent; None while it has."""
        self._stall_timer: asyncio.TimerHandle | None = None
        self._has_sent_prefix = False
        """True when the first bytes of the next answer have already been sent."""
        transport.set_write_buffer_limits(high=0)  # `pause` is called for every unread byte

    @property
    def is_writable(self) -> bool:
        """False while the client has not read what was sent."""
        return self._writable_event is None

    async def drain(self) -> None:
        """Wait until the client has read what was sent, or the connection is lost."""
        if self._writable_event:
            await self._writable_event.wait()

    def pause(self) -> None:
        """Start to watch whether the client reads its answer."""
        self._writable_event = asyncio.Event()
        self._watch_reader(0)

    def close(self) -> None:
        """End the stream, because the connection is lost. This breaks its reference cycle with the stream."""
        self.resume()
        self._reader = None

    def resume(self) -> None:
        """Stop watching: the client has read its answer, or the connection is lost."""
        if self._reader:
            self._memory.release_answer(self._reader)
        if self._writable_event:
            self._writable_event.set()
            self._writable_event = None
        if self._stall_timer:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _watch_reader(self, previous_bytes: int) -> None:
        """Abort the connection if the client has not read `SMALL_BYTES` bytes since the last check.

        `previous_bytes` is the number of unread bytes at the last check, or 0 at the first check.
        """
        unread_bytes = self._transport.get_write_buffer_size()
        if previous_bytes and unread_bytes > previous_bytes - SMALL_BYTES:
            self._transport.abort()
        else:
            loop = asyncio.get_running_loop()
            self._stall_timer = loop.call_later(_STALL_TIMEOUT, self._watch_reader, unread_bytes)

    def write(self, data: bytes | memoryview) -> None:
        """Send data. Data that the client does not read at once is held in the memory account."""
        if self._has_sent_prefix:
            self._has_sent_prefix = False
            data = data[len(_PREFIX) :]
        self._transport.write(data)
        if self._writable_event and self._reader:
            self._memory.reserve_answer(self._reader, self._transport.get_write_buffer_size())

    def write_prefix(self) -> None:
        """Send the first bytes of the next answer, which are always the same."""
        if not self._has_sent_prefix:
            self.write(_PREFIX)
            self._has_sent_prefix = True

    def write_continue(self) -> None:
        """Tell the client to send the body (RFC 9110, section 15.2.1)."""
        self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def write_answer(
        self,
        status: int,
        content: bytes,
        headers: Mapping[str, str],
        request_id: str,
        media_type: str,
        lines: bytes,
    ) -> None:
        """Send a whole answer; `lines` are further encoded headers."""
        if headers:
            lines += "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
        head = b"%b%bcontent-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n\r\n" % (
            STATUS_LINES[status],
            lines,
            media_type.encode(),
            len(content),
            request_id.encode(),
        )
        if len(content) <= SMALL_BYTES:
            self.write(head + content)
            return
        self.write(head)
        self.write(memoryview(content))  # the transport would copy the rest of `bytes` twice

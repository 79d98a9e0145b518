"""The client side of one HTTP/1.1 connection, which reads complete answers and can leave at any moment."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Final, NamedTuple
from urllib.parse import urlsplit

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSE: Final = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


class Response(NamedTuple):
    """A complete answer."""

    status: int
    head: bytes
    """Status line and headers."""
    content: bytes

    @property
    def media_type(self) -> str:
        """Content type without parameters; empty if there is none."""
        header = re.search(rb"\r\ncontent-type: *([^;\r]+)", self.head, re.IGNORECASE)
        return header[1].decode().strip() if header else ""


class BrokenConnection(Exception):
    """The connection ended before the answer did, or the data is not a valid answer."""


def parse_address(url: str) -> tuple[str, int]:
    """Return the host and port of a URL."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 80


def build_request(path: str, body: bytes, headers: Mapping[str, str], method: str = "POST") -> bytes:
    """Return a complete HTTP request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Connection:
    """A keep-alive connection for one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.last_used_at = time.monotonic()
        """Monotonic time of the last answer, or of the connection's start, in seconds."""
        self.is_closing = False
        """Flag for a server that announced the end of the connection."""

    @classmethod
    async def open(cls, address: tuple[str, int]) -> Connection:
        """Connect.

        Raises `BrokenConnection`.
        """
        try:
            return cls(*await asyncio.open_connection(*address))
        except OSError as error:
            raise BrokenConnection(f"no connection: {error}") from None

    async def send(self, content: bytes) -> None:
        """Send the content, and return when the socket has accepted nearly all of it.

        An answer may have arrived before. A broken connection shows when the answer is read.
        """
        try:
            self._writer.write(content)
            await self._writer.drain()
        except OSError:
            return

    async def receive(self) -> Response:
        """Read an answer.

        Raises `BrokenConnection`.
        """
        try:
            response = await self._read_response()
            self.last_used_at = time.monotonic()
            return response
        except asyncio.IncompleteReadError as error:
            raise BrokenConnection(
                f"the connection ended after {len(error.partial)} bytes of a part"
            ) from None
        except (OSError, ValueError, asyncio.LimitOverrunError) as error:
            raise BrokenConnection(repr(error)) from None

    async def read_start(self) -> None:
        """Read only the first bytes of an answer.

        Raises `BrokenConnection`.
        """
        try:
            await self._reader.read(16)
        except OSError as error:
            raise BrokenConnection(repr(error)) from None

    async def _read_response(self) -> Response:
        head = await self._reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1."):
            raise BrokenConnection(f"not an answer: {head[:40]!r}")
        self.is_closing = _CLOSE.search(head) is not None
        if _CHUNKED.search(head):
            content = b"".join([chunk async for chunk in self._read_chunks()])
        else:
            length = _LENGTH.search(head)
            content = await self._reader.readexactly(int(length[1]) if length else 0)
        return Response(int(head[9:12]), head, content)

    async def _read_chunks(self) -> AsyncIterator[bytes]:
        while size := int(await self._reader.readline(), 16):
            yield await self._reader.readexactly(size)
            await self._reader.readline()
        await self._reader.readline()

    def abort(self) -> None:
        """Close at once and discard unsent data."""
        self._writer.transport.abort()

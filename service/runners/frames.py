"""Frames: the encoding of messages between the service and its processes as bytes on a socket.

Each message consists of two lengths (uint32, little-endian), a JSON object, and the bytes that belong to it.
The stream has no other marks: whoever writes must write a message as a whole before the next message begins.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

import orjson

BytesLike: TypeAlias = bytes | memoryview
"""Bytes of one encoded image."""

Frame: TypeAlias = tuple[dict[str, Any], memoryview]
"""Received message: its JSON object, and the bytes behind the object."""

_LENGTHS: Final = struct.Struct("<II")

MAX_PIECE_BYTES: Final = 256 << 10
"""Limit of bytes in one write. A copy of 32 MB would block the event loop for up to 10 ms."""


def encode_frame(values: dict[str, Any], parts: Sequence[BytesLike] = ()) -> bytes:
    """Return a whole message: the lengths, the JSON object, and the bytes that belong to it."""
    return b"".join((encode_header(values, sum(len(part) for part in parts)), *parts))


def encode_header(values: dict[str, Any], payload_size: int) -> bytes:
    """Return the start of a message. The caller writes `payload_size` bytes right after it."""
    header = orjson.dumps(values)
    return _LENGTHS.pack(len(header), payload_size) + header


def split_content(content: memoryview, sizes: Sequence[int]) -> Iterator[memoryview]:
    """Yield parts of these sizes from the bytes behind a message."""
    start = 0
    for size in sizes:
        yield content[start : start + size]
        start += size


def send_message(connection: socket.socket, values: dict[str, Any], parts: Sequence[BytesLike] = ()) -> None:
    """Write one message, and block until it is written.

    The caller must be the only writer of the socket. Do not call this on the event loop.
    """
    connection.sendall(encode_header(values, sum(map(len, parts))))
    for part in parts:
        connection.sendall(part)


def receive_message(connection: socket.socket) -> Frame | None:
    """Block until one message has arrived; return None at the end of the stream.

    Exactly one message is read, so another reader (`FrameDecoder`) can take over the socket afterwards.
    Raises `TimeoutError` if the socket has a time limit.
    """
    lengths = _receive_exactly(connection, _LENGTHS.size)
    if lengths is None:
        return None
    header_size, payload_size = _LENGTHS.unpack(lengths)
    content = _receive_exactly(connection, header_size + payload_size)
    return None if content is None else _parse_frame(content, header_size)


def _receive_exactly(connection: socket.socket, size: int) -> memoryview | None:
    """Return exactly `size` bytes; None when the stream ends before that."""
    content = memoryview(bytearray(size))
    position = 0
    while position < size:
        count = connection.recv_into(content[position:])
        if not count:
            return None
        position += count
    return content


def _parse_frame(content: memoryview, header_size: int) -> Frame:
    return orjson.loads(content[:header_size]), content[header_size:]


class FrameDecoder:
    """A decoder of messages from a stream that arrives in pieces."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._buffered_bytes = 0
        self._needed_bytes = _LENGTHS.size
        """Number of bytes needed to complete the next message."""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Add received bytes, and yield every complete message.

        Exhaust the iterator before the next call: the rest of the bytes is stored only at its end. A caller
        that stops earlier must not use the decoder again. The frames are views of bytes that are never
        overwritten.
        """
        self._pieces.append(data)
        self._buffered_bytes += len(data)
        if self._buffered_bytes < self._needed_bytes:
            return
        data = b"".join(self._pieces)
        start, self._needed_bytes = 0, _LENGTHS.size
        while len(data) - start >= _LENGTHS.size:
            header_size, payload_size = _LENGTHS.unpack_from(data, start)
            end = start + _LENGTHS.size + header_size + payload_size
            if len(data) < end:
                self._needed_bytes = end - start
                break
            yield _parse_frame(memoryview(data)[start + _LENGTHS.size : end], header_size)
            start = end
        self._pieces, self._buffered_bytes = [data[start:]], len(data) - start

"""Frames: the encoding of messages between the service and its processes as bytes on a socket.

Each frame consists of two lengths (uint32, little-endian), the JSON array `[kind, values]`, and the content:
bytes that belong to the message. The stream has no other marks: a writer writes a frame as a whole before
the next frame begins, and a reader that finds anything else (`FrameError`) must not read on.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import orjson

BytesLike: TypeAlias = bytes | memoryview
"""Bytes of one encoded image."""

_LENGTHS: Final = struct.Struct("<II")

MAX_PIECE_BYTES: Final = 256 << 10
"""Limit of bytes in one write or read. A copy of 32 MB would block the event loop for up to 10 ms."""

MAX_REPLY_BYTES: Final = 256 << 20
"""Limit of bytes in a frame that the service reads. The largest has the contracts of all loaded models."""

MAX_REQUEST_BYTES: Final = (1 << 32) - 1
"""Limit of bytes in a frame that a child reads. The service has limited the bodies in it already."""


class FrameError(Exception):
    """The bytes of a stream are not a message, or not a message that is expected.

    The text is a predicate whose subject is the sender: "sent …" or "answered …".
    """


class Frame(NamedTuple):
    """A received message, decoded as far as all messages are alike."""

    kind: str
    """Name of the message's class."""
    values: dict[str, Any]
    content: memoryview
    """Bytes behind the JSON, which are never overwritten."""


def encode_frame(kind: str, values: Any, contents: Sequence[BytesLike] = ()) -> Iterator[memoryview]:
    """Yield the pieces of an encoded message in order.

    Large contents are not copied: the pieces are views of `contents`, which must not change until the last
    piece is written. No other message may be written between two pieces. Raises `TypeError` if JSON has no
    form for a value.
    """
    header = orjson.dumps((kind, values), default=list)  # a list for a named tuple
    size = sum(map(len, contents))
    start = _LENGTHS.pack(len(header), size) + header
    if size <= MAX_PIECE_BYTES:
        yield memoryview(b"".join((start, *contents)))
        return
    yield memoryview(start)
    for content in contents:
        for position in range(0, len(content), MAX_PIECE_BYTES):
            yield memoryview(content)[position : position + MAX_PIECE_BYTES]


def split_content(content: memoryview, sizes: Sequence[int]) -> Iterator[memoryview]:
    """Yield parts of these sizes from the content of a message."""
    start = 0
    for size in sizes:
        yield content[start : start + size]
        start += size


def receive_frame(
    connection: socket.socket, *, max_bytes: int = MAX_REQUEST_BYTES, deadline: float | None = None
) -> Frame | None:
    """Block until one message has arrived; return None if the stream ends before that.

    Exactly one message is read, so another reader (`FrameDecoder`) can take over the socket afterwards.
    `deadline` is a time on the monotonic clock, in seconds. Raises `TimeoutError` when it has passed, and
    `FrameError`.
    """
    lengths = _receive_exactly(connection, _LENGTHS.size, deadline)
    if lengths is None:
        return None
    header_size, content_size = _LENGTHS.unpack(lengths)
    _check_size(header_size + content_size, max_bytes)
    body = _receive_exactly(connection, header_size + content_size, deadline)
    return None if body is None else _parse_body(body, header_size)


def _receive_exactly(connection: socket.socket, size: int, deadline: float | None) -> memoryview | None:
    """Return exactly `size` bytes; None when the stream ends before that.

    Memory is taken for bytes that have arrived only.
    """
    content = bytearray()
    while len(content) < size:
        if deadline is not None:
            set_time_limit(connection, deadline)
        piece = connection.recv(min(size - len(content), MAX_PIECE_BYTES))
        if not piece:
            return None
        content += piece
    return memoryview(content)


def set_time_limit(connection: socket.socket, deadline: float) -> None:
    """Limit the next call to a deadline on the monotonic clock. Raises `TimeoutError` if it has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    connection.settimeout(seconds)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise FrameError(f"sent a message of {size} bytes; the limit is {max_bytes}")


def _parse_body(body: memoryview, header_size: int) -> Frame:
    """Return the frame that consists of these bytes behind the lengths. Raises `FrameError`."""
    try:
        kind, values = orjson.loads(body[:header_size])
    except (TypeError, ValueError) as error:
        raise FrameError(f"sent a header that cannot be read: {error}") from None
    if not isinstance(kind, str) or not isinstance(values, dict):
        raise FrameError("sent a header that is not a kind and an object")
    return Frame(kind, values, body[header_size:])


class FrameDecoder:
    """A decoder of messages from a stream that arrives in pieces."""

    def __init__(self, max_bytes: int = MAX_REPLY_BYTES) -> None:
        """Set the limit of one message in bytes."""
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []
        self._buffered_bytes = 0
        self._needed_bytes = _LENGTHS.size
        """Number of bytes needed to complete the next message."""

    @property
    def is_between_frames(self) -> bool:
        """True if all bytes so far belong to complete messages."""
        return not self._buffered_bytes

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Add received bytes, and yield every complete message.

        Exhaust the iterator before the next call: the rest of the bytes is stored only at its end. A caller
        that stops earlier must not use the decoder again, and neither after a `FrameError`. The frames are
        views of bytes that are never overwritten.
        """
        self._pieces.append(data)
        self._buffered_bytes += len(data)
        if self._buffered_bytes < self._needed_bytes:
            return
        data = b"".join(self._pieces)
        start, self._needed_bytes = 0, _LENGTHS.size
        while len(data) - start >= _LENGTHS.size:
            header_size, content_size = _LENGTHS.unpack_from(data, start)
            end = start + _LENGTHS.size + header_size + content_size
            if len(data) < end:
                _check_size(header_size + content_size, self._max_bytes)
                self._needed_bytes = end - start
                break
            yield _parse_body(memoryview(data)[start + _LENGTHS.size : end], header_size)
            start = end
        self._pieces, self._buffered_bytes = [data[start:]], len(data) - start

"""Calls as bytes of HTTP/2, for what no client of gRPC sends."""

from __future__ import annotations

import socket
import struct

from tests.servers import Server
from tests.service.grpc.channels import grpc_address

_DATA, _HEADERS, _SETTINGS = 0, 1, 4
"""Types of frames."""

_INITIAL_WINDOW_SIZE = 4
"""Identifier of a setting."""

_END_STREAM, _END_HEADERS = 1, 4
"""Flags of frames."""

EMPTY_MESSAGE = bytes(5)
"""A message of gRPC without content: the flag for compression and the length."""


class RawConnection:
    """A connection to the gRPC port. Use it as a context manager."""

    def __init__(self, server: Server, *, window: int = 65_535) -> None:
        """Connect; the server may send `window` bytes of each reply."""
        host, port = grpc_address(server).split(":")
        self._socket = socket.create_connection((host, int(port)), timeout=30)
        settings = struct.pack("!HI", _INITIAL_WINDOW_SIZE, window)
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _encode_frame(_SETTINGS, 0, 0, settings))
        self._next_stream = 1

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def start_call(self, path: bytes, *metadata: tuple[bytes, bytes]) -> int:
        """Start a call without a message, and return the number of its stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        pairs = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path),
            (b":authority", b"x"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            *metadata,
        ]
        block = b"".join(b"\0" + _encode_text(name) + _encode_text(value) for name, value in pairs)
        self._socket.sendall(_encode_frame(_HEADERS, _END_HEADERS, stream, block))
        return stream

    def send_message(self, stream: int, message: bytes = EMPTY_MESSAGE) -> None:
        """Send the only message of a call, with its prefix."""
        self._socket.sendall(_encode_frame(_DATA, _END_STREAM, stream, message))

    def wait_for_end(self, stream: int) -> None:
        """Wait until the server has ended a call."""
        while True:
            length_and_kind = self._receive(9)
            number = struct.unpack("!I", length_and_kind[5:])[0]
            self._receive(int.from_bytes(length_and_kind[:3]))
            is_end = length_and_kind[3] in (_DATA, _HEADERS) and length_and_kind[4] & _END_STREAM
            if number == stream and is_end:
                return

    def _receive(self, size: int) -> bytes:
        content = b""
        while len(content) < size:
            piece = self._socket.recv(size - len(content))
            assert piece, "the server has closed the connection"
            content += piece
        return content


def _encode_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + struct.pack("!I", stream) + payload


def _encode_text(text: bytes) -> bytes:
    """Return a text as HPACK has it, without the Huffman code."""
    assert len(text) < 127
    return bytes([len(text)]) + text

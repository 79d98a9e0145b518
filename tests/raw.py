"""HTTP over raw sockets, for requests that no client library sends."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

CLASSIFY_HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n"
LIVE_REQUEST = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


class Wire:
    """A TCP connection to a server."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=60)
        self._buffer = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def read_response(self) -> WireResponse:
        """Read the next answer, which must have a Content-Length."""
        while b"\r\n\r\n" not in self._buffer:
            self._receive()
        head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        status, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers["content-length"])
        while len(self._buffer) < length:
            self._receive()
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return WireResponse(int(status.split()[1]), headers, body)

    def is_all_read(self) -> bool:
        """Return whether the server has read everything: both ends' queues are empty (proc(5), `net/tcp`)."""
        port = f":{self.socket.getsockname()[1]:04X}"
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        ends = [line.split() for line in lines if port in line]
        return all(end[4] == "00000000:00000000" for end in ends)

    def is_closed(self) -> bool:
        """Return whether the server closes the connection without sending more."""
        return not self._buffer and self.socket.recv(1) == b""

    def _receive(self) -> None:
        chunk = self.socket.recv(1 << 16)
        if not chunk:
            raise EOFError(f"the connection ended after {self._buffer!r}")
        self._buffer += chunk


class WireResponse:
    """An answer as received."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error_code(self) -> str:
        """Return the error code of the body."""
        return str(self.json["error"]["code"])

    @property
    def is_closing(self) -> bool:
        return self.headers.get("connection") == "close"


def classify_request(body: bytes, *headers: bytes) -> bytes:
    """Return a complete classification request."""
    lines = b"".join(header + b"\r\n" for header in headers)
    return CLASSIFY_HEAD + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body

"""The yardstick for Fovea's front process: the least that an HTTP server in Python can do.

asyncio and httptools read a request and its body, and answer 200 bytes of JSON. There is no model, no limit,
no metric, and no other process.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import httptools

_JSON = b'{"predictions":[' + b",".join([b'{"label":"cat","index":0,"probability":0.2}'] * 4) + b"]}"
_JSON_200 = _JSON.ljust(200)
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 200\r\n\r\n" + _JSON_200


class MinimalProtocol(asyncio.Protocol):
    """An HTTP/1.1 connection that gives every request the same answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with the first request."""
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)
        self._body: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        """Parse a piece of a request."""
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Join the body, and answer."""
        body = b"".join(self._body)
        self._body.clear()
        self._transport.write(self.create_answer(body))

    def create_answer(self, body: bytes) -> bytes:
        """Return the answer to a body."""
        return _ANSWER


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(MinimalProtocol, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))

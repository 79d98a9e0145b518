"""Compressed replies (RFC 9110, section 12.5.3): each content is compressed once, and kept compressed."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from starlette.responses import Response
from starlette.types import Scope

VARY: Final = "Accept-Encoding"
"""Value of `Vary` of a reply that can be compressed."""

MIN_BYTES: Final = 1024
"""Size in bytes below which nothing is compressed: the reply fits into one packet anyway."""

_LEVEL: Final = 9
"""Level of gzip. Each content is compressed once, so the smallest result counts: 1.7 MB take 0.1 s."""

_MAX_INLINE_BYTES: Final = 8 << 10
"""Maximum number of bytes that the event loop compresses itself, in less than a millisecond."""

_MAX_KEPT_BYTES: Final = 4 << 20
"""Maximum size in bytes of the contents that a `Compressor` keeps, with their compressed forms."""


def accepts_gzip(accept_encoding: bytes) -> bool:
    """Return True if a request with this header `Accept-Encoding` takes gzip.

    The coding's own weight takes precedence over that of `*`. A weight that is not a number counts as 1.
    """
    weights: dict[str, float] = {}
    for item in accept_encoding.decode("latin-1").lower().split(","):
        coding, *parameters = (part.strip() for part in item.split(";"))
        weights[coding] = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                with contextlib.suppress(ValueError):
                    weights[coding] = float(value)
    return weights.get("gzip", weights.get("*", 0.0)) > 0


def request_accepts_gzip(scope: Scope) -> bool:
    """Return True if an ASGI request takes gzip."""
    return any(name.lower() == b"accept-encoding" and accepts_gzip(value) for name, value in scope["headers"])


async def compress_content(content: bytes) -> bytes:
    """Return the content as gzip, which is always the same for the same content."""
    if len(content) <= _MAX_INLINE_BYTES:
        return gzip.compress(content, _LEVEL, mtime=0)
    return await asyncio.to_thread(gzip.compress, content, _LEVEL, mtime=0)


class Compressor:
    """Replies from content that is compressed once. The least recently used contents are dropped.

    Every method is called on the event loop.
    """

    def __init__(self, max_bytes: int = _MAX_KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._contents: OrderedDict[bytes, bytes] = OrderedDict()
        """Compressed contents by the contents."""
        self._total_bytes = 0

    async def create_response(
        self, scope: Scope, content: bytes, media_type: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        """Return the response to a request, compressed if the request takes gzip."""
        headers = {**(headers or {}), "Vary": VARY}
        if len(content) >= MIN_BYTES and request_accepts_gzip(scope):
            headers["Content-Encoding"] = "gzip"
            content = await self.compress(content)
        return Response(content, media_type=media_type, headers=headers)

    async def compress(self, content: bytes) -> bytes:
        """Return the content as gzip."""
        compressed = self._contents.get(content)
        if compressed is None:
            compressed = await compress_content(content)
            if content not in self._contents:  # another request may have compressed it meanwhile
                self._keep(content, compressed)
        else:
            self._contents.move_to_end(content)
        return compressed

    def _keep(self, content: bytes, compressed: bytes) -> None:
        size = len(content) + len(compressed)
        if size > self._max_bytes:
            return
        while self._total_bytes + size > self._max_bytes:
            oldest, oldest_compressed = self._contents.popitem(last=False)
            self._total_bytes -= len(oldest) + len(oldest_compressed)
        self._contents[content] = compressed
        self._total_bytes += size

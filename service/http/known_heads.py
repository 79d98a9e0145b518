"""Heads of requests that were parsed before.

A client sends the same head again and again: only the value of Content-Length differs. The head of a request
is parsed from its own bytes alone, so the same bytes around that value give the same result.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

_MAX_HEADS: Final = 512
"""Maximum number of heads that are kept."""

_MAX_HEAD_BYTES: Final = 1 << 10
"""Maximum size in bytes of a head that is kept."""

_CONTENT_LENGTH: Final = re.compile(rb"\r\ncontent-length: ?([0-9]{1,15})\r\n", re.IGNORECASE)

_UNIQUE_HEADERS: Final = frozenset({b"traceparent", b"x-request-id"})
"""Headers that differ in every request: such a head does not come again."""


@dataclass(slots=True)
class RequestHead:
    """Request line and headers of a request."""

    method: bytes
    url: bytes
    """Target as sent."""
    version: str
    """HTTP version: "1.1" or "1.0"."""
    headers: list[tuple[bytes, bytes]]
    """Headers with names in lower case, in the order of the request."""
    content_length: int
    """Declared size of the body in bytes; 0 if none is declared."""
    is_chunked: bool
    """True if the body comes in chunks, so that its size is not known."""
    keep_alive: bool
    """True if the client allows further requests on the connection."""
    expects_continue: bool
    """True if the client waits for `100 Continue` before it sends the body."""


class KnownHeads:
    """Parsed heads by their bytes without the value of Content-Length."""

    def __init__(self) -> None:
        self._heads: dict[bytes, RequestHead] = {}

    def find(self, content: bytes) -> RequestHead | None:
        """Return a new head for these bytes, or None if the parser must look at them.

        `content` ends with the first empty line.
        """
        split_head = _split_content_length(content)
        if split_head is None:
            return None
        key, digits = split_head
        known = self._heads.get(key)
        if known is None:
            return None
        headers = [(name, digits if name == b"content-length" else value) for name, value in known.headers]
        return RequestHead(
            known.method,
            known.url,
            known.version,
            headers,
            int(digits),
            known.is_chunked,
            known.keep_alive,
            known.expects_continue,
        )

    def add(self, content: bytes, head: RequestHead) -> None:
        """Keep the head that the parser has read from these bytes, if they may come again."""
        split_head = _split_content_length(content)
        if split_head is None or any(name in _UNIQUE_HEADERS for name, _ in head.headers):
            return
        if len(self._heads) >= _MAX_HEADS:
            self._heads.clear()
        self._heads[split_head[0]] = replace(head, headers=head.headers.copy())


def _split_content_length(content: bytes) -> tuple[bytes, bytes] | None:
    """Return the bytes around the value of Content-Length, and the value; None without such a header.

    A head with a second Content-Length, or with chunks as well, is not valid: it is never added, so never
    found.
    """
    if len(content) > _MAX_HEAD_BYTES:
        return None
    length_match = _CONTENT_LENGTH.search(content)
    if length_match is None:
        return None
    start, end = length_match.span(1)
    # No head holds an empty line, so the key is no other head's.
    return content[:start] + content[end:], length_match[1]

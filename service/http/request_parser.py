"""Parsing of HTTP/1.1 requests with httptools, one request at a time.

The parser never reads beyond the end of a request. The heads of requests and their chunked bodies end with an
empty line, so each call stops behind the next empty line. A body with a Content-Length is counted, and does
not go through httptools. What follows belongs to the next request, and is parsed when the connection is free.
"""

from __future__ import annotations

import re
from typing import Final

import httptools

from fovea.service.errors import BadHttp, HeaderTooLarge, RequestError
from fovea.service.http.known_heads import KnownHeads, RequestHead
from fovea.service.http.observer import log_internal_error

MAX_HEADER_BYTES: Final = 64 << 10
"""Maximum size in bytes of the request line and the headers of a request. Proxies allow 8 to 32 KB."""

_END: Final = b"\r\n\r\n"

_VALID_HOST: Final = re.compile(
    rb"(?:\[[0-9A-Za-z:.%_~\-]+\]|(?:[0-9A-Za-z\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?"
)
"""Valid Host header (RFC 3986, section 3.2): an optional host and an optional port. For an address in
brackets only the characters are checked."""


class RequestParser:
    """Parser of the requests of one connection, one after the other.

    `feed` is called until `is_complete`. It sets `head` first; each later call leaves a piece of the body for
    `take_body`. `start_next` prepares for the next request.
    """

    def __init__(self, known_heads: KnownHeads) -> None:
        """Create the parser; `known_heads` are those of all connections."""
        self._known_heads = known_heads
        self._parser = httptools.HttpRequestParser(self)
        self._clear()

    def _clear(self) -> None:
        self.head: RequestHead | None = None
        self.has_begun = False
        """True after the first byte of a request."""
        self.is_complete = False
        """True when the request has ended, with the last byte of its body or without a body."""
        self._body: bytes | memoryview = b""
        """Piece of the body in the last call of `feed`."""
        self.body_bytes = 0
        """Number of bytes of the body so far."""
        self.missing_bytes = 0
        """Number of bytes that are missing of a body with a Content-Length; 0 for any other request."""
        self.pending_bytes = 0
        """Number of bytes since the parser last completed the headers or a piece of a body."""
        self._has_parsed = False
        """True if httptools has read the head."""
        self._tail = b""
        """Last bytes of an incomplete head or body, in which the empty line may have begun."""
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._header_bytes = 0
        self._pieces: list[bytes] = []

    def start_next(self) -> None:
        """Prepare for the next request."""
        if self._has_parsed and (self.missing_bytes or self.body_bytes):  # httptools still waits for the body
            self._parser = httptools.HttpRequestParser(self)
        self._clear()

    def close(self) -> None:
        """Break the reference cycle with httptools' parser, which only the collector would free."""
        del self._parser

    def feed(self, data: bytes | bytearray, view: memoryview, start: int, end: int) -> int:
        """Parse `data[start:end]` as far as the next empty line or the end of the body.

        Return the position behind. `view` is a view of `data`. Raises `BadHttp` or `HeaderTooLarge`.
        """
        if missing_bytes := self.missing_bytes:
            stop = min(end, start + missing_bytes)
            self._body = view[start:stop]
            self.count_bytes(stop - start)
            return stop
        is_first_piece = not self.has_begun and not self._tail
        stop = self._find_stop(data, start, end)
        if is_first_piece and not self._tail:  # the whole head
            content = bytes(view[start:stop])
            if head := self._known_heads.find(content):
                self._take_known_head(head)
                return stop
            self._parse(content, stop - start)
            if self.head:
                self._known_heads.add(content, self.head)
        else:
            self._parse(view[start:stop], stop - start)
        return stop

    def _take_known_head(self, head: RequestHead) -> None:
        """Take a head that was found without httptools, which does not read this request."""
        self.head = head
        self.has_begun = True
        self.missing_bytes = head.content_length
        self.is_complete = not head.content_length
        self.pending_bytes = 0

    def _parse(self, data: bytes | memoryview, size: int) -> None:
        """Parse `size` bytes with httptools. Raises `BadHttp` or `HeaderTooLarge`."""
        self.pending_bytes += size
        self._feed_httptools(data)
        if self.pending_bytes > MAX_HEADER_BYTES:
            raise _create_too_large_error()
        self._body, self._pieces = b"".join(self._pieces), []
        self.body_bytes += len(self._body)

    def take_body(self) -> bytes | memoryview:
        """Return the piece of the body in the last call of `feed`, once. It is as valid as the fed data."""
        body, self._body = self._body, b""
        return body

    def count_bytes(self, size: int) -> None:
        """Count `size` more bytes of a body with a Content-Length, which may have bypassed the parser."""
        self.body_bytes += size
        self.missing_bytes -= size
        self.is_complete = not self.missing_bytes

    def _feed_httptools(self, data: bytes | memoryview) -> None:
        """Feed httptools. Raises `BadHttp` or `HeaderTooLarge`."""
        self._has_parsed = True
        offers_upgrade = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            offers_upgrade = True
        except httptools.HttpParserError as error:
            # httptools wraps exceptions of the callbacks; the context is the original exception.
            raise _to_request_error(error.__context__) from None
        if offers_upgrade:  # outside of `except`, which would replace that context
            self._ignore_upgrade()

    def _find_stop(self, data: bytes | bytearray, start: int, end: int) -> int:
        """Return the position behind the next empty line, or `end`."""
        if self._tail:  # the empty line may have begun in the data before
            joined = self._tail + data[start : min(end, start + 3)]
            position = joined.find(_END)
            if position >= 0:
                stop = start + position + len(_END) - len(self._tail)
                self._tail = b""
                return stop
        position = data.find(_END, start, end)
        if position >= 0:
            self._tail = b""
            return position + len(_END)
        self._tail = (self._tail + data[max(start, end - 3) : end])[-3:]
        return end

    def _ignore_upgrade(self) -> None:
        """Ignore an offer to upgrade the protocol, as Java's client makes by default.

        httptools ends such a request after its headers and would take its body for the next request
        (MagicStack/httptools#124). The head is therefore parsed again without the offer. Raises `BadHttp` for
        CONNECT, which httptools treats in the same way.
        """
        if self._parser.get_method() == b"CONNECT":
            raise BadHttp("CONNECT is not offered: this service is no proxy")
        start = b"%b %b HTTP/%b\r\n" % (
            self._parser.get_method(),
            self._url,
            self._parser.get_http_version().encode(),
        )
        lines = [name + b": " + value + b"\r\n" for name, value in self._headers if name != b"upgrade"]
        self._parser = httptools.HttpRequestParser(self)
        self._clear()
        self._feed_httptools(start + b"".join(lines) + b"\r\n")

    # --- httptools' calls ---

    def on_message_begin(self) -> None:
        """Note that a request has begun."""
        if self.has_begun:
            raise BadHttp("the request has more data after its end")
        self.has_begun = True

    def on_url(self, url: bytes) -> None:
        """Store a piece of the target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header, or count and drop a trailer of a chunked body.

        Merging trailers into the headers would change decisions already based on the headers (RFC 9110,
        section 6.5.1).
        """
        self._header_bytes += len(name) + len(value)
        if self._header_bytes + len(self._url) > MAX_HEADER_BYTES:
            raise _create_too_large_error()
        if self.head is None:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Check the headers and set `head`."""
        self.pending_bytes = 0
        parser = self._parser
        if not parser.should_upgrade():
            self.head = _create_head(
                parser.get_method(),
                self._url,
                parser.get_http_version(),
                self._headers,
                keep_alive=parser.should_keep_alive(),
            )
            self.missing_bytes = self.head.content_length

    def on_body(self, body: bytes) -> None:
        """Store a piece of a chunked body."""
        self.pending_bytes = 0
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        """Note that the request has ended."""
        self.is_complete = True


def _create_head(
    method: bytes, url: bytes, version: str, headers: list[tuple[bytes, bytes]], *, keep_alive: bool
) -> RequestHead:
    """Return the head of a request.

    Raises `BadHttp` for what the parser accepts but RFC 9112 forbids, or Fovea does not support.
    """
    if version not in ("1.1", "1.0"):
        raise BadHttp(f"the request is HTTP/{version}; send HTTP/1.1")
    host_count = content_length = 0
    is_chunked = expects_continue = False
    for name, value in headers:
        if name == b"host":
            host_count += 1
            if not _VALID_HOST.fullmatch(value):
                raise BadHttp("the Host header is neither a host nor a host and a port")
        elif name == b"content-length":
            content_length = int(value)  # httptools accepts digits alone, and one such header
        elif name == b"transfer-encoding":
            _check_transfer_encoding(value, version)
            is_chunked = True
        elif name == b"expect":
            # HTTP/1.0 clients do not know it (RFC 9110, section 10.1.1).
            expects_continue = version == "1.1" and value.lower() == b"100-continue"
    if host_count != 1 and (host_count or version == "1.1"):
        raise BadHttp(f"the request has {host_count} Host headers; send one")
    return RequestHead(
        method, url, version, headers, content_length, is_chunked, keep_alive, expects_continue
    )


def _check_transfer_encoding(value: bytes, version: str) -> None:
    if version == "1.0":
        raise BadHttp("HTTP/1.0 has no Transfer-Encoding; send a Content-Length")
    if value.lower() != b"chunked":
        coding = value[:100].decode("latin-1")
        raise BadHttp(f"Transfer-Encoding {coding!r} is not offered; send `chunked` alone")


def _create_too_large_error() -> HeaderTooLarge:
    """Return the error for headers above the size limit."""
    return HeaderTooLarge(f"the headers have more than {MAX_HEADER_BYTES} bytes")


def _to_request_error(cause: BaseException | None) -> RequestError:
    """Return the error for a parser exception.

    The error is the exception of a callback, `BadHttp` for invalid input, or an internal error.
    """
    if isinstance(cause, RequestError):
        return cause
    if cause is None or isinstance(cause, httptools.HttpParserError):
        return BadHttp("not a valid HTTP/1.1 request")
    return log_internal_error("")

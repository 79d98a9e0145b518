"""Requests that an ASGI application answers (https://asgi.readthedocs.io, HTTP 2.3)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import MutableMapping
from contextlib import suppress
from enum import Enum, auto
from typing import Any, Final, Protocol
from urllib.parse import unquote

import httptools
from starlette.types import ASGIApp, Message, Scope

from fovea.service.errors import BadHttp, RequestError
from fovea.service.http.known_heads import RequestHead
from fovea.service.http.observer import Observer
from fovea.service.http.request_context import get_context
from fovea.service.http.request_record import RequestRecord
from fovea.service.http.response_stream import (
    CONNECTION_CLOSE,
    CONNECTION_KEEP_ALIVE,
    SMALL_BYTES,
    STATUS_LINES,
    ResponseStream,
)

_MAX_BODY_AHEAD: Final = 64 << 10
"""Number of bytes of a body that wait for the application. Reading pauses above it."""

_BODILESS_STATUSES: Final = (204, 304)
"""Statuses whose answers never have a body."""

_INVALID_IN_VALUE: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
"""Characters that could end a header (RFC 9110, section 5.5)."""


class _Framing(Enum):
    """Mark of the end of an answer's content."""

    EMPTY = auto()
    """There is no content, whatever the application sends: an answer to HEAD, or a status without content."""
    LENGTH = auto()
    """The answer has a Content-Length."""
    CHUNKED = auto()
    UNTIL_CLOSE = auto()
    """The connection closes behind the content: HTTP/1.0 has no chunks."""


class AsgiWriter(Protocol):
    """Interface of a connection, as an ASGI exchange uses it."""

    responses: ResponseStream

    @property
    def date_line(self) -> bytes:
        """The Date header."""

    @property
    def has_long_rest(self) -> bool:
        """True if more of the request's body is missing than any body may have."""

    def write_error(self, error: RequestError, record: RequestRecord) -> None:
        """Send an error as the last answer of the connection."""

    def update_memory(self) -> None:
        """Account for the memory that the exchange holds now."""

    def update_reading(self) -> None:
        """Pause or resume reading, as the exchange needs it now."""

    def end_answer(self) -> None:
        """Go on after the whole answer was sent."""

    def abort_answer(self) -> None:
        """Close the connection, because the answer cannot be completed."""


class AsgiExchange:
    """One request, from its headers to its answer, for an ASGI application.

    Every method runs on the event loop. The connection calls the upper half; the application's task calls
    `_receive` and `_send`.
    """

    def __init__(self, connection: AsgiWriter, observer: Observer, head: RequestHead, scope: Scope) -> None:
        """Create the exchange; `start` starts the application."""
        self._connection = connection
        self._observer = observer
        self._scope = scope
        self._context = get_context(scope)
        self._is_head_request = head.method == b"HEAD"
        self._is_http_1_0 = head.version == "1.0"
        self._must_continue = head.expects_continue
        self._body = bytearray()
        """Received content that the application has not read yet."""
        self._has_more = True
        """True until the whole body has been received."""
        self._message_event = asyncio.Event()
        """Set when there is something for the application to receive."""
        self._task: asyncio.Task[None] | None = None
        self._unsent_head = b""
        """Headers that wait for the first piece of content."""
        self._framing: _Framing | None = None
        self._remaining_bytes = 0
        """Number of bytes that the answer still has to have, by its Content-Length."""
        self.keep_alive = head.keep_alive
        self.response_started = self.response_complete = False

    def start(self, app: ASGIApp) -> asyncio.Task[None]:
        """Start the application, and return its task."""
        self._task = asyncio.get_running_loop().create_task(self._run(app))
        return self._task

    # --- the connection's calls ---

    @property
    def kept_bytes(self) -> int:
        """Number of bytes of the body that the exchange holds."""
        return len(self._body)

    @property
    def is_full(self) -> bool:
        """Return whether reading must pause until the application has read."""
        return len(self._body) > _MAX_BODY_AHEAD

    def get_buffer(self) -> None:
        """Return None: the body is copied from the common buffer."""

    def count_bytes(self, size: int) -> None:
        """Do nothing: `kept_bytes` has the number."""

    def receive_body(self, data: memoryview | bytes) -> None:
        """Keep a piece of the body, unless nobody will read it."""
        if not self.response_complete:
            self._body += data
            self._message_event.set()

    def complete_body(self) -> None:
        """Note that the whole body has been received."""
        self._has_more = False
        self._message_event.set()

    def send_refusal(self) -> None:
        """Do nothing: `refuse` answers at once."""

    def refuse(self, error: RequestError) -> None:
        """Answer with an error in place of the application, and end the connection.

        The application may already have begun to read the request, and not to answer.
        """
        record = self._observer.resolve_record(self._scope)
        if self._task:
            # Set this before `disconnect` cancels the application: `ObserverMiddleware` records the error.
            self._context.sent_error = error
            self.disconnect()
            self._connection.write_error(error, record)
            return
        self._observer.start_request()
        self._observer.record_failure(record, error.code)
        record.status = error.status
        self.response_started = self.response_complete = True
        self._observer.end_request(record)
        self._connection.write_error(error, record)

    def disconnect(self) -> None:
        """Stop the application's work: the client has left, or the connection has sent an answer.

        Invariant: the job is over before its memory is released. `on_disconnect` cancels the application's
        task, which ends its jobs at once. The task's own `with` and `finally` blocks then release its memory.
        """
        self.response_started = self.response_complete = True
        self._body = bytearray()
        self._message_event.set()
        self._context.has_disconnected = True
        if on_disconnect := self._context.on_disconnect:
            # The application registers this callback to cancel its jobs.
            on_disconnect()

    # --- the application ---

    async def _run(self, app: ASGIApp) -> None:
        """Run the application, and close the connection if it leaves the answer incomplete."""
        try:
            with suppress(Exception):  # `ObserverMiddleware` has logged it
                await app(self._scope, self._receive, self._send)
        finally:
            if not self.response_complete:
                self.response_complete = True
                self._connection.abort_answer()

    async def _receive(self) -> Message:
        """Return the received part of the body. From now on the receiver accounts for its memory."""
        if self._must_continue and not self.response_started:
            self._connection.responses.write_continue()
        self._must_continue = False
        if not self.response_complete:
            await self._message_event.wait()
            self._message_event.clear()
        if self.response_complete:
            return {"type": "http.disconnect"}
        body, self._body = bytes(self._body), bytearray()
        self._connection.update_memory()
        self._connection.update_reading()
        return {"type": "http.request", "body": body, "more_body": self._has_more}

    async def _send(self, message: Message) -> None:
        """Send a message of the application. Raises `RuntimeError` for a message that must not come now."""
        while not self._connection.responses.is_writable and not self.response_complete:
            await self._connection.responses.drain()
        kind = message["type"]
        if self._context.has_disconnected:
            return
        if kind == "http.response.start" and not self.response_started:
            self._start_answer(message)
        elif kind == "http.response.body" and self.response_started and not self.response_complete:
            self._write_content(message.get("body", b""), is_last=not message.get("more_body", False))
        else:
            raise RuntimeError(f"the application must not send {kind!r} now")

    def _start_answer(self, message: MutableMapping[str, Any]) -> None:
        """Encode the headers. They wait for the first piece of content, to share a packet with it."""
        self.response_started = True
        self._must_continue = False
        status = message["status"]
        framing = _Framing.UNTIL_CLOSE if self._is_http_1_0 else _Framing.CHUNKED
        lines = [STATUS_LINES[status], self._connection.date_line]
        for name, value in message.get("headers", ()):
            if _INVALID_IN_VALUE.search(value) or _INVALID_IN_VALUE.search(name):
                raise RuntimeError(f"the header {name!r} has characters that no header may have")
            if name.lower() == b"content-length":
                framing, self._remaining_bytes = _Framing.LENGTH, int(value)
            elif name.lower() == b"connection":
                self.keep_alive = self.keep_alive and value.lower() != b"close"
                continue
            lines.append(b"%b: %b\r\n" % (name, value))
        if self._is_head_request or status in _BODILESS_STATUSES:
            framing = _Framing.EMPTY
        elif framing is _Framing.UNTIL_CLOSE:
            self.keep_alive = False
        elif framing is _Framing.CHUNKED:
            lines.append(b"transfer-encoding: chunked\r\n")
        self._framing = framing
        if self._connection.has_long_rest:
            self.keep_alive = False
        if not self.keep_alive:
            lines.append(CONNECTION_CLOSE)
        elif self._is_http_1_0:
            lines.append(CONNECTION_KEEP_ALIVE)
        lines.append(b"\r\n")
        self._unsent_head = b"".join(lines)
        # The application may take long before the content.
        asyncio.get_running_loop().call_soon(self._flush_head)

    def _flush_head(self) -> None:
        if self._unsent_head and not self._context.has_disconnected:
            head, self._unsent_head = self._unsent_head, b""
            self._connection.responses.write(head)

    def _write_content(self, content: bytes, *, is_last: bool) -> None:
        """Send a piece of content, and go on if it is the last one."""
        if self._framing is None:
            raise RuntimeError("the answer has no valid headers")
        if self._framing is _Framing.EMPTY:
            content = b""
        elif self._framing is _Framing.CHUNKED:
            content = b"%x\r\n%b\r\n" % (len(content), content) if content else b""
            content += b"0\r\n\r\n" if is_last else b""
        elif self._framing is _Framing.LENGTH:
            self._remaining_bytes -= len(content)
            if self._remaining_bytes < 0 or (is_last and self._remaining_bytes):
                raise RuntimeError("the answer has another size than its Content-Length")
        if self._unsent_head and len(content) <= SMALL_BYTES:
            content = self._unsent_head + content
            self._unsent_head = b""
        self._flush_head()
        if content:
            self._connection.responses.write(content)
        if is_last:
            self.response_complete = True
            self._body = bytearray()
            self._message_event.set()
            self._connection.end_answer()


def build_scope(
    head: RequestHead,
    client: tuple[str, int] | None,
    server: tuple[str, int | None] | None,
    state: Any,
    scheme: str = "http",
) -> dict[str, Any]:
    """Return the ASGI scope of a request; `scheme` is "http" or "https".

    Raises `BadHttp` if the target is not valid.
    """
    try:
        url = httptools.parse_url(head.url)
        raw_path = url.path or b"/"  # RFC 9112, section 3.2.2: `http://host` has no path
        path = raw_path.decode("ascii")
    except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
        raise BadHttp("the request's target is not a valid URL") from None
    if raw_path == b"*" and head.method != b"OPTIONS":
        raise BadHttp("`*` is a target of OPTIONS alone")
    headers = head.headers
    if url.host is not None:  # it overrides the Host header (RFC 9112, section 3.2.2)
        host = b"[%b]" % url.host if b":" in url.host else url.host
        port = b"" if url.port is None else b":%d" % url.port
        headers = [one for one in headers if one[0] != b"host"]
        headers.append((b"host", host + port))
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": head.version,
        "server": server,
        "client": client,
        "scheme": scheme,
        "method": head.method.decode("ascii"),
        "root_path": "",
        "path": unquote(path) if "%" in path else path,
        "raw_path": raw_path,
        "query_string": url.query or b"",
        "headers": headers,
        "state": state,
    }

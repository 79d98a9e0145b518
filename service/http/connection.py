"""An HTTP/1.1 connection: uvicorn's protocol with additional limits.

* Headers have a time limit and a size limit. Both limits also cover trailers.
* Every body has a time limit and a size limit, even if the request is already answered or refused.
* The memory of all connections is accounted for together (`service.resources.body_memory`): unread bodies,
  pipelined requests, and answers that the client has not read.
* Input that is not HTTP is answered with an error in Fovea's own JSON and counted.
* The number of pipelined requests is limited. The connection reads only the first pieces of a pipelined
  request until the requests before it are answered.
* A client that closes its sending side still gets its answer. A client that leaves is detected even while
  nothing is read from it (`service.http.hangups`).
* If a connection must end while the client still sends, the remaining input is read and discarded first.
  Closing at once would reset the connection, and a reset can destroy the answer before the client reads it.
* Requests that bypass ASGI are handed to `service.http.fast_path`.
* Once the service is stopping, every answer has `Connection: close`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Final
from urllib.parse import unquote

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from fovea.service.errors import (
    BadHttp,
    BodyTimeout,
    BodyTooLarge,
    HeaderTimeout,
    HeaderTooLarge,
    Overloaded,
    RequestError,
)
from fovea.service.http.fast_path import JSON_MEDIA_TYPE, Exchange, FastApp
from fovea.service.http.hangups import HangUpWatcher
from fovea.service.http.lifecycle import Lifecycle, Phase
from fovea.service.http.observer import Observer, encode_error, log_internal_error
from fovea.service.http.request_context import get_context
from fovea.service.http.request_record import RequestRecord
from fovea.service.http.timer import RateLimiter, Timer
from fovea.service.resources.body_memory import BodyMemory
from fovea.service.settings import Settings

log = logging.getLogger(__name__)

MAX_HEADER_BYTES: Final = 64 << 10
"""Maximum size in bytes of the request line and the headers of a request. Proxies allow 8 to 32 KB."""

_LINGER_TIMEOUT: Final = 2.0
"""Time in seconds for a client to read its last answer and close. Further input is discarded meanwhile."""

_MAX_LINGER_BYTES: Final = 64 << 20
"""Maximum number of bytes discarded meanwhile. A client that sends more does not read."""

_MAX_PIPELINED: Final = 100
"""Maximum number of pipelined requests that wait on one connection. uvicorn has no limit, at 2.5 KB each."""

_SMALL_BYTES: Final = 64 << 10
"""Size in bytes up to which data is copied to share a packet. Also the amount that a slow client must read
within `_STALL_TIMEOUT` seconds."""

_STALL_TIMEOUT: Final = 30.0
"""Time in seconds for a client to read `_SMALL_BYTES` bytes of its answer once the socket's buffers are full.
"""

_RESPONSE_PREFIX: Final = b"HTTP/1.1 "
"""First bytes of every answer."""

_REQUEST_BYTES: Final = 2500
"""Memory in bytes that a waiting request takes besides its headers and its body."""

_VALID_HOST: Final = re.compile(
    rb"(?:\[[0-9A-Za-z:.%_~\-]+\]|(?:[0-9A-Za-z\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?"
)
"""Valid Host header (RFC 3986, section 3.2): an optional host and an optional port. For an address in
brackets only the characters are checked."""

_CONNECTION_CLOSE: Final = b"connection: close\r\n"

_ID_HEADERS: Final = (b"x-request-id", b"traceparent")
"""Headers that a refused request keeps, so that its answer and log line carry the caller's ids."""

_BODILESS_STATUSES: Final = (204, 304)
"""Statuses whose answers never have a body."""


class _ParseState(Enum):
    """Part of a request that the connection expects next."""

    NOTHING = 0
    HEADERS = 1
    BODY = 2


class Connection(HttpToolsProtocol, asyncio.BufferedProtocol):
    """uvicorn's connection with additional limits. `on_lost` is called once, when the connection is closed.

    Input is received into a `buffer` that all connections of an event loop share, or into the shared buffer
    of a large body. Allocating memory for each read would fragment the heap.

    Invariant: the job is over before its memory is released. `Exchange._end` closes the handler first, then
    releases the shared buffer. Every path that ends an exchange runs through `Exchange._end`, and then clears
    `_exchange` and `_receives_directly` in the same callback. `get_buffer` therefore never offers a shared
    buffer that has been released.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        app_state: dict[str, Any],
        *,
        settings: Settings,
        lifecycle: Lifecycle,
        observer: Observer,
        fast_app: FastApp,
        body_memory: BodyMemory,
        hangups: HangUpWatcher,
        refusal_limiter: RateLimiter,
        buffer: memoryview,
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(config, state, app_state)
        self._settings = settings
        self._lifecycle = lifecycle
        self._observer = observer
        self._fast_app = fast_app
        self._body_memory = body_memory
        self._hangups = hangups
        self._refusal_limiter = refusal_limiter
        self._buffer = buffer
        self._on_lost = on_lost
        self.url = b""
        self._parse_state = _ParseState.NOTHING
        self._header_bytes = 0
        self._hosts: list[bytes] = []
        self._body_bytes = 0
        """Number of bytes of the newest request's body received so far."""
        self._unparsed_bytes = 0
        """Number of bytes received since the parser last completed the headers or a piece of a body."""
        self._partial_bytes = 0
        """Upper bound in bytes on the incomplete headers received so far."""
        self._accounted_bytes = 0
        """Number of bytes of this connection in the memory account."""
        self._body_seconds: float | None = None
        """Time in seconds that was left for the body when reading was paused."""
        self._is_lingering = False
        """True while the connection lingers: no more requests are answered."""
        self._linger_bytes = _MAX_LINGER_BYTES
        self._ignores_input = False
        """True after a refusal: further input is not parsed."""
        self._has_half_closed = False
        """True when the client has closed its sending side."""
        self._has_sent_prefix = False
        """True when the first bytes of the next answer have already been sent."""
        self._final_error: BadHttp | None = None
        """Error for an invalid request. It is sent after the requests before it are answered."""
        self._current: Exchange | _Cycle | None = None
        """Request that is being answered. uvicorn's `cycle` is the newest request, which may still wait."""
        self._exchange: Exchange | None = None
        """Same object as `_current` if that request bypasses ASGI, else None."""
        self._is_http_1_0 = False
        """True when the request came by HTTP/1.0."""
        self._had_exchange = False
        """True when one of the requests in the current read has bypassed ASGI. Further requests of the same
        read go through ASGI, so that other connections also make progress."""
        self._receives_directly = False
        """True while the rest of the body is received into its shared buffer, bypassing the parser."""
        self._answer_future: asyncio.Future[None] | None = None
        self._timer = Timer(self.loop)
        self._stall_timer: asyncio.TimerHandle | None = None

    # --- asyncio's calls ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Set up flow control and start the time limit for the headers."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` is called for every unread byte
        self._socket: socket.socket = transport.get_extra_info("socket")
        self._descriptor = self._socket.fileno()
        self._observer.metrics.connections.inc()
        self.asgi_transport = _AsgiTransport(self)
        self._timer.arm(self._settings.header_timeout, self._on_header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Abandon the current request, and release the memory and the callbacks of the connection."""
        self._abandon()
        super().connection_lost(exc)
        self._resolve_answer_future()
        self._timer.close()
        self.resume_writing()
        # asyncio closes the socket after this callback, and the kernel may then reuse its descriptor.
        self._hangups.unwatch(self._descriptor)
        self._body_memory.release(self._accounted_bytes)
        self._accounted_bytes = 0
        self._observer.metrics.connections.dec()
        self._on_lost()
        del self.asgi_transport  # break reference cycles, which only the collector would free
        self.flow = self.cycle = None  # type: ignore[assignment]

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether the connection stays open after the client has closed its sending side.

        The connection stays open if an answer is due, because the client may still read.
        """
        if self._is_over or not self._is_answering:
            return False
        if self._parse_state is _ParseState.BODY:  # the body will never be complete
            if not self.pipeline:
                return False
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._current  # type: ignore[assignment]
        self._parse_state = _ParseState.NOTHING
        self._has_half_closed = True
        self._timer.disarm()
        self.cycle.keep_alive = False
        self._hangups.watch(self._descriptor, self._on_hang_up, half_close=False)
        self._probe()
        return True

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the buffer for the next read: the shared buffer of a large body, or the common buffer."""
        if self._receives_directly and self._exchange and self._exchange.shared_buffer:
            # The kernel writes directly into the memory that the runners share.
            return self._exchange.get_buffer(self._exchange.shared_buffer)
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Process the bytes that asyncio has received into the buffer."""
        if self._receives_directly and (exchange := self._exchange):
            exchange.count_bytes(nbytes)
            if exchange.received_bytes == exchange.content_length:
                self._finish_direct_body()
        elif self._is_lingering and nbytes > self._linger_bytes:
            self._close()
        else:
            self._linger_bytes -= nbytes if self._is_lingering else 0
            if not self._ignores_input:
                # The buffer is shared with other connections: its content is valid only until this method
                # returns.
                self._receive(self._buffer[:nbytes])
            elif not self._is_lingering:
                self.flow.pause_reading()  # `_linger` discards the rest, after the answer

    def _receive(self, data: memoryview) -> None:
        """Parse received bytes, refuse invalid input, and set the time limit that applies next."""
        self._unparsed_bytes += len(data)
        self._partial_bytes = len(data) + (
            self._partial_bytes if self._parse_state is _ParseState.HEADERS else 0
        )
        self._had_exchange = False
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            # httptools wraps exceptions of the callbacks; the context is the original exception.
            self._refuse(_to_request_error(error.__context__))
        if self._unparsed_bytes > MAX_HEADER_BYTES:
            self._refuse(_create_too_large_error())
        elif self._parse_state is _ParseState.HEADERS and not self._timer.is_armed and not self._is_answering:
            self._timer.arm(self._settings.header_timeout, self._on_header_timeout)
        elif self._parse_state is _ParseState.BODY:
            self._await_body()
        self.update_memory()

    def pause_writing(self) -> None:
        """Start to watch whether the client reads its answer."""
        super().pause_writing()
        self._watch_reader(0)

    def _watch_reader(self, previous_bytes: int) -> None:
        """Abort the connection if the client has not read `_SMALL_BYTES` bytes since the last check.

        `previous_bytes` is the number of unread bytes at the last check, or 0 at the first check.
        """
        unread_bytes = self.transport.get_write_buffer_size()
        if previous_bytes and unread_bytes > previous_bytes - _SMALL_BYTES:
            self.transport.abort()
        else:
            self._stall_timer = self.loop.call_later(_STALL_TIMEOUT, self._watch_reader, unread_bytes)

    def resume_writing(self) -> None:
        """Stop watching, because the client has read its answer."""
        super().resume_writing()
        self._body_memory.release_answer(self)
        if self._stall_timer:
            self._stall_timer.cancel()
            self._stall_timer = None

    # --- the parser ---

    def _parse(self, data: memoryview) -> None:
        """Feed the parser, and ignore an offer to upgrade the protocol, as Java's client makes by default.

        httptools ends such a request after its headers and would parse its body as the next request
        (MagicStack/httptools#124). The request is therefore parsed again without the offer. httptools also
        ends CONNECT requests early, but they never get here: `on_headers_complete` refuses them.
        """
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                headers = [(name, value) for name, value in self.headers if name != b"upgrade"]
                lines = [name + b": " + value + b"\r\n" for name, value in headers]
                start = b"%s %s HTTP/%s\r\n" % (self._method, self.url, self._version)
                self._renew_parser()
                self.parser.feed_data(start + b"".join(lines) + b"\r\n")

    def _renew_parser(self) -> None:
        """Create a parser with the same options as uvicorn's."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # same as uvicorn

    def on_message_begin(self) -> None:
        """Reset the state for a new request."""
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._hosts = []
        self._parse_state = _ParseState.HEADERS
        self._header_bytes = self._body_bytes = 0
        if self.cycle is not None:
            self._timer.disarm()  # this was the keep-alive limit

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header, or count and drop a trailer of a chunked body.

        Merging trailers into the headers would change decisions already based on the headers (RFC 9110,
        section 6.5.1).
        """
        self._header_bytes += len(name) + len(value)
        if self._header_bytes + len(self.url) > MAX_HEADER_BYTES:
            raise _create_too_large_error()
        if self._parse_state is not _ParseState.HEADERS:
            return
        name = name.lower()
        if name == b"host":
            self._hosts.append(value)
        elif name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Check the headers and start to answer the request."""
        try:
            self._handle_headers()
        except BadHttp as error:
            if self._is_answering:  # the requests before it are answered first
                self._final_error = error
            raise

    def _handle_headers(self) -> None:
        """Check the headers, and open the request as an exchange or as an ASGI cycle."""
        self._timer.disarm()
        self._unparsed_bytes = 0
        method, version = self.parser.get_method(), self.parser.get_http_version()
        self._check_headers(method, version)
        self._offers_upgrade = self.parser.should_upgrade()
        if self._offers_upgrade:
            self._method, self._version = method, version.encode()
            return
        if self._is_over:
            raise BadHttp("the connection has had its last answer")
        if len(self.pipeline) == _MAX_PIPELINED:
            raise Overloaded(f"{_MAX_PIPELINED} requests wait on this connection already", retry_after=1.0)
        if version == "1.0":
            self.expect_100_continue = False  # RFC 9110, section 10.1.1: ignore it
        if not self._open_exchange(method, version):
            self._open_cycle(method, version)
        self._parse_state = _ParseState.BODY
        if self._lifecycle.phase > Phase.READY:
            self.cycle.keep_alive = False

    def _check_headers(self, method: bytes, version: str) -> None:
        """Raise `BadHttp` for headers that the parser accepts but that are not valid here.

        RFC 9112 forbids them, or Fovea does not support them.
        """
        if version not in ("1.1", "1.0"):
            raise BadHttp(f"the request is HTTP/{version}; send HTTP/1.1")
        if method == b"CONNECT":
            raise BadHttp("CONNECT is not offered: this service is no proxy")
        hosts = self._hosts
        if len(hosts) != 1 and (hosts or version == "1.1"):
            raise BadHttp(f"the request has {len(hosts)} Host headers; send one")
        if hosts and not _VALID_HOST.fullmatch(hosts[0]):
            raise BadHttp("the Host header is neither a host nor a host and a port")
        for name, value in self.headers:
            if name == b"transfer-encoding":
                if version == "1.0":
                    raise BadHttp("HTTP/1.0 has no Transfer-Encoding; send a Content-Length")
                if value.lower() != b"chunked":
                    coding = value[:100].decode("latin-1")
                    raise BadHttp(f"Transfer-Encoding {coding!r} is not offered; send `chunked` alone")

    def _open_exchange(self, method: bytes, version: str) -> bool:
        """Return whether the request bypasses ASGI. Requests that must wait for others never do."""
        if self._is_answering or self._had_exchange or self.flow.write_paused:
            return False
        headers = dict(self.headers)
        length = headers.get(b"content-length", b"")
        if method == b"GET" and not length and b"transfer-encoding" not in headers:
            if not self._fast_app.can_answer(self.url):
                return False
            length = b"0"
        if not length.isdigit():
            return False
        record, _ = self._observer.create_record(method.decode(), headers, self.headers, self.client)
        exchange = Exchange(self, self._observer, record, int(length))
        if not exchange.try_open(self._fast_app, method, self.url, headers):
            return False
        exchange.keep_alive = self.parser.should_keep_alive()
        self._is_http_1_0 = version == "1.0"
        self._had_exchange = True
        self._exchange = self._current = exchange
        self.cycle = exchange  # type: ignore[assignment]  # it has the attributes that uvicorn uses
        if self.expect_100_continue and exchange.is_incomplete:
            self.write_bytes(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _open_cycle(self, method: bytes, version: str) -> None:
        """Answer the request by ASGI, at once or after the requests before it. Raises `BadHttp`."""
        try:
            url = httptools.parse_url(self.url)
            raw_path = url.path or b"/"  # RFC 9112, section 3.2.2: `http://host` has no path
            path = raw_path.decode("ascii")
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
            raise BadHttp("the request's target is not a valid URL") from None
        if raw_path == b"*" and method != b"OPTIONS":
            raise BadHttp("`*` is a target of OPTIONS alone")
        if url.host is not None:  # it overrides the Host header (RFC 9112, section 3.2.2)
            host = b"[%b]" % url.host if b":" in url.host else url.host
            port = b"" if url.port is None else b":%d" % url.port
            self.headers = [one for one in self.headers if one[0] != b"host"]
            self.headers.append((b"host", host + port))
        scope = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "method": method.decode("ascii"),
            "root_path": self.root_path,
            "path": self.root_path + (unquote(path) if "%" in path else path),
            "raw_path": self.root_path.encode("ascii") + raw_path,
            "query_string": url.query or b"",
            "headers": self.headers,
            "state": self.app_state.copy(),
        }
        cycle = _Cycle(self, scope, self._header_bytes + len(self.url) + _REQUEST_BYTES)
        self.cycle = cycle
        content_length = dict(self.headers).get(b"content-length", b"")
        if content_length.isdigit() and int(content_length) > self._settings.body_bytes:
            cycle.refuse(self._body_too_large())
        if self._is_answering:
            self.pipeline.appendleft((cycle, self.app))
            self.flow.pause_reading()
        else:
            self._current = cycle
            self._start_asgi_task(cycle, self.app)

    def _body_too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body has more than {self._settings.body_bytes} bytes (FOVEA_BODY_BYTES)")

    def on_body(self, body: bytes) -> None:
        """Pass a piece of the body to the newest request, within the size limit."""
        self._unparsed_bytes = 0
        if isinstance(self.cycle, Exchange):
            self.cycle.receive_body(body)
            return
        self._body_bytes += len(body)
        if self._body_bytes > self._settings.body_bytes:
            raise self._body_too_large()
        if isinstance(self.cycle, _Cycle) and not self.cycle.is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Complete the newest request."""
        if self._offers_upgrade:
            return
        self._parse_state = _ParseState.NOTHING
        self._unparsed_bytes = 0
        if not self.pipeline:
            self._timer.disarm()
        if isinstance(self.cycle, Exchange):
            self.cycle.complete_body()
        else:
            super().on_message_complete()
        if self._is_lingering:
            self._close()
        elif not self._is_answering:
            self._wait_for_next()

    def _await_body(self) -> None:
        """Set the time limit for the rest of the newest request's body."""
        if self._ignores_input or self.pipeline:  # the body is discarded, or must wait
            return
        if exchange := self._exchange:
            # All available input is parsed: a pending refusal can be sent now.
            exchange.send_refusal()
            if not exchange.is_incomplete:
                return
            # From here on the rest of the body bypasses the parser.
            self._receives_directly = exchange.shared_buffer is not None
        if not self._timer.is_armed and not self.flow.read_paused:
            self._timer.arm(self._settings.body_timeout, self._on_body_timeout)

    def _finish_direct_body(self) -> None:
        """Complete an exchange whose body was received into its shared buffer.

        The old parser has not seen the end of the body, so the next request gets a new parser.
        """
        self._receives_directly = False
        self._renew_parser()
        self.on_message_complete()

    # --- memory and reading ---

    def update_memory(self) -> None:
        """Update the memory account to what this connection keeps. Refuse and drop what does not fit."""
        old_bytes, new_bytes = self._accounted_bytes, self._count_kept_bytes()
        if new_bytes > old_bytes and (self._is_over or not self._body_memory.reserve(new_bytes - old_bytes)):
            if not self._is_over:
                self._overload()
            new_bytes = min(old_bytes, self._count_kept_bytes())  # the small remainder is not accounted for
        if new_bytes < old_bytes:
            self._body_memory.release(old_bytes - new_bytes)
        self._accounted_bytes = new_bytes

    def _count_kept_bytes(self) -> int:
        """Return the bytes of incomplete headers, of an unread body, and of waiting requests."""
        size = min(self._partial_bytes, MAX_HEADER_BYTES) if self._parse_state is _ParseState.HEADERS else 0
        if isinstance(self._current, _Cycle):
            size += len(self._current.body)
        for cycle, _ in self.pipeline:
            size += cycle.memory_bytes  # type: ignore[attr-defined]  # every cycle is a `_Cycle`
        return size

    def _overload(self) -> None:
        """Refuse a request because the memory for bodies is exhausted."""
        limit = self._body_memory.limit
        error = Overloaded(f"all bodies together have {limit} bytes (FOVEA_BODIES_BYTES)", retry_after=1.0)
        if self.pipeline:  # refuse the next request; the connection then ends before the others
            oldest = self.pipeline.pop()
            self.pipeline.clear()
            self.pipeline.append(oldest)
            self.cycle = oldest[0]
            self.cycle.refuse(error)  # type: ignore[attr-defined]
            self._ignores_input = True
        elif not self._is_answering:
            self._refuse(error)
        elif isinstance(self._current, _Cycle) and not self._current.response_started:
            self._ignores_input = True
            self._answer_with(error)
        else:
            self._ignores_input = True
            self.cycle.keep_alive = False

    def on_reading_paused(self) -> None:
        """Watch for hang-ups, and stop the time limit of the body, because the client has to wait."""
        self._hangups.watch(self._descriptor, self._on_hang_up, half_close=True)
        if self._parse_state is _ParseState.BODY and self._is_answering and self._timer.is_armed:
            self._body_seconds = self._timer.remaining
            self._timer.disarm()

    def on_reading_resumed(self) -> None:
        """Stop watching for hang-ups, and continue the time limit of the body."""
        self._hangups.unwatch(self._descriptor)
        if self._body_seconds is not None and self._parse_state is _ParseState.BODY and not self._is_over:
            self._timer.arm(self._body_seconds, self._on_body_timeout)
        self._body_seconds = None

    @property
    def can_pause(self) -> bool:
        """Return whether reading may pause. After a half-close there is nothing left to read."""
        return not self._has_half_closed

    def _on_hang_up(self, is_dead: bool) -> None:
        """Handle a hang-up that the watcher reports."""
        if is_dead:
            self._abort()
        else:
            self._probe()

    def _probe(self) -> None:
        """Find out whether a client that has closed its sending side still reads.

        If the client has left, its system reports so when more data arrives. The probe sends the first bytes
        of the answer, because every answer begins with the same bytes.
        """
        if self._current is None or self._current.response_started or self.flow.write_paused:
            return  # writing the answer will show it
        if not self._has_sent_prefix:
            self.write_bytes(_RESPONSE_PREFIX)
            self._has_sent_prefix = True
        if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._abort()

    def _abort(self) -> None:
        """Abandon the requests and abort the connection, because the client has left."""
        self._abandon()
        self.transport.abort()

    def cut_off(self) -> None:
        """Abort the connection to free memory, as `service.resources.body_memory.SlowReader` describes."""
        log.info("a client is cut off that does not read its answer: all bodies together have %d bytes"
                 " (FOVEA_BODIES_BYTES)", self._body_memory.limit)  # fmt: skip
        self._abort()

    # --- an answer's end ---

    def on_response_complete(self) -> None:
        """Start the next request, or wait for one.

        Replaces uvicorn's method, which creates a timer for each answer.
        """
        self._resolve_answer_future()
        if self._is_over:
            return
        self._current = None
        if self.pipeline:
            self._start_next()
        elif self._final_error:
            self._answer_with(self._final_error)
        else:
            self.flow.resume_reading()
            if self._has_half_closed:
                self._close()
            else:
                self._wait_for_next()
        self.update_memory()

    def _start_next(self) -> None:
        """Answer the request that has waited longest. Reading resumes if no other request waits behind it."""
        cycle, app = self.pipeline.pop()
        self._current = cycle  # type: ignore[assignment]
        self._start_asgi_task(cycle, app)
        if len(cycle.body) <= HIGH_WATER_LIMIT:  # else reading resumes when the body is consumed
            self.flow.resume_reading()
        if self._parse_state is _ParseState.BODY:
            self._await_body()

    def _wait_for_next(self) -> None:
        """Set the time limit for the next request, or for the rest of the answered request's body."""
        if self._is_over:
            return
        if self._parse_state is _ParseState.HEADERS:
            self._timer.arm(self._settings.header_timeout, self._on_header_timeout)
        elif self._parse_state is _ParseState.NOTHING:
            self._timer.arm(self._settings.keep_alive, self._close)
        elif not self._timer.is_armed:  # an armed limit stays: the body gets no extra time
            self._timer.arm(self._settings.body_timeout, self._on_body_timeout)

    @property
    def _is_over(self) -> bool:
        """Return whether the connection answers no more requests."""
        return self._is_lingering or self.transport.is_closing()

    def end(self) -> None:
        """Close after an answer: at once, or when the client has stopped sending."""
        is_sending = self._parse_state is _ParseState.BODY or self._ignores_input or self.flow.read_paused
        if is_sending and not self._has_half_closed and not self.transport.is_closing():
            self._linger()
        else:
            self._close()

    def _linger(self) -> None:
        """Send the end of the stream, then discard input until the client closes or the time limit passes."""
        self._is_lingering = True
        self.pipeline.clear()
        self.flow.resume_reading()
        try:
            self.transport.write_eof()
        except OSError:  # the connection has been reset
            self.transport.abort()
        self._timer.arm(_LINGER_TIMEOUT, self._close)

    def _close(self) -> None:
        """Close the connection after the buffered answer is sent."""
        self.transport.close()
        self._timer.disarm()  # `_watch_reader` covers clients that do not read

    # --- answers without ASGI ---

    def respond(
        self,
        exchange: Exchange,
        status: int,
        content: bytes,
        headers: Mapping[str, str],
        media_type: str = JSON_MEDIA_TYPE,
    ) -> None:
        """Write the answer of an exchange.

        The connection ends if the body is still arriving in a shared buffer. The exchange is over and has
        released the buffer, so the connection stops receiving into it.
        """
        if self._parse_state is _ParseState.BODY and (
            self._receives_directly  # the parser does not know how much of the body is left
            or exchange.content_length > self._settings.body_bytes
        ):
            exchange.keep_alive = False
        self._receives_directly = False
        self._exchange = None
        if self.transport.is_closing():
            return
        request_id = exchange.record.request_id
        persistence = b""
        if not exchange.keep_alive:
            persistence = _CONNECTION_CLOSE
        elif self._is_http_1_0:
            persistence = b"connection: keep-alive\r\n"
        self._write(status, content, headers, request_id, media_type, persistence)
        if not exchange.keep_alive:
            self.end()
        self.on_response_complete()

    def refuse_with_delay(self, exchange: Exchange, error: RequestError) -> None:
        """Refuse a request at once, or later if too many requests are refused for lack of capacity.

        Delaying refusals limits the load from callers that retry at once, and leaves time for admitted
        requests.
        """
        delay = self._refusal_limiter.next_delay(self.loop.time()) if isinstance(error, Overloaded) else 0.0
        if delay:
            self.loop.call_later(delay, exchange.refuse, error)
        else:
            exchange.refuse(error)

    def _on_body_timeout(self) -> None:
        """Refuse or close, because the time limit for the body has passed."""
        if self._exchange or self._is_answering:
            self._refuse(BodyTimeout(self._settings.body_timeout))
        else:  # the request is answered, and the rest of its body is not needed
            self._close()

    def _on_header_timeout(self) -> None:
        """Refuse or close, because the time limit for the headers has passed."""
        if self._parse_state is _ParseState.NOTHING:  # the client never sent anything: nothing to answer
            self._close()
            return
        limit = self._settings.header_timeout
        self._refuse(HeaderTimeout(f"the headers did not arrive within {limit:g} s (FOVEA_HEADER_TIMEOUT)"))

    def _refuse(self, error: RequestError) -> None:
        """Answer the newest request with an error and end the connection.

        Earlier requests are answered first.
        """
        if self._ignores_input:
            return
        self._ignores_input = True
        if self._is_over:
            return
        if self._parse_state is _ParseState.BODY:
            self._refuse_newest(error)
        elif not self._is_answering:
            self._answer_with(error)
        elif not self._final_error:
            self._record_error(error)
            self.cycle.keep_alive = False

    def _refuse_newest(self, error: RequestError) -> None:
        """Refuse the request whose body is being received."""
        if self.pipeline:
            self.cycle.refuse(error)  # type: ignore[attr-defined]
        elif self._exchange:
            self._exchange.keep_alive = False
            self._exchange.refuse(error)
        elif not self._is_answering:  # the request is already answered
            self._record_error(error)
            self._linger()
        elif not self.cycle.response_started:
            self._answer_with(error)
        else:
            self._record_error(error)
            self._abandon()
            self._close()

    def _answer_with(self, error: RequestError) -> None:
        """Answer the current request with an error in place of the application.

        The application may already have begun to read the request.
        """
        if isinstance(self._current, _Cycle):
            scope = self._current.scope
            record = self._observer.resolve_record(scope)  # type: ignore[arg-type]  # a plain dict
            # Set this before `_abandon` cancels the application: `ObserverMiddleware` then records the error.
            get_context(scope).sent_error = error  # type: ignore[arg-type]
            self._abandon()
        else:
            record = self._record_error(error, error.status)
        status, content, headers = encode_error(error, record)
        self._write(status, content, headers, record.request_id)
        self._linger()

    def _record_error(self, error: RequestError, status: int = 0) -> RequestRecord:
        """Record an error for input that is not a request, or for a request without an answer."""
        record, _ = self._observer.create_record("", {}, (), self.client)
        record.status = status
        self._observer.record_failure(record, error.code)
        self._observer.log_request(record)
        return record

    def _write(
        self,
        status: int,
        content: bytes,
        headers: Mapping[str, str],
        request_id: str,
        media_type: str = JSON_MEDIA_TYPE,
        persistence: bytes = _CONNECTION_CLOSE,
    ) -> None:
        """Write a complete answer."""
        lines = b"".join([b"%b: %b\r\n" % one for one in self.server_state.default_headers])
        if headers:
            lines += "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
        head = b"%b%bcontent-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n%b\r\n" % (
            STATUS_LINE[status],
            lines,
            media_type.encode(),
            len(content),
            request_id.encode(),
            persistence,
        )
        if len(content) <= _SMALL_BYTES:
            self.write_bytes(head + content)
            return
        self.write_bytes(head)
        self.write_bytes(memoryview(content))  # the transport would copy the rest of `bytes` twice

    def write_bytes(self, data: bytes | memoryview) -> None:
        """Send data. Data that the client does not read at once is held in the memory account."""
        if self._has_sent_prefix:
            self._has_sent_prefix = False
            data = data[len(_RESPONSE_PREFIX) :]
        self.transport.write(data)
        if self.flow.write_paused:
            self._body_memory.reserve_answer(self, self.transport.get_write_buffer_size())

    def _abandon(self) -> None:
        """Notify the application that the current request is over.

        Waiting requests have not begun and are dropped. Receiving stops before the exchange releases its
        shared buffer.
        """
        self._receives_directly = False
        self.pipeline.clear()
        current, self._current = self._current, None
        if self._exchange:
            self._exchange.disconnect()
            self._exchange = None
        elif isinstance(current, _Cycle) and not current.response_complete:
            current.disconnect()

    # --- the service's end ---

    @property
    def _is_answering(self) -> bool:
        """Return whether a request is being answered."""
        return self._current is not None and not self._current.response_complete

    def get_answer_future(self) -> asyncio.Future[None] | None:
        """Return a future that is done when the current exchange is over, or None if there is none."""
        if not self._exchange:
            return None
        self._answer_future = self._answer_future or self.loop.create_future()
        return self._answer_future

    def _resolve_answer_future(self) -> None:
        """Complete the future that `get_answer_future` has returned."""
        if self._answer_future and not self._answer_future.done():
            self._answer_future.set_result(None)
        self._answer_future = None

    def close_after_answer(self) -> None:
        """End the connection after the current answer. An idle connection stays open."""
        if self._is_answering and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def close_if_idle(self) -> None:
        """Close an idle connection that has had an answer.

        A new connection may still send a request, to be refused.
        """
        if self.cycle is not None and not self._is_answering and self._parse_state is _ParseState.NOTHING:
            self._close()

    def close_now(self, error: RequestError) -> bool:
        """Close the connection now. Return whether a request lost its answer."""
        has_lost_answer = self._is_answering
        if has_lost_answer:
            self._ignores_input = True
            self.pipeline.clear()
            self.cycle = self._current  # type: ignore[assignment]
            self._refuse_newest(error)
        self.transport.close()
        return has_lost_answer


class _Cycle(RequestResponseCycle):
    """uvicorn's request cycle for ASGI, with support for HTTP/1.0 and the additional limits."""

    def __init__(self, connection: Connection, scope: Any, overhead_bytes: int) -> None:
        """Create the cycle; `overhead_bytes` is the request's memory in bytes without its body."""
        super().__init__(
            scope=scope,
            transport=connection.asgi_transport,  # type: ignore[arg-type]  # has all methods that an answer uses
            flow=connection.flow,
            logger=connection.logger,
            access_logger=connection.access_logger,
            access_log=connection.access_log,
            default_headers=connection.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=connection.expect_100_continue,
            keep_alive=connection.parser.should_keep_alive(),
            on_response=connection.on_response_complete,
        )
        self._on_read = connection.update_memory
        self._context = get_context(self.scope)  # type: ignore[arg-type]  # a plain dict
        self._overhead_bytes = overhead_bytes
        self._ends_by_close = False
        """True when the end of the answer is marked by closing the connection."""
        self.is_refused = False
        """True when the body is discarded."""

    @property
    def memory_bytes(self) -> int:
        """Return the memory in bytes that the request takes while it waits."""
        return self._overhead_bytes + len(self.body)

    def refuse(self, error: RequestError) -> None:
        """Make the application answer with `error`, then end the connection."""
        self._context.refusal = error
        self.is_refused = True
        self.keep_alive = False
        self.body = bytearray()
        self.scope["headers"] = [one for one in self.scope["headers"] if one[0] in _ID_HEADERS]
        self._overhead_bytes = _REQUEST_BYTES

    def disconnect(self) -> None:
        """Stop the application's work: the client has left, or the connection has sent an answer.

        Invariant: the job is over before its memory is released. `on_disconnect` cancels the application's
        task, which ends its jobs at once. The task's own `with` and `finally` blocks then release its memory.
        """
        self.disconnected = True
        self.body = bytearray()
        self.message_event.set()
        self._context.has_disconnected = True
        if on_disconnect := self._context.on_disconnect:
            # The application registers this callback to cancel its jobs.
            on_disconnect()

    async def receive(self) -> Any:
        """Return the available part of the body. From now on the receiver accounts for its memory."""
        message = await super().receive()
        self._on_read()
        return message

    async def send(self, message: Any) -> None:
        """Send a message of the application, framed for the client's HTTP version."""
        if message["type"] == "http.response.start" and not self.response_started:
            message = self._frame_message(message)
        elif self._ends_by_close:
            # uvicorn compares each piece with the expected length, which is not known here.
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)

    def _frame_message(self, message: Any) -> Any:
        """Return the start of the answer with headers that an HTTP/1.0 client understands.

        Without a length, closing the connection marks the end of the answer.
        """
        if self.scope["http_version"] != "1.0":
            return message
        headers = list(message.get("headers", ()))
        has_length = any(name.lower() == b"content-length" for name, _ in headers)
        has_content = self.scope["method"] != "HEAD" and message["status"] not in _BODILESS_STATUSES
        if has_content and not has_length:  # HTTP/1.0 has no chunked encoding
            self.chunked_encoding = False
            self.keep_alive = False
            self._ends_by_close = True
        if self.keep_alive:
            headers.append((b"connection", b"keep-alive"))
        return {**message, "headers": headers}


class _Flow(FlowControl):
    """uvicorn's flow control, which also notifies the connection.

    While requests wait, reading stays paused.
    """

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        super().__init__(transport)
        self._connection = connection

    def pause_reading(self) -> None:
        """Pause reading and notify the connection."""
        if not self.read_paused and self._connection.can_pause:
            super().pause_reading()
            self._connection.on_reading_paused()

    def resume_reading(self) -> None:
        """Resume reading and notify the connection, unless requests wait."""
        if self.read_paused and not self._connection.pipeline and self._connection.can_pause:
            super().resume_reading()
            self._connection.on_reading_resumed()


class _AsgiTransport:
    """Transport for ASGI answers. Closing it ends the connection in order."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pending_data = b""

    def write(self, data: bytes) -> None:
        """Send headers and the data that follows at once together: two packets cost twice as much."""
        if self._pending_data and len(data) > _SMALL_BYTES:
            self._flush()
            self._connection.write_bytes(data)
        elif self._pending_data:
            self._connection.write_bytes(self._pending_data + data)
            self._pending_data = b""
        else:
            self._pending_data = data
            # The application may take long before the body: send the headers in the next iteration of the
            # event loop.
            self._connection.loop.call_soon(self._flush)

    def close(self) -> None:
        """Send held data, and end the connection in order."""
        self._flush()
        self._connection.end()

    def is_closing(self) -> bool:
        """Return whether the connection is closing."""
        return self._connection.transport.is_closing()

    def _flush(self) -> None:
        """Send held data."""
        if self._pending_data:
            self._connection.write_bytes(self._pending_data)
            self._pending_data = b""


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

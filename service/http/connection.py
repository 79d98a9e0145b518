"""An HTTP/1.1 connection: one request at a time, with limits on time and memory in every state.

| state | meaning | time limit |
|---|---|---|
| `IDLE` | no request has begun | keep-alive limit, then close |
| `HEADERS` | a head is incomplete | header limit, then 408 |
| `BODY` | a body is incomplete | body limit, then 408 |
| `ANSWERING` | a whole request waits for its answer | the application's |
| `LINGERING` | the last answer is sent; input is discarded | 2 s, then close |
| `CLOSED` | the connection is closing or closed | |

`TRANSITIONS` has the legal changes. In `BODY` the request may have its answer already; the rest of its body
is then dropped, and `IDLE` follows.

* **Pipelining.** What a client sends behind a request waits, unparsed, until the request is answered. Nothing
  more is read meanwhile, so a client that leaves is detected by `service.http.hangups`. Requests that came in
  one read are answered in different rounds of the event loop, so that other connections make progress.
* **Memory.** The memory of all connections is accounted for together (`service.resources.body_memory`):
  incomplete heads, unread bodies, input that waits, and answers that the client has not read.
* **Half-close.** A client that closes its sending side still gets the answer to a whole request.
* **Lingering.** If a connection must end while the client still sends, the remaining input is read and
  discarded first. Closing at once would reset the connection, and a reset can destroy the answer before the
  client reads it.
* **Applications.** `service.http.fast_path` answers what it can; `service.http.asgi_exchange` passes the rest
  to the ASGI application. Both are an exchange, and the connection treats them alike.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Any, Final

from fovea.service.errors import (
    BodyTimeout,
    BodyTooLarge,
    CertificateRequired,
    HeaderTimeout,
    Overloaded,
    RequestError,
)
from fovea.service.http.asgi_exchange import AsgiExchange, build_scope
from fovea.service.http.fast_path import JSON_MEDIA_TYPE, Exchange, open_exchange
from fovea.service.http.known_heads import RequestHead
from fovea.service.http.lifecycle import Phase
from fovea.service.http.observer import encode_error
from fovea.service.http.rate_limiter import find_refusal_delay
from fovea.service.http.read_control import ReadControl
from fovea.service.http.request_parser import MAX_HEADER_BYTES, RequestParser
from fovea.service.http.request_record import RequestRecord
from fovea.service.http.response_stream import (
    CONNECTION_CLOSE,
    CONNECTION_KEEP_ALIVE,
    SMALL_BYTES,
    ResponseStream,
)
from fovea.service.http.server_context import ServerContext
from fovea.service.timer import Timer

log = logging.getLogger(__name__)

_LINGER_TIMEOUT: Final = 2.0
"""Time in seconds for a client to read its last answer and close. Further input is discarded meanwhile."""

_MAX_LINGER_BYTES: Final = 64 << 20
"""Maximum number of bytes discarded meanwhile. A client that sends more does not read."""

_MAX_PIECES: Final = 256
"""Maximum number of pieces of input that are parsed in one round of the event loop. A chunked body full of
empty lines has a piece for every four bytes, which takes 1.5 µs."""


class State(Enum):
    """State of a connection; the module's docstring has the table."""

    IDLE = auto()
    HEADERS = auto()
    BODY = auto()
    ANSWERING = auto()
    LINGERING = auto()
    CLOSED = auto()


TRANSITIONS: Final = {
    State.IDLE: {State.HEADERS, State.BODY, State.LINGERING, State.CLOSED},
    State.HEADERS: {State.BODY, State.LINGERING, State.CLOSED},
    State.BODY: {State.ANSWERING, State.LINGERING, State.CLOSED},
    State.ANSWERING: {State.IDLE, State.LINGERING, State.CLOSED},
    State.LINGERING: {State.CLOSED},
    State.CLOSED: set[State](),
}
"""States that may follow each state. A head leads to `BODY` even if no body follows: `ANSWERING` is next."""

_RECEIVING: Final = (State.IDLE, State.HEADERS, State.BODY)
"""States in which input belongs to the newest request."""


class Connection(asyncio.BufferedProtocol):
    """One connection. `on_lost` is called once, when the connection is closed.

    Invariant: the job is over before its memory is released. `Exchange._end` closes the handler first, then
    releases the shared buffer and clears `Exchange.shared_buffer`. `get_buffer` therefore never offers a
    shared buffer that has been released.
    """

    def __init__(self, server: ServerContext, on_lost: Callable[[], None]) -> None:
        """Create the connection; asyncio calls `connection_made` next."""
        self._server = server
        self._settings = server.settings
        self._observer = server.observer
        self._loop = asyncio.get_running_loop()
        self._buffer = memoryview(server.buffer)
        self._on_lost = on_lost
        self._state = State.IDLE
        self._parser = RequestParser(server.known_heads)
        self._timer = Timer(self._loop)
        self._exchange: Exchange | AsgiExchange | None = None
        """Request whose body is arriving, or that is being answered."""
        self._is_new = True
        """True until the first request is complete."""
        self.is_health_only = False
        """True if the client lacks a certificate that the service asks for: only health is answered."""
        self._is_http_1_0 = False
        """True when the newest request came by HTTP/1.0."""
        self._rest = b""
        """Input behind the newest request, which waits until the request is answered."""
        self._rest_start = 0
        """Position in `_rest` of the first byte that is not parsed."""
        self._receives_directly = False
        """True if the next bytes go into the shared buffer of a body."""
        self._is_parsing = False
        """True inside `_parse`."""
        self._has_more_input = False
        """True while `_parse` has input behind the part that it passes on."""
        self._rest_error: RequestError | None = None
        """Error that is sent instead of parsing the rest, after the request is answered."""
        self._linger_bytes = _MAX_LINGER_BYTES
        self._accounted_bytes = 0
        """Number of bytes of this connection in the memory account."""
        self._answer_future: asyncio.Future[None] | None = None
        self._delayed_refusal: asyncio.TimerHandle | None = None
        """Timer of the last refusal with a delay."""

    # --- asyncio's calls ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit for the first request."""
        self._transport = transport
        self.responses = ResponseStream(transport, self._server.body_memory, self)
        self._reading = ReadControl(transport, self._server.hangups, self._on_hang_up)
        self._client = _to_address(transport.get_extra_info("peername"))
        self._server.connections.add(self)
        self._observer.metrics.connections.inc()
        self._timer.arm(self._settings.header_timeout, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Abandon the request, and release the memory and the callbacks of the connection."""
        self._state = State.CLOSED
        try:
            self._abandon()
        finally:  # the connection is gone, whatever the application does
            self._release()

    def _release(self) -> None:
        """Release what the connection holds, after it is lost."""
        self._resolve_answer_future()
        if self._delayed_refusal:  # it would keep the connection until then
            self._delayed_refusal.cancel()
        self._timer.close()
        self._parser.close()
        self.responses.close()
        self._reading.close()
        self.update_memory()
        self._server.connections.discard(self)
        self._observer.metrics.connections.dec()
        self._on_lost()

    def eof_received(self) -> bool:
        """Return whether the connection stays open after the client has closed its sending side."""
        exchange = self._exchange
        if exchange is None or self._state is not State.ANSWERING:  # no whole request waits for its answer
            self._abandon()
            self._close()
            return False
        exchange.keep_alive = False
        self._reading.watch_half_closed()
        self._probe()
        return True

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the buffer for the next read: the shared buffer of a large body, or the common buffer."""
        # With a shared buffer, the kernel writes directly into the memory that the runners share.
        buffer = self._exchange.get_buffer() if self._exchange and self._state is State.BODY else None
        self._receives_directly = buffer is not None
        return self._buffer if buffer is None else buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Process the bytes that asyncio has received into the buffer."""
        if self._receives_directly and self._exchange:
            self._parser.count_bytes(nbytes)
            self._exchange.count_bytes(nbytes)
            if self._parser.is_complete and self._state is State.BODY:
                self._complete_body()
        elif self._state is State.LINGERING:
            self._linger_bytes -= nbytes
            if self._linger_bytes < 0:
                self._close()
        else:
            self._parse(self._server.buffer, self._buffer, 0, nbytes)

    def pause_writing(self) -> None:
        """Note that the client has not read everything."""
        self.responses.pause()

    def resume_writing(self) -> None:
        """Note that the client has read everything."""
        self.responses.resume()

    # --- input ---

    def _parse(self, data: bytes | bytearray, view: memoryview, start: int, end: int) -> None:
        """Parse `data[start:end]` as far as the end of the newest request; `view` is a view of `data`."""
        self._is_parsing = True
        try:
            start = self._parse_message(data, view, start, end)
            if start < end:
                self._keep_rest(data, start, end)
            elif self._state is State.BODY:
                self._await_body()
        finally:
            self._is_parsing = self._has_more_input = False
            self.update_memory()
            self.update_reading()

    def _parse_message(self, data: bytes | bytearray, view: memoryview, start: int, end: int) -> int:
        """Parse one request as far as it has arrived, and return the position behind."""
        if self._state not in _RECEIVING:
            return start
        parser = self._parser
        try:
            for _ in range(_MAX_PIECES):
                start = parser.feed(data, view, start, end)
                self._has_more_input = start < end
                is_last = parser.is_complete
                if self._state is State.BODY:
                    self._pass_body()
                else:
                    self._pass_head()
                if start == end or is_last or self._state not in _RECEIVING:
                    break
        except RequestError as error:
            self._refuse(error)
        return start

    def _pass_head(self) -> None:
        """Open the exchange if the head is complete, else set its time limit. Raises `RequestError`."""
        if head := self._parser.head:
            self._timer.disarm()
            self._open_exchange(head)
        elif self._state is State.IDLE and self._parser.has_begun:
            self._state = State.HEADERS
            # The first head must arrive within the limit since the connection was opened.
            seconds = self._timer.remaining if self._is_new else self._settings.header_timeout
            self._timer.arm(seconds, self._on_header_timeout)

    def _pass_body(self) -> None:
        """Pass on the received part of the body. Raises `BodyTooLarge`."""
        parser, exchange = self._parser, self._exchange
        assert exchange  # noqa: S101 - `_open_exchange` has set it
        if parser.body_bytes > self._settings.body_bytes:
            raise self._create_too_large_error()
        exchange.receive_body(parser.take_body())
        if parser.is_complete and self._state is State.BODY:
            self._complete_body()

    def _open_exchange(self, head: RequestHead) -> None:
        """Open the exchange for a head. Raises `RequestError`."""
        if self.is_health_only and not self._server.is_health_request(head):
            raise CertificateRequired(
                "the service needs a client certificate (FOVEA_TLS_CLIENT_CA) for this route"
            )
        self._is_new = False
        self._is_http_1_0 = head.version == "1.0"
        self._state = State.BODY
        if self._server.lifecycle.phase > Phase.READY:
            head.keep_alive = False
        exchange = None
        if self.responses.is_writable:
            exchange = open_exchange(self, self._server.fast_app, self._observer, head, self._client)
        if exchange is None:
            self._open_asgi(head)
        else:
            self._exchange = exchange
            if head.expects_continue and exchange.is_incomplete:
                self.responses.write_continue()
        if self._parser.is_complete:  # the request has no body
            self._complete_body()

    def _open_asgi(self, head: RequestHead) -> None:
        """Pass the request to the ASGI application. Raises `BadHttp`."""
        server = self._server
        address = _to_address(self._transport.get_extra_info("sockname"))
        scope = build_scope(head, self._client, address, server.asgi_state.copy(), server.scheme)
        exchange = AsgiExchange(self, self._observer, head, scope)
        self._exchange = exchange
        if head.content_length > self._settings.body_bytes:
            exchange.refuse(self._create_too_large_error())
        else:
            task = exchange.start(server.asgi)
            server.tasks.add(task)
            task.add_done_callback(server.tasks.discard)

    def _complete_body(self) -> None:
        """Note that the newest request is complete: its answer is due, unless it is answered already."""
        exchange = self._exchange
        assert exchange  # noqa: S101 - `_open_exchange` has set it
        self._timer.disarm()
        self._parser.start_next()
        self._state = State.ANSWERING
        if exchange.response_complete:
            self._start_next()
        else:
            exchange.complete_body()

    def _await_body(self) -> None:
        """Set the time limit for the rest of the body, unless a pending refusal ends the connection."""
        if exchange := self._exchange:
            exchange.send_refusal()  # all available input is parsed: it can be sent now
        if self._reading.is_reading and not self._timer.is_armed:
            self._timer.arm(self._settings.body_timeout, self._on_body_timeout)

    def _keep_rest(self, data: bytes | bytearray, start: int, end: int) -> None:
        """Keep input until the newest request is answered, or until the next round of the event loop."""
        if self._state in _RECEIVING:  # it is answered already, or has many pieces
            self._loop.call_soon(self._parse_rest)
        elif self._state is not State.ANSWERING:
            return
        if isinstance(data, bytes) and 2 * start < end:  # a copy for each small request would take long
            self._rest, self._rest_start = data, start
        else:
            self._rest, self._rest_start = bytes(data[start:end]), 0

    def _parse_rest(self) -> None:
        """Parse the input that has waited, in a new round of the event loop."""
        if self._state is State.CLOSED:  # lost meanwhile
            return
        rest, start = self._rest, self._rest_start
        self._drop_rest()
        self.update_memory()  # the request's own body is accounted for anew
        try:
            self._parse(rest, memoryview(rest), start, len(rest))
        except BaseException:  # asyncio closes a connection for an error in its own calls alone
            self._abort()
            raise

    def _drop_rest(self) -> None:
        self._rest, self._rest_start = b"", 0

    # --- memory and reading ---

    def update_memory(self) -> None:
        """Update the memory account to what this connection keeps. Refuse and drop what does not fit."""
        if self._is_parsing:  # `_parse` calls this again at its end
            return
        memory, old_bytes = self._server.body_memory, self._accounted_bytes
        new_bytes = self._count_kept_bytes()
        if new_bytes > old_bytes and not memory.reserve(new_bytes - old_bytes):
            self._refuse_for_memory()
            self.update_memory()  # nothing is kept now, or less
            return
        if new_bytes < old_bytes:
            memory.release(old_bytes - new_bytes)
        self._accounted_bytes = new_bytes

    def _count_kept_bytes(self) -> int:
        """Return the bytes of an incomplete head, of an unread body, and of input that waits."""
        if self._state is State.LINGERING or self._state is State.CLOSED:
            return 0
        size = min(self._parser.pending_bytes, MAX_HEADER_BYTES) + len(self._rest)
        return size + self._exchange.kept_bytes if self._exchange else size

    def _refuse_for_memory(self) -> None:
        """Refuse a request because the memory for bodies is exhausted."""
        limit = self._server.body_memory.limit
        error = Overloaded(f"all bodies together have {limit} bytes (FOVEA_BODIES_BYTES)", retry_after=1.0)
        if self._state is State.ANSWERING and self._rest:
            self._drop_rest()
            self._rest_error = error
        else:
            self._refuse(error)

    def update_reading(self) -> None:
        """Pause reading while input waits, or while the application has not read the body; else resume it.

        The time limit of a body stands still meanwhile, because the client has to wait.
        """
        must_wait = self._rest or self._rest_error or (self._exchange and self._exchange.is_full)
        should_read = not must_wait or self._state is State.LINGERING
        if should_read is self._reading.is_reading or self._is_parsing:
            return
        if should_read:
            self._reading.resume()
            if self._state is State.BODY:
                self._timer.resume()
                self._await_body()
        else:
            self._reading.pause()
            if self._state is State.BODY:
                self._timer.pause()

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
        if self._exchange is None or self._exchange.response_started or not self.responses.is_writable:
            return  # writing the answer, or what is written already, will show it
        self.responses.write_prefix()
        if self._reading.has_error():
            self._abort()

    # --- refusals ---

    def refuse_input(self, error: RequestError) -> None:
        """Answer with an error before anything is parsed, because the input is not HTTP in the clear."""
        self._refuse(error)

    def _on_header_timeout(self) -> None:
        """Refuse, because the time limit for the head has passed."""
        limit = self._settings.header_timeout
        self._refuse(HeaderTimeout(f"the headers did not arrive within {limit:g} s (FOVEA_HEADER_TIMEOUT)"))

    def _on_body_timeout(self) -> None:
        """Refuse or close, because the time limit for the body has passed."""
        if self._is_answer_due:
            self._refuse(BodyTimeout(self._settings.body_timeout))
        else:  # the request is answered, and the rest of its body is not needed
            self._close()

    def _create_too_large_error(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body has more than {self._settings.body_bytes} bytes (FOVEA_BODY_BYTES)")

    def _refuse(self, error: RequestError) -> None:
        """Answer the newest request with an error and end the connection."""
        exchange = self._exchange
        if exchange and not exchange.response_started:
            exchange.keep_alive = False
            exchange.refuse(error)
            return
        record = self._record_error(error)
        if exchange is None:
            self.write_error(error, record)
        elif exchange.response_complete:
            self._linger()
        else:  # the answer has begun: only closing the connection can signal the error
            self._abandon()
            self._close()

    def _record_error(self, error: RequestError) -> RequestRecord:
        """Record an error for input that is not a request, or for a request that is answered already."""
        record, _ = self._observer.create_record("", {}, (), self._client)
        record.status = 0 if self._exchange else error.status
        self._observer.record_failure(record, error.code)
        self._observer.log_request(record)
        return record

    def write_error(self, error: RequestError, record: RequestRecord) -> None:
        """Send an error as the last answer of the connection."""
        status, content, headers = encode_error(error, record)
        lines = self._server.date_line + record.cors_lines + CONNECTION_CLOSE
        self.responses.write_answer(status, content, headers, record.request_id, JSON_MEDIA_TYPE, lines)
        self._linger()

    # --- answers ---

    def respond(
        self,
        exchange: Exchange,
        status: int,
        content: bytes,
        headers: Mapping[str, str],
        media_type: str = JSON_MEDIA_TYPE,
    ) -> None:
        """Write the answer of an exchange, which is over and has released its shared buffer."""
        missing_bytes = self._parser.missing_bytes
        if missing_bytes and (self.has_long_rest or missing_bytes > SMALL_BYTES):
            exchange.keep_alive = False
        lines = self._server.date_line
        if exchange.record.cors_lines:
            lines += exchange.record.cors_lines
        if not exchange.keep_alive:
            lines += CONNECTION_CLOSE
        elif self._is_http_1_0:
            lines += CONNECTION_KEEP_ALIVE
        self.responses.write_answer(status, content, headers, exchange.record.request_id, media_type, lines)
        self.end_answer()

    def refuse_with_delay(self, exchange: Exchange, error: RequestError) -> None:
        """Refuse a request at once, or later if its caller or all callers get too many refusals.

        Delaying refusals limits the load from callers that retry at once, and leaves time for admitted
        requests.
        """
        delay = find_refusal_delay(error, self._server.refusal_limiter, self._loop.time())
        if delay:
            self._delayed_refusal = self._loop.call_later(delay, exchange.refuse, error)
        else:
            exchange.refuse(error)

    @property
    def date_line(self) -> bytes:
        """The Date header."""
        return self._server.date_line

    @property
    def has_long_rest(self) -> bool:
        """True if more of the body is missing than any body may have."""
        return self._parser.missing_bytes > self._settings.body_bytes

    def end_answer(self) -> None:
        """Go on after a whole answer: with the next request, the rest of the body, or the end."""
        exchange = self._exchange
        assert exchange  # noqa: S101 - its answer was written just now
        if self._answer_future:
            self._resolve_answer_future()
        if not exchange.keep_alive:
            self._end()
        elif self._state is State.ANSWERING:
            self._start_next()
        else:  # the rest of the body is dropped
            self.update_memory()
            self.update_reading()
            self._await_body()

    def _start_next(self) -> None:
        """Wait for the next request, or parse what has come of it."""
        self._state = State.IDLE
        self._exchange = None
        self._timer.arm(self._settings.keep_alive, self._close)
        if self._rest_error:
            self._refuse(self._rest_error)
        elif self._rest:
            self._loop.call_soon(self._parse_rest)
        elif self._accounted_bytes or not self._reading.is_reading:
            self.update_memory()
            self.update_reading()

    def _end(self) -> None:
        """Close after the last answer: at once, or when the client has stopped sending."""
        if self._state is State.BODY or not self._reading.is_reading or self._has_more_input:
            self._linger()
        else:
            self._close()

    def _linger(self) -> None:
        """Send the end of the stream, then discard input until the client closes or the time limit passes."""
        self._state = State.LINGERING
        self._resolve_answer_future()
        self._drop_rest()
        self.update_memory()
        self.update_reading()
        try:
            self._transport.write_eof()
        except OSError:  # the connection has been reset
            self._transport.abort()
        self._timer.arm(_LINGER_TIMEOUT, self._close)

    def _close(self) -> None:
        """Close the connection after the buffered answer is sent."""
        self._state = State.CLOSED
        self._transport.close()
        self._timer.disarm()  # `_watch_reader` covers clients that do not read

    def _abort(self) -> None:
        """Abandon the request and abort the connection, because the client has left."""
        self._state = State.CLOSED
        self._abandon()
        self._transport.abort()
        self._timer.disarm()  # it may be due in this round of the event loop

    def abort_answer(self) -> None:
        """Close the connection, because its answer cannot be completed."""
        self._close()

    def cut_off(self) -> None:
        """Abort the connection to free memory, as `service.resources.body_memory.SlowReader` describes."""
        log.info("a client is cut off that does not read its answer: all bodies together have %d bytes"
                 " (FOVEA_BODIES_BYTES)", self._server.body_memory.limit)  # fmt: skip
        self._abort()

    def _abandon(self) -> None:
        """Notify the application that the request is over."""
        exchange, self._exchange = self._exchange, None
        self._drop_rest()
        if exchange and not exchange.response_complete:
            exchange.disconnect()

    # --- the service's end ---

    @property
    def _is_answer_due(self) -> bool:
        """Return whether a request waits for its answer, or for the rest of its answer."""
        return self._exchange is not None and not self._exchange.response_complete

    def get_answer_future(self) -> asyncio.Future[None] | None:
        """Return a future that is done when the newest answer is sent, or None if no answer is due."""
        if not self._is_answer_due:
            return None
        self._answer_future = self._answer_future or self._loop.create_future()
        return self._answer_future

    def _resolve_answer_future(self) -> None:
        """Complete the future that `get_answer_future` has returned."""
        if self._answer_future and not self._answer_future.done():
            self._answer_future.set_result(None)
        self._answer_future = None

    def close_after_answer(self) -> None:
        """End the connection after the current answer. An idle connection stays open."""
        if self._exchange and not self._exchange.response_started:
            self._exchange.keep_alive = False

    def close_if_idle(self) -> None:
        """Close an idle connection that has had an answer.

        A new connection may still send a request, to be refused.
        """
        if self._state is State.IDLE and not self._is_new and not self._rest:
            self._close()

    def close_now(self, error: RequestError) -> bool:
        """Close the connection now. Return whether a request lost its answer."""
        has_lost_answer = self._is_answer_due
        if has_lost_answer:
            self._refuse(error)
        self._close()
        return has_lost_answer


def _to_address(name: Any) -> tuple[str, int] | None:
    """Return host and port of a socket's name; None for a Unix socket."""
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) and len(name) >= 2 else None

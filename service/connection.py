"""One HTTP/1.1 connection: uvicorn's protocol, with the limits that it lacks.

* Headers have a time limit and a size; so has what follows them and is no body (trailers).
* What is not HTTP is answered in our own JSON, and counted.
* So many requests may be sent ahead of their answers, and no more.
* A connection that is to end while the client still sends is read out first: closing it at once would
  reset it, and a reset can destroy the answer before the client has seen it.
* What the application answers past ASGI is given to it (`service.direct`).
* Once the service is on its way out, every answer says `Connection: close`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Final

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from service.direct import JSON, Application, Turn
from service.errors import BadHttp, BodyTimeout, HeaderTimeout, HeaderTooLarge, Overloaded, RequestError
from service.lifecycle import Lifecycle, Phase
from service.observe import Observer, describe
from service.record import Record
from service.settings import Settings
from service.timer import Timer

HEADER_BYTES: Final = 64 << 10
"""Most bytes of one request's line and headers; proxies allow 8 to 32 KB."""

_LINGER: Final = 2.0
"""Seconds for a client to read its last answer and close, while what it still sends is thrown away."""

_PIPELINED: Final = 100
"""Most requests that one connection may have waiting: uvicorn takes as many as come, 2.5 KB each."""

_SMALL: Final = 64 << 10
"""Bytes that are copied rather than sent in a packet of their own."""

_STUCK: Final = 30.0
"""Seconds for a client to make room for its answer, once the socket's buffers are full."""


class _Stage(Enum):
    """What the connection is about to receive."""

    NOTHING = 0
    HEADERS = 1
    BODY = 2


class Connection(HttpToolsProtocol, asyncio.BufferedProtocol):
    """uvicorn's connection within our limits. `on_lost` is called once, when the connection is gone.

    What comes is received into a `buffer` that all connections of an event loop share, or into the slot of
    a large body: fresh memory for each read would leave the heap full of holes.
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
        direct: Application,
        buffer: memoryview,
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(config, state, app_state)
        self._settings = settings
        self._lifecycle = lifecycle
        self._observer = observer
        self._direct = direct
        self._buffer = buffer
        self._on_lost = on_lost
        self.url = b""
        self._stage = _Stage.NOTHING
        self._header_bytes = 0
        self._unparsed = 0
        self._ending = False
        self._deaf = False
        self._turn: Turn | None = None
        """What is being answered past ASGI."""
        self._had_turn = False
        """One of the requests that have just been received was a turn: further ones go through ASGI, which
        lets other connections have theirs."""
        self._receiving = False
        """What comes is the rest of its body, and goes into its slot past the parser."""
        self._answered: asyncio.Future[None] | None = None
        self._timer = Timer(self.loop)
        self._stuck: asyncio.TimerHandle | None = None

    # --- asyncio's calls ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._observer.metrics.connections.inc()
        self._answers = _Answers(self)
        self._timer.arm(self._settings.header_timeout, self._headers_late)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answering:
            self._abandon()
        super().connection_lost(exc)
        self._tell_answered()
        self._timer.close()
        self.resume_writing()
        self._observer.metrics.connections.dec()
        self._on_lost()
        self.pipeline.clear()
        del self._answers  # it refers back, as the cycle does: only the collector would find them
        self.cycle = None  # type: ignore[assignment]

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._receiving and self._turn and self._turn.slot:
            return self._turn.room(self._turn.slot)
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._receiving and (turn := self._turn):
            turn.count(nbytes)
            if turn.received == turn.length:
                self._received()
        elif not self._deaf:
            self._receive(self._buffer[:nbytes])

    def _receive(self, data: memoryview) -> None:
        self._unparsed += len(data)
        self._had_turn = False
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            ours = error.__context__  # what a call below raised
            self._refuse(ours if isinstance(ours, RequestError) else BadHttp("not a valid HTTP/1.1 request"))
        if self._unparsed > HEADER_BYTES:
            self._refuse(_too_large())
        elif self._stage is _Stage.HEADERS and not self._timer.armed and not self._answering:
            self._timer.arm(self._settings.header_timeout, self._headers_late)
        elif self._stage is _Stage.BODY and self._turn:
            self._await_body(self._turn)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(_STUCK, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck:
            self._stuck.cancel()
            self._stuck = None

    # --- the parser ---

    def _parse(self, data: memoryview) -> None:
        """Feed the parser. An offer to upgrade, as Java's client makes by default, is passed over.

        httptools ends such a request after its headers, and would take its body for the next one
        (MagicStack/httptools#124): it is parsed again without the offer.
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
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's

    def on_message_begin(self) -> None:
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._stage = _Stage.HEADERS
        self._header_bytes = 0
        if self.cycle is not None:
            self._timer.disarm()  # it was for the wait between requests

    def on_header(self, name: bytes, value: bytes) -> None:
        """Headers, and the trailers of a chunked body too."""
        self._header_bytes += len(name) + len(value)
        if self._header_bytes + len(self.url) > HEADER_BYTES:
            raise _too_large()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._timer.disarm()
        self._unparsed = 0
        self._offers_upgrade = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if self._offers_upgrade:
            self._method, self._version = self.parser.get_method(), self.parser.get_http_version().encode()
            return
        if self._is_over:
            raise BadHttp("the connection has had its last answer")
        if len(self.pipeline) == _PIPELINED:
            raise Overloaded(f"{_PIPELINED} requests wait on this connection already", retry_after=1.0)
        if not self._open_turn():
            url, headers, expects = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()  # makes the scope
            self.url, self.expect_100_continue = url, expects
            self.headers += headers
            super().on_headers_complete()
            self.cycle.transport = self._answers  # type: ignore[assignment]  # all that an answer uses
        self._stage = _Stage.BODY
        if self._lifecycle.phase > Phase.READY:
            self.cycle.keep_alive = False

    def _open_turn(self) -> bool:
        """Whether the request is answered past ASGI. Those that must wait for their turn are not."""
        if self._answering or self._had_turn or self.flow.write_paused:
            return False
        headers = dict(self.headers)
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return False
        method = self.parser.get_method()
        record, _ = self._observer.record(method.decode(), headers, self.headers, self.client)
        turn = Turn(self, self._observer, record, int(length))
        if not turn.open(self._direct, method, self.url, headers):
            return False
        turn.keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        self._had_turn = True
        self._turn = turn
        self.cycle = turn  # type: ignore[assignment]  # it has what uvicorn's protocol asks of it
        if self.expect_100_continue and turn.incomplete:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        if isinstance(self.cycle, Turn):
            self.cycle.receive(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offers_upgrade:
            return
        self._stage = _Stage.NOTHING
        self._unparsed = 0
        if isinstance(self.cycle, Turn):
            self._timer.disarm()
            self.cycle.complete()
        else:
            super().on_message_complete()
        if self._ending:
            self._close()
        elif self.cycle.response_complete:
            self._wait_for_next()

    def _await_body(self, turn: Turn) -> None:
        """The body of a turn is still to come, or the rest of it."""
        turn.pause()
        if not turn.incomplete:
            return
        if not self._timer.armed:
            self._timer.arm(self._settings.body_timeout, self._body_late)
        if turn.slot and not self._receiving:
            self._receiving = True

    def _received(self) -> None:
        """The slot has the whole body. The parser knows nothing of it: the next request gets another."""
        self._receiving = False
        self._renew_parser()
        self.on_message_complete()

    # --- an answer's end ---

    def on_response_complete(self) -> None:
        """In place of uvicorn's, which makes a timer for each answer."""
        self._tell_answered()
        if self._is_over:
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._wait_for_next()

    def _wait_for_next(self) -> None:
        """The answer is out: wait for the next request, or first for the rest of this one's body."""
        if self._is_over:
            return
        if self._stage is _Stage.HEADERS:
            self._timer.arm(self._settings.header_timeout, self._headers_late)
        elif self._stage is _Stage.BODY:
            self._timer.arm(self._settings.body_timeout, self._close)
        else:
            self._timer.arm(self._settings.keep_alive, self._close)

    @property
    def _is_over(self) -> bool:
        """Nothing more is answered."""
        return self._ending or self.transport.is_closing()

    def end(self) -> None:
        """Close after an answer: at once, or when the client has stopped sending."""
        if self._stage is not _Stage.BODY or self.transport.is_closing():
            self._close()
        else:
            self._linger()

    def _linger(self) -> None:
        self._ending = True
        self.flow.resume_reading()
        try:
            self.transport.write_eof()
        except OSError:  # it has been reset
            self.transport.abort()
        self._timer.arm(_LINGER, self._close)

    def _close(self) -> None:
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._timer.arm(_STUCK, self.transport.abort)

    # --- our own answers ---

    def respond(
        self, turn: Turn, status: int, content: bytes, headers: Mapping[str, str], media_type: str = JSON
    ) -> None:
        """Write a turn's answer. The connection goes on, unless the body is still coming into a slot."""
        if self._receiving:
            self._receiving = False
            turn.keep_alive = False  # the parser does not know how much of the body is left
        self._turn = None
        if self.transport.is_closing():
            return
        request_id = turn.record.request_id
        self._write(status, content, headers, request_id, media_type, close=not turn.keep_alive)
        if not turn.keep_alive:
            self.end()
        self.on_response_complete()

    def _body_late(self) -> None:
        if self._turn:
            self._turn.refuse(BodyTimeout(self._settings.body_timeout))

    def _headers_late(self) -> None:
        if self._stage is _Stage.NOTHING:  # it never sent anything: nothing to answer
            self._close()
            return
        limit = self._settings.header_timeout
        self._refuse(HeaderTimeout(f"the headers did not arrive within {limit:g} s (FOVEA_HEADER_TIMEOUT)"))

    def _refuse(self, error: RequestError) -> None:
        """Answer in the application's place, and end the connection."""
        if self._deaf:
            return
        self._deaf = True
        if self._is_over:
            return
        if self._turn and isinstance(self.cycle, Turn) and self._stage is _Stage.BODY:
            self._turn.keep_alive = False
            self._turn.refuse(error)
        elif not self._answering or (
            self._stage is _Stage.BODY and not self.cycle.response_started and not self.pipeline
        ):
            self._answer_with(error)
        else:
            self._tell(error)
            if self._stage is _Stage.BODY:
                self._abandon()
                self._close()
            else:
                self.cycle.keep_alive = False  # an earlier request on this connection comes first

    def _answer_with(self, error: RequestError) -> None:
        """In the application's place, to a request that it may have begun to read."""
        if self._answering:
            scope = self.cycle.scope
            record = self._observer.placed(scope)  # type: ignore[arg-type]  # it is a plain dict
            scope["state"]["refused"] = error  # `Observe` tells of it
            self._abandon()
        else:
            record = self._tell(error, error.status)
        status, content, headers = describe(error, record)
        self._write(status, content, headers, record.request_id, close=True)
        self._linger()

    def _tell(self, error: RequestError, status: int = 0) -> Record:
        """Of what was no request, or of one that has no answer."""
        record, _ = self._observer.record("", {}, (), self.client)
        record.status = status
        self._observer.failed(record, error.code)
        self._observer.tell(record)
        return record

    def _write(
        self,
        status: int,
        content: bytes,
        headers: Mapping[str, str],
        request_id: str,
        media_type: str = JSON,
        *,
        close: bool,
    ) -> None:
        """A whole answer."""
        lines = b"".join([b"%b: %b\r\n" % one for one in self.server_state.default_headers])
        if headers:
            lines += "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
        head = b"%b%bcontent-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n%b\r\n" % (
            STATUS_LINE[status],
            lines,
            media_type.encode(),
            len(content),
            request_id.encode(),
            b"connection: close\r\n" if close else b"",
        )
        if len(content) <= _SMALL:
            self.transport.write(head + content)
            return
        self.transport.write(head)
        self.transport.write(memoryview(content))  # of bytes the transport copies what is left, twice

    def _abandon(self) -> None:
        """Tell the application that the request it works for is no more."""
        self._receiving = False
        if self._turn:
            self._turn.leave()
            self._turn = None
        if not isinstance(self.cycle, Turn):
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            state = self.cycle.scope["state"]
            state["left"] = True
            if on_leave := state.get("on_leave"):
                on_leave()

    # --- the service's end ---

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def answered(self) -> asyncio.Future[None] | None:
        """Done once the turn that is being answered is over; None if there is none."""
        if not self._turn:
            return None
        self._answered = self._answered or self.loop.create_future()
        return self._answered

    def _tell_answered(self) -> None:
        if self._answered and not self._answered.done():
            self._answered.set_result(None)
        self._answered = None

    def leave(self) -> None:
        """End the connection with the answer that is being made. One that is idle may still be used."""
        if self._answering and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def leave_if_idle(self) -> None:
        """Close a connection that has had its answer. A new one may still ask, and be refused."""
        if self.cycle is not None and not self._answering and self._stage is _Stage.NOTHING:
            self._close()

    def cut(self, error: RequestError) -> bool:
        """End the connection now. Returns whether a request lost its answer by it."""
        lost = self._answering
        if lost:
            self._stage = _Stage.BODY
            self._refuse(error)
        self.transport.close()
        return lost


class _Answers:
    """The transport as an answer sees it: closing it ends the connection in order."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._held = b""

    def write(self, data: bytes) -> None:
        """Send headers together with what follows them at once: two packets cost twice as much."""
        if self._held and len(data) > _SMALL:
            self._flush()
            self._connection.transport.write(data)
        elif self._held:
            self._connection.transport.write(self._held + data)
            self._held = b""
        else:
            self._held = data
            self._connection.loop.call_soon(self._flush)

    def close(self) -> None:
        self._flush()
        self._connection.end()

    def is_closing(self) -> bool:
        return self._connection.transport.is_closing()

    def _flush(self) -> None:
        if self._held:
            self._connection.transport.write(self._held)
            self._held = b""


def _too_large() -> HeaderTooLarge:
    return HeaderTooLarge(f"the headers have more than {HEADER_BYTES} bytes")

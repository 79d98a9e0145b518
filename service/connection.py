"""One HTTP/1.1 connection: uvicorn's protocol, with the limits that it lacks.

* Headers have a time limit and a size; so has what follows them and is no body (trailers).
* What is not HTTP is answered in our own JSON, and counted.
* So many requests may be sent ahead of their answers, and no more.
* A connection that is to end while the client still sends is read out first: closing it at once would
  reset it, and a reset can destroy the answer before the client has seen it.
* What the application would refuse by its headers alone is refused here: under overload the answers depend on
  what a refusal costs.
* Once the service is on its way out, every answer says `Connection: close`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import Any, Final, cast

import httptools
import uvicorn
from starlette.types import Scope
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.errors import BadHttp, HeaderTimeout, HeaderTooLarge, Overloaded, RequestError
from service.lifecycle import Lifecycle, Phase
from service.metrics import Metrics
from service.observe import count, describe, new_request_id, request_id
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


class Connection(HttpToolsProtocol):
    """uvicorn's connection within our limits.

    `refusal` says of a request's scope whether it is refused, and why. `on_lost` is called once, when the
    connection is gone.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        app_state: dict[str, Any],
        *,
        settings: Settings,
        lifecycle: Lifecycle,
        metrics: Metrics,
        refusal: Callable[[Scope], RequestError | None],
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(config, state, app_state)
        self._settings = settings
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._refusal = refusal
        self._on_lost = on_lost
        self.url = b""
        self._stage = _Stage.NOTHING
        self._header_bytes = 0
        self._unparsed = 0
        self._ending = False
        self._deaf = False
        self._timer = Timer(self.loop)
        self._stuck: asyncio.TimerHandle | None = None

    # --- asyncio's calls ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._metrics.connections.inc()
        self._answers = _Answers(self)
        self._timer.arm(self._settings.header_timeout, self._headers_late)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._answering:
            self._left()
        self._timer.close()
        self.resume_writing()
        self._metrics.connections.dec()
        self._on_lost()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._unparsed += len(data)
        try:
            self._parse(memoryview(data))
        except httptools.HttpParserError as error:
            ours = error.__context__  # what a call below raised
            self._refuse(ours if isinstance(ours, RequestError) else BadHttp("not a valid HTTP/1.1 request"))
        if self._unparsed > HEADER_BYTES:
            self._refuse(_too_large())
        elif self._stage is _Stage.HEADERS and not self._timer.armed and not self._answering:
            self._timer.arm(self._settings.header_timeout, self._headers_late)

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
                self.parser = httptools.HttpRequestParser(self)
                self.parser.feed_data(start + b"".join(lines) + b"\r\n")

    def on_message_begin(self) -> None:
        super().on_message_begin()
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
        if len(self.pipeline) == _PIPELINED:
            raise Overloaded(f"{_PIPELINED} requests wait on this connection already", retry_after=1.0)
        super().on_headers_complete()
        self._stage = _Stage.BODY
        self.cycle.transport = self._answers  # type: ignore[assignment]  # all that an answer uses
        if self._lifecycle.phase > Phase.READY:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offers_upgrade:
            return
        super().on_message_complete()
        self.cycle.scope["state"]["is_whole"] = True
        self._stage = _Stage.NOTHING
        self._unparsed = 0
        if self._ending:
            self._close()
        elif self.cycle.response_complete:
            self._wait_for_next()

    # --- an answer's end ---

    def on_response_complete(self) -> None:
        """In place of uvicorn's, which makes a timer for each answer."""
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._wait_for_next()

    def _wait_for_next(self) -> None:
        """The answer is out: wait for the next request, or first for the rest of this one's body."""
        if self._ending:
            return
        if self._stage is _Stage.HEADERS:
            self._timer.arm(self._settings.header_timeout, self._headers_late)
        elif self._stage is _Stage.BODY:
            self._timer.arm(self._settings.body_timeout, self._close)
        else:
            self._timer.arm(self._settings.keep_alive, self._close)

    def end(self) -> None:
        """Close after an answer: at once, or when the client has stopped sending."""
        if self._stage is not _Stage.BODY or self.transport.is_closing():
            self._close()
        else:
            self._linger()

    def _linger(self) -> None:
        self._ending = True
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer.arm(_LINGER, self._close)

    def _close(self) -> None:
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._timer.arm(_STUCK, self.transport.abort)

    # --- our own answers ---

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Begin with a request whose turn it is. What is refused gets no task, to cost a quarter."""
        writable = not self.flow.write_paused  # else the answer must wait
        if writable and (error := self._refusal(cast(Scope, cycle.scope))):
            self.loop.call_soon(self._decline, cycle, error)  # after all that was received is parsed
        else:
            super()._start_asgi_task(cycle, app)

    def _decline(self, cycle: RequestResponseCycle, error: RequestError) -> None:
        """Answer a request in the application's place; the connection goes on."""
        scope = cast(Scope, cycle.scope)
        if cycle.disconnected:
            self._metrics.errors.labels("client_left").inc()
            count(scope, 0, 0.0, self._metrics)
            return
        self._metrics.errors.labels(error.code).inc()
        count(scope, error.status, 0.0, self._metrics)
        self.transport.write(self._rendered(error, request_id(scope), close=not cycle.keep_alive))
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            self.end()
        self.on_response_complete()

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
        self._metrics.errors.labels(error.code).inc()
        if self._answering and self._stage is not _Stage.BODY:
            self.cycle.keep_alive = False  # an earlier request on this connection comes first
            return
        if self._answering:
            self._abandon()
            if self.cycle.response_started or self.pipeline:
                self._close()
                return
        self.transport.write(self._rendered(error, new_request_id(), close=True))
        self._linger()

    def _rendered(self, error: RequestError, request_id: str, *, close: bool) -> bytes:
        content, headers = describe(error, request_id)
        lines = [
            STATUS_LINE[error.status].rstrip(),
            *(name + b": " + value for name, value in self.server_state.default_headers),
            *(f"{name}: {value}".encode() for name, value in headers.items()),
            b"content-length: %d" % len(content),
            b"x-request-id: %s" % request_id.encode(),
            *([b"connection: close"] if close else ()),
        ]
        return b"\r\n".join(lines) + b"\r\n\r\n" + content

    def _abandon(self) -> None:
        """Tell the application that the request it works for is no more."""
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        self._left()

    def _left(self) -> None:
        state = self.cycle.scope["state"]
        state["left"] = True
        if on_leave := state.get("on_leave"):
            on_leave()

    # --- the service's end ---

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

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

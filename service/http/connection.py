"""One HTTP/1.1 connection: uvicorn's protocol, with the limits that it lacks.

* Headers have a time limit and a size; so has what follows them and is no body (trailers).
* Every body has a time limit and a size, whatever becomes of the request: answered, refused or thrown away.
* Everything that a connection keeps (unread bodies, requests that wait, answers that the client does not
  read) is in one account with all other connections (`service.resources.body_memory`).
* What is not HTTP is answered in our own JSON, and counted.
* So many requests may be sent ahead of their answers, and no more. None of them is read further than its
  first pieces before its turn.
* A client that closes its sending side gets its answer; one that leaves is noticed, also while nothing is
  read from it (`service.http.hangups`).
* A connection that is to end while the client still sends is read out first: closing it at once would
  reset it, and a reset can destroy the answer before the client has seen it.
* What the application answers past ASGI is given to it (`service.http.fast_path`).
* Once the service is on its way out, every answer says `Connection: close`.
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
from fovea.service.http.fast_path import JSON, Application, Turn
from fovea.service.http.hangups import Hangups
from fovea.service.http.lifecycle import Lifecycle, Phase
from fovea.service.http.observer import Observer, describe, failure
from fovea.service.http.request_record import Record
from fovea.service.http.timer import Pace, Timer
from fovea.service.resources.body_memory import BodyMemory
from fovea.service.settings import Settings

log = logging.getLogger(__name__)

HEADER_BYTES: Final = 64 << 10
"""Most bytes of one request's line and headers; proxies allow 8 to 32 KB."""

_LINGER: Final = 2.0
"""Seconds for a client to read its last answer and close, while what it still sends is thrown away."""

_LINGER_BYTES: Final = 64 << 20
"""Bytes that are thrown away meanwhile at most: a client that sends so many does not read."""

_PIPELINED: Final = 100
"""Most requests that one connection may have waiting: uvicorn takes as many as come, 2.5 KB each."""

_SMALL: Final = 64 << 10
"""Bytes that are copied rather than sent in a packet of their own; and that a slow client has to read."""

_STUCK: Final = 30.0
"""Seconds for a client to read `_SMALL` bytes of its answer, once the socket's buffers are full."""

_GREETING: Final = b"HTTP/1.1 "
"""The first bytes of every answer."""

_REQUEST: Final = 2500
"""Bytes that a request takes while it waits, besides its headers and its body."""

_HOST: Final = re.compile(
    rb"(?:\[[0-9A-Za-z:.%_~\-]+\]|(?:[0-9A-Za-z\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?"
)
"""RFC 3986, section 3.2: a host and a port, where there are any; of an address in brackets its characters."""

_CLOSES: Final = b"connection: close\r\n"

_ID_HEADERS: Final = (b"x-request-id", b"traceparent")
"""What a refused request keeps of its headers."""

_NO_CONTENT: Final = (204, 304)
"""Statuses whose answers never have a body."""


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
        memory: BodyMemory,
        hangups: Hangups,
        refusals: Pace,
        buffer: memoryview,
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(config, state, app_state)
        self._settings = settings
        self._lifecycle = lifecycle
        self._observer = observer
        self._direct = direct
        self._memory = memory
        self._hangups = hangups
        self._refusals = refusals
        self._buffer = buffer
        self._on_lost = on_lost
        self.url = b""
        self._stage = _Stage.NOTHING
        self._header_bytes = 0
        self._hosts: list[bytes] = []
        self._body_bytes = 0
        """Of the newest request, received so far."""
        self._unparsed = 0
        self._partial_bytes = 0
        """At most so many bytes of headers have come that are not whole."""
        self._held_bytes = 0
        """In the account."""
        self._body_seconds: float | None = None
        """What was left for the body when reading was paused."""
        self._ending = False
        self._linger_bytes = _LINGER_BYTES
        self._deaf = False
        self._has_half_closed = False
        """The client has closed its sending side."""
        self._has_greeted = False
        """The first bytes of the next answer are sent already."""
        self._last_word: BadHttp | None = None
        """The answer to a request at fault, once those before it are answered."""
        self._current: Turn | _Cycle | None = None
        """The request that is being answered. `cycle` is the newest, which may still wait for its turn."""
        self._turn: Turn | None = None
        """`_current`, where it is answered past ASGI."""
        self._turn_is_old = False
        """It came by HTTP/1.0."""
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
        self.flow = _Flow(transport, self)
        transport.set_write_buffer_limits(high=0)  # every byte that the client does not read is told of
        self._socket: socket.socket = transport.get_extra_info("socket")
        self._descriptor = self._socket.fileno()
        self._observer.metrics.connections.inc()
        self.answers = _Answers(self)
        self._timer.arm(self._settings.header_timeout, self._headers_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._abandon()
        super().connection_lost(exc)
        self._tell_answered()
        self._timer.close()
        self.resume_writing()
        self._hangups.forget(self._descriptor)
        self._memory.give_back(self._held_bytes)
        self._held_bytes = 0
        self._observer.metrics.connections.dec()
        self._on_lost()
        del self.answers  # it refers back, as the flow and the cycle do: only the collector would find them
        self.flow = self.cycle = None  # type: ignore[assignment]

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether the connection stays: a client may close its sending side and still read."""
        if self._is_over or not self._answering:
            return False
        if self._stage is _Stage.BODY:  # it will never be whole
            if not self.pipeline:
                return False
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._current  # type: ignore[assignment]
        self._stage = _Stage.NOTHING
        self._has_half_closed = True
        self._timer.disarm()
        self.cycle.keep_alive = False
        self._hangups.watch(self._descriptor, self._hang_up, half=False)
        self._probe()
        return True

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._receiving and self._turn and self._turn.slot:
            return self._turn.room(self._turn.slot)
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._receiving and (turn := self._turn):
            turn.count(nbytes)
            if turn.received == turn.length:
                self._received()
        elif self._ending and nbytes > self._linger_bytes:
            self._close()
        else:
            self._linger_bytes -= nbytes if self._ending else 0
            if not self._deaf:
                self._receive(self._buffer[:nbytes])

    def _receive(self, data: memoryview) -> None:
        self._unparsed += len(data)
        self._partial_bytes = len(data) + (self._partial_bytes if self._stage is _Stage.HEADERS else 0)
        self._had_turn = False
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            self._refuse(_reason(error.__context__))
        if self._unparsed > HEADER_BYTES:
            self._refuse(_too_large())
        elif self._stage is _Stage.HEADERS and not self._timer.armed and not self._answering:
            self._timer.arm(self._settings.header_timeout, self._headers_late)
        elif self._stage is _Stage.BODY:
            self._await_body()
        self.settle()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(0)

    def _watch_reader(self, before: int) -> None:
        """Cut the connection off unless its client has read something of its answer since there were `before`
        bytes left; 0 the first time."""
        left = self.transport.get_write_buffer_size()
        if before and left > before - _SMALL:
            self.transport.abort()
        else:
            self._stuck = self.loop.call_later(_STUCK, self._watch_reader, left)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._memory.drop_answer(self)
        if self._stuck:
            self._stuck.cancel()
            self._stuck = None

    # --- the parser ---

    def _parse(self, data: memoryview) -> None:
        """Feed the parser. An offer to upgrade, as Java's client makes by default, is passed over.

        httptools ends such a request after its headers, and would take its body for the next one
        (MagicStack/httptools#124): it is parsed again without the offer. CONNECT, which httptools ends like
        that too, never comes here: `on_headers_complete` refuses it.
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
        self._hosts = []
        self._stage = _Stage.HEADERS
        self._header_bytes = self._body_bytes = 0
        if self.cycle is not None:
            self._timer.disarm()  # it was for the wait between requests

    def on_header(self, name: bytes, value: bytes) -> None:
        """Headers; and the trailers of a chunked body, which are counted and dropped: merged into the
        headers they would change what has been decided by them (RFC 9110, section 6.5.1)."""
        self._header_bytes += len(name) + len(value)
        if self._header_bytes + len(self.url) > HEADER_BYTES:
            raise _too_large()
        if self._stage is not _Stage.HEADERS:
            return
        name = name.lower()
        if name == b"host":
            self._hosts.append(value)
        elif name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        try:
            self._take_headers()
        except BadHttp as error:
            if self._answering:  # those before it come first
                self._last_word = error
            raise

    def _take_headers(self) -> None:
        self._timer.disarm()
        self._unparsed = 0
        method, version = self.parser.get_method(), self.parser.get_http_version()
        self._check_headers(method, version)
        self._offers_upgrade = self.parser.should_upgrade()
        if self._offers_upgrade:
            self._method, self._version = method, version.encode()
            return
        if self._is_over:
            raise BadHttp("the connection has had its last answer")
        if len(self.pipeline) == _PIPELINED:
            raise Overloaded(f"{_PIPELINED} requests wait on this connection already", retry_after=1.0)
        if version == "1.0":
            self.expect_100_continue = False  # RFC 9110, section 10.1.1: it is ignored
        if not self._open_turn(method, version):
            self._open_cycle(method, version)
        self._stage = _Stage.BODY
        if self._lifecycle.phase > Phase.READY:
            self.cycle.keep_alive = False

    def _check_headers(self, method: bytes, version: str) -> None:
        """Raise `BadHttp` for what the parser lets through and RFC 9112 does not, or we do not offer."""
        if version not in ("1.1", "1.0"):
            raise BadHttp(f"the request is HTTP/{version}; send HTTP/1.1")
        if method == b"CONNECT":
            raise BadHttp("CONNECT is not offered: this service is no proxy")
        hosts = self._hosts
        if len(hosts) != 1 and (hosts or version == "1.1"):
            raise BadHttp(f"the request has {len(hosts)} Host headers; send one")
        if hosts and not _HOST.fullmatch(hosts[0]):
            raise BadHttp("the Host header is neither a host nor a host and a port")
        for name, value in self.headers:
            if name == b"transfer-encoding":
                if version == "1.0":
                    raise BadHttp("HTTP/1.0 has no Transfer-Encoding; send a Content-Length")
                if value.lower() != b"chunked":
                    coding = value[:100].decode("latin-1")
                    raise BadHttp(f"Transfer-Encoding {coding!r} is not offered; send `chunked` alone")

    def _open_turn(self, method: bytes, version: str) -> bool:
        """Whether the request is answered past ASGI. Those that must wait for their turn are not."""
        if self._answering or self._had_turn or self.flow.write_paused:
            return False
        headers = dict(self.headers)
        length = headers.get(b"content-length", b"")
        if method == b"GET" and not length and b"transfer-encoding" not in headers:
            if not self._direct.has_answer(self.url):
                return False
            length = b"0"
        if not length.isdigit():
            return False
        record, _ = self._observer.record(method.decode(), headers, self.headers, self.client)
        turn = Turn(self, self._observer, record, int(length))
        if not turn.open(self._direct, method, self.url, headers):
            return False
        turn.keep_alive = self.parser.should_keep_alive()
        self._turn_is_old = version == "1.0"
        self._had_turn = True
        self._turn = self._current = turn
        self.cycle = turn  # type: ignore[assignment]  # it has what uvicorn's protocol asks of it
        if self.expect_100_continue and turn.incomplete:
            self.put(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _open_cycle(self, method: bytes, version: str) -> None:
        """Have the request answered by ASGI: now, or after those before it. Raises `BadHttp`."""
        try:
            url = httptools.parse_url(self.url)
            raw_path = url.path or b"/"  # RFC 9112, section 3.2.2: `http://host` has none
            path = raw_path.decode("ascii")
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
            raise BadHttp("the request's target is not a valid URL") from None
        if raw_path == b"*" and method != b"OPTIONS":
            raise BadHttp("`*` is a target of OPTIONS alone")
        if url.host is not None:  # it comes before the Host header (RFC 9112, section 3.2.2)
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
        cycle = _Cycle(self, scope, self._header_bytes + len(self.url) + _REQUEST)
        self.cycle = cycle
        declared = dict(self.headers).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._settings.body_bytes:
            cycle.refuse(self._body_too_large())
        if self._answering:
            self.pipeline.appendleft((cycle, self.app))
            self.flow.pause_reading()
        else:
            self._current = cycle
            self._start_asgi_task(cycle, self.app)

    def _body_too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body has more than {self._settings.body_bytes} bytes (FOVEA_BODY_BYTES)")

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        if isinstance(self.cycle, Turn):
            self.cycle.receive(body)
            return
        self._body_bytes += len(body)
        if self._body_bytes > self._settings.body_bytes:
            raise self._body_too_large()
        if isinstance(self.cycle, _Cycle) and not self.cycle.is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offers_upgrade:
            return
        self._stage = _Stage.NOTHING
        self._unparsed = 0
        if not self.pipeline:
            self._timer.disarm()
        if isinstance(self.cycle, Turn):
            self.cycle.complete()
        else:
            super().on_message_complete()
        if self._ending:
            self._close()
        elif not self._answering:
            self._wait_for_next()

    def _await_body(self) -> None:
        """The body of the newest request is still to come, or the rest of it."""
        if self._deaf or self.pipeline:  # nobody wants it, or not yet
            return
        if turn := self._turn:
            turn.pause()
            if not turn.incomplete:
                return
            self._receiving = turn.slot is not None
        if not self._timer.armed and not self.flow.read_paused:
            self._timer.arm(self._settings.body_timeout, self._body_late)

    def _received(self) -> None:
        """The slot has the whole body. The parser knows nothing of it: the next request gets another."""
        self._receiving = False
        self._renew_parser()
        self.on_message_complete()

    # --- memory and reading ---

    def settle(self) -> None:
        """Hold in the account what this connection keeps. What does not fit is refused and let go of."""
        held, kept = self._held_bytes, self._kept()
        if kept > held and (self._is_over or not self._memory.take(kept - held)):
            if not self._is_over:
                self._overload()
            kept = min(held, self._kept())  # the little that is left is in no account
        if kept < held:
            self._memory.give_back(held - kept)
        self._held_bytes = kept

    def _kept(self) -> int:
        """Bytes of headers that are not whole, of a body that nobody has read, and of requests that wait."""
        size = min(self._partial_bytes, HEADER_BYTES) if self._stage is _Stage.HEADERS else 0
        if isinstance(self._current, _Cycle):
            size += len(self._current.body)
        for cycle, _ in self.pipeline:
            size += cycle.size  # type: ignore[attr-defined]  # they are all ours
        return size

    def _overload(self) -> None:
        limit = self._memory.limit
        error = Overloaded(f"all bodies together have {limit} bytes (FOVEA_BODIES_BYTES)", retry_after=1.0)
        if self.pipeline:  # the next is refused, which ends the connection before the others
            oldest = self.pipeline.pop()
            self.pipeline.clear()
            self.pipeline.append(oldest)
            self.cycle = oldest[0]
            self.cycle.refuse(error)  # type: ignore[attr-defined]
            self._deaf = True
        elif not self._answering:
            self._refuse(error)
        elif isinstance(self._current, _Cycle) and not self._current.response_started:
            self._deaf = True
            self._answer_with(error)
        else:
            self._deaf = True
            self.cycle.keep_alive = False

    def reading_pauses(self) -> None:
        """The client is to wait: so does the time limit of its body."""
        self._hangups.watch(self._descriptor, self._hang_up, half=True)
        if self._stage is _Stage.BODY and self._answering and self._timer.armed:
            self._body_seconds = self._timer.left
            self._timer.disarm()

    def reading_resumes(self) -> None:
        """The client may go on."""
        self._hangups.forget(self._descriptor)
        if self._body_seconds is not None and self._stage is _Stage.BODY and not self._is_over:
            self._timer.arm(self._body_seconds, self._body_late)
        self._body_seconds = None

    @property
    def may_pause(self) -> bool:
        """Whether there is anything to read that could wait."""
        return not self._has_half_closed

    def _hang_up(self, is_dead: bool) -> None:
        if is_dead:
            self._vanish()
        else:
            self._probe()

    def _probe(self) -> None:
        """Find out whether a client that has closed its sending side still reads.

        Of somebody who has left its system says so when more data come. The data are the first bytes of the
        answer, which are the same for all.
        """
        if self._current is None or self._current.response_started or self.flow.write_paused:
            return  # the answer itself will find out
        if not self._has_greeted:
            self.put(_GREETING)
            self._has_greeted = True
        if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._vanish()

    def _vanish(self) -> None:
        """The client has left."""
        self._abandon()
        self.transport.abort()

    def cut_off(self) -> None:
        """See `service.resources.body_memory.Reader`."""
        log.info("a client is cut off that does not read its answer: all bodies together have %d bytes"
                 " (FOVEA_BODIES_BYTES)", self._memory.limit)  # fmt: skip
        self._vanish()

    # --- an answer's end ---

    def on_response_complete(self) -> None:
        """In place of uvicorn's, which makes a timer for each answer."""
        self._tell_answered()
        if self._is_over:
            return
        self._current = None
        if self.pipeline:
            self._start_next()
        elif self._last_word:
            self._answer_with(self._last_word)
        else:
            self.flow.resume_reading()
            if self._has_half_closed:
                self._close()
            else:
                self._wait_for_next()
        self.settle()

    def _start_next(self) -> None:
        """Answer the request that has waited longest. The client may go on when none waits behind it."""
        cycle, app = self.pipeline.pop()
        self._current = cycle  # type: ignore[assignment]
        self._start_asgi_task(cycle, app)
        if len(cycle.body) <= HIGH_WATER_LIMIT:  # more is to be read first, and reading resumes then
            self.flow.resume_reading()
        if self._stage is _Stage.BODY:
            self._await_body()

    def _wait_for_next(self) -> None:
        """The answer is out: wait for the next request, or first for the rest of this one's body."""
        if self._is_over:
            return
        if self._stage is _Stage.HEADERS:
            self._timer.arm(self._settings.header_timeout, self._headers_late)
        elif self._stage is _Stage.NOTHING:
            self._timer.arm(self._settings.keep_alive, self._close)
        elif not self._timer.armed:  # the body gets no more time than it had
            self._timer.arm(self._settings.body_timeout, self._body_late)

    @property
    def _is_over(self) -> bool:
        """Nothing more is answered."""
        return self._ending or self.transport.is_closing()

    def end(self) -> None:
        """Close after an answer: at once, or when the client has stopped sending."""
        is_sending = self._stage is _Stage.BODY or self._deaf or self.flow.read_paused
        if is_sending and not self._has_half_closed and not self.transport.is_closing():
            self._linger()
        else:
            self._close()

    def _linger(self) -> None:
        self._ending = True
        self.pipeline.clear()
        self.flow.resume_reading()
        try:
            self.transport.write_eof()
        except OSError:  # it has been reset
            self.transport.abort()
        self._timer.arm(_LINGER, self._close)

    def _close(self) -> None:
        self.transport.close()
        self._timer.disarm()  # who does not read the last answer is watched already

    # --- our own answers ---

    def respond(
        self, turn: Turn, status: int, content: bytes, headers: Mapping[str, str], media_type: str = JSON
    ) -> None:
        """Write a turn's answer. The connection goes on, unless the body is still coming into a slot."""
        if self._stage is _Stage.BODY and (
            self._receiving  # the parser does not know how much of the body is left
            or turn.length > self._settings.body_bytes
        ):
            turn.keep_alive = False
        self._receiving = False
        self._turn = None
        if self.transport.is_closing():
            return
        request_id = turn.record.request_id
        persistence = b""
        if not turn.keep_alive:
            persistence = _CLOSES
        elif self._turn_is_old:
            persistence = b"connection: keep-alive\r\n"
        self._write(status, content, headers, request_id, media_type, persistence)
        if not turn.keep_alive:
            self.end()
        self.on_response_complete()

    def refuse_in_turn(self, turn: Turn, error: RequestError) -> None:
        """Refuse at once, or later where too many are refused for want of a place: to answer callers who ask
        again at once would leave no time for those who have a place."""
        wait = self._refusals.wait(self.loop.time()) if isinstance(error, Overloaded) else 0.0
        if wait:
            self.loop.call_later(wait, turn.refuse, error)
        else:
            turn.refuse(error)

    def _body_late(self) -> None:
        if self._turn or self._answering:
            self._refuse(BodyTimeout(self._settings.body_timeout))
        else:  # it has its answer, and the rest is of no use
            self._close()

    def _headers_late(self) -> None:
        if self._stage is _Stage.NOTHING:  # it never sent anything: nothing to answer
            self._close()
            return
        limit = self._settings.header_timeout
        self._refuse(HeaderTimeout(f"the headers did not arrive within {limit:g} s (FOVEA_HEADER_TIMEOUT)"))

    def _refuse(self, error: RequestError) -> None:
        """Answer the newest request in the application's place, and end the connection with it. Those before
        it are answered first."""
        if self._deaf:
            return
        self._deaf = True
        if self._is_over:
            return
        if self._stage is _Stage.BODY:
            self._refuse_newest(error)
        elif not self._answering:
            self._answer_with(error)
        elif not self._last_word:
            self._tell(error)
            self.cycle.keep_alive = False

    def _refuse_newest(self, error: RequestError) -> None:
        """The body of a request is at fault."""
        if self.pipeline:
            self.cycle.refuse(error)  # type: ignore[attr-defined]
        elif self._turn:
            self._turn.keep_alive = False
            self._turn.refuse(error)
        elif not self._answering:  # it has its answer already
            self._tell(error)
            self._linger()
        elif not self.cycle.response_started:
            self._answer_with(error)
        else:
            self._tell(error)
            self._abandon()
            self._close()

    def _answer_with(self, error: RequestError) -> None:
        """In the application's place, to a request that it may have begun to read."""
        if isinstance(self._current, _Cycle):
            scope = self._current.scope
            record = self._observer.placed(scope)  # type: ignore[arg-type]  # it is a plain dict
            scope["state"]["refused"] = error  # `Observe` tells of it
            self._abandon()
        else:
            record = self._tell(error, error.status)
        status, content, headers = describe(error, record)
        self._write(status, content, headers, record.request_id)
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
        persistence: bytes = _CLOSES,
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
            persistence,
        )
        if len(content) <= _SMALL:
            self.put(head + content)
            return
        self.put(head)
        self.put(memoryview(content))  # of bytes the transport copies what is left, twice

    def put(self, data: bytes | memoryview) -> None:
        """Send; what the client does not read at once is held in the account."""
        if self._has_greeted:
            self._has_greeted = False
            data = data[len(_GREETING) :]
        self.transport.write(data)
        if self.flow.write_paused:
            self._memory.hold_answer(self, self.transport.get_write_buffer_size())

    def _abandon(self) -> None:
        """Tell the application that the request it works for is no more. Those that wait have not begun."""
        self._receiving = False
        self.pipeline.clear()
        current, self._current = self._current, None
        if self._turn:
            self._turn.leave()
            self._turn = None
        elif isinstance(current, _Cycle) and not current.response_complete:
            current.leave()

    # --- the service's end ---

    @property
    def _answering(self) -> bool:
        return self._current is not None and not self._current.response_complete

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
            self._deaf = True
            self.pipeline.clear()
            self.cycle = self._current  # type: ignore[assignment]
            self._refuse_newest(error)
        self.transport.close()
        return lost


class _Cycle(RequestResponseCycle):
    """A request that ASGI answers: uvicorn's, with what HTTP/1.0 and our limits ask."""

    def __init__(self, connection: Connection, scope: Any, size: int) -> None:
        """`size` is what it takes without its body, in bytes."""
        super().__init__(
            scope=scope,
            transport=connection.answers,  # type: ignore[arg-type]  # all that an answer uses
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
        self._on_read = connection.settle
        self._size = size
        self._ends_by_close = False
        """The end of the connection is that of the answer."""
        self.is_refused = False
        """Its body is not kept."""

    @property
    def size(self) -> int:
        """Bytes that it takes while it waits."""
        return self._size + len(self.body)

    def refuse(self, error: RequestError) -> None:
        """Let the application answer with `error`, which ends the connection."""
        self.scope["state"]["refusal"] = error
        self.is_refused = True
        self.keep_alive = False
        self.body = bytearray()
        self.scope["headers"] = [one for one in self.scope["headers"] if one[0] in _ID_HEADERS]
        self._size = _REQUEST

    def leave(self) -> None:
        """The client has gone, or has its answer from the connection: stop working for it."""
        self.disconnected = True
        self.body = bytearray()
        self.message_event.set()
        state = self.scope["state"]
        state["left"] = True
        if on_leave := state.get("on_leave"):
            on_leave()

    async def receive(self) -> Any:
        """What has come of the body. It is in the account of whoever receives it from now on."""
        message = await super().receive()
        self._on_read()
        return message

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start" and not self.response_started:
            message = self._framed(message)
        elif self._ends_by_close:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)

    def _framed(self, message: Any) -> Any:
        """The start of the answer, such that its client finds its end."""
        if self.scope["http_version"] != "1.0":
            return message
        headers = list(message.get("headers", ()))
        has_length = any(name.lower() == b"content-length" for name, _ in headers)
        has_content = self.scope["method"] != "HEAD" and message["status"] not in _NO_CONTENT
        if has_content and not has_length:  # HTTP/1.0 knows no chunks
            self.chunked_encoding = False
            self.keep_alive = False
            self._ends_by_close = True
        if self.keep_alive:
            headers.append((b"connection", b"keep-alive"))
        return {**message, "headers": headers}


class _Flow(FlowControl):
    """uvicorn's, which tells the connection. While requests wait for their turn, nothing more is read."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        super().__init__(transport)
        self._connection = connection

    def pause_reading(self) -> None:
        if not self.read_paused and self._connection.may_pause:
            super().pause_reading()
            self._connection.reading_pauses()

    def resume_reading(self) -> None:
        if self.read_paused and not self._connection.pipeline and self._connection.may_pause:
            super().resume_reading()
            self._connection.reading_resumes()


class _Answers:
    """The transport as an answer sees it: closing it ends the connection in order."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._held = b""

    def write(self, data: bytes) -> None:
        """Send headers together with what follows them at once: two packets cost twice as much."""
        if self._held and len(data) > _SMALL:
            self._flush()
            self._connection.put(data)
        elif self._held:
            self._connection.put(self._held + data)
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
            self._connection.put(self._held)
            self._held = b""


def _too_large() -> HeaderTooLarge:
    return HeaderTooLarge(f"the headers have more than {HEADER_BYTES} bytes")


def _reason(cause: BaseException | None) -> RequestError:
    """What a parser's error means: what a call below it raised, or that the client does not send HTTP."""
    if isinstance(cause, RequestError):
        return cause
    if cause is None or isinstance(cause, httptools.HttpParserError):
        return BadHttp("not a valid HTTP/1.1 request")
    return failure("")

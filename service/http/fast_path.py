"""Classification requests that bypass ASGI: no task, no future and no copy of the body.

ASGI costs more than the classification of a small image. The connection creates an `Exchange` for each
request that its `FastApp` accepts. The exchange collects the body and passes the body to the `RequestHandler`
that the application created from the headers. A large body is received into a shared buffer, which is memory
that the runners share. The answer is written at once.

Everything here runs on the event loop. The connection calls the exchange, the exchange calls the handler, and
the handler answers through the exchange, which calls the connection.

Invariant: the job is over before its memory is released. Runners read the body directly from the shared
buffer, and the next request overwrites the buffer. `Exchange._end` therefore closes the handler, which ends
the job, and only then releases the buffer. A runner may still read the buffer of a job that is over, but its
result is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol, TypeAlias

from fovea.service.errors import BodyTooLarge, RequestError
from fovea.service.http.known_heads import RequestHead
from fovea.service.http.observer import Observer, encode_error, log_internal_error
from fovea.service.http.request_record import RequestRecord
from fovea.service.observability.metrics import CLIENT_LEFT
from fovea.service.runners.shared_memory import SharedBodies, SharedBuffer

Headers: TypeAlias = Mapping[bytes, bytes]
"""Headers by name in lower case. If a name occurs more than once, the last value counts."""

_MAX_INLINE_BYTES: Final = 64 << 10
"""Size in bytes up to which a body is sent to a runner instead of being received into a shared buffer."""

_MAX_READ_BYTES: Final = 1 << 20
"""Maximum size of one read in bytes. A larger read blocks the event loop for over a millisecond."""


JSON_MEDIA_TYPE: Final = "application/json"


class RequestOpener(Protocol):
    """Interface that accepts requests which bypass ASGI."""

    def open_request(
        self, exchange: Exchange, method: bytes, url: bytes, headers: Headers
    ) -> RequestHandler | None:
        """Accept a request by its headers, and fill in the record of the exchange.

        Return None to leave the request to ASGI. Raises `RequestError` to refuse the request.
        """


class FastApp(RequestOpener, Protocol):
    """Interface of everything that answers requests without ASGI."""

    shared_bodies: SharedBodies

    def can_answer(self, url: bytes) -> bool:
        """Return whether the application may accept a GET request for this URL."""


class RequestHandler(Protocol):
    """Interface of the handler of an accepted request.

    The exchange calls `count_bytes` for each piece of the body, then `handle_body` once, and `close` once at
    any time. The handler answers with `Exchange.answer` or `Exchange.refuse`, which both call `close` before
    they return.
    """

    def count_bytes(self, size: int) -> None:
        """Account for `size` received bytes of the body. Raises `RequestError` when there are too many."""

    def handle_body(self, body: bytes | SharedBuffer, size: int) -> None:
        """Start the work on the complete body: the bytes, or the first `size` bytes of the shared buffer.

        Raises `RequestError`.
        """

    def close(self) -> None:
        """Stop the work and release every resource. Called once, when the request is over.

        Every job of the request must be over when this method returns: removed from the queue, or its result
        ignored. The caller releases the shared buffer of the body right after this.
        """


class ResponseWriter(Protocol):
    """Interface of a connection, as an exchange uses it."""

    def respond(
        self,
        exchange: Exchange,
        status: int,
        content: bytes,
        headers: Mapping[str, str],
        media_type: str = JSON_MEDIA_TYPE,
    ) -> None:
        """Write the answer. The connection stays open if `exchange.keep_alive` is true.

        The exchange calls this as its last step: its shared buffer is released, and the connection must not
        receive into the buffer any more.
        """

    def refuse_with_delay(self, exchange: Exchange, error: RequestError) -> None:
        """Refuse a request that was not admitted: at once, or later if there are too many refusals."""


class Exchange:
    """One request, from its headers to its answer."""

    __slots__ = (
        "_chunks",
        "_error",
        "_handler",
        "_observer",
        "_writer",
        "content_length",
        "disconnected",
        "keep_alive",
        "received_bytes",
        "record",
        "response_complete",
        "response_started",
        "shared_buffer",
    )  # fmt: skip

    kept_bytes = 0
    """Number of bytes that the connection accounts for: none, because the handler does."""
    is_full = False
    """False because reading never waits for the handler."""

    def __init__(
        self, writer: ResponseWriter, observer: Observer, record: RequestRecord, content_length: int
    ) -> None:
        self._writer = writer
        self._observer = observer
        self.record = record
        self._handler: RequestHandler | None = None
        self._error: RequestError | None = None
        self._chunks: list[bytes] = []
        self.shared_buffer: SharedBuffer | None = None
        self.content_length = content_length
        """Declared size of the body in bytes."""
        self.received_bytes = 0
        """Number of bytes of the body received so far."""
        self.keep_alive = True
        self.disconnected = self.response_started = self.response_complete = False

    def try_open(self, app: FastApp, method: bytes, url: bytes, headers: Headers) -> bool:
        """Return whether the application accepts the request.

        A large body needs a shared buffer. If no buffer is free, the request is left to ASGI, which needs
        none.
        """
        is_large = self.content_length > _MAX_INLINE_BYTES
        if is_large and not app.shared_bodies.free_count:
            return False
        try:
            self._handler = app.open_request(self, method, url, headers)
            if self._handler is None:
                return False
            if self.content_length > app.shared_bodies.capacity:  # it would overflow into the next buffer
                limit = app.shared_bodies.capacity
                raise BodyTooLarge(f"the body has more than {limit} bytes (FOVEA_BODY_BYTES)")
            if is_large:
                self.shared_buffer = app.shared_bodies.allocate()
        except RequestError as error:
            self._reject(error)
        except Exception:
            self._reject(log_internal_error(self.record.request_id))
        self._observer.start_request()
        return True

    def _reject(self, error: RequestError) -> None:
        """Close the handler and keep the error. `send_refusal` or `complete_body` sends the refusal."""
        self._error = error
        handler, self._handler = self._handler, None
        if handler:
            handler.close()

    # --- the body ---

    @property
    def is_incomplete(self) -> bool:
        """True if more of the body is expected."""
        return self._handler is not None and self.received_bytes < self.content_length

    def send_refusal(self) -> None:
        """Send a pending refusal now that the available data has been read.

        The refusal waits for the data that has already arrived, but not for more.
        """
        if self._error:
            error, self._error = self._error, None
            self._writer.refuse_with_delay(self, error)

    def receive_body(self, data: memoryview | bytes) -> None:
        """Store a copy of a piece of the body. A rejected or finished request discards the rest."""
        if self._handler is None:
            return
        if self.shared_buffer:
            self.shared_buffer.view(self.received_bytes, self.received_bytes + len(data))[:] = data
        else:
            self._chunks.append(bytes(data))
        self.count_bytes(len(data))

    def get_buffer(self) -> memoryview | None:
        """Return the part of the shared buffer for the next bytes; None if the body needs no shared buffer.

        The kernel writes into this part, and the connection then reports the bytes with `count_bytes`.
        """
        if self.shared_buffer is None:
            return None
        return self.shared_buffer.view(
            self.received_bytes, min(self.received_bytes + _MAX_READ_BYTES, self.content_length)
        )

    def count_bytes(self, size: int) -> None:
        """Account for `size` more bytes of the body."""
        self.received_bytes += size
        if self._handler:
            self._call_handler(self._handler.count_bytes, size)

    def complete_body(self) -> None:
        """Pass the complete body to the handler, or send a pending refusal."""
        if self._error:
            self.send_refusal()
        elif self._handler:
            body = self.shared_buffer or (
                self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
            )
            self._chunks = []
            self._call_handler(self._handler.handle_body, body, self.received_bytes)

    def _call_handler(self, function: Callable[..., None], *arguments: object) -> None:
        """Call the application, and answer with the error if it raises an exception."""
        try:
            function(*arguments)
        except RequestError as error:
            self.refuse(error)
        except Exception:
            self.fail()

    # --- the answer ---

    def answer(
        self, content: bytes, headers: Mapping[str, str] | None = None, media_type: str = JSON_MEDIA_TYPE
    ) -> None:
        """Write the application's answer. Does nothing if the request is over."""
        if not self.response_complete:
            self._end(200)
            self._writer.respond(self, 200, content, headers or {}, media_type)

    def refuse(self, error: RequestError) -> None:
        """Write an error as the answer. Does nothing if the request is over."""
        if not self.response_complete:
            self._observer.record_failure(self.record, error.code)
            status, content, headers = encode_error(error, self.record)
            self._end(status)
            self._writer.respond(self, status, content, headers)

    def fail(self) -> None:
        """Answer with an internal error. Call this while the exception is being handled."""
        self.refuse(log_internal_error(self.record.request_id))

    def disconnect(self) -> None:
        """End the request because the client has disconnected."""
        if not self.response_complete:
            self.disconnected = True
            self._observer.record_failure(self.record, CLIENT_LEFT)
            self._end(0)

    def _end(self, status: int) -> None:
        """End the request: set the status, close the handler, count the request, and release the memory.

        Invariant: the job is over before its memory is released. `RequestHandler.close` ends the job and must
        come before `SharedBuffer.release`. In the other order, a runner could classify the next request's
        body in the buffer, and this request's caller would get the labels of somebody else's image.

        `_handler` is cleared only after `close` has returned. If `close` raises, the buffer stays allocated,
        because a lost buffer is better than a wrong answer.

        The request is counted before the last byte leaves, so that a client that has its answer finds the
        request in the next scrape.
        """
        self.response_started = self.response_complete = True  # also when the client has disconnected
        self.record.status = status
        if self._handler:
            self._handler.close()
            self._handler = None
        self._observer.end_request(self.record)
        self._error = None  # its traceback refers back to this exchange
        if self.shared_buffer:
            assert self._handler is None, "the job must be over before its memory is released"  # noqa: S101
            self.shared_buffer.release(self.received_bytes)
            self.shared_buffer = None


def open_exchange(
    writer: ResponseWriter,
    app: FastApp,
    observer: Observer,
    head: RequestHead,
    client: tuple[str, int] | None,
) -> Exchange | None:
    """Return the exchange of a request from `client`; None if the application leaves the request to ASGI."""
    headers = dict(head.headers)
    if head.is_chunked or (
        b"content-length" not in headers and not (head.method == b"GET" and app.can_answer(head.url))
    ):
        return None
    record, _ = observer.create_record(head.method.decode(), headers, head.headers, client)
    exchange = Exchange(writer, observer, record, head.content_length)
    exchange.keep_alive = head.keep_alive
    return exchange if exchange.try_open(app, head.method, head.url, headers) else None

"""Classification requests that bypass ASGI: no task, no future and no copy of the body.

ASGI costs more than the classification of a small image. The connection creates a `Turn` for each request
that its `Application` accepts. The turn collects the body and passes the body to the `Call` that the
application created from the headers. A large body is received into a slot of the memory that the runners
share. The answer is written at once.

Invariant: the job is over before its memory is given back. Runners read the body directly from the slot, and
the next request overwrites the slot. `Turn._end` therefore closes the call, which ends the job, and only then
gives the slot back. A runner may still read the slot of a job that is over, but its result is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol, TypeAlias

from fovea.service.errors import BodyTooLarge, RequestError
from fovea.service.http.observer import Observer, describe, failure
from fovea.service.http.request_record import Record
from fovea.service.observability.metrics import CLIENT_LEFT
from fovea.service.runners.shared_memory import SharedBodies, SharedBuffer

Headers: TypeAlias = Mapping[bytes, bytes]
"""Headers by name in lower case. If a name occurs more than once, the last value counts."""

_SMALL: Final = 64 << 10
"""Size in bytes up to which a body is sent to a runner instead of being received into a slot."""

_AT_ONCE: Final = 1 << 20
"""Maximum size of one read in bytes. A larger read blocks the event loop for over a millisecond."""


JSON: Final = "application/json"


class Opener(Protocol):
    """Interface that accepts requests which bypass ASGI."""

    def open(self, turn: Turn, method: bytes, url: bytes, headers: Headers) -> Call | None:
        """Accept a request by its headers and fill in the turn's record.

        Return None to leave the request to ASGI. Raises `RequestError` to refuse the request.
        """


class Application(Opener, Protocol):
    """Interface of everything that answers requests without ASGI."""

    slots: SharedBodies

    def has_answer(self, url: bytes) -> bool:
        """Return whether the application may accept a GET request for this URL."""


class Call(Protocol):
    """Interface of an accepted request. A call ends with `Turn.answer`, `Turn.refuse` or `close`."""

    def count(self, size: int) -> None:
        """Account for `size` received bytes of the body. Raises `RequestError` when there are too many."""

    def begin(self, body: bytes | SharedBuffer, size: int) -> None:
        """Start the work on the complete body: the bytes, or the first `size` bytes of the slot.

        Raises `RequestError`.
        """

    def close(self) -> None:
        """Stop the work and release every resource. Called once, when the request is over.

        Every job of the call must be over when this method returns: removed from the queue, or its result
        ignored. The caller gives the body's slot back right after this.
        """


class Writer(Protocol):
    """Interface of a connection, as used by a turn."""

    def respond(
        self, turn: Turn, status: int, content: bytes, headers: Mapping[str, str], media_type: str = JSON
    ) -> None:
        """Write the answer. The connection stays open if the turn's `keep_alive` is true."""

    def refuse_in_turn(self, turn: Turn, error: RequestError) -> None:
        """Refuse a request that was not admitted: at once, or later if there are too many refusals."""


class _Nobody:
    """Stand-in for the event that uvicorn's protocol sets for an ASGI application. Nothing waits for it."""

    def set(self) -> None:
        """Do nothing."""


class Turn:
    """One request, from its headers to its answer. It replaces uvicorn's request-response cycle."""

    __slots__ = (
        "_body", "_call", "_error", "_observer", "_writer", "disconnected", "keep_alive", "length",
        "received", "record", "response_complete", "response_started", "slot",
    )  # fmt: skip

    message_event = _Nobody()

    def __init__(self, writer: Writer, observer: Observer, record: Record, length: int) -> None:
        self._writer = writer
        self._observer = observer
        self.record = record
        self._call: Call | None = None
        self._error: RequestError | None = None
        self._body: list[bytes] = []
        self.slot: SharedBuffer | None = None
        self.length = length
        """Declared size of the body in bytes."""
        self.received = 0
        """Number of bytes of the body received so far."""
        self.keep_alive = True
        self.disconnected = self.response_started = self.response_complete = False

    def open(self, application: Application, method: bytes, url: bytes, headers: Headers) -> bool:
        """Return whether the application accepts the request.

        A large body needs a slot. If no slot is free, the request is left to ASGI, which needs no slot.
        """
        is_large = self.length > _SMALL
        if is_large and not application.slots.free_count:
            return False
        try:
            self._call = application.open(self, method, url, headers)
            if self._call is None:
                return False
            if self.length > application.slots.capacity:  # it would overflow into the next slot
                limit = application.slots.capacity
                raise BodyTooLarge(f"the body has more than {limit} bytes (FOVEA_BODY_BYTES)")
            if is_large:
                self.slot = application.slots.allocate()
        except RequestError as error:
            self._reject(error)
        except Exception:
            self._reject(failure(self.record.request_id))
        self._observer.begin()
        return True

    def _reject(self, error: RequestError) -> None:
        """Close the call and keep the error. `pause` or `complete` sends the refusal."""
        self._error = error
        call, self._call = self._call, None
        if call:
            call.close()

    # --- the body ---

    @property
    def incomplete(self) -> bool:
        """Return whether more of the body is expected."""
        return self._call is not None and self.received < self.length

    def pause(self) -> None:
        """Send a pending refusal now that the available data has been read.

        The refusal waits for the data that has already arrived, but not for more.
        """
        if self._error:
            error, self._error = self._error, None
            self._writer.refuse_in_turn(self, error)

    def receive(self, data: bytes) -> None:
        """Store a piece of the body. A rejected or finished request discards the rest of its body."""
        if self._call is None:
            return
        if self.slot:
            self.slot.view(self.received, self.received + len(data))[:] = data
        else:
            self._body.append(data)
        self.count(len(data))

    def room(self, slot: SharedBuffer) -> memoryview:
        """Return the part of the slot that the next bytes of the body belong to."""
        return slot.view(self.received, min(self.received + _AT_ONCE, self.length))

    def count(self, size: int) -> None:
        """Account for `size` more bytes of the body."""
        self.received += size
        if self._call:
            self._guarded(self._call.count, size)

    def complete(self) -> None:
        """Pass the complete body to the call, or send a pending refusal."""
        if self._error:
            self.pause()
        elif self._call:
            body = self.slot or (self._body[0] if len(self._body) == 1 else b"".join(self._body))
            self._body = []
            self._guarded(self._call.begin, body, self.received)

    def _guarded(self, act: Callable[..., None], *arguments: object) -> None:
        """Call into the application and turn an exception into an answer."""
        try:
            act(*arguments)
        except RequestError as error:
            self.refuse(error)
        except Exception:
            self.fail()

    # --- the answer ---

    def answer(
        self, content: bytes, headers: Mapping[str, str] | None = None, media_type: str = JSON
    ) -> None:
        """Write the application's answer. Does nothing if the request is over."""
        if not self._is_over:
            self._end(200)
            self._writer.respond(self, 200, content, headers or {}, media_type)

    def refuse(self, error: RequestError) -> None:
        """Write an error as the answer. Does nothing if the request is over."""
        if not self._is_over:
            self._observer.failed(self.record, error.code)
            status, content, headers = describe(error, self.record)
            self._end(status)
            self._writer.respond(self, status, content, headers)

    def fail(self) -> None:
        """Answer with an internal error. Call this while the exception is being handled."""
        self.refuse(failure(self.record.request_id))

    def leave(self) -> None:
        """End the request because the client has disconnected."""
        if not self._is_over:
            self.disconnected = True
            self._observer.failed(self.record, CLIENT_LEFT)
            self._end(0)

    @property
    def _is_over(self) -> bool:
        """Return whether the request was answered or the client has disconnected."""
        return self.response_complete or self.disconnected

    def _end(self, status: int) -> None:
        """End the request: set the status, close the call, count the request, and give the slot back.

        Invariant: the job is over before its memory is given back. `Call.close` ends the job and must come
        before `slot.give_back`. In the other order, a runner could classify the body of the next request in
        the slot and return its labels to this request's caller.

        The request is counted before the last byte leaves, so that a client that has its answer finds the
        request in the next scrape.
        """
        self.response_started = self.response_complete = True
        self.record.status = status
        call, self._call = self._call, None
        if call:
            call.close()
        self._observer.end(self.record)
        self._error = None  # its traceback refers back to this turn
        # Invariant: the job is over by now, so nobody gets a result read from the slot after this line.
        if self.slot:
            self.slot.release(self.received)
            self.slot = None

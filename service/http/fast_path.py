"""A request that is answered past ASGI: without a task, a future, or a copy of its body.

ASGI costs more than a small image. The connection makes a `Turn` of a request that its `Application` takes.
It collects the body, a large one in a slot of the memory that the runners share, and gives it to the `Call`
that the application has made of the headers; its answer is written at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol, TypeAlias

from fovea.service.errors import BodyTooLarge, RequestError
from fovea.service.http.observer import Observer, describe, failure
from fovea.service.http.request_record import Record
from fovea.service.observability.metrics import CLIENT_LEFT
from fovea.service.runners.shared_memory import Slot, Slots

Headers: TypeAlias = Mapping[bytes, bytes]
"""By name in lower case; of several with one name the last."""

_SMALL: Final = 64 << 10
"""Bytes of a body that is cheaper sent to a runner than left where it finds it."""

_AT_ONCE: Final = 1 << 20
"""Most bytes received in one go: more than that holds the event loop for over a millisecond."""


JSON: Final = "application/json"


class Opener(Protocol):
    """What takes requests past ASGI."""

    def open(self, turn: Turn, method: bytes, url: bytes, headers: Headers) -> Call | None:
        """Take a request by its headers, and say in the turn's record what is known. None leaves it to ASGI.

        Raises `RequestError` to refuse it.
        """


class Application(Opener, Protocol):
    """All that answers requests past ASGI."""

    slots: Slots

    def has_answer(self, url: bytes) -> bool:
        """Whether it may take a GET request for this URL."""


class Call(Protocol):
    """What the application has made of a request. It ends with `Turn.answer`, `refuse` or `close`."""

    def count(self, size: int) -> None:
        """So many bytes of the body have come. Raises `RequestError` when they are too many."""

    def begin(self, body: bytes | Slot, size: int) -> None:
        """The body is whole: all of the bytes, or the first `size` of the slot. Raises `RequestError`."""

    def close(self) -> None:
        """The request is over: stop, and give everything back. Called once."""


class Writer(Protocol):
    """The connection, as a turn sees it."""

    def respond(
        self, turn: Turn, status: int, content: bytes, headers: Mapping[str, str], media_type: str = JSON
    ) -> None:
        """Write the answer; the connection goes on if the turn's `keep_alive` says so."""

    def refuse_in_turn(self, turn: Turn, error: RequestError) -> None:
        """Refuse a request that was not let in: at once, or later where too many are refused."""


class _Nobody:
    """Who waits for news from uvicorn's protocol: an ASGI application would."""

    def set(self) -> None:
        """Nothing."""


class Turn:
    """One request, from its headers to its answer. Stands where uvicorn's protocol has its own cycle."""

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
        self.slot: Slot | None = None
        self.length = length
        """Of the body, as it was declared, in bytes."""
        self.received = 0
        self.keep_alive = True
        self.disconnected = self.response_started = self.response_complete = False

    def open(self, application: Application, method: bytes, url: bytes, headers: Headers) -> bool:
        """Whether the application takes the request. A large body needs a slot; where there is none, ASGI
        can do without."""
        is_large = self.length > _SMALL
        if is_large and not application.slots.free:
            return False
        try:
            self._call = application.open(self, method, url, headers)
            if self._call is None:
                return False
            if self.length > application.slots.limit:  # it would reach into the next slot
                limit = application.slots.limit
                raise BodyTooLarge(f"the body has more than {limit} bytes (FOVEA_BODY_BYTES)")
            if is_large:
                self.slot = application.slots.take()
        except RequestError as error:
            self._reject(error)
        except Exception:
            self._reject(failure(self.record.request_id))
        self._observer.begin()
        return True

    def _reject(self, error: RequestError) -> None:
        """Refuse the request when all that has come by now is received."""
        self._error = error
        call, self._call = self._call, None
        if call:
            call.close()

    # --- the body ---

    @property
    def incomplete(self) -> bool:
        """More of the body is awaited."""
        return self._call is not None and self.received < self.length

    def pause(self) -> None:
        """All that has come by now was received: a refusal waits for that, and for no more."""
        if self._error:
            error, self._error = self._error, None
            self._writer.refuse_in_turn(self, error)

    def receive(self, data: bytes) -> None:
        """A piece of the body."""
        if self._call is None:
            return
        if self.slot:
            self.slot.view(self.received, self.received + len(data))[:] = data
        else:
            self._body.append(data)
        self.count(len(data))

    def room(self, slot: Slot) -> memoryview:
        """Where in its slot the next bytes of the body belong."""
        return slot.view(self.received, min(self.received + _AT_ONCE, self.length))

    def count(self, size: int) -> None:
        """So many bytes more have been received."""
        self.received += size
        if self._call:
            self._guarded(self._call.count, size)

    def complete(self) -> None:
        """The body is whole."""
        if self._error:
            self.pause()
        elif self._call:
            body = self.slot or (self._body[0] if len(self._body) == 1 else b"".join(self._body))
            self._body = []
            self._guarded(self._call.begin, body, self.received)

    def _guarded(self, act: Callable[..., None], *arguments: object) -> None:
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
        """The application's. Does nothing when the request is over."""
        if not self._is_over:
            self._end(200)
            self._writer.respond(self, 200, content, headers or {}, media_type)

    def refuse(self, error: RequestError) -> None:
        """Say why there is none. Does nothing when the request is over."""
        if not self._is_over:
            self._observer.failed(self.record, error.code)
            status, content, headers = describe(error, self.record)
            self._end(status)
            self._writer.respond(self, status, content, headers)

    def fail(self) -> None:
        """Our own bug is being handled: say that there was one."""
        self.refuse(failure(self.record.request_id))

    def leave(self) -> None:
        """The client has gone."""
        if not self._is_over:
            self.disconnected = True
            self._observer.failed(self.record, CLIENT_LEFT)
            self._end(0)

    @property
    def _is_over(self) -> bool:
        return self.response_complete or self.disconnected

    def _end(self, status: int) -> None:
        """Count before the last byte leaves: who has an answer finds it in the next scrape."""
        self.response_started = self.response_complete = True
        self.record.status = status
        call, self._call = self._call, None
        if call:
            call.close()
        self._observer.end(self.record)
        self._error = None  # its traceback leads back here
        if self.slot:
            self.slot.give_back(self.received)
            self.slot = None

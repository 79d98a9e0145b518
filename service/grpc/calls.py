"""One call over gRPC: its record, its deadline, its message, and its end.

Every call is observed like a request over HTTP: it gets an id, a line in the access log, metrics and a trace.
The handler of a call runs before its message has arrived. When the client cancels or its deadline passes,
gRPC cancels the task of the handler, and `with` blocks release what was admitted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote

import grpc
from google.protobuf.message import DecodeError

from fovea.service.access.caller import Scope
from fovea.service.api.services import Services, parse_time_limit
from fovea.service.errors import BadRequest, BodyTooLarge, DeadlineExceeded, Draining, RequestError
from fovea.service.grpc.delayed_refusals import DelayedRefusals
from fovea.service.grpc.message_slots import MessageSlots
from fovea.service.grpc.statuses import find_status, make_trailers
from fovea.service.grpc.unread_replies import UnreadReplies
from fovea.service.http.api_protocol import ApiProtocol, render_flat_error
from fovea.service.http.lifecycle import Phase
from fovea.service.http.observer import log_internal_error
from fovea.service.http.proxies import Header
from fovea.service.observability.metrics import CLIENT_LEFT
from fovea.service.runners.lane import INFINITY

PROTOCOL: Final = ApiProtocol("grpc", render_flat_error)

_MAX_SMALL_BYTES: Final = 4096
"""Maximum size in bytes of a message without images, as over HTTP."""

_MAX_DETAILS_BYTES: Final = 4096
"""Maximum size in bytes of a status message as it is sent. Clients refuse more than 8 KB of metadata."""

_PLAIN_CHARACTERS: Final = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
"""Characters of a status message that are sent as they are."""


class Method(NamedTuple):
    """A method of a service."""

    handle: Callable[[Call], Awaitable[bytes]]
    """Handler. It returns the bytes of the only message, or nothing after a stream of messages. It raises
    `RequestError`."""
    scope: Scope | None
    """Scope of the API keys that open the method; None for a method that is always open."""


class SharedLimits(NamedTuple):
    """Limits of all calls together."""

    refusals: DelayedRefusals
    unread_replies: UnreadReplies


class Call:
    """One call. The handler of its method reads the message and returns the answer."""

    def __init__(
        self,
        services: Services,
        slots: MessageSlots,
        limits: SharedLimits,
        context: Any,
        path: str,
    ) -> None:
        """Start the record and the deadline of a call; `context` is a `grpc.aio.ServicerContext`."""
        pairs: list[Header] = [
            (name.encode(), value if isinstance(value, bytes) else value.encode("latin-1", "replace"))
            for name, value in context.invocation_metadata() or ()
        ]
        self.services = services
        self.limits = limits
        self.context = context
        self.headers = dict(pairs)
        """Metadata of the call by name in lower case, like the headers of a request."""
        self.header_pairs = pairs
        self.record, self.origin = services.observer.create_record(
            "POST", self.headers, pairs, _parse_peer(context.peer())
        )
        self.record.route, self.record.protocol = path, PROTOCOL
        self._slots = slots
        remaining = context.time_remaining()
        self.deadline = INFINITY if remaining is None else time.monotonic() + remaining
        """Deadline of the answer on the monotonic clock in seconds."""

    @asynccontextmanager
    async def limit_time(self) -> AsyncIterator[None]:
        """Limit the time of the block: by the call's deadline, X-Deadline-Ms, or FOVEA_DEADLINE_MS.

        Raises `BadRequest`, or `DeadlineExceeded`.
        """
        if limit := parse_time_limit(self.headers, self.services.settings):
            self.deadline = min(self.deadline, self.record.started_at + limit)
        if self.deadline == INFINITY:
            yield
            return
        try:
            async with asyncio.timeout_at(self.deadline) as timeout:
                yield
        except TimeoutError:
            if not timeout.expired():
                raise
            seconds = max(0.0, self.deadline - self.record.started_at)
            raise DeadlineExceeded(f"the call was not answered within {seconds:.3g} s") from None

    def hold_slot(self) -> AbstractAsyncContextManager[None]:
        """Hold a slot for receiving a message (`MessageSlots.hold`)."""
        return self._slots.hold(self.record.caller)

    async def read_message(self) -> bytes:
        """Receive the message of the call.

        Raises `BodyTooLarge`, `BodyTimeout`, or `Overloaded`.
        """
        async with self.hold_slot():
            message = await self.context.read()
        if message is grpc.aio.EOF:  # the client of a message that is too large gets gRPC's own status
            limit = self.services.settings.body_bytes
            raise BodyTooLarge(
                f"the call has no message, or a message of more than {limit} bytes (FOVEA_BODY_BYTES)"
            )
        content: bytes = message
        return content

    async def parse_message(self, message_type: Any) -> Any:
        """Receive the message of the call and parse it as a message without images.

        Raises `RequestError`.
        """
        return parse_small_message(await self.read_message(), message_type)


def parse_small_message(content: bytes, message_type: Any) -> Any:
    """Parse a message without images. Raises `BodyTooLarge`, or `BadRequest`."""
    name = message_type.DESCRIPTOR.name
    if len(content) > _MAX_SMALL_BYTES:
        raise BodyTooLarge(f"the {name} has {len(content)} bytes; at most {_MAX_SMALL_BYTES}")
    try:
        return message_type.FromString(content)
    except DecodeError as error:
        raise BadRequest(f"the message is not a {name}: {error}") from None


async def answer_call(call: Call, method: Method) -> bytes:
    """Return the answer to a call, and observe the call. An error ends the call with its status."""
    observer, record, context = call.services.observer, call.record, call.context
    observer.start_request()
    content = b""
    error: RequestError | None = None
    try:
        if access := call.services.access:
            access.authorize(method.scope, record.credential, record.client)
        content = await method.handle(call)
        if content:
            call.limits.unread_replies.add(record.caller, len(content))
        record.status = 200
    except asyncio.CancelledError:
        _record_cancellation(call)
        raise
    except RequestError as refusal:
        error = refusal
    except Exception:
        error = log_internal_error(record.request_id)
    finally:  # the call is counted before its answer leaves
        if error:
            observer.record_failure(record, error.code)
            record.status = error.status
        observer.end_request(record)
    trailers = make_trailers(record.request_id, error)
    if error:
        content = b""
        status, details = find_status(error), _shorten_details(error.message)
        # The traceback of the error, or of another one in whose handling it was raised, refers to this frame
        # and to the frames with the images. Such a cycle would live until the next full garbage collection.
        error.__traceback__ = error.__context__ = None
        delay = call.limits.refusals.find_delay(error)
        error = None
        await call.limits.refusals.wait(delay)
        # Raises an exception of gRPC, which ends the handler.
        await context.abort(status, details, trailers)
    context.set_trailing_metadata(trailers)
    return content


def _record_cancellation(call: Call) -> None:
    """Record why gRPC has cancelled a call. Its client gets no answer of ours any more."""
    record = call.record
    if call.services.lifecycle.phase >= Phase.REFUSING:
        record.status, reason = Draining.status, Draining.code
    elif time.monotonic() >= call.deadline:
        record.status, reason = DeadlineExceeded.status, DeadlineExceeded.code
    else:
        reason = CLIENT_LEFT
    call.services.observer.record_failure(record, reason)


def _shorten_details(message: str) -> str:
    """Shorten a message to what fits the metadata of any client.

    gRPC sends bytes that are not ASCII as `%FF`.
    """
    while len(quote(message, safe=_PLAIN_CHARACTERS)) > _MAX_DETAILS_BYTES:
        message = message[: 3 * len(message) // 4]
    return message


def _parse_peer(peer: str) -> tuple[str, int] | None:
    """Return the address and the port of the other end, or None if it has no port.

    `peer` is as gRPC writes it: `ipv4:127.0.0.1:5000` or `ipv6:%5B::1%5D:5000`.
    """
    _, _, address = unquote(peer).partition(":")
    host, _, port = address.rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdigit() else None

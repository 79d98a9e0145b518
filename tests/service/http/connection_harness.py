"""A connection in this process, whose client is the test. Its applications answer as the URL says."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send

from fovea.service.errors import BadRequest, Overloaded, Unauthorized
from fovea.service.http.access_log import AccessLog
from fovea.service.http.api_protocol import ApiProtocols
from fovea.service.http.connection import TRANSITIONS, Connection, State
from fovea.service.http.fast_path import Exchange, RequestHandler
from fovea.service.http.hangups import HangUpWatcher
from fovea.service.http.lifecycle import Lifecycle
from fovea.service.http.observer import Observer, ObserverMiddleware
from fovea.service.http.proxies import TrustedProxies
from fovea.service.http.rate_limiter import RateLimiter
from fovea.service.http.request_record import RequestRecord
from fovea.service.http.server_context import ServerContext
from fovea.service.observability.metrics import Metrics
from fovea.service.resources.body_memory import BodyMemory
from fovea.service.runners.shared_memory import SharedBodies, SharedBuffer
from fovea.service.settings import Settings

MAX_BODY_BYTES = 200_000

LONG_BYTES = 280_000
"""Size in bytes of an answer that exceeds the buffers of a socket."""


class CheckedConnection(Connection):
    """A connection that refuses illegal transitions."""

    @property
    def _state(self) -> State:
        return self._checked_state

    @_state.setter
    def _state(self, state: State) -> None:
        old = getattr(self, "_checked_state", state)
        assert state is old or state in TRANSITIONS[old], f"{old} to {state}"
        self._checked_state = state


class SilentLog(AccessLog):
    """Writes nothing."""

    def write(self, record: RequestRecord, seconds: float, trace_id: str) -> None:
        pass


class FastHandler:
    """Answers in the next round of the event loop, or refuses at once, as the URL says."""

    def __init__(self, exchange: Exchange, url: bytes) -> None:
        self._exchange = exchange
        self._url = url
        self.is_closed = False

    def count_bytes(self, size: int) -> None:
        if self._url == b"/fast/overloaded":
            raise Overloaded("no room", retry_after=1.0)

    def handle_body(self, body: bytes | SharedBuffer, size: int) -> None:
        if self._url == b"/fast/bad":
            raise BadRequest("no image")
        content = body if isinstance(body, bytes) else body.read_bytes(size)
        answer = bytes(LONG_BYTES) if self._url == b"/fast/long" else b"%d" % len(content)
        asyncio.get_running_loop().call_soon(partial(self._exchange.answer, answer))

    def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True


class FastApp:
    """Takes every request below `/fast`, and fails for `/raises`."""

    def __init__(self) -> None:
        self.shared_bodies = SharedBodies(2, MAX_BODY_BYTES)

    def can_answer(self, url: bytes) -> bool:
        if url == b"/raises":
            raise ArithmeticError("raised on purpose")
        return url.startswith(b"/fast")

    def open_request(
        self, exchange: Exchange, method: bytes, url: bytes, headers: Mapping[bytes, bytes]
    ) -> RequestHandler | None:
        if url == b"/fast/later":
            error = Unauthorized("many such errors")
            error.delay = 1000.0
            raise error
        return FastHandler(exchange, url) if url.startswith(b"/fast") else None


async def answer_asgi(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the body first, or answer before it has come, or fail, as the path says."""
    if scope["path"] == "/late":
        await asyncio.sleep(0.2)
    body, has_more = b"", not scope["path"].startswith("/early")
    while has_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, has_more = body + message["body"], message["more_body"]
    if scope["path"] == "/fails":
        raise ValueError("the application has a fault")
    content = b"%d" % len(body)
    headers = [] if scope["path"] == "/chunked" else [(b"content-length", b"%d" % len(content))]
    if scope["path"] == "/slow":
        await asyncio.sleep(0.2)
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if scope["path"] == "/chunked":
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        await asyncio.sleep(0.01)
    if scope["path"] == "/breaks":
        return
    await send({"type": "http.response.body", "body": content})


@cache
def create_observer() -> Observer:
    return Observer(Metrics(CollectorRegistry()), SilentLog(0), None, ApiProtocols(), TrustedProxies([]))


def create_context(loop: asyncio.AbstractEventLoop, **settings: Any) -> ServerContext:
    observer = create_observer()
    return ServerContext(
        asgi=ObserverMiddleware(answer_asgi, observer=observer),
        asgi_state={},
        fast_app=FastApp(),
        settings=Settings(body_bytes=MAX_BODY_BYTES, bodies_bytes=300_000, **settings),
        lifecycle=Lifecycle(),
        observer=observer,
        body_memory=BodyMemory(300_000),
        hangups=HangUpWatcher(loop),
        refusal_limiter=RateLimiter(200, burst=200, max_wait=0.01),
        buffer=bytearray(1 << 17),
    )


class Peer:
    """The test's end of a connection."""

    def __init__(self, context: ServerContext) -> None:
        self.context = context
        self.socket, self.service_socket = socket.socketpair()
        self.socket.setblocking(False)
        self.lost_event = asyncio.Event()
        self.connection = CheckedConnection(context, self.lost_event.set)
        self.faults: list[str] = []
        """Exceptions that asyncio has caught."""

    async def send(self, data: bytes) -> None:
        """Send, and let the connection read it."""
        await asyncio.get_running_loop().sock_sendall(self.socket, data)
        for _ in range(5):
            await asyncio.sleep(0)

    async def read(self, seconds: float = 0.02) -> bytes:
        """Return what has come; empty at the end of the stream. Raises `TimeoutError`.

        No read is cancelled: it could have received something.
        """
        deadline = time.monotonic() + seconds
        while True:
            with suppress(BlockingIOError):
                return self.socket.recv(1 << 16)
            if time.monotonic() > deadline:
                raise TimeoutError
            await asyncio.sleep(0.001)


@asynccontextmanager
async def open_connection(**settings: Any) -> AsyncIterator[Peer]:
    """Open a connection. At the end the test's side is closed, and the connection must keep nothing."""
    loop = asyncio.get_running_loop()
    peer = Peer(create_context(loop, **settings))
    context = peer.context
    loop.set_exception_handler(lambda _, event: peer.faults.append(repr(event.get("exception", event))))
    await loop.connect_accepted_socket(lambda: peer.connection, peer.service_socket)
    try:
        yield peer
    finally:
        peer.socket.close()
        async with asyncio.timeout(60):
            await peer.lost_event.wait()
            if context.tasks:
                await asyncio.wait(context.tasks)
        context.hangups.close()
    assert not peer.faults
    assert context.body_memory.used_bytes == 0
    assert not context.connections
    assert context.fast_app.shared_bodies.free_count == 2

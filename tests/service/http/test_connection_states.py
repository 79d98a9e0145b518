"""Whatever a client sends and however it leaves, a connection makes legal transitions and keeps nothing."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Mapping
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send

from fovea.service.errors import BadRequest, Draining, Overloaded
from fovea.service.http.access_log import AccessLog
from fovea.service.http.api_protocol import ApiProtocols
from fovea.service.http.connection import TRANSITIONS, Connection, ServerContext, State
from fovea.service.http.fast_path import Exchange, RequestHandler
from fovea.service.http.hangups import HangUpWatcher
from fovea.service.http.lifecycle import Lifecycle
from fovea.service.http.observer import Observer, ObserverMiddleware
from fovea.service.http.proxies import TrustedProxies
from fovea.service.http.request_record import RequestRecord
from fovea.service.http.timer import RateLimiter
from fovea.service.observability.metrics import Metrics
from fovea.service.resources.body_memory import BodyMemory
from fovea.service.runners.shared_memory import SharedBodies, SharedBuffer
from fovea.service.settings import Settings
from tests.raw import LIVE_REQUEST

MAX_BODY_BYTES = 200_000


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
        asyncio.get_running_loop().call_soon(partial(self._exchange.answer, b"%d" % len(content)))

    def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True


class FastApp:
    """Takes every request below `/fast`."""

    def __init__(self) -> None:
        self.shared_bodies = SharedBodies(2, MAX_BODY_BYTES)

    def can_answer(self, url: bytes) -> bool:
        return url.startswith(b"/fast")

    def open_request(
        self, exchange: Exchange, method: bytes, url: bytes, headers: Mapping[bytes, bytes]
    ) -> RequestHandler | None:
        return FastHandler(exchange, url) if url.startswith(b"/fast") else None


async def answer_asgi(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the body first, or answer before it has come, or fail, as the path says."""
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
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if scope["path"] == "/breaks":
        return
    await send({"type": "http.response.body", "body": content})


class Scenario(NamedTuple):
    """What one client sends, cut at these positions, and what happens after some rounds of the event loop."""

    requests: list[bytes]
    cuts: list[int]
    ending: str
    rounds: int
    missing_bytes: int
    """Number of bytes at the end of the last request that are not sent."""


BODIES = [b"", b"abc", b"\r\n\r\n" * 2000, bytes(70_000), bytes(MAX_BODY_BYTES), bytes(MAX_BODY_BYTES + 1)]
PATHS = ["/fast", "/fast/overloaded", "/fast/bad", "/echo", "/early", "/chunked", "/fails", "/breaks", "*"]
BROKEN = [
    b"nonsense\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\r\n\r\n",
    b"GET /echo HTTP/1.1\r\nHost: x\r\nA: ",
]


def build_request(path: str, body: bytes, framing: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n".encode()
    if framing == "chunked":
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in (body[:5], body[5:]) if one)
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    persistence = b"Connection: close\r\n" if framing == "last" else b""
    return head + persistence + b"Content-Length: %d\r\n\r\n" % len(body) + body


REQUESTS = st.builds(
    build_request,
    st.sampled_from(PATHS),
    st.sampled_from(BODIES),
    st.sampled_from(["length", "chunked", "last"]),
)
SCENARIOS = st.builds(
    Scenario,
    st.lists(REQUESTS | st.just(LIVE_REQUEST) | st.sampled_from(BROKEN), min_size=1, max_size=5),
    st.lists(st.integers(0, 1 << 20), max_size=5),
    st.sampled_from(["read", "half-close", "close", "stop"]),
    st.integers(0, 10),
    st.sampled_from([0, 0, 1, 1000]),
)


@cache
def create_observer() -> Observer:
    return Observer(Metrics(CollectorRegistry()), SilentLog(0), None, ApiProtocols(), TrustedProxies([]))


def create_context(loop: asyncio.AbstractEventLoop) -> ServerContext:
    observer = create_observer()
    return ServerContext(
        asgi=ObserverMiddleware(answer_asgi, observer=observer),
        asgi_state={},
        fast_app=FastApp(),
        settings=Settings(body_bytes=MAX_BODY_BYTES, bodies_bytes=300_000),
        lifecycle=Lifecycle(),
        observer=observer,
        body_memory=BodyMemory(300_000),
        hangups=HangUpWatcher(loop),
        refusal_limiter=RateLimiter(200, burst=200, max_wait=0.01),
        buffer=bytearray(1 << 16),
    )


async def read_all(client: socket.socket, send_task: asyncio.Task[None]) -> bytes:
    """Read until the connection ends, or everything is sent and nothing comes any more."""
    reply, has_sent = b"", False
    try:
        while True:
            has_sent = send_task.done()
            try:
                async with asyncio.timeout(0.02):
                    piece = await asyncio.get_running_loop().sock_recv(client, 1 << 16)
            except TimeoutError:
                if has_sent:
                    return reply
                continue
            reply += piece
            if not piece:
                return reply
    except ConnectionError:
        return reply


async def run_scenario(scenario: Scenario) -> bytes:
    """Play the client, and return all that it read. The connection is closed and has released everything."""
    loop = asyncio.get_running_loop()
    context = create_context(loop)
    lost_event = asyncio.Event()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    await loop.connect_accepted_socket(lambda: CheckedConnection(context, lost_event.set), theirs)
    (connection,) = context.connections
    stream = b"".join(scenario.requests)
    stream = stream[: max(1, len(stream) - scenario.missing_bytes)]
    positions = [0, *sorted(cut % len(stream) for cut in scenario.cuts), len(stream)]

    async def send_pieces() -> None:
        for start, end in pairwise(positions):
            await loop.sock_sendall(ours, stream[start:end])
            await asyncio.sleep(0)
        if scenario.ending == "half-close":
            ours.shutdown(socket.SHUT_WR)

    send_task = asyncio.create_task(send_pieces())
    if scenario.ending in ("stop", "close"):
        for _ in range(scenario.rounds):
            await asyncio.sleep(0)
    if scenario.ending == "stop":
        connection.close_now(Draining("the service stops", retry_after=1.0))
    reply = b"" if scenario.ending == "close" else await read_all(ours, send_task)
    send_task.cancel()
    await asyncio.gather(send_task, return_exceptions=True)
    ours.close()
    async with asyncio.timeout(10):
        await lost_event.wait()
        if context.tasks:
            await asyncio.wait(context.tasks)
    assert context.body_memory.used_bytes == 0
    assert not context.connections
    assert context.fast_app.shared_bodies.free_count == 2
    context.hangups.close()
    return reply


@pytest.mark.long
@given(scenario=SCENARIOS)
@settings(max_examples=1000, deadline=None)
def test_connection_makes_legal_transitions_and_keeps_nothing(scenario: Scenario) -> None:
    reply = asyncio.run(run_scenario(scenario))
    assert len(re.findall(rb"HTTP/1\.1 \d{3} ", reply)) <= len(scenario.requests)

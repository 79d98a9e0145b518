"""Whatever a client sends and however it leaves, a connection makes legal transitions and keeps nothing."""

from __future__ import annotations

import asyncio
import re
import socket
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fovea.service.errors import Draining
from tests.raw import LIVE_REQUEST
from tests.service.http.connection_harness import MAX_BODY_BYTES, Peer, open_connection


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


async def read_all(peer: Peer, send_task: asyncio.Task[None]) -> bytes:
    """Read until the connection ends, or everything is sent and nothing comes any more."""
    reply, has_sent = b"", False
    try:
        while True:
            has_sent = send_task.done()
            try:
                piece = await peer.read()
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
    stream = b"".join(scenario.requests)
    stream = stream[: max(1, len(stream) - scenario.missing_bytes)]
    positions = [0, *sorted(cut % len(stream) for cut in scenario.cuts), len(stream)]
    async with open_connection() as peer:

        async def send_pieces() -> None:
            for start, end in pairwise(positions):
                await asyncio.get_running_loop().sock_sendall(peer.socket, stream[start:end])
                await asyncio.sleep(0)
            if scenario.ending == "half-close":
                peer.socket.shutdown(socket.SHUT_WR)

        send_task = asyncio.create_task(send_pieces())
        if scenario.ending in ("stop", "close"):
            for _ in range(scenario.rounds):
                await asyncio.sleep(0)
        if scenario.ending == "stop":
            peer.connection.close_now(Draining("the service stops", retry_after=1.0))
        reply = b"" if scenario.ending == "close" else await read_all(peer, send_task)
        send_task.cancel()
        await asyncio.gather(send_task, return_exceptions=True)
    return reply


@pytest.mark.long
@given(scenario=SCENARIOS)
@settings(max_examples=400)
def test_connection_makes_legal_transitions_and_keeps_nothing(scenario: Scenario) -> None:
    reply = asyncio.run(run_scenario(scenario))
    assert len(re.findall(rb"HTTP/1\.1 \d{3} ", reply)) <= len(scenario.requests)

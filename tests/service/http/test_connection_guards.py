"""Moments in which a connection does several things at once, one test for each."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fovea.service.resources.body_memory import BodyMemory
from fovea.service.serving.admission import Admission
from fovea.service.serving.classifier import Classifier
from fovea.service.serving.live_model import LiveModel
from tests.raw import LIVE_REQUEST
from tests.service.http.connection_harness import LONG_BYTES, Peer, open_connection

FAST_REQUEST = b"GET /fast HTTP/1.1\r\nHost: x\r\n\r\n"
HALF_REQUEST = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabc"
CLOSING_HEAD = b"POST /fast/%b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"


async def read_answers(peer: Peer) -> bytes:
    """Return all that the connection sends until the end of the stream."""
    reply = b""
    while piece := await peer.read(60):
        reply += piece
    return reply


async def is_open(peer: Peer) -> bool:
    """Return whether the connection still takes what the client sends."""
    try:
        await peer.send(b"x")
        await peer.send(b"x")
    except OSError:
        return False
    return not peer.lost_event.is_set()


@pytest.mark.parametrize("size", [3, 70_000], ids=["copied", "shared"])
def test_last_piece_of_a_body_may_be_refused(size: int) -> None:
    """The refusal ends the request with the very read that completes its body."""

    async def play() -> None:
        async with open_connection() as peer:
            await peer.send(CLOSING_HEAD % (b"overloaded", size))
            await peer.send(bytes(size))
            assert b" 503 " in await read_answers(peer)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("path", "rest", "status"),
    [
        (b"bad", b"abc" + LIVE_REQUEST, b" 400 "),
        (b"good", b"abc" + LIVE_REQUEST, b" 200 "),
        (b"overloaded", b"a", b" 503 "),
    ],
    ids=["answered at once", "answered later", "in the body"],
)
def test_client_that_goes_on_sending_gets_the_last_answer(path: bytes, rest: bytes, status: bytes) -> None:
    """Closing at once would reset the connection, and the reset can destroy the answer."""

    async def play() -> None:
        async with open_connection() as peer:
            await peer.send(CLOSING_HEAD % (path, 3) + rest)
            assert status in await read_answers(peer)
            assert await is_open(peer)
            assert not peer.connection._rest  # it is not accounted for any more

    asyncio.run(play())


def test_connection_closes_at_once_if_its_client_sends_nothing_more() -> None:
    async def play() -> None:
        async with open_connection() as peer:
            await peer.send(CLOSING_HEAD % (b"bad", 3) + b"abc")
            assert b" 400 " in await read_answers(peer)
            assert not await is_open(peer)

    asyncio.run(play())


def test_refusal_ends_the_wait_for_the_answer() -> None:
    """The service's stop must not wait for the client to close."""

    async def play() -> None:
        async with open_connection(body_timeout=0.3) as peer:
            await peer.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            answer_future = peer.connection.get_answer_future()
            assert answer_future
            assert b" 408 " in await read_answers(peer)
            assert answer_future.done()
            assert await is_open(peer)

    asyncio.run(play())


def test_lost_connection_ends_the_wait_for_the_answer() -> None:
    async def play() -> None:
        async with open_connection() as peer:
            await peer.send(CLOSING_HEAD % (b"good", 3))
            answer_future = peer.connection.get_answer_future()
            assert answer_future
        assert answer_future.done()

    asyncio.run(play())


def test_lost_connection_ends_the_wait_for_a_refusal() -> None:
    """Otherwise connections that come and go at once would stay in memory for the whole delay."""

    async def play() -> None:
        async with open_connection() as peer:
            await peer.send(CLOSING_HEAD % (b"later", 3))
            timer = peer.connection._delayed_refusal
            assert timer
            assert not timer.cancelled()
        assert timer.cancelled()

    asyncio.run(play())


def test_bytes_of_a_later_head_do_not_extend_its_time_limit() -> None:
    async def play() -> None:
        async with open_connection(header_timeout=0.1) as peer:
            await peer.send(FAST_REQUEST)
            assert b" 200 " in await peer.read(60)
            for byte in FAST_REQUEST[:10]:
                await peer.send(bytes([byte]))
                try:
                    assert b" 408 " in await peer.read(0.05)
                    return
                except TimeoutError:
                    continue
            pytest.fail("a client that sends single bytes was served for half a second")

    asyncio.run(play())


def test_time_limit_of_a_body_ends_with_the_body() -> None:
    async def play() -> None:
        async with open_connection(body_timeout=0.15) as peer:
            await peer.send(b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabc")
            await peer.send(b"de")
            assert b" 200 " in await peer.read(60)

    asyncio.run(play())


@pytest.mark.parametrize("first_request", [b"", FAST_REQUEST], ids=["first", "behind another"])
def test_time_limit_of_a_body_stands_still_while_the_application_does_not_read(first_request: bytes) -> None:
    async def play() -> None:
        async with open_connection(body_timeout=0.15) as peer:
            head = b"POST /late HTTP/1.1\r\nHost: x\r\nContent-Length: 90001\r\n\r\n"
            await peer.send(first_request + head + bytes(90_000))
            await asyncio.sleep(0.2)
            await peer.send(b"x")
            reply = b""
            while b"90001" not in reply:
                piece = await peer.read(60)
                assert piece, reply
                reply += piece

    asyncio.run(play())


def test_connection_reads_on_behind_a_request_that_exceeds_the_memory() -> None:
    async def play() -> None:
        async with open_connection() as peer:
            memory = peer.context.body_memory
            assert memory.reserve(memory.limit)
            await peer.send(FAST_REQUEST + LIVE_REQUEST)
            reply = await read_answers(peer)
            assert reply.count(b" 200 ") == reply.count(b" 503 ") == 1
            for _ in range(100):  # more than the buffers of the socket hold
                await peer.send(bytes(10_000))
            memory.release(memory.limit)

    asyncio.run(asyncio.wait_for(play(), 60))


def test_many_pieces_of_a_body_beyond_the_memory_are_refused() -> None:
    """They wait for the next round of the event loop, within a body whose request is answered already."""

    async def play() -> None:
        async with open_connection() as peer:
            await peer.send(b"POST /early HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            assert b" 200 " in await peer.read(60)
            memory = peer.context.body_memory
            assert memory.reserve(memory.limit)
            await peer.send(1000 * b"4\r\n\r\n\r\n\r\n")
            assert not await read_answers(peer)
            memory.release(memory.limit)

    asyncio.run(play())


def test_request_that_has_waited_keeps_the_connection_when_the_service_stops() -> None:
    async def play() -> None:
        async with open_connection() as peer:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(peer.socket, 3 * FAST_REQUEST)
            while not peer.lost_event.is_set():
                peer.connection.close_if_idle()
                await asyncio.sleep(0)
            assert (await read_answers(peer)).count(b" 200 ") == 3

    asyncio.run(play())


def test_half_close_does_not_disturb_an_answer_that_has_begun() -> None:
    async def play() -> None:
        async with open_connection() as peer:
            await peer.send(b"POST /chunked HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
            peer.socket.shutdown(socket.SHUT_WR)
            assert (await read_answers(peer)).endswith(b"\r\n\r\n1\r\n3\r\n0\r\n\r\n")

    asyncio.run(play())


def test_fault_in_a_request_that_has_waited_ends_the_connection() -> None:
    async def play() -> None:
        async with open_connection() as peer:
            await peer.send(FAST_REQUEST + b"GET /raises HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await read_answers(peer)).count(b" 200 ") == 1
            await peer.lost_event.wait()
            assert peer.faults == ["ArithmeticError('raised on purpose')"]
            peer.faults.clear()

    asyncio.run(play())


def test_time_limit_that_is_due_with_an_abort_has_no_effect() -> None:
    async def play() -> None:
        async with open_connection(header_timeout=0.05) as peer:
            await peer.send(LIVE_REQUEST)
            assert await peer.read(60)
            await peer.send(b"GET / HT")
            loop = asyncio.get_running_loop()
            loop.call_later(0.01, peer.connection.cut_off)
            time.sleep(0.1)  # both are due in the next round of the event loop
            failures = peer.context.observer.metrics.errors.labels("header_timeout")
            before = failures._value.get()
            await peer.lost_event.wait()
            assert failures._value.get() == before

    asyncio.run(play())


@pytest.mark.parametrize("half_request", [HALF_REQUEST, HALF_REQUEST[:40]], ids=["body", "head"])
def test_end_of_the_stream_ends_half_a_request_at_once(half_request: bytes) -> None:
    """The connection itself must stay until the client has read the answer before it."""

    async def play() -> None:
        async with open_connection(header_timeout=0.2) as peer:
            await peer.send(b"GET /fast/long HTTP/1.1\r\nHost: x\r\n\r\n")
            await peer.send(half_request)
            assert bool(peer.context.tasks) == (half_request is HALF_REQUEST)
            peer.socket.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(60):
                while peer.context.tasks:
                    await asyncio.sleep(0)
            assert not peer.connection.responses.is_writable
            await asyncio.sleep(0.3)  # no time limit counts any more
            assert not peer.lost_event.is_set()
            assert (await read_answers(peer)).endswith(bytes(LONG_BYTES))

    asyncio.run(play())


class _ReleasingReader:
    """A client that has read nothing of an earlier answer, and whose request ends when it is cut off."""

    def __init__(self) -> None:
        self.admission: Admission | None = None

    def cut_off(self) -> None:
        assert self.admission
        self.admission.release()


def test_request_that_is_cut_off_while_it_reserves_memory_keeps_none() -> None:
    memory, reader = BodyMemory(100), _ReleasingReader()
    classifier: Any = SimpleNamespace(body_memory=memory, settings=SimpleNamespace(body_bytes=100))
    model: Any = SimpleNamespace(acquire=lambda: None, release=lambda: None)
    reader.admission = Admission(cast(Classifier, classifier), cast(LiveModel, model))
    memory.reserve_answer(reader, 60)
    reader.admission.reserve_bytes(50)
    assert memory.used_bytes == 0


def test_nothing_of_a_second_answer_follows_one_that_is_unread() -> None:
    """The client half-closes in its second body. The unread answer shows whether it still reads."""

    async def play() -> None:
        async with open_connection() as peer:
            await peer.send(b"GET /fast/long HTTP/1.1\r\nHost: x\r\n\r\n")
            head = b"POST /late HTTP/1.1\r\nHost: x\r\nContent-Length: 150000\r\n\r\n"
            await peer.send(head + bytes(90_000))
            peer.socket.shutdown(socket.SHUT_WR)
            await asyncio.sleep(0.4)
            answers = b"".join([piece async for piece in read_pieces(peer)])
            assert answers.endswith(bytes(LONG_BYTES)), answers[-40:]

    asyncio.run(play())


async def read_pieces(peer: Peer) -> AsyncIterator[bytes]:
    """Yield what comes until the end of the stream."""
    while piece := await peer.read(60):
        yield piece

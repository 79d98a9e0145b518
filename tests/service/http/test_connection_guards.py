"""Moments in which a connection does several things at once, one test for each."""

from __future__ import annotations

import asyncio
import socket
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fovea.service.resources.body_memory import BodyMemory
from fovea.service.serving.admission import Admission
from fovea.service.serving.classifier import Classifier
from fovea.service.serving.registry import LiveModel
from tests.raw import LIVE_REQUEST
from tests.service.http.connection_harness import LONG_BYTES, Peer, open_connection

CLOSING_HEAD = b"POST /fast/%b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"


async def read_answers(peer: Peer) -> bytes:
    """Return all that the connection sends until the end of the stream."""
    reply = b""
    while piece := await peer.read(10):
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


def test_client_that_goes_on_sending_behind_its_last_request_gets_the_answer() -> None:
    """Closing at once would reset the connection, and the reset can destroy the answer."""

    async def play() -> None:
        async with open_connection() as peer:
            await peer.send(CLOSING_HEAD % (b"bad", 3) + b"abc" + LIVE_REQUEST)
            assert b" 400 " in await read_answers(peer)
            assert await is_open(peer)

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
        async with open_connection(body_timeout=0.05) as peer:
            await peer.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            answer_future = peer.connection.get_answer_future()
            assert answer_future
            assert b" 408 " in await read_answers(peer)
            assert answer_future.done()
            assert await is_open(peer)

    asyncio.run(play())


def test_fault_in_a_request_that_has_waited_ends_the_connection() -> None:
    async def play() -> None:
        async with open_connection() as peer:
            await peer.send(b"GET /fast HTTP/1.1\r\nHost: x\r\n\r\nGET /raises HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await read_answers(peer)).count(b" 200 ") == 1
            await peer.lost_event.wait()
            assert peer.faults == ["ArithmeticError('raised on purpose')"]
            peer.faults.clear()

    asyncio.run(play())


def test_time_limit_that_is_due_with_an_abort_has_no_effect() -> None:
    async def play() -> None:
        async with open_connection(header_timeout=0.05) as peer:
            await peer.send(LIVE_REQUEST)
            assert await peer.read(10)
            await peer.send(b"GET / HT")
            loop = asyncio.get_running_loop()
            loop.call_later(0.01, peer.connection.cut_off)
            time.sleep(0.1)  # both are due in the next round of the event loop
            failures = peer.context.observer.metrics.errors.labels("header_timeout")
            before = failures._value.get()
            await peer.lost_event.wait()
            assert failures._value.get() == before

    asyncio.run(play())


def test_end_of_the_stream_ends_half_a_request_at_once() -> None:
    """The connection itself must stay until the client has read the answer before it."""

    async def play() -> None:
        async with open_connection() as peer:
            await peer.send(b"GET /fast/long HTTP/1.1\r\nHost: x\r\n\r\n")
            await peer.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabc")
            assert peer.context.tasks
            peer.socket.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(10):
                while peer.context.tasks:
                    await asyncio.sleep(0)
            assert not peer.connection.responses.is_writable
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

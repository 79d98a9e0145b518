"""What supervisor and workers say to each other arrives whole and in order, however long it is and however
busy the other one."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from fovea.service.supervisor import channel
from fovea.service.supervisor.channel import Inbox, Outbox, SupervisedSource

LONG = {"names": "x" * 300_000}
"""As long as the names of 10,000 models."""


def _run_with_pair(use_ends: Callable[[socket.socket, socket.socket], Coroutine[Any, Any, None]]) -> None:
    ours, theirs = channel.create_channel()
    theirs.setblocking(False)
    with ours, theirs:
        asyncio.run(use_ends(ours, theirs))


async def _read_messages(connection: socket.socket, count: int) -> list[Any]:
    """Read this number of whole messages, or all of them, after a delay."""
    inbox = Inbox()
    messages: list[Any] = []
    loop = asyncio.get_running_loop()
    while len(messages) < count and channel.NO_MORE_MESSAGE not in messages[-1:]:
        message = inbox.add_piece(await loop.sock_recv(connection, 1 << 16))
        if message is not None:
            messages.append(message if message == channel.NO_MORE_MESSAGE else json.loads(message))
    return messages


def test_a_worker_that_is_busy_gets_everything_later() -> None:
    async def work(ours: socket.socket, theirs: socket.socket) -> None:
        outbox = Outbox(ours)
        for number in range(5000):  # the socket has room for some hundreds
            outbox.send(commit=str(number))
        assert not outbox.is_empty
        assert await _read_messages(theirs, 5000) == [{"commit": str(number)} for number in range(5000)]
        assert outbox.is_empty

    _run_with_pair(work)


def test_a_message_may_have_any_length() -> None:
    async def work(ours: socket.socket, theirs: socket.socket) -> None:
        outbox = Outbox(ours)
        for message in (LONG, {"commit": "a"}, LONG, {"commit": "b"}):
            outbox.send(**message)
        assert await _read_messages(theirs, 4) == [LONG, {"commit": "a"}, LONG, {"commit": "b"}]

    _run_with_pair(work)


def test_who_reads_nothing_at_all_is_given_up() -> None:
    async def work(ours: socket.socket, _theirs: socket.socket) -> None:
        outbox = Outbox(ours)
        with pytest.raises(OSError, match="No buffer space"):
            for number in range(50_000):
                outbox.send(commit=str(number))

    _run_with_pair(work)


def test_who_has_gone_is_known_at_once() -> None:
    async def work(ours: socket.socket, theirs: socket.socket) -> None:
        theirs.close()
        with pytest.raises(OSError, match="Broken pipe"):
            Outbox(ours).send(commit="a")

    _run_with_pair(work)


def test_a_worker_says_how_much_it_serves_and_stops_though_nobody_reads_yet() -> None:
    """One with thousands of models, and a supervisor that is busy."""

    async def work(ours: socket.socket, theirs: socket.socket) -> None:
        source = SupervisedSource(theirs, lambda _: None, lambda _: None, lambda: None)
        source.start(lambda _: None)
        for _ in range(5000):
            source.send_message(prepared=1)
        source.report_ready(**LONG)
        stopping = asyncio.create_task(source.stop())
        everything = await _read_messages(ours, 1_000_000)
        said = [one for one in everything if one == channel.NO_MORE_MESSAGE or "closed" not in one]
        assert said == [*({"prepared": 1} for _ in range(5000)), {"ready": LONG}, channel.NO_MORE_MESSAGE]
        ours.shutdown(socket.SHUT_WR)
        await stopping

    _run_with_pair(work)


def test_a_worker_puts_long_messages_together() -> None:
    async def work(ours: socket.socket, theirs: socket.socket) -> None:
        messages: asyncio.Queue[Any] = asyncio.Queue()
        source = SupervisedSource(theirs, lambda _: None, messages.put_nowait, lambda: None)
        source.start(lambda _: None)
        Outbox(ours).send(**LONG)
        assert await messages.get() == LONG

    _run_with_pair(work)

"""Messages between supervisor and workers arrive whole and in order, at any length and under load."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from fovea.service.supervisor import channel
from fovea.service.supervisor.channel import Inbox, Outbox, SupervisedSource

LONG_MESSAGE = {"names": "x" * 300_000}
"""A message as long as the names of 10,000 models."""


def _run_with_pair(use_ends: Callable[[socket.socket, socket.socket], Coroutine[Any, Any, None]]) -> None:
    local_end, remote_end = channel.create_channel()
    remote_end.setblocking(False)
    with local_end, remote_end:
        asyncio.run(use_ends(local_end, remote_end))


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


def test_busy_worker_gets_all_messages_later() -> None:
    async def work(local_end: socket.socket, remote_end: socket.socket) -> None:
        outbox = Outbox(local_end)
        for number in range(5000):  # the socket has room for some hundreds
            outbox.send(commit=str(number))
        assert not outbox.is_empty
        assert await _read_messages(remote_end, 5000) == [{"commit": str(number)} for number in range(5000)]
        assert outbox.is_empty

    _run_with_pair(work)


def test_message_can_have_any_length() -> None:
    async def work(local_end: socket.socket, remote_end: socket.socket) -> None:
        outbox = Outbox(local_end)
        for message in (LONG_MESSAGE, {"commit": "a"}, LONG_MESSAGE, {"commit": "b"}):
            outbox.send(**message)
        assert await _read_messages(remote_end, 4) == [
            LONG_MESSAGE,
            {"commit": "a"},
            LONG_MESSAGE,
            {"commit": "b"},
        ]

    _run_with_pair(work)


def test_send_to_peer_that_never_reads_fails() -> None:
    async def work(local_end: socket.socket, _remote_end: socket.socket) -> None:
        outbox = Outbox(local_end)
        with pytest.raises(OSError, match="No buffer space"):
            for number in range(50_000):
                outbox.send(commit=str(number))

    _run_with_pair(work)


def test_send_to_closed_peer_fails_at_once() -> None:
    async def work(local_end: socket.socket, remote_end: socket.socket) -> None:
        remote_end.close()
        with pytest.raises(OSError, match="Broken pipe"):
            Outbox(local_end).send(commit="a")

    _run_with_pair(work)


def test_worker_can_report_and_stop_before_supervisor_reads() -> None:
    """The worker has thousands of models, and the supervisor is busy."""

    async def work(local_end: socket.socket, remote_end: socket.socket) -> None:
        source = SupervisedSource(remote_end, lambda _: None, lambda _: None, lambda: None)
        source.start(lambda _: None)
        for _ in range(5000):
            source.send_message(prepared=1)
        source.report_ready(**LONG_MESSAGE)
        stop_task = asyncio.create_task(source.stop())
        all_messages = await _read_messages(local_end, 1_000_000)
        messages = [
            message
            for message in all_messages
            if message == channel.NO_MORE_MESSAGE or "closed" not in message
        ]
        assert messages == [
            *({"prepared": 1} for _ in range(5000)),
            {"ready": LONG_MESSAGE},
            channel.NO_MORE_MESSAGE,
        ]
        local_end.shutdown(socket.SHUT_WR)
        await stop_task

    _run_with_pair(work)


def test_worker_reassembles_long_messages() -> None:
    async def work(local_end: socket.socket, remote_end: socket.socket) -> None:
        messages: asyncio.Queue[Any] = asyncio.Queue()
        source = SupervisedSource(remote_end, lambda _: None, messages.put_nowait, lambda: None)
        source.start(lambda _: None)
        Outbox(local_end).send(**LONG_MESSAGE)
        assert await messages.get() == LONG_MESSAGE

    _run_with_pair(work)

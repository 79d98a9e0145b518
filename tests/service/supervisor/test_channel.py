"""Messages between supervisor and workers arrive whole and in order, at any length and under load."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from fovea.service.runners.messages import Message
from fovea.service.supervisor.channel import Channel, SupervisedSource, create_channel, send_heartbeats
from fovea.service.supervisor.messages import (
    SUPERVISOR_MESSAGES,
    WORKER_MESSAGES,
    AbandonCommand,
    ChangeReply,
    ConnectionReport,
    LostModelReport,
    NoMoreConnections,
    PrepareReply,
    ReadyReport,
    StartingHeartbeat,
    SupervisorMessage,
    WorkerMessage,
)

LONG_NAME = "x" * 300_000
"""A name as long as the names of 10,000 models."""


def _run_with_pair(
    use_ends: Callable[[Channel[WorkerMessage], socket.socket], Coroutine[Any, Any, None]],
) -> None:
    local_end, remote_end = create_channel()
    with local_end, remote_end:
        asyncio.run(use_ends(Channel(local_end, WORKER_MESSAGES), remote_end))


def _create_source(
    remote_end: socket.socket, on_message: Callable[[Any], None] = lambda _: None
) -> SupervisedSource:
    source = SupervisedSource(
        remote_end,
        on_signal=lambda _: None,
        on_message=on_message,
        on_starved=lambda: None,
        on_gone=lambda: None,
    )
    source.start(lambda _: None)
    return source


async def _read_messages(channel: Channel[Any], is_last: Callable[[list[Message]], bool]) -> list[Message]:
    """Read messages until `is_last` returns True for those that have been read."""
    messages: list[Message] = []
    loop = asyncio.get_running_loop()
    while not is_last(messages):
        message = channel.decode(await loop.sock_recv(channel.socket, 1 << 16))
        if message is not None:
            messages.append(message)
    return messages


def test_busy_worker_gets_all_messages_later() -> None:
    async def work(channel: Channel[WorkerMessage], remote_end: socket.socket) -> None:
        worker: Channel[SupervisorMessage] = Channel(remote_end, SUPERVISOR_MESSAGES)
        messages = [AbandonCommand(str(number)) for number in range(5000)]
        for message in messages:  # the socket has room for some hundreds
            channel.send(message)
        assert channel.has_unsent
        assert await _read_messages(worker, lambda read: len(read) == 5000) == messages
        assert not channel.has_unsent

    _run_with_pair(work)


def test_connection_does_not_overtake_messages() -> None:
    async def work(channel: Channel[WorkerMessage], remote_end: socket.socket) -> None:
        worker: Channel[SupervisorMessage] = Channel(remote_end, SUPERVISOR_MESSAGES)
        while not channel.has_unsent:
            channel.send(AbandonCommand(LONG_NAME))
        with suppress(BlockingIOError):
            while True:
                worker.receive_packet()
        # The socket has room again, but the event loop has not yet sent the rest of the last message.
        assert not channel.pass_connection(remote_end)
        while channel.has_unsent:
            await asyncio.sleep(0)
        assert channel.pass_connection(remote_end)

    _run_with_pair(work)


def test_message_can_have_any_length() -> None:
    async def work(channel: Channel[WorkerMessage], remote_end: socket.socket) -> None:
        worker: Channel[SupervisorMessage] = Channel(remote_end, SUPERVISOR_MESSAGES)
        size = len(AbandonCommand("").to_bytes())
        names = [LONG_NAME, "a", LONG_NAME, *("x" * ((1 << 16) - size + more) for more in (-1, 0, 1)), "b"]
        for name in names:
            channel.send(AbandonCommand(name))
        messages = await _read_messages(worker, lambda read: len(read) == len(names))
        assert messages == [AbandonCommand(name) for name in names]

    _run_with_pair(work)


def test_send_to_peer_that_never_reads_fails() -> None:
    async def work(channel: Channel[WorkerMessage], _remote_end: socket.socket) -> None:
        with pytest.raises(OSError, match="No buffer space"):
            for number in range(50_000):
                channel.send(AbandonCommand(str(number)))

    _run_with_pair(work)


def test_send_to_closed_peer_fails_at_once() -> None:
    async def work(channel: Channel[WorkerMessage], remote_end: socket.socket) -> None:
        remote_end.close()
        with pytest.raises(OSError, match="Broken pipe"):
            channel.send(AbandonCommand("a"))

    _run_with_pair(work)


def test_worker_can_report_and_stop_before_supervisor_reads() -> None:
    """The worker has thousands of models, and the supervisor is busy."""

    async def work(channel: Channel[WorkerMessage], remote_end: socket.socket) -> None:
        source = _create_source(remote_end)
        messages = [LostModelReport(str(number), is_lost=True) for number in range(5000)]
        for message in messages:
            source.send_message(message)
        source.send_message(ReadyReport(LONG_NAME, "/v1/classify"))
        stop_task = asyncio.create_task(source.stop())
        read = await _read_messages(channel, lambda read: NoMoreConnections() in read[-1:])
        assert [one for one in read if not isinstance(one, ConnectionReport)] == [
            *messages,
            ReadyReport(LONG_NAME, "/v1/classify"),
            NoMoreConnections(),
        ]
        channel.socket.shutdown(socket.SHUT_WR)
        await stop_task

    _run_with_pair(work)


def test_last_counters_arrive_at_a_supervisor_that_was_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters do not wait in the queue, so a busy supervisor gets few reports, and the last one at once."""

    async def work(channel: Channel[WorkerMessage], remote_end: socket.socket) -> None:
        monkeypatch.setattr("fovea.service.supervisor.channel.HEARTBEAT_INTERVAL", 3600)
        source = _create_source(remote_end)
        for _ in range(20_000):
            source.report_closed()
        last = ConnectionReport(0, 20_000, [])
        messages = await asyncio.wait_for(_read_messages(channel, lambda read: last in read[-1:]), 60)
        assert len(messages) < 2000

    _run_with_pair(work)


def test_worker_reassembles_long_messages() -> None:
    async def work(channel: Channel[WorkerMessage], remote_end: socket.socket) -> None:
        messages: asyncio.Queue[Any] = asyncio.Queue()
        _create_source(remote_end, messages.put_nowait)
        channel.send(AbandonCommand(LONG_NAME))
        assert await messages.get() == AbandonCommand(LONG_NAME)

    _run_with_pair(work)


def test_heartbeats_of_a_blocked_process_end_with_the_block() -> None:
    local_end, remote_end = create_channel()
    with local_end, remote_end:
        local_end.settimeout(60)
        with send_heartbeats(remote_end):
            assert [local_end.recv(100) for _ in range(2)] == [StartingHeartbeat().to_bytes()] * 2
        assert not [one for one in threading.enumerate() if one.name == "beat"], "there is a second writer"


WORKER_CODE = """
import asyncio, socket, sys
from fovea.service.http.access_log import configure_logging
from fovea.service.supervisor.channel import SupervisedSource
from fovea.service.supervisor.participant import Participant

async def run():
    participant = Participant()
    source = SupervisedSource(
        socket.socket(fileno=int(sys.argv[1])),
        on_signal=sys.exit,
        on_message=participant.handle_message,
        on_starved=sys.exit,
        on_gone=sys.exit,
    )
    configure_logging("info", "json")
    source.start(sys.exit)
    await asyncio.sleep(60)

asyncio.run(run())
"""


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b'{"serve": []}', "sent a message of"),
        (AbandonCommand("a").to_bytes()[:-1], "sent a packet that ends 0 messages"),
        (PrepareReply(0, None).to_bytes(), "sent an unexpected message 'PrepareReply'"),
        (ChangeReply(0, None).to_bytes(), "answered request 0, which is not open"),
    ],
)
def test_worker_ends_at_once_after_an_invalid_message(packet: bytes, reason: str) -> None:
    local_end, remote_end = create_channel()
    with local_end:
        with remote_end:
            process = subprocess.Popen(
                [sys.executable, "-c", WORKER_CODE, str(remote_end.fileno())],
                pass_fds=[remote_end.fileno()],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        local_end.send(packet)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 70
    assert f"FrameError: {reason}" in log

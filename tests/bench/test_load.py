"""The load generator against real servers that answer well, late, incompletely or not at all."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from fovea.bench.load import compute_percentile, run_closed_loop, run_open_loop

Answer = Callable[[bytes], Awaitable[bytes]]
"""Function from a request's body to all bytes of the answer; no bytes close the connection."""

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n"


class LoadServer:
    """A server on a loop of its own."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.url = ""
        self.bodies: list[bytes] = []
        self.connections = 0
        self.max_connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.max_connections = max(self.connections, self.max_connections)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(_content_length(head))
                self.bodies.append(body)
                answer = await self._answer(body)
                writer.write(answer)
                if not answer or b"connection: close" in answer.lower():
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.connections -= 1
            await _close_writer(writer)


def _content_length(head: bytes) -> int:
    return int(head.lower().split(b"content-length: ")[1].split()[0])


async def _close_writer(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


@contextmanager
def run_server(answer: Answer) -> Iterator[LoadServer]:
    """Serve until the end of the `with`."""
    server = LoadServer(answer)
    loop = asyncio.new_event_loop()
    listener = loop.run_until_complete(asyncio.start_server(server.serve, "127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/classify?top_k=1"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(_stop_listener(listener), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _stop_listener(listener: asyncio.Server) -> None:
    listener.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def reply_at_once(_body: bytes) -> bytes:
    return OK


def test_open_loop_sends_at_the_requested_rate() -> None:
    with run_server(reply_at_once) as server:
        result = run_open_loop(server.url, [b"a", b"bb"], rate=500, seconds=1)
    assert abs(len(result.planned_times) - 500) < 5 * math.sqrt(500)  # five deviations of a Poisson count
    assert (np.diff(result.planned_times) >= 0).all()
    assert result.planned_times[-1] < 1
    assert result.statuses == {200: len(result.planned_times)}
    assert result.errors == {}
    assert result.answer_rate(max_latency=10) <= len(result.planned_times)


def test_bodies_are_sent_in_turn() -> None:
    with run_server(reply_at_once) as server:
        result = run_open_loop(server.url, [b"a", b"bb", b"ccc"], rate=300, seconds=0.5, connections=1)
    assert server.bodies == [[b"a", b"bb", b"ccc"][turn % 3] for turn in range(len(result.planned_times))]


def test_same_seed_gives_the_same_schedule() -> None:
    with run_server(reply_at_once) as server:
        first, again, other = (
            run_open_loop(server.url, [b""], rate=100, seconds=0.2, seed=seed).planned_times.tolist()
            for seed in (1, 1, 2)
        )
    assert first == again != other


def test_statuses_are_counted_and_retry_after_is_read() -> None:
    turns = iter(range(10_000))

    async def refuse_every_third(_body: bytes) -> bytes:
        return BUSY if next(turns) % 3 == 0 else OK

    with run_server(refuse_every_third) as server:
        result = run_open_loop(server.url, [b"x"], rate=300, seconds=0.5)
    count = len(result.planned_times)
    assert result.statuses == {200: count - math.ceil(count / 3), 503: math.ceil(count / 3)}
    assert result.retry_after == (7, 7)
    assert result.percentile(99, 503) > 0
    assert math.isnan(result.percentile(99, 404))


@pytest.mark.parametrize("connections", [1, 512])
def test_stall_delays_all_planned_requests(connections: int) -> None:
    """With one connection the requests of half a second are sent late, and still count as slow."""
    stall, rate = 0.5, 200
    turns = iter(range(10_000))
    turn = asyncio.Lock()

    async def stall_once(_body: bytes) -> bytes:
        async with turn:
            if next(turns) == 50:
                await asyncio.sleep(stall)
        return OK

    with run_server(stall_once) as server:
        result = run_open_loop(server.url, [b"x"], rate=rate, seconds=1.5, connections=connections)
    assert result.statuses == {200: len(result.planned_times)}
    slow = int((result.latency > stall / 5).sum())
    assert slow >= 0.6 * rate * stall * 4 / 5  # a closed loop would have seen one
    assert result.percentile(100) >= 0.9 * stall
    assert (result.queued_requests > 0) == (connections == 1)


def test_open_loop_keeps_the_connection_limit() -> None:
    async def reply_slowly(_body: bytes) -> bytes:
        await asyncio.sleep(0.05)
        return OK

    with run_server(reply_slowly) as server:
        result = run_open_loop(server.url, [b"x"], rate=400, seconds=0.5, connections=5)
    assert server.max_connections == 5
    assert result.statuses == {200: len(result.planned_times)}
    assert result.answer_rate(max_latency=0.2) < result.answer_rate(max_latency=10) <= 5 / 0.05


def test_silent_server_is_abandoned_after_the_grace_time() -> None:
    async def never_reply(_body: bytes) -> bytes:
        await asyncio.Event().wait()
        return OK

    with run_server(never_reply) as server:
        result = run_open_loop(server.url, [b"x"], rate=100, seconds=0.2, grace_seconds=0.2)
    assert result.errors == {"no answer": len(result.planned_times)}
    assert np.isnan(result.latency).all()


def test_every_hang_up_is_counted_as_an_error() -> None:
    async def send_nothing(_body: bytes) -> bytes:
        return b""

    with run_server(send_nothing) as server:
        result = run_open_loop(server.url, [b"x"], rate=100, seconds=0.3)
    assert sum(result.errors.values()) == len(result.planned_times)
    assert result.statuses == {}


def test_closed_connection_is_replaced() -> None:
    async def reply_and_close(_body: bytes) -> bytes:
        return OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")

    with run_server(reply_and_close) as server:
        result = run_open_loop(server.url, [b"x"], rate=200, seconds=0.3, connections=3)
    assert result.statuses == {200: len(result.planned_times)}


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\n\r\nno length", b"SSH-2.0-OpenSSH_9.2\r\n\r\n"])
def test_unreadable_reply_is_an_error(answer: bytes) -> None:
    async def send_answer(_body: bytes) -> bytes:
        return answer

    with run_server(send_answer) as server:
        result = run_open_loop(server.url, [b"x"], rate=100, seconds=0.2)
    assert result.errors == {"not an answer that can be read": len(result.planned_times)}


def test_refused_connections_are_errors() -> None:
    with socket.socket() as listener:  # nobody listens on its port
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        result = run_open_loop(f"http://127.0.0.1:{port}/", [b"x"], rate=100, seconds=0.2)
    assert result.errors == {"Connection refused": len(result.planned_times)}


def test_large_bodies_arrive_complete() -> None:
    body = bytes(range(256)) * 20_000
    with run_server(reply_at_once) as server:
        result = run_open_loop(server.url, [body], rate=20, seconds=0.5)
    assert result.statuses == {200: len(result.planned_times)}
    assert set(server.bodies) == {body}


def test_answer_sent_before_the_body_is_read_counts() -> None:
    """A server may refuse by the head alone; the client goes on sending what the server still reads."""

    class EarlyServer(LoadServer):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(BUSY)
                    await reader.readexactly(_content_length(head))
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                await _close_writer(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadServer, "serve", EarlyServer.serve)
        with run_server(reply_at_once) as server:
            result = run_open_loop(server.url, [b"x" * 8_000_000], rate=20, seconds=0.3, connections=50)
    assert (set(result.statuses), result.errors) == ({503}, {})


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1.0), (1, 1.0), (50, 50.0), (99, 99.0), (99.5, 100.0), (100, 100.0)]
)
def test_percentile_is_a_measured_value(percent: float, value: float) -> None:
    assert compute_percentile([float(number) for number in range(1, 101)], percent) == value


def test_percentile_of_no_values_is_nan() -> None:
    assert math.isnan(compute_percentile([], 50))


# --- the closed loop -----------------------------------------------------------------------------


def test_callers_send_again_after_each_answer() -> None:
    async def reply_slowly(_body: bytes) -> bytes:
        await asyncio.sleep(0.05)
        return OK

    with run_server(reply_slowly) as server:
        result = run_closed_loop(server.url, [b"a", b"bb"], callers=3, seconds=0.5)
    assert server.max_connections == 3
    assert result.statuses == {200: len(result.planned_times)}
    assert 3 < len(result.planned_times) <= 3 * (0.5 / 0.05 + 1)
    assert {body: server.bodies.count(body) for body in (b"a", b"bb")} == {
        b"a": math.ceil(len(result.planned_times) / 2), b"bb": len(result.planned_times) // 2
    }  # fmt: skip
    assert result.planned_times.max() < 0.5
    assert result.latency.min() >= 0.05


def test_callers_reconnect_after_a_closed_connection() -> None:
    turns = iter(range(10_000))

    async def reply_or_hang_up(_body: bytes) -> bytes:
        return OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") if next(turns) % 2 else b""

    with run_server(reply_or_hang_up) as server:
        result = run_closed_loop(server.url, [b"x"], callers=2, seconds=0.3)
    assert result.statuses[200] > 5
    assert result.errors == {"closed by the server": len(result.planned_times) - result.statuses[200]}


def test_stall_in_a_closed_loop_delays_one_request() -> None:
    """A closed loop hides a stall; the open loop shows it."""
    turns = iter(range(10_000))

    async def stall_once(_body: bytes) -> bytes:
        await asyncio.sleep(0.5 if next(turns) == 20 else 0)
        return OK

    with run_server(stall_once) as server:
        result = run_closed_loop(server.url, [b"x"], callers=1, seconds=1)
    assert int((result.latency > 0.45).sum()) == 1

"""Load generation in open and closed loop.

In an open loop, requests are sent at planned times, whether or not earlier requests have been answered. In a
closed loop, each of a number of callers sends its next request after an answer.

The plan is a Poisson process, as produced by many independent users. Latency counts from the *planned* time,
so a server that stalls is charged for all requests planned meanwhile (coordinated omission). Delays on the
client's side count too: up to 1 ms, the resolution of epoll, and the wait for a connection when all are busy.

The client has one thread and non-blocking keep-alive sockets, used last in, first out. Everything is bounded:
connections by `connections`, requests by the plan, time by `seconds` and `patience`.
"""

from __future__ import annotations

import math
import re
import select
import socket
import time
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

LATE_SECONDS: Final = 0.01
"""Delay from which a request counts as late, in seconds.

The delay exceeds epoll's resolution plus a moment without the processor.
"""

_ANSWER_BYTES: Final = 1 << 20
"""Maximum size of one answer, in bytes; a longer answer is an error."""

_READ: Final = select.EPOLLIN | select.EPOLLRDHUP
_READ_WRITE: Final = _READ | select.EPOLLOUT

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_RETRY_AFTER: Final = re.compile(rb"\r\nretry-after: *(\d+)", re.IGNORECASE)
_CLOSE: Final = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


@dataclass(frozen=True)
class Result:
    """The outcome of each planned request; times are in seconds."""

    seconds: float
    """Length of the plan."""
    planned: npt.NDArray[np.float64]
    """Planned times of the requests from the start, float64 (n,)."""
    latency: npt.NDArray[np.float64]
    """Times from the plan to the last byte of the answer, float64 (n,); NaN without an answer."""
    status: npt.NDArray[np.int16]
    """HTTP statuses, int16 (n,); 0 without an answer."""
    errors: dict[str, int]
    """Number of requests without an answer, by reason."""
    late: int
    """Number of requests that the client sent more than `LATE_SECONDS` late, because it could not keep up."""
    held: int
    """Number of requests that waited because all connections were busy."""
    retry_after: tuple[int, int] | None
    """Smallest and largest Retry-After, in seconds; None if there was none."""
    cpu_seconds: float
    """Processor time of the client."""

    @property
    def statuses(self) -> dict[int, int]:
        """Number of answers by status."""
        return {
            int(status): int((self.status == status).sum()) for status in np.unique(self.status) if status
        }

    def percentile(self, percent: float, status: int = 200) -> float:
        """Return a percentile of the latencies with this status; NaN without such answers."""
        return percentile(np.sort(self.latency[self.status == status]).tolist(), percent)

    def answered(self, *, within: float) -> float:
        """Return the timely answers 200 per second of the plan.

        An answer is timely if it takes at most `within` seconds and comes before the plan ends. Work for
        callers who continue to wait after the end is left out.
        """
        good = (self.status == 200) & (self.latency <= within)
        return float((good & (self.planned + self.latency <= self.seconds)).sum() / self.seconds)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of the values do not exceed; NaN if empty.

    The values are `ordered`.
    """
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def offer(
    url: str,
    bodies: Sequence[bytes],
    *,
    rate: float,
    seconds: float,
    connections: int = 512,
    patience: float = 10.0,
    content_type: str = "application/octet-stream",
    seed: int = 0,
) -> Result:
    """POST `bodies` in turn to `url`, `rate` per second for `seconds`; wait `patience` seconds for the rest.

    The same `seed` gives the same plan. Raises `OSError` if the host's name cannot be resolved.
    """
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(2 * rate * seconds) + 100)
    planned = np.cumsum(gaps)
    planned = planned[planned < seconds]
    return run(_Client(url, bodies, planned.tolist(), connections, content_type), seconds, patience)


def keep_asking(
    url: str,
    bodies: Sequence[bytes],
    *,
    callers: int,
    seconds: float,
    patience: float = 10.0,
    content_type: str = "application/octet-stream",
) -> Result:
    """POST `bodies` in turn to `url` from `callers` for `seconds`; each sends again after an answer.

    `planned` then holds the times of sending. A server that stalls gets fewer requests, so its latencies look
    too good. Raises `OSError` if the host's name cannot be resolved.
    """
    return run(Callers(url, bodies, callers, seconds, content_type), seconds, patience)


def run(client: _Client, seconds: float, patience: float) -> Result:
    """Run a client for `seconds`; wait at most `patience` seconds for the last answers."""
    started = time.thread_time()
    client.run(seconds + patience)
    return Result(
        seconds=seconds,
        planned=np.array(client.planned),
        latency=np.array(client.latency),
        status=np.array(client.status, np.int16),
        errors=dict(client.errors),
        late=client.late,
        held=client.held,
        retry_after=(min(client.retry_after), max(client.retry_after)) if client.retry_after else None,
        cpu_seconds=time.thread_time() - started,
    )


class Connection:
    """A socket with its current request and progress; `request` is -1 if there is none."""

    __slots__ = ("answer", "closing", "expected", "polled", "request", "socket", "unsent")

    def __init__(self, opened: socket.socket) -> None:
        self.socket = opened
        self.request = -1
        self.unsent: memoryview | None = None
        self.answer = b""
        self.expected = 0
        """Length of the answer with its head; 0 until the head has arrived."""
        self.closing = False
        self.polled = _READ_WRITE


class _Client:
    def __init__(
        self, url: str, bodies: Sequence[bytes], planned: list[float], connections: int, content_type: str
    ) -> None:
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)[0]
        self._family, self._address = found[0], found[4]
        head = f"POST {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {content_type}\r\n"
        self._requests = [
            memoryview(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body) for body in bodies
        ]
        self.planned = planned
        """Planned times of the requests, in seconds from the start."""
        self._limit = connections
        self._connections: dict[int, Connection] = {}
        self._idle: list[Connection] = []
        self._waiting: deque[int] = deque()
        self._start = 0.0
        self._open_requests = len(planned)
        self.latency = array("d", [math.nan]) * len(planned)
        self.status = array("h", [0]) * len(planned)
        self.errors: Counter[str] = Counter()
        self.retry_after: set[int] = set()
        self.late = 0
        self.held = 0

    def run(self, limit: float) -> None:
        """Send all planned requests; return when all are answered, or after `limit` seconds."""
        with select.epoll() as self._epoll:
            try:
                self._loop(limit)
            finally:
                for connection in self._connections.values():
                    connection.socket.close()
        if self._open_requests:
            self.errors["no answer"] += self._open_requests

    def _loop(self, limit: float) -> None:
        planned, count, turn = self.planned, len(self.planned), 0
        clock = time.monotonic
        self._start = clock()
        while self._open_requests and (now := clock() - self._start) < limit:
            while turn < count and planned[turn] <= now:
                self.late += now - planned[turn] > LATE_SECONDS
                self._assign(turn)
                turn += 1
            wait = (planned[turn] if turn < count else limit) - (clock() - self._start)
            self._poll(max(0.0, wait))

    def _poll(self, wait: float) -> None:
        """Send and receive on ready connections; wait at most `wait` seconds for the first one."""
        for number, events in self._epoll.poll(wait, 256):
            connection = self._connections[number]
            if events & select.EPOLLOUT:
                self._send(connection)
            if events & ~select.EPOLLOUT and number in self._connections:
                self._receive(connection)

    def _assign(self, request: int) -> None:
        """Assign a request to a free connection or a new one, or queue the request."""
        if self._idle:
            connection = self._idle.pop()
            self._begin(connection, request)
            self._send(connection)
        elif len(self._connections) < self._limit:
            self._begin(self._connect(), request)  # sent once it is connected and thus writable
        else:
            self._waiting.append(request)
            self.held += 1

    def _connect(self) -> Connection:
        opened = socket.socket(self._family, socket.SOCK_STREAM)
        opened.setblocking(False)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.connect_ex(self._address)
        connection = Connection(opened)
        self._connections[opened.fileno()] = connection
        self._epoll.register(opened.fileno(), _READ_WRITE)
        return connection

    def _begin(self, connection: Connection, request: int) -> None:
        connection.request = request
        connection.unsent = self._requests[request % len(self._requests)]

    def _send(self, connection: Connection) -> None:
        if connection.unsent is not None:
            try:
                sent = connection.socket.send(connection.unsent)
            except BlockingIOError:
                sent = 0
            except (BrokenPipeError, ConnectionResetError):
                sent = len(connection.unsent)  # the answer may have come before; reading shows that
                connection.closing = True
            except OSError as error:
                self._fail(connection, error.strerror or "failed")
                return
            connection.unsent = connection.unsent[sent:] if sent < len(connection.unsent) else None
        wanted = _READ if connection.unsent is None else _READ_WRITE
        if wanted != connection.polled:
            self._epoll.modify(connection.socket.fileno(), wanted)
            connection.polled = wanted
        if connection.unsent is None and connection.request < 0 and connection not in self._idle:
            self._free(connection)  # it was answered before everything was sent

    def _receive(self, connection: Connection) -> None:
        try:
            received = connection.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(connection, error.strerror or "failed")
            return
        if not received:
            self._fail(connection, "closed by the server")
            return
        connection.answer = answer = connection.answer + received
        if not connection.expected:
            connection.expected = self._expected(connection)
        if connection.request < 0 or len(answer) > _ANSWER_BYTES or connection.expected < 0:
            self._fail(connection, "not an answer that can be read")
        elif connection.expected and len(answer) >= connection.expected:
            self._finish(connection)

    def _expected(self, connection: Connection) -> int:
        """Return the length of the complete answer; 0 without the head, -1 if the length is unknown."""
        end = connection.answer.find(b"\r\n\r\n")
        if end < 0:
            return 0
        length = _LENGTH.search(connection.answer, 0, end)
        if length is None or not connection.answer.startswith(b"HTTP/1."):
            return -1
        if _CLOSE.search(connection.answer, 0, end):
            connection.closing = True
        return end + 4 + int(length[1])

    def _finish(self, connection: Connection) -> None:
        request, answer = connection.request, connection.answer
        status = int(answer[9:12])
        self.status[request] = status
        self.latency[request] = time.monotonic() - self._start - self.planned[request]
        self._over()
        if status != 200 and (found := _RETRY_AFTER.search(answer)):
            self.retry_after.add(int(found[1]))
        connection.request, connection.answer, connection.expected = -1, b"", 0
        if connection.closing:
            self._drop(connection)
        elif connection.unsent is None:
            self._free(connection)

    def _free(self, connection: Connection) -> None:
        if self._waiting:
            self._begin(connection, self._waiting.popleft())
            self._send(connection)
        else:
            self._idle.append(connection)

    def _fail(self, connection: Connection, reason: str) -> None:
        if connection.request >= 0:
            self.errors[reason] += 1
            self._over()
        self._drop(connection)

    def _over(self) -> None:
        """Finish a request that has its answer or will have none."""
        self._open_requests -= 1

    def _drop(self, connection: Connection) -> None:
        del self._connections[connection.socket.fileno()]
        if connection in self._idle:
            self._idle.remove(connection)
        connection.socket.close()
        if self._waiting:
            self._assign(self._waiting.popleft())


class Callers(_Client):
    """Callers in closed loop: each finished request is followed by the next on the first free connection."""

    def __init__(
        self, url: str, bodies: Sequence[bytes], callers: int, seconds: float, content_type: str
    ) -> None:
        super().__init__(url, bodies, [0.0] * callers, callers, content_type)
        self._seconds = seconds

    def _over(self) -> None:
        super()._over()
        now = time.monotonic() - self._start
        if now < self._seconds:
            self._waiting.append(self._plan(now))

    def _plan(self, now: float) -> int:
        """Add a request that is sent at `now`; return its number."""
        self.planned.append(now)
        self.latency.append(math.nan)
        self.status.append(0)
        self._open_requests += 1
        return len(self.planned) - 1

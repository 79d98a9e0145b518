"""Load generation in open and closed loop.

In an open loop, requests are sent at planned times, whether or not earlier requests have been answered. In a
closed loop, each of a number of callers sends its next request after an answer.

The plan is a Poisson process, as produced by many independent users. Latency counts from the *planned* time,
so a server that stalls is charged for all requests planned meanwhile (coordinated omission). Delays on the
client's side count too: up to 1 ms, the resolution of epoll, and the wait for a connection when all are busy.

The client has one thread and non-blocking keep-alive sockets, used last in, first out. Everything is bounded:
connections by `connections`, requests by the plan, time by `seconds` and `grace_seconds`.
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

from fovea.http_calls import read_key_header

LATE_SECONDS: Final = 0.01
"""Delay from which a request counts as late, in seconds.

The delay exceeds epoll's resolution plus a moment without the processor.
"""

_MAX_ANSWER_BYTES: Final = 1 << 20
"""Maximum size of one answer, in bytes; a longer answer is an error."""

_READ: Final = select.EPOLLIN | select.EPOLLRDHUP
_READ_WRITE: Final = _READ | select.EPOLLOUT

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_RETRY_AFTER: Final = re.compile(rb"\r\nretry-after: *(\d+)", re.IGNORECASE)
_CLOSE: Final = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


@dataclass(frozen=True)
class LoadResult:
    """The outcome of each planned request; times are in seconds."""

    seconds: float
    """Length of the plan."""
    planned_times: npt.NDArray[np.float64]
    """Planned times of the requests from the start, float64 (n,)."""
    latency: npt.NDArray[np.float64]
    """Times from the plan to the last byte of the answer, float64 (n,); NaN without an answer."""
    status: npt.NDArray[np.int16]
    """HTTP statuses, int16 (n,); 0 without an answer."""
    errors: dict[str, int]
    """Number of requests without an answer, by reason."""
    late_requests: int
    """Number of requests that the client sent more than `LATE_SECONDS` late, because it could not keep up."""
    queued_requests: int
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
        return compute_percentile(np.sort(self.latency[self.status == status]).tolist(), percent)

    def answer_rate(self, *, max_latency: float) -> float:
        """Return the timely answers 200 per second of the plan.

        An answer is timely if it takes at most `max_latency` seconds and comes before the plan ends. Work for
        callers who continue to wait after the end is left out.
        """
        good = (self.status == 200) & (self.latency <= max_latency)
        return float((good & (self.planned_times + self.latency <= self.seconds)).sum() / self.seconds)


def compute_percentile(sorted_values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of the values do not exceed; NaN if empty.

    The values are `sorted_values`.
    """
    if not sorted_values:
        return math.nan
    return sorted_values[max(0, math.ceil(len(sorted_values) * percent / 100) - 1)]


def run_open_loop(
    url: str,
    bodies: Sequence[bytes],
    *,
    rate: float,
    seconds: float,
    connections: int = 512,
    grace_seconds: float = 10.0,
    content_type: str = "application/octet-stream",
    seed: int = 0,
) -> LoadResult:
    """POST `bodies` in turn to `url`, `rate` per second for `seconds`.

    Wait at most `grace_seconds` for the answers that are still missing then.
    The same `seed` gives the same plan. Raises `OSError` if the host's name cannot be resolved.
    """
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(2 * rate * seconds) + 100)
    planned_times = np.cumsum(gaps)
    planned_times = planned_times[planned_times < seconds]
    return run_client(
        _Client(url, bodies, planned_times.tolist(), connections, content_type), seconds, grace_seconds
    )


def run_closed_loop(
    url: str,
    bodies: Sequence[bytes],
    *,
    callers: int,
    seconds: float,
    grace_seconds: float = 10.0,
    content_type: str = "application/octet-stream",
) -> LoadResult:
    """POST `bodies` in turn to `url` from `callers` for `seconds`; each sends again after an answer.

    `planned_times` then holds the times of sending. A server that stalls gets fewer requests, so its
    latencies look too good. Raises `OSError` if the host's name cannot be resolved.
    """
    return run_client(ClosedLoopClient(url, bodies, callers, seconds, content_type), seconds, grace_seconds)


def run_client(client: _Client, seconds: float, grace_seconds: float) -> LoadResult:
    """Run a client for `seconds`; wait at most `grace_seconds` seconds for the last answers."""
    started_at = time.thread_time()
    client.run(seconds + grace_seconds)
    return LoadResult(
        seconds=seconds,
        planned_times=np.array(client.planned_times),
        latency=np.array(client.latency),
        status=np.array(client.status, np.int16),
        errors=dict(client.errors),
        late_requests=client.late_requests,
        queued_requests=client.queued_requests,
        retry_after=(min(client.retry_after), max(client.retry_after)) if client.retry_after else None,
        cpu_seconds=time.thread_time() - started_at,
    )


class ClientConnection:
    """A socket with its current request and progress; `request` is -1 if there is none."""

    __slots__ = (
        "is_closing",
        "polled_events",
        "request",
        "response",
        "response_length",
        "socket",
        "unsent_data",
    )

    def __init__(self, client_socket: socket.socket) -> None:
        self.socket = client_socket
        self.request = -1
        self.unsent_data: memoryview | None = None
        self.response = b""
        self.response_length = 0
        """Length of the answer with its head; 0 until the head has arrived."""
        self.is_closing = False
        self.polled_events = _READ_WRITE


class _Client:
    def __init__(
        self,
        url: str,
        bodies: Sequence[bytes],
        planned_times: list[float],
        connections: int,
        content_type: str,
    ) -> None:
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        address_info = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)[0]
        self._family, self._address = address_info[0], address_info[4]
        head = f"POST {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {content_type}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in read_key_header().items())
        self._requests = [
            memoryview(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body) for body in bodies
        ]
        self.planned_times = planned_times
        """Planned times of the requests, in seconds from the start."""
        self._max_connections = connections
        self._connections: dict[int, ClientConnection] = {}
        self._idle_connections: list[ClientConnection] = []
        self._waiting_requests: deque[int] = deque()
        self._started_at = 0.0
        self._open_requests = len(planned_times)
        self.latency = array("d", [math.nan]) * len(planned_times)
        self.status = array("h", [0]) * len(planned_times)
        self.errors: Counter[str] = Counter()
        self.retry_after: set[int] = set()
        self.late_requests = 0
        self.queued_requests = 0

    def run(self, limit: float) -> None:
        """Send all planned requests; return when all are answered, or after `limit` seconds."""
        with select.epoll() as self._epoll:
            try:
                self._run_loop(limit)
            finally:
                for connection in self._connections.values():
                    connection.socket.close()
        if self._open_requests:
            self.errors["no answer"] += self._open_requests

    def _run_loop(self, limit: float) -> None:
        planned_times, count, next_request = self.planned_times, len(self.planned_times), 0
        clock = time.monotonic
        self._started_at = clock()
        while self._open_requests and (now := clock() - self._started_at) < limit:
            while next_request < count and planned_times[next_request] <= now:
                self.late_requests += now - planned_times[next_request] > LATE_SECONDS
                self._assign_request(next_request)
                next_request += 1
            wait = (planned_times[next_request] if next_request < count else limit) - (
                clock() - self._started_at
            )
            self._poll_connections(max(0.0, wait))

    def _poll_connections(self, wait: float) -> None:
        """Send and receive on ready connections; wait at most `wait` seconds for the first one."""
        for number, events in self._epoll.poll(wait, 256):
            connection = self._connections[number]
            if events & select.EPOLLOUT:
                self._send(connection)
            if events & ~select.EPOLLOUT and number in self._connections:
                self._receive(connection)

    def _assign_request(self, request: int) -> None:
        """Assign a request to a free connection or a new one, or queue the request."""
        if self._idle_connections:
            connection = self._idle_connections.pop()
            self._begin_request(connection, request)
            self._send(connection)
        elif len(self._connections) < self._max_connections:
            self._begin_request(self._connect(), request)  # sent once it is connected and thus writable
        else:
            self._waiting_requests.append(request)
            self.queued_requests += 1

    def _connect(self) -> ClientConnection:
        client_socket = socket.socket(self._family, socket.SOCK_STREAM)
        client_socket.setblocking(False)
        client_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client_socket.connect_ex(self._address)
        connection = ClientConnection(client_socket)
        self._connections[client_socket.fileno()] = connection
        self._epoll.register(client_socket.fileno(), _READ_WRITE)
        return connection

    def _begin_request(self, connection: ClientConnection, request: int) -> None:
        connection.request = request
        connection.unsent_data = self._requests[request % len(self._requests)]

    def _send(self, connection: ClientConnection) -> None:
        if connection.unsent_data is not None:
            try:
                sent_bytes = connection.socket.send(connection.unsent_data)
            except BlockingIOError:
                sent_bytes = 0
            except (BrokenPipeError, ConnectionResetError):
                sent_bytes = len(
                    connection.unsent_data
                )  # the answer may have come before; reading shows that
                connection.is_closing = True
            except OSError as error:
                self._fail_connection(connection, error.strerror or "failed")
                return
            connection.unsent_data = (
                connection.unsent_data[sent_bytes:] if sent_bytes < len(connection.unsent_data) else None
            )
        events = _READ if connection.unsent_data is None else _READ_WRITE
        if events != connection.polled_events:
            self._epoll.modify(connection.socket.fileno(), events)
            connection.polled_events = events
        if (
            connection.unsent_data is None
            and connection.request < 0
            and connection not in self._idle_connections
        ):
            self._reuse_connection(connection)  # it was answered before everything was sent

    def _receive(self, connection: ClientConnection) -> None:
        try:
            data = connection.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail_connection(connection, error.strerror or "failed")
            return
        if not data:
            self._fail_connection(connection, "closed by the server")
            return
        connection.response = response = connection.response + data
        if not connection.response_length:
            connection.response_length = self._parse_response_length(connection)
        if connection.request < 0 or len(response) > _MAX_ANSWER_BYTES or connection.response_length < 0:
            self._fail_connection(connection, "not an answer that can be read")
        elif connection.response_length and len(response) >= connection.response_length:
            self._finish_request(connection)

    def _parse_response_length(self, connection: ClientConnection) -> int:
        """Return the length of the complete answer; 0 without the head, -1 if the length is unknown."""
        end = connection.response.find(b"\r\n\r\n")
        if end < 0:
            return 0
        length = _LENGTH.search(connection.response, 0, end)
        if length is None or not connection.response.startswith(b"HTTP/1."):
            return -1
        if _CLOSE.search(connection.response, 0, end):
            connection.is_closing = True
        return end + 4 + int(length[1])

    def _finish_request(self, connection: ClientConnection) -> None:
        request, response = connection.request, connection.response
        status = int(response[9:12])
        self.status[request] = status
        self.latency[request] = time.monotonic() - self._started_at - self.planned_times[request]
        self._end_request()
        if status != 200 and (retry_match := _RETRY_AFTER.search(response)):
            self.retry_after.add(int(retry_match[1]))
        connection.request, connection.response, connection.response_length = -1, b"", 0
        if connection.is_closing:
            self._drop_connection(connection)
        elif connection.unsent_data is None:
            self._reuse_connection(connection)

    def _reuse_connection(self, connection: ClientConnection) -> None:
        if self._waiting_requests:
            self._begin_request(connection, self._waiting_requests.popleft())
            self._send(connection)
        else:
            self._idle_connections.append(connection)

    def _fail_connection(self, connection: ClientConnection, reason: str) -> None:
        if connection.request >= 0:
            self.errors[reason] += 1
            self._end_request()
        self._drop_connection(connection)

    def _end_request(self) -> None:
        """Finish a request that has its answer or will have none."""
        self._open_requests -= 1

    def _drop_connection(self, connection: ClientConnection) -> None:
        del self._connections[connection.socket.fileno()]
        if connection in self._idle_connections:
            self._idle_connections.remove(connection)
        connection.socket.close()
        if self._waiting_requests:
            self._assign_request(self._waiting_requests.popleft())


class ClosedLoopClient(_Client):
    """Callers in closed loop: each finished request is followed by the next on the first free connection."""

    def __init__(
        self, url: str, bodies: Sequence[bytes], callers: int, seconds: float, content_type: str
    ) -> None:
        super().__init__(url, bodies, [0.0] * callers, callers, content_type)
        self._seconds = seconds

    def _end_request(self) -> None:
        super()._end_request()
        now = time.monotonic() - self._started_at
        if now < self._seconds:
            self._waiting_requests.append(self._plan_request(now))

    def _plan_request(self, now: float) -> int:
        """Add a request that is sent at `now`; return its number."""
        self.planned_times.append(now)
        self.latency.append(math.nan)
        self.status.append(0)
        self._open_requests += 1
        return len(self.planned_times) - 1

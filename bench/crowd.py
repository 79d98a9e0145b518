"""Mixed clients: good clients in closed loop, and clients that stall, drip or leave.

Each request belongs to a kind that states the expected status and the errors that the service must count. The
answers and the counts are then compared exactly.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSE: Final = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_SAMPLE: Final = re.compile(r'^fovea_(requests|errors)_total\{.*?(?:reason|status)="(\w+)".*\} (\S+)$', re.M)

_MAX_ODD_CLIENTS: Final = 500
"""Maximum number of odd clients at a time; further good requests wait."""

_ANSWER_TIMEOUT: Final = 60.0
"""Time limit for one answer, in seconds; a good client that waits longer has failed."""

_DRIP_SECONDS: Final = 1.0

_COUNT_TIMEOUT: Final = 5.0
"""Time within which the service must have counted the last clients that left, in seconds."""


class ClientBehaviour(Enum):
    """The way in which a client sends its request and proceeds."""

    WHOLE = "at once, and awaits the answer"
    STALLS = "half of the body, and awaits the answer"
    DRIPS_HEADERS = "the first line, then a byte a second"
    DRIPS_BODY = "the headers, then a byte a second"
    LEAVES = "at once, and leaves"
    LEAVES_HALFWAY = "half of the body, and leaves"


@dataclass(frozen=True)
class RequestKind:
    """A kind of request with one expected result."""

    name: str
    requests: Sequence[bytes]
    """Complete HTTP requests, sent in turn."""
    share: float
    """Share of all requests; the first kind gets the rest."""
    status: int = 200
    """Expected status; 0 for clients that do not await the answer."""
    error_counts: Mapping[str, int] = field(default_factory=dict)
    """Errors that the service must count for one such request, by code."""
    behaviour: ClientBehaviour = ClientBehaviour.WHOLE


@dataclass(frozen=True)
class CrowdResult:
    """The results of the requests as seen by the clients; status 0 means no answer."""

    seconds: float
    """Time from the first request to the last awaited answer on the steady connections, in seconds."""
    request_counts: Counter[str]
    """Number of sent requests by kind."""
    statuses: Counter[tuple[str, int]]
    """Number of answers by kind and status."""
    failures: Counter[tuple[str, str]]
    """Number of broken connections by kind and error."""


def build_request(
    body: bytes, content_type: str = "application/octet-stream", path: str = "/v1/classify"
) -> bytes:
    """Return a complete HTTP request."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def schedule_requests(kinds: Sequence[RequestKind], count: int, *, seed: int) -> list[RequestKind]:
    """Return `count` requests of all kinds in their shares, in an order determined by the seed."""
    counts = [round(kind.share * count) for kind in kinds[1:]]
    kind_indices = np.repeat(np.arange(len(kinds)), [count - sum(counts), *counts])
    return [kinds[place] for place in np.random.default_rng(seed).permutation(kind_indices)]


def send_requests(url: str, schedule: Sequence[RequestKind], *, connections: int) -> CrowdResult:
    """Send all planned requests over `connections` in closed loop; return after all have ended."""
    return asyncio.run(_ClientCrowd(url, schedule).run(connections))


class _ClientCrowd:
    def __init__(self, url: str, schedule: Sequence[RequestKind]) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._schedule = iter(schedule)
        self._request_counts: Counter[str] = Counter()
        self._statuses: Counter[tuple[str, int]] = Counter()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._odd_client_limit = asyncio.Semaphore(_MAX_ODD_CLIENTS)

    async def run(self, connections: int) -> CrowdResult:
        started_at = time.monotonic()
        async with asyncio.TaskGroup() as odd:
            async with asyncio.TaskGroup() as steady:
                for _ in range(connections):
                    steady.create_task(self._run_steady_client(odd))
            seconds = time.monotonic() - started_at
        return CrowdResult(seconds, self._request_counts, self._statuses, self._failures)

    def _next_requests(self) -> Iterator[tuple[RequestKind, bytes]]:
        for kind in self._schedule:
            index = self._request_counts[kind.name]
            self._request_counts[kind.name] += 1
            yield kind, kind.requests[index % len(kind.requests)]

    async def _run_steady_client(self, odd: asyncio.TaskGroup) -> None:
        """Send one request after the other; requests with odd behaviour get their own clients."""
        connection: _Connection | None = None
        for kind, content in self._next_requests():
            if kind.behaviour is not ClientBehaviour.WHOLE:
                await self._odd_client_limit.acquire()
                odd.create_task(self._run_odd_client(kind, content))
                continue
            try:
                connection = connection or await _Connection.open(self._address)
                self._statuses[kind.name, await connection.exchange(content)] += 1
            except (OSError, EOFError, TimeoutError) as error:
                self._failures[kind.name, type(error).__name__] += 1
                if connection:
                    connection.close()
                connection = None
            if connection and connection.is_closing:
                connection.close()
                connection = None
        if connection:
            connection.close()

    async def _run_odd_client(self, kind: RequestKind, content: bytes) -> None:
        try:
            if kind.behaviour in (ClientBehaviour.LEAVES, ClientBehaviour.LEAVES_HALFWAY):
                part = content if kind.behaviour is ClientBehaviour.LEAVES else _first_half(content)
                await _send_and_close(self._address, part)
                self._statuses[kind.name, 0] += 1
            else:
                self._statuses[kind.name, await self._run_slow_client(kind.behaviour, content)] += 1
        except (OSError, EOFError, TimeoutError) as error:
            self._failures[kind.name, type(error).__name__] += 1
        finally:
            self._odd_client_limit.release()

    async def _run_slow_client(self, behaviour: ClientBehaviour, content: bytes) -> int:
        connection = await _Connection.open(self._address)
        try:
            if behaviour is ClientBehaviour.STALLS:
                return await connection.exchange(_first_half(content))
            end = b"\r\n" if behaviour is ClientBehaviour.DRIPS_HEADERS else b"\r\n\r\n"
            return await connection.drip_bytes(content, content.index(end) + len(end))
        finally:
            connection.close()


class _Connection:
    """The client side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.is_closing = False
        """Flag for a server that announced the end of the connection."""

    @classmethod
    async def open(cls, address: tuple[str, int]) -> _Connection:
        return cls(*await asyncio.open_connection(*address))

    def close(self) -> None:
        self._writer.close()

    async def exchange(self, content: bytes) -> int:
        """Send the content and return the answer's status."""
        self._writer.write(content)
        return await asyncio.wait_for(self._read_status(), _ANSWER_TIMEOUT)

    async def drip_bytes(self, content: bytes, start: int) -> int:
        """Send everything before `start` at once, then one byte per second until the answer arrives."""
        self._writer.write(content[:start])
        response = asyncio.ensure_future(self.exchange(b""))
        for index in range(start, len(content)):
            finished_futures, _ = await asyncio.wait([response], timeout=_DRIP_SECONDS)
            if finished_futures:
                break
            self._writer.write(content[index : index + 1])
        return await response

    async def _read_status(self) -> int:
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        await self._reader.readexactly(int(length[1]) if length else 0)
        self.is_closing = _CLOSE.search(head) is not None
        return int(head[9:12])


def _first_half(content: bytes) -> bytes:
    start = content.index(b"\r\n\r\n") + 4
    return content[: (start + len(content)) // 2]


async def _send_and_close(address: tuple[str, int], content: bytes) -> None:
    """Send and close in one segment (tcp(7), TCP_CORK), so that no answer can come in between."""
    with socket.socket() as client_socket:
        client_socket.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client_socket, address)
        client_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        await loop.sock_sendall(client_socket, content)


# --- expected results ----------------------------------------------------------------------------


@dataclass(frozen=True)
class CounterSnapshot:
    """The counts of the service so far."""

    counts: Counter[tuple[str, str]]
    """Counts of `errors` by reason and of `requests` by status."""

    @classmethod
    def scrape(cls, url: str) -> CounterSnapshot:
        """Read the counters of the service at `url`, without those of reading them."""
        parts = urlsplit(url)
        with urllib.request.urlopen(f"http://{parts.netloc}/metrics", timeout=_ANSWER_TIMEOUT) as response:
            lines = [line for line in response.read().decode().splitlines() if 'route="/metrics"' not in line]
        counts: Counter[tuple[str, str]] = Counter()
        for name, label, value in _SAMPLE.findall("\n".join(lines)):
            counts[name, label] += int(float(value))
        return cls(counts)

    def increase_since(self, earlier: CounterSnapshot) -> Counter[tuple[str, str]]:
        """Return the increase since an earlier snapshot."""
        return self.counts - earlier.counts


def expected_counts(schedule: Sequence[RequestKind]) -> Counter[tuple[str, str]]:
    """Return the counts that the service must have for these requests."""
    counts: Counter[tuple[str, str]] = Counter()
    for kind in schedule:
        for reason, number in kind.error_counts.items():
            counts["errors", reason] += number
        if kind.behaviour is not ClientBehaviour.DRIPS_HEADERS:  # never became a request
            counts["requests", str(kind.status)] += 1
    return counts


def wait_for_counts(
    url: str, earlier: CounterSnapshot, schedule: Sequence[RequestKind]
) -> Counter[tuple[str, str]]:
    """Return the service's counts since `earlier`, once they are complete or after some seconds."""
    end = time.monotonic() + _COUNT_TIMEOUT
    expected = expected_counts(schedule)
    while (
        increase := CounterSnapshot.scrape(url).increase_since(earlier)
    ) != expected and time.monotonic() < end:
        time.sleep(0.05)
    return increase


def find_differences(
    result: CrowdResult, schedule: Sequence[RequestKind], counts: Counter[tuple[str, str]]
) -> list[str]:
    """Return the answers and counts that differ from the expectations; empty if all is right."""
    kinds: dict[str, Any] = {kind.name: kind for kind in schedule}
    differences = [
        f"{name}: {number} x status {status}, not {kinds[name].status}"
        for (name, status), number in sorted(result.statuses.items())
        if status != kinds[name].status
    ]
    differences += [
        f"{name}: {number} x {error}" for (name, error), number in sorted(result.failures.items())
    ]
    expected = expected_counts(schedule)
    for name, label in sorted(counts.keys() | expected.keys()):
        if counts[name, label] != expected[name, label]:
            differences.append(f"{name} {label}: {counts[name, label]} counted, {expected[name, label]} sent")
    return differences

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

_ODD_CLIENTS: Final = 500
"""Maximum number of odd clients at a time; further good requests wait."""

_PATIENCE: Final = 60.0
"""Time limit for one answer, in seconds; a good client that waits longer has failed."""

_DRIP_SECONDS: Final = 1.0

_COUNTED_SECONDS: Final = 5.0
"""Time within which the service must have counted the last clients that left, in seconds."""


class Manner(Enum):
    """The way in which a client sends its request and proceeds."""

    WHOLE = "at once, and awaits the answer"
    STALLS = "half of the body, and awaits the answer"
    DRIPS_HEADERS = "the first line, then a byte a second"
    DRIPS_BODY = "the headers, then a byte a second"
    LEAVES = "at once, and leaves"
    LEAVES_HALFWAY = "half of the body, and leaves"


@dataclass(frozen=True)
class Kind:
    """A kind of request with one expected result."""

    name: str
    requests: Sequence[bytes]
    """Complete HTTP requests, sent in turn."""
    share: float
    """Share of all requests; the first kind gets the rest."""
    status: int = 200
    """Expected status; 0 for clients that do not await the answer."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Errors that the service must count for one such request, by code."""
    manner: Manner = Manner.WHOLE


@dataclass(frozen=True)
class Outcome:
    """The results of the requests as seen by the clients; status 0 means no answer."""

    seconds: float
    """Time from the first request to the last awaited answer on the steady connections, in seconds."""
    sent: Counter[str]
    """Number of sent requests by kind."""
    statuses: Counter[tuple[str, int]]
    """Number of answers by kind and status."""
    failures: Counter[tuple[str, str]]
    """Number of broken connections by kind and error."""


def request(body: bytes, content_type: str = "application/octet-stream", path: str = "/v1/classify") -> bytes:
    """Return a complete HTTP request."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def schedule(kinds: Sequence[Kind], count: int, *, seed: int) -> list[Kind]:
    """Return `count` requests of all kinds in their shares, in an order determined by the seed."""
    counts = [round(kind.share * count) for kind in kinds[1:]]
    places = np.repeat(np.arange(len(kinds)), [count - sum(counts), *counts])
    return [kinds[place] for place in np.random.default_rng(seed).permutation(places)]


def send(url: str, planned: Sequence[Kind], *, connections: int) -> Outcome:
    """Send all planned requests over `connections` in closed loop; return after all have ended."""
    return asyncio.run(_Crowd(url, planned).run(connections))


class _Crowd:
    def __init__(self, url: str, planned: Sequence[Kind]) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._planned = iter(planned)
        self._sent: Counter[str] = Counter()
        self._statuses: Counter[tuple[str, int]] = Counter()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._odd_places = asyncio.Semaphore(_ODD_CLIENTS)

    async def run(self, connections: int) -> Outcome:
        started = time.monotonic()
        async with asyncio.TaskGroup() as odd:
            async with asyncio.TaskGroup() as steady:
                for _ in range(connections):
                    steady.create_task(self._steady(odd))
            seconds = time.monotonic() - started
        return Outcome(seconds, self._sent, self._statuses, self._failures)

    def _next(self) -> Iterator[tuple[Kind, bytes]]:
        for kind in self._planned:
            turn = self._sent[kind.name]
            self._sent[kind.name] += 1
            yield kind, kind.requests[turn % len(kind.requests)]

    async def _steady(self, odd: asyncio.TaskGroup) -> None:
        """Send one request after the other; requests with an odd manner get their own clients."""
        connection: _Connection | None = None
        for kind, content in self._next():
            if kind.manner is not Manner.WHOLE:
                await self._odd_places.acquire()
                odd.create_task(self._odd(kind, content))
                continue
            try:
                connection = connection or await _Connection.open(self._address)
                self._statuses[kind.name, await connection.exchange(content)] += 1
            except (OSError, EOFError, TimeoutError) as error:
                self._failures[kind.name, type(error).__name__] += 1
                if connection:
                    connection.close()
                connection = None
            if connection and connection.ends:
                connection.close()
                connection = None
        if connection:
            connection.close()

    async def _odd(self, kind: Kind, content: bytes) -> None:
        try:
            if kind.manner in (Manner.LEAVES, Manner.LEAVES_HALFWAY):
                part = content if kind.manner is Manner.LEAVES else _half(content)
                await _leave(self._address, part)
                self._statuses[kind.name, 0] += 1
            else:
                self._statuses[kind.name, await self._slow(kind.manner, content)] += 1
        except (OSError, EOFError, TimeoutError) as error:
            self._failures[kind.name, type(error).__name__] += 1
        finally:
            self._odd_places.release()

    async def _slow(self, manner: Manner, content: bytes) -> int:
        connection = await _Connection.open(self._address)
        try:
            if manner is Manner.STALLS:
                return await connection.exchange(_half(content))
            end = b"\r\n" if manner is Manner.DRIPS_HEADERS else b"\r\n\r\n"
            return await connection.drip(content, content.index(end) + len(end))
        finally:
            connection.close()


class _Connection:
    """The client side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.ends = False
        """Flag for a server that announced the end of the connection."""

    @classmethod
    async def open(cls, address: tuple[str, int]) -> _Connection:
        return cls(*await asyncio.open_connection(*address))

    def close(self) -> None:
        self._writer.close()

    async def exchange(self, content: bytes) -> int:
        """Send the content and return the answer's status."""
        self._writer.write(content)
        return await asyncio.wait_for(self._status(), _PATIENCE)

    async def drip(self, content: bytes, start: int) -> int:
        """Send everything before `start` at once, then one byte per second until the answer arrives."""
        self._writer.write(content[:start])
        answer = asyncio.ensure_future(self.exchange(b""))
        for place in range(start, len(content)):
            done, _ = await asyncio.wait([answer], timeout=_DRIP_SECONDS)
            if done:
                break
            self._writer.write(content[place : place + 1])
        return await answer

    async def _status(self) -> int:
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        await self._reader.readexactly(int(length[1]) if length else 0)
        self.ends = _CLOSE.search(head) is not None
        return int(head[9:12])


def _half(content: bytes) -> bytes:
    start = content.index(b"\r\n\r\n") + 4
    return content[: (start + len(content)) // 2]


async def _leave(address: tuple[str, int], content: bytes) -> None:
    """Send and close in one segment (tcp(7), TCP_CORK), so that no answer can come in between."""
    with socket.socket() as opened:
        opened.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(opened, address)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        await loop.sock_sendall(opened, content)


# --- expected results ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ledger:
    """The counts of the service so far."""

    counts: Counter[tuple[str, str]]
    """Counts of `errors` by reason and of `requests` by status."""

    @classmethod
    def read(cls, url: str) -> Ledger:
        """Read the counters of the service at `url`, without those of reading them."""
        parts = urlsplit(url)
        with urllib.request.urlopen(f"http://{parts.netloc}/metrics", timeout=_PATIENCE) as answer:
            lines = [line for line in answer.read().decode().splitlines() if 'route="/metrics"' not in line]
        counts: Counter[tuple[str, str]] = Counter()
        for name, label, value in _SAMPLE.findall("\n".join(lines)):
            counts[name, label] += int(float(value))
        return cls(counts)

    def since(self, earlier: Ledger) -> Counter[tuple[str, str]]:
        """Return the increase since an earlier ledger."""
        return self.counts - earlier.counts


def wanted(planned: Sequence[Kind]) -> Counter[tuple[str, str]]:
    """Return the counts that the service must have for these requests."""
    counts: Counter[tuple[str, str]] = Counter()
    for kind in planned:
        for reason, number in kind.reasons.items():
            counts["errors", reason] += number
        if kind.manner is not Manner.DRIPS_HEADERS:  # never became a request
            counts["requests", str(kind.status)] += 1
    return counts


def counted(url: str, earlier: Ledger, planned: Sequence[Kind]) -> Counter[tuple[str, str]]:
    """Return the service's counts since `earlier`, once they are complete or after some seconds."""
    end = time.monotonic() + _COUNTED_SECONDS
    expected = wanted(planned)
    while (found := Ledger.read(url).since(earlier)) != expected and time.monotonic() < end:
        time.sleep(0.05)
    return found


def surprises(outcome: Outcome, planned: Sequence[Kind], found: Counter[tuple[str, str]]) -> list[str]:
    """Return the answers and counts that differ from the expectations; empty if all is right."""
    kinds: dict[str, Any] = {kind.name: kind for kind in planned}
    told = [
        f"{name}: {number} x status {status}, not {kinds[name].status}"
        for (name, status), number in sorted(outcome.statuses.items())
        if status != kinds[name].status
    ]
    told += [f"{name}: {number} x {error}" for (name, error), number in sorted(outcome.failures.items())]
    expected = wanted(planned)
    for name, label in sorted(found.keys() | expected.keys()):
        if found[name, label] != expected[name, label]:
            told.append(f"{name} {label}: {found[name, label]} counted, {expected[name, label]} sent")
    return told

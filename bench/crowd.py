"""Clients of every manner at once: good ones in closed loop, and beside them those that stall, drip or leave.

Each request belongs to a kind that says what must become of it: its status, and the errors by which the
service must count it. What was answered and what was counted is then compared, to the last request.
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
"""Most of them at a time: while so many are at it, the good ones wait."""

_PATIENCE: Final = 60.0
"""Seconds for one answer: a good client that waits longer has failed."""

_DRIP_SECONDS: Final = 1.0

_COUNTED_SECONDS: Final = 5.0
"""Within which the service must have counted the last of those that have left."""


class Manner(Enum):
    """How a client sends its request, and what it does then."""

    WHOLE = "at once, and awaits the answer"
    STALLS = "half of the body, and awaits the answer"
    DRIPS_HEADERS = "the first line, then a byte a second"
    DRIPS_BODY = "the headers, then a byte a second"
    LEAVES = "at once, and leaves"
    LEAVES_HALFWAY = "half of the body, and leaves"


@dataclass(frozen=True)
class Kind:
    """Requests that must all fare the same."""

    name: str
    requests: Sequence[bytes]
    """Whole HTTP requests, sent in turn."""
    share: float
    """Of all requests; the first kind gets what the others leave."""
    status: int = 200
    """Of the answer; 0 for those who do not await it."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Errors that the service must count for one such request, by code."""
    manner: Manner = Manner.WHOLE


@dataclass(frozen=True)
class Outcome:
    """What became of the requests. The statuses are as the clients saw them, 0 for none."""

    seconds: float
    """From the first request to the last answer that was awaited at the steady connections."""
    sent: Counter[str]
    """By kind."""
    statuses: Counter[tuple[str, int]]
    """By kind and status."""
    failures: Counter[tuple[str, str]]
    """Connections that broke, by kind and error."""


def request(body: bytes, content_type: str = "application/octet-stream", path: str = "/v1/classify") -> bytes:
    """A whole HTTP request."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def schedule(kinds: Sequence[Kind], count: int, *, seed: int) -> list[Kind]:
    """`count` requests of all kinds in their shares, in an order that the seed decides."""
    counts = [round(kind.share * count) for kind in kinds[1:]]
    places = np.repeat(np.arange(len(kinds)), [count - sum(counts), *counts])
    return [kinds[place] for place in np.random.default_rng(seed).permutation(places)]


def send(url: str, planned: Sequence[Kind], *, connections: int) -> Outcome:
    """Send all that is planned, as fast as `connections` in closed loop do; return when all have ended."""
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
        """One request after the other; those of odd manners are handed to clients of their own."""
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
    """A client's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.ends = False
        """The server has said that it closes the connection."""

    @classmethod
    async def open(cls, address: tuple[str, int]) -> _Connection:
        return cls(*await asyncio.open_connection(*address))

    def close(self) -> None:
        self._writer.close()

    async def exchange(self, content: bytes) -> int:
        """Send, and return the answer's status."""
        self._writer.write(content)
        return await asyncio.wait_for(self._status(), _PATIENCE)

    async def drip(self, content: bytes, start: int) -> int:
        """Send all before `start` at once and then a byte a second until the answer is there."""
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
    """Send, and close in the same segment (tcp(7), TCP_CORK): no answer can come in between."""
    with socket.socket() as opened:
        opened.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(opened, address)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        await loop.sock_sendall(opened, content)


# --- what must have become of them ---------------------------------------------------------------


@dataclass(frozen=True)
class Ledger:
    """What the service has counted so far."""

    counts: Counter[tuple[str, str]]
    """`errors` by reason, and `requests` by status."""

    @classmethod
    def read(cls, url: str) -> Ledger:
        """The counters of the service at `url`, without those of reading them."""
        parts = urlsplit(url)
        with urllib.request.urlopen(f"http://{parts.netloc}/metrics", timeout=_PATIENCE) as answer:
            lines = [line for line in answer.read().decode().splitlines() if 'route="/metrics"' not in line]
        counts: Counter[tuple[str, str]] = Counter()
        for name, label, value in _SAMPLE.findall("\n".join(lines)):
            counts[name, label] += int(float(value))
        return cls(counts)

    def since(self, earlier: Ledger) -> Counter[tuple[str, str]]:
        """What has come to it."""
        return self.counts - earlier.counts


def wanted(planned: Sequence[Kind]) -> Counter[tuple[str, str]]:
    """What the service must count for these requests."""
    counts: Counter[tuple[str, str]] = Counter()
    for kind in planned:
        for reason, number in kind.reasons.items():
            counts["errors", reason] += number
        if kind.manner is not Manner.DRIPS_HEADERS:  # never became a request
            counts["requests", str(kind.status)] += 1
    return counts


def counted(url: str, earlier: Ledger, planned: Sequence[Kind]) -> Counter[tuple[str, str]]:
    """What the service has counted since `earlier`, once that is all, or after some seconds."""
    end = time.monotonic() + _COUNTED_SECONDS
    expected = wanted(planned)
    while (found := Ledger.read(url).since(earlier)) != expected and time.monotonic() < end:
        time.sleep(0.05)
    return found


def surprises(outcome: Outcome, planned: Sequence[Kind], found: Counter[tuple[str, str]]) -> list[str]:
    """Whatever was answered or counted otherwise than the kinds say; empty when all is right."""
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

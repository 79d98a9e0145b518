"""The state that all clients and faults share: requests, served versions, random choices and the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from fovea.bench.caller import BrokenConnection, Connection, Response, parse_address
from fovea.bench.chaos.faults import FaultLog
from fovea.bench.chaos.service import Service
from fovea.bench.chaos.verdict import ClientRequest, RequestLog
from fovea.bench.questions import LeaveMoment

GIVE_UP_SECONDS: Final = 20.0
"""Time after its limit at which a client gives up, in seconds."""

OVERLAP_SECONDS: Final = {1: 1.0, 2: 10.0}
"""Time for which an old version may still answer after a swap, in seconds, by number of workers.

Workers are informed one after the other, and a stopped worker is informed when it continues.
"""

_LAG_SECONDS: Final = 0.1
"""Delay of the test's own event loop from which it is taken into account, in seconds."""


class ServedVersions:
    """The versions of the model that may have answered at any time."""

    def __init__(self, version: str, overlap_seconds: float) -> None:
        """Start with one version; see `OVERLAP_SECONDS` for `overlap_seconds`."""
        self._periods = [_VersionPeriod(version, 0.0)]
        self._overlap_seconds = overlap_seconds

    def add_version(self, version: str) -> None:
        """Allow this version from now on, beside the earlier versions."""
        self._periods.append(_VersionPeriod(version, time.monotonic()))

    def keep_only(self, version: str) -> None:
        """Allow only this version from now on."""
        for one in self._periods:
            if one.version != version:
                one.ended_at = min(one.ended_at, time.monotonic() + self._overlap_seconds)

    def versions_between(self, start: float, end: float) -> frozenset[str]:
        """Return all versions that may have answered a request in this period."""
        return frozenset(
            one.version for one in self._periods if one.began_at <= end and one.ended_at >= start
        )


@dataclass
class _VersionPeriod:
    """The period in which a version may have answered."""

    version: str
    began_at: float
    ended_at: float = float("inf")


class ChaosState:
    """The state that all actors of one service share, and the requests that they send.

    The actors are tasks on one event loop and change the state only between two `await`s. No lock is needed.
    Every actor ends after `stop_event` has been set, when its current request has its answer.
    """

    def __init__(self, service: Service, seed: int) -> None:
        self.service = service
        self.address = parse_address(service.url)
        self.has_workers = bool(service.find_pids("worker"))
        self.request_log = RequestLog()
        self.faults = FaultLog()
        self.versions = ServedVersions("1", OVERLAP_SECONDS[2 if self.has_workers else 1])
        self.failures: list[str] = []
        self.swaps = 0
        self.memory_refusals = 0
        """Number of changes that were refused for lack of memory."""
        self.stray_count = 0
        """Number of probes without an answer."""
        self.stop_event = asyncio.Event()
        self._seed = seed
        self._is_stopped = False
        self._run_count = 0
        self._lags: list[tuple[float, float]] = []

    def start_run(self) -> bool:
        """Prepare the next run of all actors; return false if they have been stopped permanently."""
        self._run_count += 1
        if self._is_stopped:
            return False
        self.stop_event.clear()
        return True

    def make_generator(self, name: str) -> random.Random:
        """Return the random generator of one actor."""
        return random.Random(f"{self._seed}/{self.has_workers}/{self._run_count}/{name}")  # noqa: S311 - no secret

    async def send_request(
        self,
        request: ClientRequest,
        content: bytes,
        check_response: Callable[[Response, ClientRequest], str],
        connections: list[Connection],
    ) -> ClientRequest:
        """Send a request, wait for its answer, and count both.

        `connections` keeps the connection for the next request.
        """
        sent_at = time.monotonic()
        request = replace(request, sent_at=sent_at)
        connection = connections.pop() if connections else None
        if connection:
            request = replace(request, idle_seconds=sent_at - connection.last_used_at)
        try:
            async with asyncio.timeout(request.limit + GIVE_UP_SECONDS):
                connection = connection or await Connection.open(self.address)
                await connection.send(content)
                response = await connection.receive()
        except (BrokenConnection, TimeoutError) as error:
            if connection:
                connection.abort()
            reason = str(error) or f"no answer within {request.limit + GIVE_UP_SECONDS:.0f} s"
            return self._record_request(replace(request, ended_at=time.monotonic(), failure_reason=reason))
        if connection.is_closing:
            connection.abort()
        else:
            connections.append(connection)
        request = replace(request, ended_at=time.monotonic(), status=response.status)
        if response.status == 200:
            codes, mistake = find_error_codes(response), check_response(response, request)
            answer_count = 0 if mistake else request.images - len(codes)
            return self._record_request(
                replace(request, mistake=mistake, codes=codes, answer_count=answer_count)
            )
        code, mistake = parse_error_code(response)
        request = replace(request, text=response.content[:300].decode(errors="replace").strip())
        return self._record_request(replace(request, codes=(code,), mistake=mistake))

    def _record_request(self, request: ClientRequest) -> ClientRequest:
        if not self.service.is_alive:  # a failure of its own; later requests add no information
            return request
        lag = sum(
            size for lag_start, size in self._lags if request.sent_at <= lag_start <= request.ended_at + size
        )
        self.request_log.add(request, lag)
        return request

    async def send_and_leave(
        self, request: ClientRequest, content: bytes, moment: LeaveMoment, generator: random.Random
    ) -> None:
        """Send a request, or a part of it, and leave."""
        request = replace(request, sent_at=time.monotonic(), has_left=True)
        try:
            connection = await Connection.open(self.address)
        except BrokenConnection:
            return  # it never became a request
        try:
            async with asyncio.timeout(request.limit):
                if moment is LeaveMoment.SENDING:
                    start = content.index(b"\r\n\r\n") + 4
                    content = content[: start + int(generator.random() * (len(content) - start))]
                await connection.send(content)
                if moment is LeaveMoment.READING:
                    await connection.read_start()
                else:
                    await asyncio.sleep(generator.random() ** 3)
        except (BrokenConnection, TimeoutError):
            pass
        finally:
            connection.abort()
        self._record_request(replace(request, ended_at=time.monotonic()))

    def stop(self) -> None:
        """Stop all actors early and permanently."""
        self._is_stopped = True
        self.stop_event.set()

    async def pause(self, seconds: float) -> bool:
        """Wait; return false if the run is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stop_event.wait(), seconds)
        return not self.stop_event.is_set()

    async def measure_lag(self) -> None:
        """Record delays of the test's own event loop, so that clients are not judged by them."""
        while not self.stop_event.is_set():
            started_at = time.monotonic()
            await asyncio.sleep(_LAG_SECONDS)
            if (lag := time.monotonic() - started_at - _LAG_SECONDS) > _LAG_SECONDS:
                self._lags.append((started_at, lag))


def close_connections(connections: list[Connection]) -> None:
    """Close connections that no request uses."""
    for connection in connections:
        connection.abort()


def parse_error_code(response: Response) -> tuple[str, str]:
    """Return an error's code in any protocol, and a complaint about an answer without one."""
    try:
        content = json.loads(response.content)
        inner = content.get("error")
        code = inner.get("code") if isinstance(inner, dict) else content.get("reason") or content.get("code")
    except (ValueError, AttributeError):
        code = None
    if isinstance(code, str):
        return code, ""
    return "", f"an error {response.status} without a code: {response.content[:200]!r}"


def find_error_codes(response: Response) -> tuple[str, ...]:
    """Return the codes of errors in an answer 200: of single images, or of the last started line."""
    with contextlib.suppress(ValueError):
        if response.media_type.endswith("ndjson"):
            lines = [json.loads(line) for line in response.content.splitlines()[-1:]]
            return tuple(line["error"]["code"] for line in lines if "error" in line)
        if response.media_type.endswith("json") and isinstance(content := json.loads(response.content), dict):
            results = content.get("results", ())
            return tuple(one["error"]["code"] for one in results if "error" in one)
    return ()

"""A server for one application: it serves until a signal, then shuts down in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from fovea.service.errors import Draining, StartError
from fovea.service.http.connection import Connection
from fovea.service.http.hangups import Hangups
from fovea.service.http.lifecycle import Lifecycle, Phase
from fovea.service.http.listener import Source
from fovea.service.http.observer import Observer
from fovea.service.http.timer import Pace
from fovea.service.settings import Settings

log = logging.getLogger(__name__)

_FAREWELL: Final = 1.0
"""Time in seconds in which a connection that arrives at the very end may send a request and be refused."""

_BUFFER: Final = 256 << 10
"""Size of the receive buffer in bytes, as in asyncio's own transports. Parsing a full buffer takes about 1
ms."""

_REFUSALS: Final = 200
"""Refusals per second for lack of capacity, and size of the initial burst. Each takes 0.15 ms of the event
loop."""

_LONGEST_REFUSAL: Final = 4.0
"""Maximum delay of a refusal in seconds."""

_CANCEL: Final = 1.0
"""Time limit in seconds for cancelled requests to end."""


class Server:
    """Server for one application, with connections from a source.

    On SIGTERM, readiness probes fail, but all requests are still answered for `drain_grace` seconds. Then new
    work is refused, and accepted work is finished within `drain_limit` seconds. SIGINT skips the grace time,
    because it comes from somebody at a terminal. A further signal skips the rest of the grace time. After the
    grace time, a further signal cancels the remaining requests.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        *,
        observer: Observer,
        lifecycle: Lifecycle,
    ) -> None:
        self._settings = settings
        self._observer = observer
        self._lifecycle = lifecycle
        self._config = uvicorn.Config(
            app.state.entry, http="httptools", ws="none", lifespan="on", log_config=None, access_log=False,
            server_header=False, proxy_headers=False,
        )  # fmt: skip
        self._direct = app.state.direct
        self._memory = app.state.classifier.bodies
        self._refusals = Pace(_REFUSALS, burst=_REFUSALS, longest=_LONGEST_REFUSAL)
        self._buffer = memoryview(bytearray(_BUFFER))
        self._state = ServerState()
        self._open = 0
        self._taking: set[asyncio.Task[object]] = set()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._cut = asyncio.Event()
        self._empty = asyncio.Event()

    async def serve(self, source: Source, *, listening: Callable[[], None]) -> None:
        """Serve until `signal` is called. `listening` is called once the server accepts connections.

        Raises `StartError`.
        """
        self._config.load()
        self._lifespan = self._config.lifespan_class(self._config)
        await self._lifespan.startup()
        if self._lifespan.should_exit:
            raise StartError("the application did not start")
        self._loop = asyncio.get_running_loop()
        self._source = source
        self._hangups = Hangups(self._loop)
        clock = self._loop.create_task(self._keep_date())
        try:
            source.start(self._take)
            listening()
            await self._stop.wait()
            await self._drain()
        finally:
            clock.cancel()
            self._hangups.close()
            await self._lifespan.shutdown()

    def signal(self, number: int) -> None:
        """Handle a signal: start the shutdown, skip the grace time, or cancel the remaining requests."""
        if not self._stop.is_set():
            self._stop.set()
            if number == signal.SIGINT:
                self._hurry.set()
        elif not self._hurry.is_set():
            self._hurry.set()
        else:
            self._cut.set()

    # --- connections ---

    def _take(self, accepted: socket.socket) -> None:
        """Take over a connection from the source."""
        self._open += 1
        self._empty.clear()
        task = self._loop.create_task(self._connect(accepted))
        # asyncio keeps only a weak reference to a task.
        self._taking.add(task)
        task.add_done_callback(self._taking.discard)

    async def _connect(self, accepted: socket.socket) -> None:
        """Create the protocol for an accepted socket."""
        try:
            await self._loop.connect_accepted_socket(self._connection, accepted)
        except Exception as error:
            if not isinstance(error, OSError):  # an OSError means that the client has already gone
                log.exception("a connection could not be taken")
            accepted.close()
            self._lost()

    def _connection(self) -> Connection:
        return Connection(
            self._config,
            self._state,
            self._lifespan.state,
            settings=self._settings,
            lifecycle=self._lifecycle,
            observer=self._observer,
            direct=self._direct,
            memory=self._memory,
            hangups=self._hangups,
            refusals=self._refusals,
            buffer=self._buffer,
            on_lost=self._lost,
        )

    def _lost(self) -> None:
        """Report that a connection is closed, to the server and to the source."""
        self._open -= 1
        if not self._open:
            self._empty.set()
        self._source.released()

    @property
    def _connections(self) -> list[Connection]:
        return [one for one in self._state.connections if isinstance(one, Connection)]

    async def _keep_date(self) -> None:
        """Update the Date header every second."""
        while True:
            self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
            await asyncio.sleep(1)

    # --- the end ---

    async def _drain(self) -> None:
        """Shut down in order: drain, refuse new work, finish accepted work, close the connections."""
        grace, limit = self._settings.drain_grace, self._settings.drain_limit
        self._lifecycle.phase = Phase.DRAINING
        for connection in self._connections:
            connection.leave()
        await _within(grace, self._hurry)
        self._hurry.set()
        self._lifecycle.phase = Phase.REFUSING
        turns = (connection.answered() for connection in self._connections)
        finished = await self._finish({*self._state.tasks, *filter(None, turns)}, limit)
        # Stop the source only now: until here, new requests are answered or refused with 503.
        await self._source.stop()
        if self._taking:
            await asyncio.wait(self._taking)
        for connection in self._connections:
            # Connections that were still being set up have arrived by now.
            connection.leave_if_idle()
        if self._open and finished:
            await _within(_FAREWELL, self._empty)
        await self._cancel()
        self._lifecycle.phase = Phase.CLOSED

    async def _finish(self, accepted: set[asyncio.Future[None]], limit: float) -> bool:
        """Wait until accepted requests are finished. Return whether all were finished in time.

        New requests are refused at once meanwhile.
        """
        cut = self._loop.create_task(self._cut.wait())
        deadline = self._loop.time() + limit
        while accepted and not cut.done() and (left := deadline - self._loop.time()) > 0:
            wanted: set[asyncio.Future[Any]] = {*accepted, cut}
            done, _ = await asyncio.wait(wanted, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            accepted = accepted - done
        cut.cancel()
        return not accepted

    async def _cancel(self) -> None:
        """Answer the unfinished requests with an error, then cancel their tasks."""
        error = Draining("the service has stopped before this request was finished", retry_after=1.0)
        lost = sum(connection.cut(error) for connection in self._connections)
        if lost:
            log.warning("cancelled %d requests that were not finished in time", lost)
        for task in self._state.tasks:
            task.cancel()
        if self._state.tasks:
            await asyncio.wait(set(self._state.tasks), timeout=_CANCEL)
        if self._open:
            await _within(_CANCEL, self._empty)


async def _within(seconds: float, event: asyncio.Event) -> None:
    """Wait for `event`, for at most `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass

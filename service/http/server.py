"""A server for one application: it serves until a signal, then shuts down in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any, Final, Protocol

import uvicorn
from starlette.types import ASGIApp

from fovea.service.errors import Draining, StartError
from fovea.service.http.certificates import CertificateFiles, Certificates
from fovea.service.http.connection import Connection
from fovea.service.http.fast_path import FastApp
from fovea.service.http.hangups import HangUpWatcher
from fovea.service.http.lifecycle import Lifecycle, Phase
from fovea.service.http.listener import ConnectionSource
from fovea.service.http.observer import Observer
from fovea.service.http.rate_limiter import create_refusal_limiter
from fovea.service.http.server_context import ServerContext
from fovea.service.http.tls import TlsServer
from fovea.service.resources.body_memory import BodyMemory
from fovea.service.settings import Settings

log = logging.getLogger(__name__)

_LATE_REQUEST_TIMEOUT: Final = 1.0
"""Time in seconds in which a connection that arrives at the very end may send a request and be refused."""

_BUFFER_BYTES: Final = 256 << 10
"""Size of the receive buffer in bytes, as in asyncio's own transports. Parsing a full buffer takes about 1
ms."""

_CANCEL_TIMEOUT: Final = 1.0
"""Time limit in seconds for cancelled requests to end."""


class FurtherServer(Protocol):
    """A server for another protocol that starts and stops with the HTTP server."""

    async def start(self) -> None:
        """Listen. Raises `StartError`."""

    async def stop(self, seconds: float | None) -> None:
        """Refuse new work, and finish accepted work within `seconds`; None cancels it at once.

        A call with None may follow while an earlier call waits.
        """


class Server:
    """Server for one application, with connections from a source.

    On SIGTERM, readiness probes fail, but all requests are still answered for `drain_grace` seconds. Then new
    work is refused, and accepted work is finished within `drain_limit` seconds. SIGINT skips the grace time,
    because it comes from somebody at a terminal. A further signal skips the rest of the grace time. After the
    grace time, a further signal cancels the remaining requests.
    """

    def __init__(
        self,
        asgi: ASGIApp,
        fast_app: FastApp,
        settings: Settings,
        *,
        body_memory: BodyMemory,
        observer: Observer,
        lifecycle: Lifecycle,
        further_server: FurtherServer | None = None,
    ) -> None:
        """Set what is served: `fast_app` answers what it can, and `asgi` all other requests.

        `further_server` starts before this server, and stops with it. Raises `StartError` if the certificate
        in `settings` cannot be used.
        """
        self._further_server = further_server
        self._settings = settings
        self._observer = observer
        self._lifecycle = lifecycle
        self._config = uvicorn.Config(
            asgi, http="httptools", ws="none", lifespan="on", log_config=None, access_log=False,
            server_header=False, proxy_headers=False,
        )  # fmt: skip
        self._asgi = asgi
        self._fast_app = fast_app
        self._body_memory = body_memory
        self._tls = self._load_certificates()
        self._open_count = 0
        self._connect_tasks: set[asyncio.Task[object]] = set()
        self._stop_event = asyncio.Event()
        self._skip_grace_event = asyncio.Event()
        self._cancel_event = asyncio.Event()
        self._no_connections_event = asyncio.Event()

    async def serve(self, source: ConnectionSource, *, on_listening: Callable[[], None]) -> None:
        """Serve until `handle_signal` is called.

        Calls `on_listening` on the event loop, once the source passes on connections. Raises `StartError`.
        """
        self._config.load()
        self._lifespan = self._config.lifespan_class(self._config)
        await self._lifespan.startup()
        if self._lifespan.should_exit:
            raise StartError("the application did not start")
        self._loop = asyncio.get_running_loop()
        self._source = source
        self._context = self._create_context()
        tasks = [self._loop.create_task(self._update_date())]
        if self._tls:
            tasks.append(self._loop.create_task(self._tls.certificates.watch()))
        try:
            if self._further_server:
                await self._further_server.start()
            # Connections may arrive from here on. `on_listening` follows, because it announces the service.
            source.start(self._add_connection)
            on_listening()
            await self._stop_event.wait()
            await self._drain()
        finally:
            for task in tasks:
                task.cancel()
            self._context.hangups.close()
            await self._lifespan.shutdown()

    def handle_signal(self, number: int) -> None:
        """Handle a signal: start the shutdown, skip the grace time, or cancel the remaining requests.

        Call this on the event loop, not from a signal handler of the interpreter.
        """
        if not self._stop_event.is_set():
            self._stop_event.set()
            if number == signal.SIGINT:
                self._skip_grace_event.set()
        elif not self._skip_grace_event.is_set():
            self._skip_grace_event.set()
        else:
            self._cancel_event.set()

    # --- connections ---

    def _add_connection(self, client_socket: socket.socket) -> None:
        """Take over a connection from the source, which calls this on the event loop."""
        self._open_count += 1
        self._no_connections_event.clear()
        task = self._loop.create_task(self._open_connection(client_socket))
        # asyncio keeps only a weak reference to a task.
        self._connect_tasks.add(task)
        task.add_done_callback(self._connect_tasks.discard)

    async def _open_connection(self, client_socket: socket.socket) -> None:
        """Create the protocol for an accepted socket."""
        try:
            await self._loop.connect_accepted_socket(self._create_protocol, client_socket)
        except Exception as error:
            if not isinstance(error, OSError):  # an OSError means that the client has already gone
                log.exception("a connection could not be set up")
            client_socket.close()
            self._on_connection_lost()

    def _create_context(self) -> ServerContext:
        return ServerContext(
            asgi=self._asgi,
            asgi_state=self._lifespan.state,
            fast_app=self._fast_app,
            settings=self._settings,
            lifecycle=self._lifecycle,
            observer=self._observer,
            body_memory=self._body_memory,
            hangups=HangUpWatcher(self._loop),
            refusal_limiter=create_refusal_limiter(),
            buffer=bytearray(_BUFFER_BYTES),
            scheme="https" if self._tls else "http",
        )

    def _load_certificates(self) -> TlsServer | None:
        """Return what encrypted connections share; None without TLS. Raises `StartError`."""
        files = CertificateFiles.from_settings(self._settings)
        if files is None:
            return None
        metrics = self._observer.metrics
        certificates = Certificates(files, on_reload=metrics.count_certificate_reload)
        metrics.add_gauge_setter(
            lambda: metrics.tls_certificate_expiry_timestamp_seconds.set(certificates.expires_at)
        )
        metrics.fold()
        return TlsServer(certificates, metrics, self._settings.header_timeout)

    def _create_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol of a new connection: HTTP, or TLS that creates the connection later."""
        if self._tls is None:
            return self._create_connection()
        return self._tls.create_stream(self._create_connection, self._on_connection_lost)

    def _create_connection(self) -> Connection:
        return Connection(self._context, self._on_connection_lost)

    def _on_connection_lost(self) -> None:
        """Report that a connection is closed, to the server and to the source.

        Called exactly once for every connection that the source has passed on: by the connection, or by
        `_open_connection` if there is none.
        """
        self._open_count -= 1
        if not self._open_count:
            self._no_connections_event.set()
        self._source.report_closed()

    async def _update_date(self) -> None:
        """Update the Date header every second."""
        while True:
            self._context.date_line = f"date: {formatdate(time.time(), usegmt=True)}\r\n".encode()
            await asyncio.sleep(1)

    # --- the end ---

    async def _drain(self) -> None:
        """Shut down in order: drain, refuse new work, finish accepted work, close the connections."""
        grace, limit = self._settings.drain_grace, self._settings.drain_limit
        self._lifecycle.phase = Phase.DRAINING
        for connection in list(self._context.connections):
            connection.close_after_answer()
        await _wait_for_event(grace, self._skip_grace_event)
        self._skip_grace_event.set()
        self._lifecycle.phase = Phase.REFUSING
        answer_futures = (connection.get_answer_future() for connection in list(self._context.connections))
        requests = {*self._context.tasks, *filter(None, answer_futures)}
        if self._further_server:
            requests.add(self._loop.create_task(self._further_server.stop(limit)))
        all_finished = await self._finish_requests(requests, limit)
        # Stop the source only now: until here, new requests are answered or refused with 503.
        await self._source.stop()
        if self._connect_tasks:
            await asyncio.wait(self._connect_tasks)
        for connection in list(self._context.connections):
            # Connections that were still being set up have arrived by now.
            connection.close_if_idle()
        if self._open_count and all_finished:
            await _wait_for_event(_LATE_REQUEST_TIMEOUT, self._no_connections_event)
        if self._tls:
            self._tls.abort_handshakes()
        await self._cancel_requests()
        self._lifecycle.phase = Phase.CLOSED

    async def _finish_requests(self, requests: set[asyncio.Future[None]], limit: float) -> bool:
        """Wait until accepted requests are finished. Return whether all were finished in time.

        New requests are refused at once meanwhile.
        """
        cancel_task = self._loop.create_task(self._cancel_event.wait())
        deadline = self._loop.time() + limit
        while requests and not cancel_task.done() and (remaining := deadline - self._loop.time()) > 0:
            futures: set[asyncio.Future[Any]] = {*requests, cancel_task}
            finished_requests, _ = await asyncio.wait(
                futures, timeout=remaining, return_when=asyncio.FIRST_COMPLETED
            )
            requests = requests - finished_requests
        cancel_task.cancel()
        return not requests

    async def _cancel_requests(self) -> None:
        """Answer the unfinished requests with an error, then cancel their tasks."""
        error = Draining("the service has stopped before this request was finished", retry_after=1.0)
        lost_count = sum(connection.close_now(error) for connection in list(self._context.connections))
        if lost_count:
            log.warning("cancelled %d requests that were not finished in time", lost_count)
        for task in self._context.tasks:
            task.cancel()
        if self._further_server:
            await self._further_server.stop(None)
        if self._context.tasks:
            await asyncio.wait(set(self._context.tasks), timeout=_CANCEL_TIMEOUT)
        if self._open_count:
            await _wait_for_event(_CANCEL_TIMEOUT, self._no_connections_event)


async def _wait_for_event(seconds: float, event: asyncio.Event) -> None:
    """Wait for `event`, for at most `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass

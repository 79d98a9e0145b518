"""Distribution of accepted connections to the workers.

The supervisor accepts every connection and passes it to the worker with the fewest connections. A shared
listening socket would leave the choice to chance: the worker that wakes first takes all connections
(observed: eight connections, one worker). `SO_REUSEPORT` uses a hash of the addresses, which seldom splits
eight connections into four and four.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final

from fovea.service.http.listener import Listener
from fovea.service.supervisor.messages import ConnectionReport
from fovea.service.supervisor.worker import WorkerProcess

log = logging.getLogger(__name__)

_RETRY_DELAY: Final = 1.0
"""Time in seconds until a connection that no worker could take is passed again, if nothing happens before."""


class ConnectionDispatcher:
    """Dispatcher of connections. Every method must be called on the event loop."""

    def __init__(self, listener: Listener, available_workers: Callable[[], Sequence[WorkerProcess]]) -> None:
        """Set the listener, and the function that returns the workers that may get connections."""
        self._listener = listener
        self._available_workers = available_workers
        self._waiting_connections: list[socket.socket] = []

    def pass_connection(self, connection: socket.socket) -> None:
        """Pass a connection to the worker with the fewest connections.

        The listener calls this on the event loop for every accepted connection. The connection waits here
        while no worker can take it.
        """
        for worker in sorted(self._available_workers(), key=lambda one: one.load):
            if worker.starved_until > time.monotonic():
                continue
            if worker.channel.pass_connection(connection):
                # Keep the connection open here until the worker reports it: another worker gets it if this
                # one dies.
                worker.passed_connections.append(connection)
                return
        self._waiting_connections.append(connection)
        self._listener.disable()
        asyncio.get_running_loop().call_later(_RETRY_DELAY, self.pass_waiting_connections)

    def pass_waiting_connections(self) -> None:
        """Pass the connections that are waiting for a worker."""
        waiting, self._waiting_connections = self._waiting_connections, []
        for connection in waiting:
            self.pass_connection(connection)
        if waiting and not self._waiting_connections:
            self._listener.enable()

    def update_connections(self, worker: WorkerProcess, report: ConnectionReport) -> None:
        """Update a worker's connections from its report.

        Connections that found no free file descriptor in the worker are passed on again.
        """
        missed_connections = []
        has_received = worker.received_count < report.received
        while worker.received_count < report.received:
            # The channel keeps messages in order, so the oldest passed connection is the next one received.
            connection = worker.passed_connections.popleft()
            if worker.received_count in report.missed:
                missed_connections.append(connection)
            else:
                connection.close()
                worker.accepted_count += 1
            worker.received_count += 1
        new_closed_count = report.closed - worker.closed_count
        worker.closed_count = report.closed
        if missed_connections:
            if not worker.starved_until:
                log.error("worker %d has no file descriptor left (ulimit -n)", worker.process.pid)
            worker.starved_until = time.monotonic() + _RETRY_DELAY
        elif new_closed_count:
            worker.starved_until = 0.0
        if new_closed_count:
            self._listener.report_closed(new_closed_count)
        elif has_received:
            self._listener.accept_waiting()
        for connection in missed_connections:
            self.pass_connection(connection)
        if new_closed_count and not missed_connections:
            self.pass_waiting_connections()

    def take_back_connections(self, worker: WorkerProcess) -> None:
        """Pass the connections that were on their way to a dead worker to other workers."""
        for connection in worker.passed_connections:
            self.pass_connection(connection)
        if worker.open_count:
            self._listener.report_closed(worker.open_count)

"""A worker process as its supervisor sees it: the start, the record and the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fovea.service.artifact.repository import ServingState, VersionsByModel
from fovea.service.observability.multiprocess import MetricFiles
from fovea.service.observability.process_metrics import kill_descendants
from fovea.service.supervisor.channel import Channel, create_channel
from fovea.service.supervisor.messages import (
    WORKER_MESSAGES,
    ReadyReport,
    ServeCommand,
    SupervisorMessage,
    WorkerMessage,
)

log = logging.getLogger(__name__)

_EXIT_TIMEOUT: Final = 10.0
"""Time in seconds after which a worker that has closed its end of the channel is killed, and time limit for
the end of killed workers."""

_SILENCE_TIMEOUT: Final = 2.0
"""Time in seconds without a message after which a worker gets no more connections."""

_HANG_TIMEOUT: Final = 10.0
"""Time in seconds without a message after which a worker is killed."""

_FIRST_MESSAGE_TIMEOUT: Final = 60.0
"""Time limit in seconds for the first message of a worker. Importing its modules takes 0.3 s on an idle
machine."""

_POLL_INTERVAL: Final = 0.01
"""Time in seconds between two checks whether a process has ended. No thread waits for the process, because
starting a thread may fail."""


@dataclass(eq=False)
class WorkerProcess:
    """Worker process, and the supervisor's end of its channel."""

    process: subprocess.Popen[bytes]
    channel: Channel[WorkerMessage]
    started_at: float = field(default_factory=time.monotonic)
    loaded_models: ReadyReport | None = None
    """Description of the loaded models; None until the worker has loaded them."""
    served_models: ReadyReport | None = None
    """Same as `loaded_models`, once the worker is admitted."""
    caller_column: int = 0
    """Column of the worker in the table of callers (`CallerTable`)."""
    starting_versions: VersionsByModel = field(default_factory=dict)
    """Versions to serve that the worker was started with."""
    is_stopping: bool = False
    """True when the worker takes no more connections."""
    passed_connections: deque[socket.socket] = field(default_factory=deque)
    """Connections on their way to the worker. If the worker dies before it takes them, other workers get
    them."""
    received_count: int = 0
    """Number of connections received, including those for which the worker had no file descriptor."""
    accepted_count: int = 0
    closed_count: int = 0

    last_message_at: float = field(default_factory=time.monotonic)
    """Time of the last message on the monotonic clock in seconds."""
    has_sent_message: bool = False
    is_silent: bool = False
    """True when the worker has been silent for too long to get connections."""
    is_hung: bool = False
    """True when the worker was killed because it was silent."""
    starved_until: float = 0.0
    """Time from which the worker may have a free file descriptor, on the monotonic clock in seconds."""

    @property
    def open_count(self) -> int:
        """Number of open connections of the worker."""
        return self.accepted_count - self.closed_count

    def send_message(self, message: SupervisorMessage) -> None:
        """Send a message as soon as there is room for it. Raises `OSError`."""
        self.channel.send(message)

    def mark_alive(self) -> bool:
        """Note that the worker has sent a message, and return True if it may get connections again."""
        self.last_message_at = time.monotonic()
        self.has_sent_message = True
        was_silent, self.is_silent = self.is_silent, False
        if was_silent:
            log.info("worker %d sends messages again, and gets connections", self.process.pid)
        return was_silent

    def check_silence(self, now: float, supervisor_delay: float) -> None:
        """Note if the worker is silent, and kill it if it has been silent for too long.

        `now` is the time on the monotonic clock in seconds. The supervisor itself did not run for
        `supervisor_delay` seconds, which do not count.
        """
        self.last_message_at += supervisor_delay
        seconds = now - self.last_message_at
        timeout = _HANG_TIMEOUT if self.has_sent_message else _FIRST_MESSAGE_TIMEOUT
        description = f"worker {self.process.pid} has sent no message for {seconds:.0f} s"
        if seconds > timeout and not self.is_hung:
            self.is_hung = True
            self.kill()
            log.error("%s, and is killed", description)
        elif seconds > _SILENCE_TIMEOUT and self.served_models and not self.is_silent:
            self.is_silent = True
            log.warning("%s, and gets no more connections", description)

    def kill(self) -> None:
        """Kill the worker and its children at once."""
        kill_descendants(self.process.pid)
        self.process.kill()

    @property
    def load(self) -> tuple[int, int]:
        """Sort key for choosing a worker: the current connections, then all connections so far."""
        return self.open_count + len(self.passed_connections), self.received_count + len(
            self.passed_connections
        )

    def describe_exit(self, code: int) -> tuple[str, str]:
        """Return the reason for an exit with this code, for the metric and as a predicate for messages."""
        if self.is_hung:
            return "hung", "was killed because it sent no messages"
        if code < 0:
            return "signal", f"was ended by signal {-code}"
        return "exit", f"ended with exit code {code}"

    async def wait_for_exit(self) -> int:
        """Wait for the end of the process and return its exit code.

        Kill the process if it takes too long.
        """
        deadline = time.monotonic() + _EXIT_TIMEOUT
        while (code := self.process.poll()) is None:
            if time.monotonic() > deadline:
                log.error(
                    "worker %d has not ended within %g s, and is killed", self.process.pid, _EXIT_TIMEOUT
                )
                self.kill()
                deadline = time.monotonic() + _EXIT_TIMEOUT
            await asyncio.sleep(_POLL_INTERVAL)
        return code


def kill_workers(workers: Collection[WorkerProcess]) -> None:
    """Kill workers at once, and wait for their end for at most `_EXIT_TIMEOUT` seconds.

    A process that waits for an unresponsive disk cannot be killed, so the wait has a limit.
    """
    for worker in workers:
        worker.kill()
    deadline = time.monotonic() + _EXIT_TIMEOUT
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(0.0, deadline - time.monotonic()))


def start_worker(
    command: Sequence[str],
    environment: Mapping[str, str],
    serving_state: ServingState,
    *,
    keys: bytes,
    metrics_index: int,
    caller_file: int | None,
    caller_column: int,
) -> tuple[WorkerProcess, MetricFiles]:
    """Start a worker, and return it with the files of its metrics.

    `keys` is the content of the keys file that is in force, empty without keys. `metrics_index` and
    `caller_file` are file descriptors: the index of the metrics, and the table of
    callers, in which the worker owns `caller_column`. Without a table, the descriptor is None. Raises
    `OSError` when the system has no room for the worker.
    """
    own_socket, worker_socket = create_channel()
    metric_files = None
    try:
        with worker_socket, os.fdopen(os.memfd_create("fovea-serving-state"), "w+b") as state_file:
            metric_files = MetricFiles.create()
            state_file.writelines(ServeCommand.from_state(serving_state).to_pieces([keys]))
            state_file.seek(0)
            descriptors = (worker_socket.fileno(), metrics_index, *metric_files.descriptors)
            if caller_file is not None:
                descriptors = (*descriptors, caller_file)
            # The worker inherits these descriptors. `with` closes this process's copy of the worker's end
            # after the start: otherwise the death of the worker would not end the channel.
            process = subprocess.Popen(  # noqa: S603 - our own command
                [*command, str(caller_column), *map(str, descriptors)],
                env=environment,
                stdin=state_file,
                pass_fds=descriptors,
            )
    except BaseException:
        own_socket.close()
        if metric_files:
            metric_files.close()
        raise
    channel = Channel[WorkerMessage](own_socket, WORKER_MESSAGES)
    worker = WorkerProcess(
        process,
        channel,
        caller_column=caller_column,
        starting_versions=serving_state.versions_by_model,
    )
    return worker, metric_files

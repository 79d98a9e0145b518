"""The Ray driver of bulk classification: `python -m fovea.bulk.ray_driver DESCRIPTOR`.

It is a process of its own, because Ray ends the process of a driver that has lost its cluster. The descriptor
is that of a socket to the command. See `fovea.bulk.ray_messages` for what goes over it.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Final

import numpy as np

from fovea.bulk.ray_messages import Alive, Failure, RayJob, Task, TaskResult, WindowEnd, WindowRequest
from fovea.bulk.ray_window import (
    CPUS_PER_ACTOR,
    MAX_RESTARTS,
    count_actors,
    get_cpus,
    iterate_remotely,
    iterate_results,
    start_heartbeats,
)
from fovea.bulk.ray_worker import report_version
from fovea.errors import FoveaError, StartError
from fovea.service import __version__
from fovea.service.errors import to_one_line

_FIRST_WINDOW: Final = 20_000
"""Number of entries in the first data set, whose speed is not known yet."""

_WINDOW_SECONDS: Final = 300.0
"""Duration of a data set. Each starts its actors anew, which takes some seconds."""

_MAX_WINDOW: Final = 1_000_000
"""Maximum number of entries in a data set: they are in memory, about 150 bytes each."""

_ALIVE_INTERVAL: Final = 5.0
"""Time between two looks at the cluster, in seconds."""

_PATIENCE: Final = 60.0
"""Time without a result and without a worker, in seconds, after which a cluster without free processors is
given up."""

_HANG_SECONDS: Final = 600.0
"""Time without a result in seconds after which the run is given up, whatever the cluster does.

A task of 64 slow images takes a minute or two; a worker that reads a pipe waits for ever.
"""

_REPLY_SECONDS: Final = 10.0
"""Maximum time in which the actor that hears from the workers replies."""

_PROBE_SECONDS: Final = 90.0
"""Maximum time in which a machine starts a first process that imports Fovea."""

_CONNECT_SECONDS: Final = 10.0
"""Maximum time to connect to the address of a cluster."""

_OBJECT_STORE_BYTES: Final = 256 << 20
"""Object store of a cluster of its own, besides the model. Only names and rows pass through it."""


def main(connection: Connection) -> None:
    """Run a job to its end."""
    job = connection.recv()
    driver = _Driver(job, connection)
    try:
        driver.run()
    except (EOFError, BrokenPipeError):  # the command has ended
        pass
    except Exception as error:  # Ray and gRPC raise many classes
        driver.send(Failure(_describe_error(error, job.address)))


class _Driver:
    """The driver of one job."""

    def __init__(self, job: RayJob, connection: Connection) -> None:
        self._job, self._connection = job, connection
        self._lock = threading.Lock()
        """Guards the sending side of the connection: two threads send."""
        self._last_result_at = time.monotonic()
        self._is_connected = self._is_running = False
        """Whether there is a cluster, and whether a data set runs."""
        self._iterate_results = iterate_results
        self._waiting_tasks: list[Sequence[str]] = []
        """Names of the first entries of each task whose result has not come, the next result's last."""
        self._heartbeats: Any = None
        """The actor that hears from the workers."""

    def send(self, message: object) -> None:
        """Send a message to the command, from any thread."""
        with self._lock:
            self._connection.send(message)

    def run(self) -> None:
        """Connect to the cluster, and run one data set for each window of entries."""
        import ray

        _check_address(self._job.address)
        threading.Thread(target=self._watch, daemon=True).start()
        self._connect()
        self._is_connected = True
        try:
            _check_nodes()
            content = ray.put(np.frombuffer(self._job.content, np.uint8))
            self._heartbeats = start_heartbeats()
            window = _FIRST_WINDOW
            is_last = False
            while not is_last:
                self.send(WindowRequest(window))
                tasks, is_last = self._receive_window()
                if tasks:
                    entries = sum(task.entries for task in tasks)
                    started_at = time.monotonic()
                    self._run_window(tasks, content)
                    window = choose_window(entries, time.monotonic() - started_at)
        finally:
            self._is_connected = False
            ray.shutdown()

    def _connect(self) -> None:
        import ray

        options: dict[str, Any] = {}
        if self._job.address == "local":
            options = {
                "num_cpus": self._job.cpus,
                "object_store_memory": _OBJECT_STORE_BYTES + 2 * len(self._job.content),
                "include_dashboard": False,
            }
        ray.init(self._job.address, logging_level="error", log_to_driver=False, **options)
        if self._job.address.startswith("ray://"):
            self._iterate_results = iterate_remotely

    def _receive_window(self) -> tuple[list[Task], bool]:
        tasks: list[Task] = []
        while isinstance(message := self._connection.recv(), Task):
            tasks.append(message)
        assert isinstance(message, WindowEnd)  # noqa: S101 - the protocol has no other message
        return tasks, message.is_last

    def _run_window(self, tasks: list[Task], content: Any) -> None:
        """Run a data set. The list of tasks is emptied, because they may hold images."""
        self._waiting_tasks = [task.first_names for task in reversed(tasks)]
        contents = [task.content for task in tasks]
        tasks.clear()
        results = self._iterate_results(self._job.model, content, self._heartbeats, contents)
        self._last_result_at, self._is_running = time.monotonic(), True
        try:
            for position, (result_position, result) in enumerate(results):
                if position != result_position:
                    raise RuntimeError(f"Ray answered task {result_position} in place of {position}")
                self._waiting_tasks.pop()
                self._last_result_at = time.monotonic()
                self.send(TaskResult(result))
        finally:
            self._is_running = False

    def _watch(self) -> None:
        """Tell the command that the cluster is there, and end the run if it has lost too much."""
        while True:
            time.sleep(_ALIVE_INTERVAL)
            if _is_hung_up(self._connection):  # the command has ended
                os._exit(1)  # Ray may just wait for its cluster; one of its own ends with this process
            if not self._is_connected:
                continue
            try:
                problem = self._find_problem()
                self.send(Failure(problem) if problem else Alive())
            except (OSError, EOFError):  # the command has ended
                problem = "no command"
            except Exception as error:
                with suppress(OSError):
                    self.send(Failure(_describe_error(error, self._job.address)))
                problem = "lost"
            if problem:
                os._exit(1)  # Ray's own threads may wait for a cluster that is gone

    def _find_problem(self) -> str | None:
        """Return why no result can be expected any more, if that is so."""
        import ray

        total, free = get_cpus(ray.cluster_resources()), get_cpus(ray.available_resources())
        silence = time.monotonic() - self._last_result_at
        if not self._is_running or silence < _PATIENCE:
            return None
        if silence < _HANG_SECONDS and free < CPUS_PER_ACTOR and not self._has_workers():
            return (
                f"the Ray cluster has given no result for {_PATIENCE:g} s: {total - free:g} of its {total:g} "
                "processors are reserved, and Fovea's workers wait for one"
            )
        return describe_hang(silence, self._waiting_tasks)

    def _has_workers(self) -> bool:
        """Return whether a worker has been alive lately; True if that is unknown."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        try:
            age: float = ray.get(self._heartbeats.read_age.remote(), timeout=_REPLY_SECONDS)
        except (GetTimeoutError, RayActorError):  # its machine is lost, or it starts again elsewhere
            return True
        return age < _PATIENCE


def choose_window(entries: int, seconds: float) -> int:
    """Return the number of entries in the next data set, when one with `entries` took `seconds`."""
    return max(_FIRST_WINDOW, min(_MAX_WINDOW, int(entries / max(seconds, 1e-3) * _WINDOW_SECONDS)))


def describe_hang(silence: float, waiting_tasks: Sequence[Sequence[str]]) -> str | None:
    """Return a sentence if `silence`, the time without a result in seconds, is too long.

    `waiting_tasks` has the names of the first entries of each task, the next result's last.
    """
    if silence < _HANG_SECONDS:
        return None
    names = ", ".join(map(repr, waiting_tasks[-1])) if waiting_tasks else "none"
    return (
        f"the Ray cluster has given no result for {silence:.0f} s; the first images of the task that waits "
        f"are {names}"
    )


def _is_hung_up(connection: Connection) -> bool:
    poll = select.poll()
    poll.register(connection.fileno(), 0)  # a hang-up is always reported
    return bool(poll.poll(0))


def _check_address(address: str) -> None:
    """Raise `StartError` if nothing listens at the address: Ray would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():  # such as `auto`
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS):
            pass
    except (OSError, OverflowError) as error:
        raise StartError(
            f"no Ray cluster answers at {address}: {getattr(error, 'strerror', None) or to_one_line(error)}"
        ) from None


def _check_nodes() -> None:
    """Raise `StartError` unless each machine with processors has this version of Fovea."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    count_actors()
    probe = ray.remote(report_version)
    replies = {
        node["NodeManagerHostname"]: probe.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in ray.nodes()
        if node["Alive"] and get_cpus(node["Resources"])
    }
    advice = f"install fovea-serve {__version__} with the extra ray on each machine of the cluster"
    for host, reply in replies.items():
        try:
            version = ray.get(reply, timeout=_PROBE_SECONDS)
        except GetTimeoutError:
            raise StartError(f"{host} in the Ray cluster did not answer in {_PROBE_SECONDS:g} s") from None
        except (RayError, RuntimeError, ImportError) as error:
            line = to_one_line(error)
            if "No module named" in line:
                raise StartError(f"{host} in the Ray cluster has no Fovea; {advice}") from None
            raise StartError(f"{host} in the Ray cluster cannot import Fovea: {line}") from None
        if version != __version__:
            raise StartError(f"{host} in the Ray cluster has Fovea {version}; {advice}")


def _describe_error(error: Exception, address: str) -> str:
    """Return a sentence for people."""
    if isinstance(error, FoveaError):
        return str(error)
    if isinstance(error, ImportError):
        return f"--engine ray needs {error.name}; pip install 'fovea-serve[ray]'"
    from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError

    if isinstance(error, RayActorError | WorkerCrashedError):
        return (
            f"a worker of the Ray cluster died {MAX_RESTARTS + 1} times, which an image may have caused: "
            f"{to_one_line(error)}"
        )
    if isinstance(error, RayTaskError):
        return f"a worker of the Ray cluster failed: {to_one_line(error.cause or error)}"
    place = "Ray on this machine" if address == "local" else f"the Ray cluster at {address}"
    return f"no connection to {place}: {to_one_line(error)}"


if __name__ == "__main__":
    with Connection(int(sys.argv[1])) as _connection:
        main(_connection)

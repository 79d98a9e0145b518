"""The Ray driver of bulk classification: `python -m fovea.bulk.ray_driver DESCRIPTOR`.

It is a process of its own, because Ray ends the process of a driver that has lost its cluster. The descriptor
is that of a socket to the command. See `fovea.bulk.ray_messages` for what goes over it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Final

import numpy as np

from fovea.bulk.ray_messages import Alive, Failure, RayJob, Task, TaskResult, WindowEnd, WindowRequest
from fovea.bulk.ray_worker import ChunkClassifier, report_version
from fovea.errors import FoveaError, StartError
from fovea.service import __version__
from fovea.service.errors import to_one_line

CPUS_PER_ACTOR: Final = 0.5
"""Processors that an actor reserves, though it uses one. There is an actor for each processor of the cluster,
so half of the reservations stay free: for other tasks, and for the actors of machines that are lost."""

_FIRST_WINDOW: Final = 20_000
"""Number of entries in the first data set, whose speed is not known yet."""

_WINDOW_SECONDS: Final = 300.0
"""Duration of a data set. Each starts its actors anew, which takes some seconds."""

_MAX_WINDOW: Final = 1_000_000
"""Maximum number of entries in a data set: they are in memory, about 150 bytes each."""

_ALIVE_INTERVAL: Final = 5.0
"""Time between two looks at the cluster, in seconds."""

_PATIENCE: Final = 60.0
"""Time without a result in seconds after which a cluster with too few free processors is given up."""

_PROBE_SECONDS: Final = 90.0
"""Maximum time in which a machine starts a first process that imports Fovea."""

_MAX_RESTARTS: Final = 4
"""Number of times that an actor is started again in a data set. An image may be the cause of its death.

Its tasks have no limit of their own: Ray counts each attempt to reach an actor whose machine is gone.
"""

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
        self._is_running = False
        """True while a data set runs."""

    def send(self, message: object) -> None:
        """Send a message to the command, from any thread."""
        with self._lock:
            self._connection.send(message)

    def run(self) -> None:
        """Connect to the cluster, and run one data set for each window of entries."""
        import ray

        self._connect()
        try:
            _check_nodes()
            content = ray.put(np.frombuffer(self._job.content, np.uint8))
            threading.Thread(target=self._watch, daemon=True).start()
            window = _FIRST_WINDOW
            is_last = False
            while not is_last:
                self.send(WindowRequest(window))
                tasks, is_last = self._receive_window()
                if tasks:
                    started_at = time.monotonic()
                    self._run_window(tasks, content)
                    speed = window / (time.monotonic() - started_at)
                    window = max(_FIRST_WINDOW, min(_MAX_WINDOW, int(speed * _WINDOW_SECONDS)))
        finally:
            ray.shutdown()

    def _connect(self) -> None:
        import ray
        from ray.data import DataContext

        options: dict[str, Any] = {}
        if self._job.address == "local":
            options = {
                "num_cpus": self._job.cpus,
                "object_store_memory": _OBJECT_STORE_BYTES + 2 * len(self._job.content),
                "include_dashboard": False,
            }
        ray.init(self._job.address, logging_level="error", log_to_driver=False, **options)
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True

    def _receive_window(self) -> tuple[list[bytes], bool]:
        tasks: list[bytes] = []
        while isinstance(message := self._connection.recv(), Task):
            tasks.append(message.content)
        assert isinstance(message, WindowEnd)  # noqa: S101 - the protocol has no other message
        return tasks, message.is_last

    def _run_window(self, tasks: list[bytes], content: Any) -> None:
        from ray.data import ActorPoolStrategy, from_items

        items = [{"position": position, "task": task} for position, task in enumerate(tasks)]
        actors, available = _count_actors()
        data = from_items(items, override_num_blocks=len(items)).map_batches(
            ChunkClassifier,
            fn_constructor_args=(self._job.model, content),
            batch_size=None,
            num_cpus=CPUS_PER_ACTOR,
            compute=ActorPoolStrategy(min_size=max(1, min(available, actors)), max_size=actors),
            max_restarts=_MAX_RESTARTS,
            max_task_retries=-1,
        )
        self._last_result_at, self._is_running = time.monotonic(), True
        try:
            for position, (result_position, result) in enumerate(_iterate_results(data)):
                if position != result_position:
                    raise RuntimeError(f"Ray answered task {result_position} in place of {position}")
                self._last_result_at = time.monotonic()
                self.send(TaskResult(result))
        finally:
            self._is_running = False

    def _watch(self) -> None:
        """Tell the command that the cluster is there, and end the run if it has lost too much."""
        while True:
            time.sleep(_ALIVE_INTERVAL)
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

        total, free = _get_cpus(ray.cluster_resources()), _get_cpus(ray.available_resources())
        if not self._is_running or time.monotonic() - self._last_result_at < _PATIENCE:
            return None
        if free >= CPUS_PER_ACTOR:
            return None
        return (
            f"the Ray cluster has given no result for {_PATIENCE:g} s: {total - free:g} of its {total:g} "
            "processors are reserved, and Fovea's workers wait for one"
        )


def _iterate_results(data: Any) -> Iterator[tuple[int, bytes]]:
    for batch in data.iter_batches(batch_size=None, prefetch_batches=0):
        yield from zip(batch["position"].tolist(), batch["result"].tolist(), strict=True)


def _get_cpus(resources: dict[str, float]) -> float:
    return resources.get("CPU", 0.0)


def _count_actors() -> tuple[int, int]:
    """Return how many actors use all processors, and how many find a place now. Raises `StartError`."""
    import ray

    total, free = _get_cpus(ray.cluster_resources()), _get_cpus(ray.available_resources())
    if total < CPUS_PER_ACTOR:
        raise StartError(f"the Ray cluster has {total:g} processors (CPU); it needs 1 or more")
    return max(1, int(total)), int(free / CPUS_PER_ACTOR)


def _check_nodes() -> None:
    """Raise `StartError` unless each machine with processors has this version of Fovea."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    _count_actors()
    probe = ray.remote(report_version)
    replies = {
        node["NodeManagerHostname"]: probe.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in ray.nodes()
        if node["Alive"] and _get_cpus(node["Resources"])
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
            f"a worker of the Ray cluster died {_MAX_RESTARTS + 1} times, which an image may have caused: "
            f"{to_one_line(error)}"
        )
    if isinstance(error, RayTaskError):
        return f"a worker of the Ray cluster failed: {to_one_line(error.cause or error)}"
    place = "Ray on this machine" if address == "local" else f"the Ray cluster at {address}"
    return f"no connection to {place}: {to_one_line(error)}"


if __name__ == "__main__":
    with Connection(int(sys.argv[1])) as _connection:
        main(_connection)

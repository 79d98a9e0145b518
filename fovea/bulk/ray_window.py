"""A window of tasks as a Ray data set: its results, in order.

Ray Data does not run behind a Ray client (`ray://`). There, an actor in the cluster runs the data set.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, Final

from fovea.bulk.ray_worker import Heartbeats, TaskClassifier, WorkerModel
from fovea.errors import StartError

CPUS_PER_ACTOR: Final = 0.5
"""Processors that an actor reserves, though it uses one. There is an actor for each processor of the cluster,
so half of the reservations stay free: for other tasks, and for the actors of machines that are lost."""

MAX_RESTARTS: Final = 4
"""Number of times that an actor is started again in a data set. An image may be the cause of its death.

Its tasks have no limit of their own: Ray counts each attempt to reach an actor whose machine is gone.
"""

_POLL_SECONDS: Final = 5.0
"""Time in seconds after which an actor answers that it has no result yet."""

_MAX_POLLED: Final = 64
"""Maximum number of results in an answer of an actor."""


def get_cpus(resources: dict[str, float]) -> float:
    """Return the number of processors among the resources of Ray."""
    return resources.get("CPU", 0.0)


def count_actors() -> tuple[int, int]:
    """Return how many actors use all processors, and how many find a place now. Raises `StartError`."""
    import ray

    total, free = get_cpus(ray.cluster_resources()), get_cpus(ray.available_resources())
    if total < CPUS_PER_ACTOR:
        raise StartError(f"the Ray cluster has {total:g} processors (CPU); it needs 1 or more")
    return max(1, int(total)), int(free / CPUS_PER_ACTOR)


def start_heartbeats() -> Any:
    """Return the handle of a new actor `Heartbeats`, which is started again if its machine dies."""
    import ray

    return ray.remote(Heartbeats).options(num_cpus=0, max_restarts=-1).remote()


def iterate_results(
    model: WorkerModel, content: Any, heartbeats: Any, tasks: list[bytes]
) -> Iterator[tuple[int, bytes]]:
    """Yield position and result of each task. `content` is the reference of the model's bytes.

    `heartbeats` is the actor that hears from the workers. The list of tasks is emptied as soon as they are in
    Ray's memory, because they may hold images.

    Raises `StartError` for a cluster without processors, and the errors of Ray.
    """
    from ray.data import ActorPoolStrategy, DataContext, from_items

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    actors, available = count_actors()
    items = [{"position": position, "task": task} for position, task in enumerate(tasks)]
    data_set = from_items(items, override_num_blocks=len(items))
    items.clear()
    tasks.clear()
    data = data_set.map_batches(
        TaskClassifier,
        fn_constructor_args=(model, content, heartbeats),
        batch_size=None,
        num_cpus=CPUS_PER_ACTOR,
        compute=ActorPoolStrategy(min_size=max(1, min(available, actors)), max_size=actors),
        max_restarts=MAX_RESTARTS,
        max_task_retries=-1,
    )
    for batch in data.iter_batches(batch_size=None, prefetch_batches=0):
        yield from zip(batch["position"].tolist(), batch["result"].tolist(), strict=True)


def iterate_remotely(
    model: WorkerModel, content: Any, heartbeats: Any, tasks: list[bytes]
) -> Iterator[tuple[int, bytes]]:
    """Do the same as `iterate_results` by an actor in the cluster, for a driver that is a Ray client."""
    import ray

    runner: Any = ray.remote(_WindowRunner).options(num_cpus=0, max_concurrency=2).remote()
    # In a list, because Ray would replace the reference by its value.
    ray.get(runner.start.remote(model, [content], heartbeats, tasks))
    tasks.clear()
    try:
        while (results := ray.get(runner.poll.remote())) is not None:
            yield from results
    finally:
        ray.kill(runner)


class _WindowRunner:
    """The actor that runs a data set for a Ray client, which asks for its results."""

    def __init__(self) -> None:
        self._results: queue.Queue[tuple[int, bytes] | BaseException | None] = queue.Queue(_MAX_POLLED)

    def start(self, model: WorkerModel, content: list[Any], heartbeats: Any, tasks: list[bytes]) -> None:
        """Start the data set."""
        arguments = model, content[0], heartbeats, tasks
        threading.Thread(target=self._run, args=arguments, daemon=True).start()

    def _run(self, model: WorkerModel, content: Any, heartbeats: Any, tasks: list[bytes]) -> None:
        end: BaseException | None = None
        try:
            for result in iterate_results(model, content, heartbeats, tasks):
                self._results.put(result)
        except Exception as error:
            end = error
        except BaseException as error:  # such as `SystemExit`, which would end the actor without a word
            end = RuntimeError(f"the data set was ended by {type(error).__name__}: {error}")
        finally:  # otherwise `poll` would wait for ever
            self._results.put(end)

    def poll(self) -> list[tuple[int, bytes]] | None:
        """Return the next results; None after the last. Raises the error of the data set."""
        results: list[tuple[int, bytes]] = []
        while len(results) < _MAX_POLLED:
            try:
                result = self._results.get(not results, _POLL_SECONDS)
            except queue.Empty:
                break
            if isinstance(result, tuple):
                results.append(result)
            elif results:
                self._results.put(result)  # the end, for the next call; nothing follows it
                break
            elif result is None:
                return None
            else:
                raise result
        return results

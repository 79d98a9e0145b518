"""Messages between the command and its Ray driver, a process of its own (`fovea.bulk.ray_driver`).

The command sends a `RayJob`. The driver then asks for windows of tasks (`WindowRequest`), and the command
answers with `Task`s and a `WindowEnd`. While the cluster works, the driver sends a `TaskResult` for each
task, in order, and `Alive` from time to time. `Failure` is its last message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fovea.bulk.ray_worker import WorkerModel


@dataclass(frozen=True)
class RayJob:
    """What the driver needs before the first task."""

    address: str
    """Address of the cluster as Ray writes it; `local` for a cluster of its own on this machine."""
    model: WorkerModel
    content: bytes
    """The model file."""
    cpus: int
    """Number of processors of a cluster of its own."""


@dataclass(frozen=True)
class WindowRequest:
    """The driver asks for tasks with about `entries` entries, which then run as one Ray data set."""

    entries: int


@dataclass(frozen=True)
class Task:
    """Chunks that one actor classifies at once."""

    content: bytes
    """The pickled list of chunks, each of them pickled on its own."""
    entries: int
    """Number of entries in the chunks."""
    first_names: Sequence[str]
    """Names of the first entries, for messages."""


@dataclass(frozen=True)
class WindowEnd:
    """All tasks of a window have been sent."""

    is_last: bool


@dataclass(frozen=True)
class TaskResult:
    """The pickled `ClassifiedChunk`s of a task."""

    content: bytes


@dataclass(frozen=True)
class Alive:
    """The driver has reached its cluster just now."""


@dataclass(frozen=True)
class Failure:
    """The run cannot go on; the message is a sentence for people."""

    message: str

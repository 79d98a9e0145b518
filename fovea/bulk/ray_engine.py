"""Bulk classification by the workers of a Ray cluster, through Ray Data."""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Final

import fovea
from fovea.bulk.engine import ClassifiedChunk
from fovea.bulk.local_engine import choose_batch_size
from fovea.bulk.ray_messages import Failure, RayJob, Task, TaskResult, WindowEnd, WindowRequest
from fovea.bulk.ray_worker import WORKER_SETTINGS, WorkerModel
from fovea.bulk.table_facts import TableFacts
from fovea.errors import FoveaError, StartError
from fovea.service.artifact.contract import Coverage
from fovea.service.cli import load_live_model
from fovea.service.image_files import ImageEntry
from fovea.service.inference.preprocess import configure_pillow
from fovea.service.inference.session import read_model
from fovea.service.resources import threads
from fovea.service.runners.predictor import Predictor
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.ranking import find_coverage
from fovea.service.serving.standalone import load_predictor
from fovea.service.settings import Settings

_CHUNK_ENTRIES: Final = 8
"""Smallest number of entries in a chunk."""

_TASK_ENTRIES: Final = 64
"""Number of entries in a task of Ray: a few seconds of large photographs. Ray needs some ms for each task."""

_MAX_TASK_BYTES: Final = 8 << 20
"""Size of the pickled entries in bytes from which a task gets no further chunk.

Entries of a compressed archive or of a table's column hold their images.
"""

_MAX_WINDOW_BYTES: Final = 128 << 20
"""Size of the pickled entries in bytes from which a data set gets no further chunk.

A cluster of its own has an object store of twice this size.
"""

_LISTING_SECONDS: Final = 60.0
"""Time of listing in seconds after which a data set gets no further chunk: the cluster waits meanwhile."""

_QUOTED_NAMES: Final = 3
"""Number of names of a task that a message quotes."""

_SILENCE_SECONDS: Final = 120.0
"""Time without a message in seconds after which the driver is given up."""

_END_SECONDS: Final = 15.0
"""Time in seconds in which the driver must end, and with it a cluster of its own."""

_MAX_LOG: Final = 64 << 10
"""Number of bytes at the end of Ray's log in which a line is looked for."""

_MAX_QUOTE: Final = 300
"""Maximum number of characters of Ray's line."""


class RayEngine:
    """Classifies with one worker for each processor of a Ray cluster.

    The workers run the code of `LocalEngine` with one thread each, on the same chunks, so the rows are the
    same but for the last bits, which depend on the type of processor.
    """

    def __init__(
        self,
        predictor: Predictor,
        model: LiveModel,
        settings: Settings,
        *,
        top_k: int,
        coverage: Coverage | None,
        address: str | None,
    ) -> None:
        """Create the engine of a model that is loaded here, too: the cluster gets no file that cannot be.

        `address` is that of the cluster as Ray writes it, such as `ray://head:10001` or `auto`; by default
        `RAY_ADDRESS`, or else a cluster of its own on this machine.

        Raises `ModelError` if the file is not the loaded one any more.
        """
        self.contract = model.contract
        version = model.model_version
        content = bytes(read_model(version.path, version.fingerprint))
        level = None if coverage is None else coverage.level
        batch_size = predictor.loaded_model.batch_max
        self._job = RayJob(
            address=address or os.environ.get("RAY_ADDRESS") or "local",
            model=WorkerModel(
                model.name,
                model.version,
                version.config,
                {name: getattr(settings, name) for name in WORKER_SETTINGS},
                batch_size,
                top_k,
                level,
                str(Path.cwd()),
            ),
            content=content,
            cpus=max(1, round(threads.available_cpus())),
        )
        self.facts = TableFacts(model.name, model.version, hashlib.sha256(content).hexdigest(), top_k, level)
        self.chunk_size = batch_size * -(-_CHUNK_ENTRIES // batch_size)
        self.description = f"Ray, batches of {batch_size}, 1 thread each"

    @classmethod
    def load(
        cls, settings: Settings, model: str | None, *, top_k: int, coverage: float | None, address: str | None
    ) -> RayEngine:
        """Load the named model, or the default model. See `LocalEngine.load` for the errors."""
        configure_pillow()
        predictor, live_model = load_live_model(settings, model, load_predictor, choose_batch_size)
        label_set = None if coverage is None else find_coverage(live_model.contract, coverage)
        return cls(predictor, live_model, settings, top_k=top_k, coverage=label_set, address=address)

    def classify(self, chunks: Iterator[Sequence[ImageEntry]]) -> Generator[ClassifiedChunk, None, None]:
        """Yield the rows of each chunk, in order. Raises `StartError` if the cluster cannot go on."""
        with TemporaryFile() as log, _start_driver(log) as driver:
            driver.send(self._job)
            yield from self._run(driver, chunks)

    def _run(
        self, driver: _DriverProcess, chunks: Iterator[Sequence[ImageEntry]]
    ) -> Generator[ClassifiedChunk, None, None]:
        waiting = 0
        is_last = False
        while not is_last or waiting:
            message = driver.receive()
            if isinstance(message, WindowRequest):
                waiting, is_last = self._send_window(driver, chunks, message.entries)
            elif isinstance(message, TaskResult):
                waiting -= 1
                results = pickle.loads(message.content)  # noqa: S301 - our workers'
                if isinstance(results, FoveaError):
                    raise results
                yield from results
            elif isinstance(message, Failure):
                raise StartError(message.message)

    def _send_window(
        self, driver: _DriverProcess, chunks: Iterator[Sequence[ImageEntry]], limit: int
    ) -> tuple[int, bool]:
        """Send the tasks of a window. Return their number, and whether there are no more."""
        window = Window(chunks, limit)
        for task in window:
            driver.send(task)
        driver.send(WindowEnd(window.is_last))
        return window.task_count, window.is_last


class Window:
    """The tasks of a data set, which are listed and pickled one by one."""

    def __init__(self, chunks: Iterator[Sequence[ImageEntry]], limit: int) -> None:
        """Take about `limit` entries, fewer if they are large or come slowly. Chunks are never cut."""
        self._chunks, self._limit = chunks, limit
        self.task_count = 0
        """Number of tasks so far."""
        self.is_last = False
        """Whether there are no more chunks after these tasks."""

    def __iter__(self) -> Iterator[Task]:
        """Yield the tasks."""
        entries = size = 0
        started_at = time.monotonic()
        while (
            not self.is_last
            and entries < self._limit
            and size < _MAX_WINDOW_BYTES
            and time.monotonic() - started_at < _LISTING_SECONDS
        ):
            if task := self._next_task():
                entries, size = entries + task.entries, size + len(task.content)
                self.task_count += 1
                yield task

    def _next_task(self) -> Task | None:
        """Return the next task; None if there are no more chunks."""
        contents: list[bytes] = []
        names: list[str] = []
        entries = size = 0
        while entries < _TASK_ENTRIES and size < _MAX_TASK_BYTES:
            chunk = next(self._chunks, None)
            if chunk is None:
                self.is_last = True
                break
            names += [entry.name for entry in chunk[: _QUOTED_NAMES - len(names)]]
            contents.append(pickle.dumps(chunk, 5))
            entries, size = entries + len(chunk), size + len(contents[-1])
        return Task(pickle.dumps(contents, 5), entries, names) if contents else None


@dataclass(frozen=True)
class _DriverProcess:
    """The process that is the driver of the cluster, which ends with a `with` block."""

    process: subprocess.Popen[bytes]
    connection: Connection
    log: IO[bytes]

    def send(self, message: object) -> None:
        """Send a message. Raises `StartError` if the process has ended."""
        try:
            self.connection.send(message)
        except OSError:
            raise StartError(self._describe_end()) from None

    def receive(self) -> object:
        """Return the next message. Raises `StartError` if the process has ended, or is silent for long."""
        try:
            if not self.connection.poll(_SILENCE_SECONDS):
                raise StartError(f"Ray has not answered for {_SILENCE_SECONDS:g} s; {self._quote_log()}")
            return self.connection.recv()
        except (EOFError, OSError):
            raise StartError(self._describe_end()) from None

    def _describe_end(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_SECONDS)
        return f"the connection to the Ray cluster was lost; {self._quote_log()}"

    def _quote_log(self) -> str:
        """Return the last line that Ray wrote."""
        descriptor = self.log.fileno()  # whose position is the process's, too
        size = os.fstat(descriptor).st_size
        lines = os.pread(descriptor, _MAX_LOG, max(0, size - _MAX_LOG)).decode(errors="replace").split("\n")
        last_line = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        return f"Ray's last line: {last_line[:_MAX_QUOTE]}"

    def __enter__(self) -> _DriverProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, and with it a cluster of its own."""
        self.connection.close()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _start_driver(log: IO[bytes]) -> _DriverProcess:
    ours, theirs = socket.socketpair()
    python_path = os.pathsep.join(
        filter(None, (str(Path(fovea.__file__).parents[1]), os.environ.get("PYTHONPATH")))
    )
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-P", "-m", "fovea.bulk.ray_driver", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the command, which ends the driver
            env={"RAY_USAGE_STATS_ENABLED": "0", **os.environ, "PYTHONPATH": python_path},
        )
    return _DriverProcess(process, Connection(ours.detach()), log)

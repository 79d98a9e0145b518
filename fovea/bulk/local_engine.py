"""Bulk classification on all processors of this machine."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Final, NamedTuple

from fovea.bulk.chunk_classifier import ChunkClassifier
from fovea.bulk.engine import ClassifiedChunk
from fovea.bulk.inputs.basic_entries import count_held_bytes
from fovea.bulk.row_maker import RowMaker
from fovea.bulk.table_facts import TableFacts
from fovea.bulk.worker_pool import WorkerPool
from fovea.service.artifact.contract import Contract, Coverage
from fovea.service.artifact.model_file import fingerprint_of
from fovea.service.cli import load_live_model
from fovea.service.errors import ModelError
from fovea.service.image_files import ImageEntry
from fovea.service.inference.preprocess import configure_pillow
from fovea.service.resources.cgroup import Cgroup
from fovea.service.resources.threads import expects_gpu
from fovea.service.runners.load_messages import LoadCommand
from fovea.service.runners.memory_plan import USABLE_SHARE, estimate_process_bytes
from fovea.service.runners.predictor import Predictor
from fovea.service.serving.live_model import LiveModel
from fovea.service.serving.ranking import find_coverage
from fovea.service.serving.standalone import load_predictor
from fovea.service.settings import Settings

_MIN_CHUNK: Final = 8
"""Smallest number of entries that a worker takes at once; a thumbnail takes less than a millisecond."""

_MIN_BATCH: Final = 4
_MAX_BATCH: Final = 16
"""Bounds of the number of images in a model call on a CPU.

The service has 4, because larger batches delay other callers. Here nobody waits, and for inputs of 32 x 32
pixels a batch of 16 takes a fifth less processor time.
"""

_BATCH_PIXELS: Final = 1 << 14
"""Pixels of all inputs in a batch that is larger than the service's. Batches of large inputs gain nothing."""

_CHUNKS_PER_WORKER: Final = 4
"""Number of chunks for each process or thread that are read, running or waiting to be written."""

_HELD_BYTES: Final = 256 << 20
"""Bytes of images that their entries hold, above which no further chunk is taken from the sources.

One chunk may exceed the limit: a chunk is cut by position, so that the batches are always the same.
"""


class _PendingChunk(NamedTuple):
    future: Future[ClassifiedChunk]
    held_bytes: int
    """Bytes of the images that the chunk's entries hold."""


class LocalEngine:
    """Classifies with a process for each processor, or with threads of this process.

    Like the runners of the service at full load, each of them reads, decodes and classifies batches of its
    own. There are only threads on a GPU, for a single processor, in a container without memory for two
    processes, and in a process that has other threads, which cannot be forked. The rows are the same.
    """

    def __init__(
        self,
        loaded: Predictor | WorkerPool,
        model: LiveModel,
        *,
        top_k: int,
        coverage: Coverage | None,
        max_bytes: int,
    ) -> None:
        """Create the engine of a model that is `loaded` here or in processes.

        Images have at most `max_bytes` bytes. Raises `ModelError`.
        """
        self.contract = model.contract
        """Description of the model."""
        batch_size = loaded.loaded_model.batch_max
        self._workers = loaded.process_count if isinstance(loaded, WorkerPool) else model.load.plan.processes
        self.facts = TableFacts(
            model.name,
            model.version,
            compute_model_digest(model),
            top_k,
            None if coverage is None else coverage.level,
        )
        self.chunk_size = batch_size * -(-_MIN_CHUNK // batch_size)
        threads_per_call = model.load.plan.threads
        self.description = (
            f"{loaded.loaded_model.provider}, batches of {batch_size}, "
            f"{threads_per_call} thread{'' if threads_per_call == 1 else 's'} each"
        )
        row_maker = RowMaker(model, top_k, coverage)
        self._classify_chunk: Callable[[Sequence[ImageEntry]], ClassifiedChunk]
        if isinstance(loaded, WorkerPool):
            loaded.prepare(row_maker, max_bytes)
            self._classify_chunk = loaded.classify
        else:
            self._classify_chunk = ChunkClassifier(loaded, row_maker, max_bytes).classify

    @classmethod
    def load(
        cls, settings: Settings, model: str | None, *, top_k: int, coverage: float | None
    ) -> LocalEngine:
        """Load the named model, or the default model.

        Raises `ModelError` and `StartError`, `ModelNotFound`, and `BadRequest` for a `coverage` that the
        model does not have.
        """
        configure_pillow()
        loaded, live_model = load_live_model(settings, model, _load_model, choose_batch_size)
        return cls(
            loaded,
            live_model,
            top_k=top_k,
            coverage=None if coverage is None else find_coverage(live_model.contract, coverage),
            max_bytes=settings.body_bytes,
        )

    def classify(self, chunks: Iterator[Sequence[ImageEntry]]) -> Generator[ClassifiedChunk, None, None]:
        """Yield the rows of each chunk, in order. Raises `ModelError` if the graph does not run.

        Raises `StartError` if a process ends, which an image may have caused.
        """
        limit = _CHUNKS_PER_WORKER * self._workers
        pending: deque[_PendingChunk] = deque()
        held_bytes = 0
        executor = ThreadPoolExecutor(self._workers, thread_name_prefix="bulk")

        def fill() -> None:
            nonlocal held_bytes
            while len(pending) < limit and held_bytes < _HELD_BYTES:
                chunk = next(chunks, None)
                if chunk is None:
                    return
                size = sum(map(count_held_bytes, chunk))
                held_bytes += size
                pending.append(_PendingChunk(executor.submit(self._classify_chunk, chunk), size))

        try:
            fill()
            while pending:
                future, size = pending.popleft()
                result = future.result()
                held_bytes -= size
                fill()
                yield result
        finally:
            executor.shutdown(cancel_futures=True)


def _load_model(load: LoadCommand) -> Predictor | WorkerPool:
    """Load a model into processes or into this one. Raises `ModelError` and `StartError`."""
    plan = replace(load.plan, wide_threads=0)  # no call is exclusive
    load = replace(load, plan=plan)
    processes = count_processes(load, Cgroup())
    if processes > 1 and not expects_gpu(plan.provider) and threading.active_count() == 1:
        return WorkerPool(replace(load, plan=replace(plan, processes=processes)))
    return load_predictor(load)


def count_processes(load: LoadCommand, cgroup: Cgroup) -> int:
    """Return how many of the planned processes fit into the free memory of the container.

    Without a limit, or if the use is unknown, all of them fit.
    """
    plan = load.plan
    limit, used_bytes = cgroup.memory_limit_bytes(), cgroup.memory_working_set_bytes()
    if limit is None or used_bytes is None:
        return plan.processes
    free_bytes = USABLE_SHARE * limit - used_bytes - plan.decode_bytes
    return min(plan.processes, max(0, int(free_bytes // estimate_process_bytes([load]))))


def choose_batch_size(contract: Contract) -> int:
    """Return the number of images in a batch on a CPU. It follows from the model alone, not the machine."""
    pixels = contract.input.width * contract.input.height
    return min(_MAX_BATCH, max(_MIN_BATCH, _BATCH_PIXELS // pixels))


def compute_model_digest(model: LiveModel) -> str:
    """Return the SHA-256 of a loaded model's file. Raises `ModelError` if the file is not the loaded one."""
    path = model.model_version.path
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        is_same = tuple(fingerprint_of(path)) == tuple(model.model_version.fingerprint)
    except OSError as error:
        raise ModelError(f"cannot read the model {path}: {error.strerror}") from None
    if not is_same:
        raise ModelError(f"{path} was replaced while it was loaded; run the command again")
    return digest

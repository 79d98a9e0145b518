"""Processes on this machine that classify chunks, each with the model in it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import traceback
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from queue import SimpleQueue
from typing import Final, NamedTuple

from fovea.bulk.chunk_classifier import ChunkClassifier
from fovea.bulk.engine import ClassifiedChunk
from fovea.bulk.inputs.basic_entries import count_held_bytes
from fovea.bulk.row_maker import RowMaker
from fovea.errors import FoveaError, ModelError, StartError
from fovea.service.artifact.model_file import MemoryFile
from fovea.service.image_files import ImageEntry
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.preprocess import release_pillow_memory
from fovea.service.runners.load_messages import LoadCommand, LoadedModel
from fovea.service.runners.predictor import Predictor

_MESSAGE_BYTES: Final = 1 << 20
"""Bytes of images that the entries of a chunk hold, above which each entry is a message of its own.

A process then has one of these images in memory at a time, and not all of the chunk.
"""

_END_SECONDS: Final = 5.0
"""Time in seconds that a process has to end after its connection is closed."""


class WorkerPool:
    """Processes with the same model. They end when this process ends, however it does.

    The processes are forked from this one, so that they start within milliseconds and share the memory of
    the imports. They load the model themselves: sessions of ONNX Runtime cannot be forked. They share its
    weights.
    """

    def __init__(self, load: LoadCommand) -> None:
        """Start `load.plan.processes` processes, and let them load the model.

        Call this in a process with one thread, which has opened no session. Raises `ModelError`, and
        `StartError` if a process cannot be started or ends.
        """
        context = multiprocessing.get_context("fork")
        self._workers: list[_Worker] = []
        self._idle_workers: SimpleQueue[_Worker] = SimpleQueue()
        lock = os.memfd_create("lock")
        weights = os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        load = replace(load, weights_file=MemoryFile.from_descriptor(weights))
        try:
            for _ in range(load.plan.processes):
                connection, remote = context.Pipe()
                others = [worker.connection for worker in self._workers] + [connection]
                process = context.Process(target=_serve, args=(remote, others, load, lock), daemon=True)
                with remote, warnings.catch_warnings():
                    # Python 3.12 warns of native threads too: those of NumPy sleep, and survive a fork.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                self._workers.append(_Worker(process, connection))
            loaded_models = [_receive_loaded_model(worker) for worker in self._workers]
        except OSError as error:
            _close(self._workers)
            raise StartError(f"a worker process cannot be started: {error.strerror}") from None
        except BaseException:
            _close(self._workers)
            raise
        finally:
            os.close(lock)
            os.close(weights)
        self.loaded_model = loaded_models[0]
        """The model as a process has loaded it."""
        weakref.finalize(self, _close, self._workers)

    @property
    def process_count(self) -> int:
        """Number of the processes."""
        return len(self._workers)

    def prepare(self, row_maker: RowMaker, max_bytes: int) -> None:
        """Let all processes make rows like this one; images have at most `max_bytes` bytes."""
        for worker in self._workers:
            worker.connection.send((row_maker, max_bytes))
            self._idle_workers.put(worker)

    def classify(self, entries: Sequence[ImageEntry]) -> ClassifiedChunk:
        """Return the rows of a chunk, in a process that is idle; wait for one if there is none.

        Several threads may call this at once. Raises what `ChunkClassifier.classify` raises, and `StartError`
        if the process ends, which an image may have caused.
        """
        worker = self._idle_workers.get()
        try:
            try:
                _send_entries(worker.connection, entries)
                result = worker.connection.recv()
            except (EOFError, ConnectionError):
                raise StartError(
                    f"a worker process {worker.describe_end()} while it classified the images from "
                    f"{entries[0].name!r} to {entries[-1].name!r}"
                ) from None
        finally:
            self._idle_workers.put(worker)
        if isinstance(result, BaseException):
            raise result
        classified_chunk: ClassifiedChunk = result
        return classified_chunk


class _Worker(NamedTuple):
    process: ForkProcess
    connection: Connection

    def describe_end(self) -> str:
        """Return how the process ended."""
        self.process.join(_END_SECONDS)
        status = self.process.exitcode
        if status == -signal.SIGKILL:
            return "was killed (SIGKILL), perhaps because memory ran out,"
        if status is not None and status < 0:
            return f"was ended by {signal.Signals(-status).name}"
        return f"ended with exit status {status}"


def _close(workers: Sequence[_Worker]) -> None:
    """End the processes, which are idle or loading."""
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        worker.process.join(_END_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _receive_loaded_model(worker: _Worker) -> LoadedModel:
    try:
        result = worker.connection.recv()
    except (EOFError, ConnectionError):
        raise StartError(f"a worker process {worker.describe_end()} while it loaded the model") from None
    if isinstance(result, BaseException):
        raise result
    loaded_model: LoadedModel = result
    return loaded_model


def _send_entries(connection: Connection, entries: Sequence[ImageEntry]) -> None:
    """Send a chunk as the number of its messages and the messages, which are lists of entries."""
    if sum(map(count_held_bytes, entries)) < _MESSAGE_BYTES:
        connection.send(1)
        connection.send(list(entries))
    else:
        connection.send(len(entries))
        for entry in entries:
            connection.send([entry])


def _receive_entries(connection: Connection) -> Iterator[ImageEntry]:
    for _ in range(connection.recv()):
        messages = connection.recv()
        while messages:
            yield messages.pop(0)


# --- in the new processes ------------------------------------------------------------------------


def _serve(connection: Connection, others: Sequence[Connection], load: LoadCommand, lock: int) -> None:
    """Load the model, and classify chunks until the other end is closed.

    `others` are the ends of the parent process, which would otherwise not be closed when it is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for one in others:
        one.close()
    gc.freeze()  # a collection would write to the memory that the processes share
    with suppress(EOFError, ConnectionError):
        try:
            predictor = Predictor.from_load(load, _create_memory(load, lock))
        except ModelError as error:
            connection.send(error.with_traceback(None))
            return
        connection.send(predictor.loaded_model)
        row_maker, max_bytes = connection.recv()
        classifier = ChunkClassifier(predictor, row_maker, max_bytes)
        while True:
            entries = _receive_entries(connection)
            result = _classify(classifier, entries)
            for _ in entries:  # those that were not read
                pass
            connection.send(result)


def _create_memory(load: LoadCommand, lock: int) -> DecodeMemory:
    """Return the limit on decode memory that all processes share.

    One image may take the whole limit, as it may in a process alone, so that the rows do not depend on the
    number of processes.
    """
    plan = load.plan
    memory = DecodeMemory(
        plan.decode_bytes,
        processes=plan.processes,
        lock_descriptor=lock,
        release_memory=release_pillow_memory,
    )
    memory.limit = plan.decode_bytes
    return memory


def _classify(classifier: ChunkClassifier, entries: Iterator[ImageEntry]) -> ClassifiedChunk | Exception:
    try:
        return classifier.classify(entries)
    except (EOFError, ConnectionError):
        raise
    except FoveaError as error:
        return error.with_traceback(None)
    except Exception as error:
        error.add_note(traceback.format_exc())
        return error.with_traceback(None)

"""A runner: a process that decodes images and runs the model for one batch after another.

A runner combines small batches. Runners are processes and not threads, because Python's global interpreter
lock lets only one thread at a time work on requests and images: two threads did 57 % of the work of two
processes. A crash, such as that of a codec on hostile bytes, affects only the batches that the runner works
on.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import compress, islice
from typing import Final

import onnxruntime

from fovea.service import allocator
from fovea.service.errors import DeadlineExceeded, ModelError
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.image_format import supported_formats
from fovea.service.inference.preprocess import configure_pillow, release_pillow_memory
from fovea.service.runners.batch_messages import Batch, BatchReport, DropCommand
from fovea.service.runners.child_process import prepare_child
from fovea.service.runners.frames import MAX_REQUEST_BYTES, FrameDecoder, receive_frame
from fovea.service.runners.load_messages import LoadReply, LoadRequest, Setup, SetupReply, UnloadCommand
from fovea.service.runners.messages import Failure
from fovea.service.runners.predictor import Predictor

_NICENESS: Final = 5
"""Niceness of a runner relative to the service, which needs the processor at once, and briefly.

At 300 % load the median refusal takes 1 ms instead of 3 ms, and no answer comes later.
"""

_LOADING_NICENESS: Final = 10
"""Niceness of a thread that loads another model while the runner works on batches."""

_RECEIVE_BYTES: Final = 256 << 10
"""Bytes to read at once: usually everything that waits, unless large images were not stored."""


def main(descriptor: int, lock_descriptor: int, bodies_descriptor: int) -> None:
    """Serve the socket with this file descriptor until the service closes its end.

    `service.runners.child_process` calls this in the main thread of the new process. `lock_descriptor` and
    `bodies_descriptor` are the descriptors of files that all runners share: the lock of
    `service.inference.decode_memory`, and the bodies of `service.runners.shared_memory`.
    """
    prepare_child(_NICENESS)
    configure_pillow()
    ignore_disconnect = contextlib.suppress(BrokenPipeError, ConnectionResetError)
    with socket.socket(fileno=descriptor) as connection, ignore_disconnect:
        _serve_connection(connection, lock_descriptor, bodies_descriptor)


def _serve_connection(connection: socket.socket, lock_descriptor: int, bodies_descriptor: int) -> None:
    """Load the models of the setup, report readiness, and work until the stream ends."""
    frame = receive_frame(connection)
    if frame is None:
        return
    setup = Setup.from_frame(frame)
    plan = setup.plan
    memory = DecodeMemory(
        plan.decode_bytes,
        processes=plan.processes,
        lock_descriptor=lock_descriptor,
        release_memory=release_pillow_memory,
    )
    try:
        models = {
            load.model_id: Predictor.from_load(load, memory, bodies_descriptor) for load in setup.models
        }
    except ModelError as error:
        connection.sendall(Failure.from_model_error(setup.number, error).to_bytes())
        return
    reply = SetupReply(
        setup.number,
        [models[load.model_id].loaded_model for load in setup.models],
        onnxruntime.__version__,
        onnxruntime.get_available_providers(),
        supported_formats(),
    )
    connection.sendall(reply.to_bytes())
    allocator.trim_heap()  # loading has left as much free memory as the model needs, and more
    allocator.release_code_pages()
    gc.freeze()  # all objects so far are permanent: exclude them from garbage collection
    _Runner(connection, models, memory, bodies_descriptor).run()


class _Runner:
    """The main loop of a runner, and its models by id.

    The main thread reads the socket and runs batches. Each load has a thread of its own, which shares the
    models and the writing side of the socket with the main thread.
    """

    def __init__(
        self,
        connection: socket.socket,
        models: dict[int, Predictor],
        memory: DecodeMemory,
        bodies_descriptor: int,
    ) -> None:
        self._connection = connection
        self._models = models
        self._memory = memory
        self._bodies_descriptor = bodies_descriptor
        # The main thread and loading threads write to the socket: each message must be written as a whole.
        self._send_lock = threading.Lock()
        self._loading_ids: set[int] = set()
        """Ids of models that are being loaded and have not been unloaded meanwhile."""
        # Guards `_loading_ids`, and changes of `_models` together with it.
        self._load_lock = threading.Lock()

    def run(self) -> None:
        """Answer batches in order, until the stream ends.

        Read all waiting messages before each group of batches: a `DropCommand` saves work only if it is read
        before its batch begins.
        """
        batches: deque[Batch] = deque()
        drops: set[tuple[int, int]] = set()
        """Batch numbers and image indexes of images that no caller waits for."""
        decoder = FrameDecoder(MAX_REQUEST_BYTES)
        while True:
            while data := _receive_bytes(self._connection, wait=not batches):
                for frame in decoder.feed(data):
                    match frame.kind:
                        case Batch.__name__:
                            batches.append(Batch.from_frame(frame))
                        case DropCommand.__name__:
                            drop = DropCommand.from_frame(frame)
                            drops.add((drop.batch_number, drop.image_index))
                        case LoadRequest.__name__:
                            request = LoadRequest.from_frame(frame)
                            # Before the thread starts: an `UnloadCommand` that follows must find the id.
                            self._loading_ids.add(request.load.model_id)
                            threading.Thread(target=self._load_model, args=(request,), daemon=True).start()
                        case _:
                            self._unload_model(UnloadCommand.from_frame(frame).model_id)
            if not batches:
                return
            group = _pop_group(batches, self._models)
            # The service has reserved these bytes for this group until it has the answers.
            self._memory.set_grant(sum(batch.reserved_bytes for batch in group))
            self._send_bytes(b"".join(_run_group(self._models.get(group[0].model_id), group, drops)))
            # Forget drops of answered batches. Drops of later batches are still needed.
            drops = {drop for drop in drops if drop[0] > group[-1].number}

    def _send_bytes(self, content: bytes) -> None:
        """Write messages as a whole. The main thread and loading threads call this."""
        with self._send_lock:
            self._connection.sendall(content)

    def _load_model(self, request: LoadRequest) -> None:
        """Load a model in a thread of its own, while the main thread runs batches, and send the reply.

        ONNX Runtime releases the global interpreter lock while it loads.
        """
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOADING_NICENESS)  # of this thread only
        load = request.load
        reply: LoadReply | Failure
        try:
            model = Predictor.from_load(load, self._memory, self._bodies_descriptor)
        except ModelError as error:
            reply = Failure.from_model_error(request.number, error)
        except Exception as error:  # any error: the service waits for an answer
            reply = Failure.from_bug(request.number, error)
        else:
            reply = LoadReply(request.number, model.loaded_model)
            # Before the reply: the service may send batches for the model as soon as it has the reply.
            with self._load_lock:
                if load.model_id in self._loading_ids:
                    self._loading_ids.remove(load.model_id)
                    self._models[load.model_id] = model
            allocator.trim_heap()
        with contextlib.suppress(OSError):  # the service has ended
            self._send_bytes(reply.to_bytes())

    def _unload_model(self, model_id: int) -> None:
        """Drop a model and return its memory to the system.

        The main thread calls this between two groups of batches, so the model is not in use. Without the
        trim, glibc would keep freed memory between other blocks.
        """
        # A thread that is still loading the model does not find the id afterwards, and drops the model.
        with self._load_lock:
            self._loading_ids.discard(model_id)
            if self._models.pop(model_id, None) is None:
                return
        allocator.trim_heap()


def _pop_group(batches: deque[Batch], models: Mapping[int, Predictor]) -> list[Batch]:
    """Take the first batch, and following batches that may run together with it.

    One image is left over, so that there is work until the next batches arrive. With 8 callers this gives 2 %
    more throughput than leaving none, 4 % more than leaving two, and 10 % more than running each batch
    separately. `connection._count_suspects` in the service must know these rules: they must change together.
    """
    max_images = max(1, sum(len(batch.images) for batch in batches) - 1)
    first = batches.popleft()
    group, images, weight = [first], len(first.images), first.weight
    if first.model_id not in models:
        return group
    limits = models[first.model_id].loaded_model
    while (
        batches
        and not first.separate
        and (batch := batches[0]).model_id == first.model_id
        and not batch.separate
    ):
        images, weight = images + len(batch.images), weight + batch.weight
        if images > min(max_images, limits.batch_max) or weight > limits.batch_bytes:
            break
        group.append(batches.popleft())
    return group


def _receive_bytes(connection: socket.socket, *, wait: bool) -> bytes:
    """Return received bytes; empty at the end of the stream, or without `wait` when no bytes have arrived."""
    try:
        return connection.recv(_RECEIVE_BYTES, 0 if wait else socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


def _run_group(model: Predictor | None, group: list[Batch], drops: set[tuple[int, int]]) -> Iterator[bytes]:
    """Run batches together, and yield the reply to each batch, in the order of the batches.

    Every batch gets a reply, whatever happens: the service waits for one. `model` is None if it was unloaded;
    a model is unloaded only when no caller waits for its answers.
    """
    now = time.monotonic()
    masks = [
        [
            model is not None
            and (batch.number, image_index) not in drops
            and (deadline is None or now < deadline)
            for image_index, deadline in enumerate(batch.deadlines)
        ]
        for batch in group
    ]
    images = [
        image for batch, mask in zip(group, masks, strict=True) for image in compress(batch.images, mask)
    ]
    deadlines = [
        deadline
        for batch, mask in zip(group, masks, strict=True)
        for deadline in compress(batch.deadlines, mask)
    ]
    try:
        exclusive = group[0].exclusive and len(group) == 1
        report = (
            model.predict_batch(images, exclusive=exclusive, deadlines=deadlines)
            if model
            else BatchReport([], [], 0.0, 0)
        )
    except Exception as error:  # any error: this batch has failed, the next one may succeed
        if len(group) > 1:
            for batch in group:
                yield from _run_group(model, [batch], drops)
            return
        yield Failure.from_bug(group[0].number, error).to_bytes()
        return
    answers, decode, batch_size = iter(report.answers), iter(report.decode_seconds), report.batch_size
    for batch, mask in zip(group, masks, strict=True):
        decode_times = list(islice(decode, sum(mask)))
        batch_answers = [next(answers) if is_wanted else _DROPPED_ERROR for is_wanted in mask]
        yield BatchReport(
            batch_answers, decode_times, report.inference_seconds, batch_size, batch.number
        ).to_bytes()
        batch_size = 0  # count the model call only once


_DROPPED_ERROR = DeadlineExceeded("no caller waits for this image any more")

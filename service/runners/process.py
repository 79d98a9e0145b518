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
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import compress, islice
from typing import Final

import onnxruntime

from fovea.service import allocator
from fovea.service.errors import DeadlineExceeded, GoldenError, ModelError, one_line
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.preprocess import configure_pillow, release_pillow_memory, supported_formats
from fovea.service.runners.messages import (
    Batch,
    Drop,
    Failure,
    Load,
    Loaded,
    Ready,
    Report,
    Setup,
    Stream,
    Told,
    Unload,
    read_work,
    receive,
)
from fovea.service.runners.predictor import Model

_NICE: Final = 5
"""Niceness of a runner relative to the service, which needs the processor at once, and briefly.

At 300 % load the median refusal takes 1 ms instead of 3 ms, and no answer comes later.
"""

_NICE_LOADING: Final = 10
"""Niceness of a thread that loads another model while the runner works on batches."""

_PIECE: Final = 256 << 10
"""Bytes to read at once: usually everything that waits, unless large images were not stored."""


def main(descriptor: int, lock: int, bodies: int) -> None:
    """Serve the socket with this file descriptor until the service closes its end.

    `lock` and `bodies` are the descriptors of files that all runners share: the lock of
    `service.inference.decode_memory`, and the bodies of `service.runners.shared_memory`.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the service ends its runners
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    configure_pillow()
    gone = contextlib.suppress(BrokenPipeError, ConnectionResetError)
    with socket.socket(fileno=descriptor) as service, gone:
        _serve(service, lock, bodies)


def _serve(service: socket.socket, lock: int, bodies: int) -> None:
    """Load the models of the setup, report readiness, and work until the stream ends."""
    frame = receive(service)
    if frame is None:
        return
    setup = Setup.read(frame)
    plan = setup.plan
    memory = DecodeMemory(
        plan.decode_bytes,
        processes=plan.processes,
        lock_descriptor=lock,
        release_memory=release_pillow_memory,
    )
    try:
        models = {load.slot: Model.of(load, memory, bodies) for load in setup.models}
    except ModelError as error:
        service.sendall(Failure(one_line(error), isinstance(error, GoldenError)).write())
        return
    ready = Ready(
        [models[load.slot].loaded for load in setup.models],
        onnxruntime.__version__,
        onnxruntime.get_available_providers(),
        supported_formats(),
    )
    service.sendall(ready.write())
    gc.freeze()  # all objects so far are permanent: exclude them from garbage collection
    _Runner(service, models, memory, bodies).work()


class _Runner:
    """The main loop of a runner, and its models by slot."""

    def __init__(
        self, service: socket.socket, models: dict[int, Model], memory: DecodeMemory, bodies: int
    ) -> None:
        self._service = service
        self._models = models
        self._memory = memory
        self._bodies = bodies
        # The main loop and loading threads share the socket: a message must be written as a whole.
        self._sending = threading.Lock()
        self._wanted: set[int] = set()
        """Slots whose model is being loaded."""
        self._loading = threading.Lock()

    def work(self) -> None:
        """Answer batches in order.

        Read all waiting messages before each batch: a message may say that no caller waits for an image any
        more.
        """
        batches: deque[Batch] = deque()
        dropped: set[Drop] = set()
        stream = Stream()
        while True:
            while data := _read(self._service, wait=not batches):
                for frame in stream.feed(data):
                    match read_work(frame):
                        case Batch() as batch:
                            batches.append(batch)
                        case Drop() as drop:
                            dropped.add(drop)
                        case Load() as load:
                            # Before the thread starts: a following Unload must find the slot.
                            self._wanted.add(load.slot)
                            threading.Thread(target=self._load, args=(load,), daemon=True).start()
                        case Unload(slot):
                            self._unload(slot)
            if not batches:
                return
            group = _group(batches, self._models)
            self._memory.set_grant(sum(batch.memory for batch in group))
            self._send(b"".join(_answer(self._models.get(group[0].model), group, dropped)))
            # Forget drops of answered batches. Drops of later batches are still needed.
            dropped = {drop for drop in dropped if drop.number > group[-1].number}

    def _send(self, content: bytes) -> None:
        """Write one message as a whole. Called by the main loop and by loading threads."""
        with self._sending:
            self._service.sendall(content)

    def _load(self, load: Load) -> None:
        """Load a model in a thread, beside the batches.

        ONNX Runtime releases the global interpreter lock while it loads.
        """
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE_LOADING)  # of this thread only
        outcome: Loaded | Failure
        try:
            model = Model.of(load, self._memory, self._bodies)
        except ModelError as error:
            outcome = Failure(one_line(error), isinstance(error, GoldenError))
        except Exception as error:  # any error: the service waits for an answer
            outcome = Failure(f"{type(error).__name__}: {one_line(error)}", trace=traceback.format_exc())
        else:
            outcome = model.loaded
            with self._loading:
                if load.slot in self._wanted:
                    self._wanted.remove(load.slot)
                    self._models[load.slot] = model
        with contextlib.suppress(OSError):  # the service has ended
            self._send(Told(load.slot, outcome).write())

    def _unload(self, slot: int) -> None:
        """Drop a model and return its memory to the system.

        Without the trim, glibc would keep freed memory between other blocks.
        """
        with self._loading:  # a model that is still loading is then not kept
            self._wanted.discard(slot)
            if self._models.pop(slot, None) is None:
                return
        allocator.trim()


def _group(batches: deque[Batch], models: Mapping[int, Model]) -> list[Batch]:
    """Take the first batch, and following batches that may run together with it.

    One image is left over, so that there is work until the next batches arrive. With 8 callers this gives 2 %
    more throughput than leaving none, 4 % more than leaving two, and 10 % more than running each batch
    separately.
    """
    most = max(1, sum(len(batch.images) for batch in batches) - 1)
    first = batches.popleft()
    group, images, weight = [first], len(first.images), first.weight
    if first.model not in models:
        return group
    limits = models[first.model].loaded
    while batches and not first.apart and (batch := batches[0]).model == first.model and not batch.apart:
        images, weight = images + len(batch.images), weight + batch.weight
        if images > min(most, limits.batch_max) or weight > limits.batch_bytes:
            break
        group.append(batches.popleft())
    return group


def _read(service: socket.socket, *, wait: bool) -> bytes:
    """Return received bytes; empty at the end of the stream, or without `wait` when no bytes have arrived."""
    try:
        return service.recv(_PIECE, 0 if wait else socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


def _answer(model: Model | None, group: list[Batch], dropped: set[Drop]) -> Iterator[bytes]:
    """Run batches together, and yield the reply to each batch.

    `model` is None if it was unloaded; a model is unloaded only when no caller waits for its answers.
    """
    now = time.monotonic()
    wanted = [
        [
            model is not None
            and Drop(batch.number, place) not in dropped
            and (deadline is None or now < deadline)
            for place, deadline in enumerate(batch.deadlines)
        ]
        for batch in group
    ]
    images = [
        image for batch, which in zip(group, wanted, strict=True) for image in compress(batch.images, which)
    ]
    try:
        alone = group[0].alone and len(group) == 1
        report = model.answer(images, alone=alone) if model else Report([], [], 0.0, 0)
    except Exception as error:  # any error: this batch has failed, the next one may succeed
        if len(group) > 1:
            for batch in group:
                yield from _answer(model, [batch], dropped)
            return
        reason = f"{type(error).__name__}: {one_line(error)}"
        yield Failure(reason, trace=traceback.format_exc(), number=group[0].number).write()
        return
    answers, decode, batch_size = iter(report.answers), iter(report.decode), report.batch
    for batch, which in zip(group, wanted, strict=True):
        times = list(islice(decode, sum(which)))
        mine = [next(answers) if one else _UNWANTED for one in which]
        yield Report(mine, times, report.inference, batch_size, batch.number).write()
        batch_size = 0  # count the model call only once


_UNWANTED = DeadlineExceeded("nobody waits for this image any more")

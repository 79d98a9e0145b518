"""A runner: a process of its own that decodes and runs one batch after the other, small ones together.

A process and not a thread, because Python's lock lets one thread at a time work on requests and images:
as threads, two of them did 57 % of what they do as processes. And what kills a process, such as a codec's
crash on hostile bytes, costs no more than what it was at.
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
from fovea.service.inference.preprocess import give_blocks_back, served_formats, settle_pillow
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
"""How far a runner stands back behind the service, which needs its turn at once, and briefly. At 300 % load
the median refusal takes 1 ms and not 3, and no answer comes later."""

_NICE_LOADING: Final = 10
"""How far a thread stands back that loads one model more while others are at work."""

_PIECE: Final = 256 << 10
"""Bytes read at once; all that waits, unless there are large images that were not stored."""


def main(descriptor: int, lock: int, bodies: int) -> None:
    """Serve the socket with this file descriptor, until the service closes its end.

    `lock` and `bodies` are the descriptors of the files that all runners share: the lock of
    `service.inference.decode_memory`, and the bodies of `service.runners.shared_memory`.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they go to whole groups; the service ends its runners
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    settle_pillow()
    gone = contextlib.suppress(BrokenPipeError, ConnectionResetError)
    with socket.socket(fileno=descriptor) as service, gone:
        _serve(service, lock, bodies)


def _serve(service: socket.socket, lock: int, bodies: int) -> None:
    frame = receive(service)
    if frame is None:
        return
    setup = Setup.read(frame)
    plan = setup.plan
    memory = DecodeMemory(plan.decode_bytes, processes=plan.processes, lock=lock, give_back=give_blocks_back)
    try:
        models = {load.slot: Model.of(load, memory, bodies) for load in setup.models}
    except ModelError as error:
        service.sendall(Failure(one_line(error), isinstance(error, GoldenError)).write())
        return
    ready = Ready(
        [models[load.slot].loaded for load in setup.models],
        onnxruntime.__version__,
        onnxruntime.get_available_providers(),
        served_formats(),
    )
    service.sendall(ready.write())
    gc.freeze()  # what is here now stays: no collection needs to look at it again
    _Runner(service, models, memory, bodies).work()


class _Runner:
    """The models by slot, and what is done with them."""

    def __init__(
        self, service: socket.socket, models: dict[int, Model], memory: DecodeMemory, bodies: int
    ) -> None:
        self._service = service
        self._models = models
        self._memory = memory
        self._bodies = bodies
        self._sending = threading.Lock()
        self._wanted: set[int] = set()
        """Slots that are being loaded."""
        self._loading = threading.Lock()

    def work(self) -> None:
        """Answer batches in order. What has come is read before each: it may say that nobody waits any
        more."""
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
                            self._wanted.add(load.slot)
                            threading.Thread(target=self._load, args=(load,), daemon=True).start()
                        case Unload(slot):
                            self._unload(slot)
            if not batches:
                return
            group = _group(batches, self._models)
            self._memory.grant(sum(batch.memory for batch in group))
            self._send(b"".join(_answer(self._models.get(group[0].model), group, dropped)))
            dropped = {drop for drop in dropped if drop.number > group[-1].number}

    def _send(self, content: bytes) -> None:
        with self._sending:
            self._service.sendall(content)

    def _load(self, load: Load) -> None:
        """Beside the batches, in a thread of its own: ONNX Runtime leaves Python's lock to them meanwhile."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE_LOADING)  # of this thread alone
        outcome: Loaded | Failure
        try:
            model = Model.of(load, self._memory, self._bodies)
        except ModelError as error:
            outcome = Failure(one_line(error), isinstance(error, GoldenError))
        except Exception as error:  # whatever it is, somebody waits for an answer
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
        """Its memory goes back to the system: glibc would keep what lies between other blocks."""
        with self._loading:  # what is only being loaded is not kept then
            self._wanted.discard(slot)
            if self._models.pop(slot, None) is None:
                return
        allocator.trim()


def _group(batches: deque[Batch], models: Mapping[int, Model]) -> list[Batch]:
    """Take the first batch, and those behind it that may be run together with it.

    One image is left, so that there is something to do until the next ones come: with 8 callers that is 2 %
    more than to leave none, 4 % more than to leave two, and 10 % more than to run each batch by itself.
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
    """What has come; nothing at the end of the stream, or when there is no more and it is not to `wait`."""
    try:
        return service.recv(_PIECE, 0 if wait else socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


def _answer(model: Model | None, group: list[Batch], dropped: set[Drop]) -> Iterator[bytes]:
    """Run batches together; what to say of each. A model is unloaded when nobody waits for it any more."""
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
    except Exception as error:  # whatever it is: this batch has failed, and the next may not
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
        batch_size = 0  # told once


_UNWANTED = DeadlineExceeded("nobody waits for this image any more")

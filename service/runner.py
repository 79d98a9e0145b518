"""A runner: a process of its own that decodes and runs one batch after the other.

A process and not a thread, because Python's lock lets one thread at a time work on requests and images:
as threads, two of them did 57 % of what they do as processes. And what kills a process, such as a codec's
crash on hostile bytes, costs no more than the batch that it was at.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import select
import signal
import socket
import time
from collections import deque
from itertools import compress
from pathlib import Path

import onnxruntime

from service.errors import DeadlineExceeded, ModelError, one_line
from service.images import served_formats, settle_pillow
from service.inference import Model
from service.memory import DecodeMemory
from service.messages import Batch, Drop, Failure, Ready, Setup, read_work, receive

log = logging.getLogger(__name__)


def main(descriptor: int, lock: int) -> None:
    """Serve the socket with this file descriptor, until the service closes its end.

    `lock` is the descriptor of the file that all runners have in common (`service.memory`).
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they go to whole groups; the service ends its runners
        signal.signal(number, signal.SIG_IGN)
    settle_pillow()
    gone = contextlib.suppress(BrokenPipeError, ConnectionResetError)
    with socket.socket(fileno=descriptor) as service, gone:
        _serve(service, lock)


def _serve(service: socket.socket, lock: int) -> None:
    frame = receive(service)
    if frame is None:
        return
    setup = Setup.read(frame)
    plan = setup.plan
    memory = DecodeMemory(plan.decode_bytes, processes=plan.processes, lock=lock)
    try:
        models = [Model(Path(path), plan, memory) for path in setup.models]
    except ModelError as error:
        service.sendall(Failure(one_line(error)).write())
        return
    ready = Ready(
        [model.loaded for model in models],
        onnxruntime.__version__,
        onnxruntime.get_available_providers(),
        served_formats(),
    )
    service.sendall(ready.write())
    gc.freeze()  # what is here now stays: no collection needs to look at it again
    _work(service, models)


def _work(service: socket.socket, models: list[Model]) -> None:
    """Answer batches in order. What has come is read before each: it may say that nobody waits any more."""
    batches: deque[Batch] = deque()
    dropped: set[Drop] = set()
    while True:
        while not batches or _has_more(service):
            frame = receive(service)
            if frame is None:
                return
            work = read_work(frame)
            if isinstance(work, Batch):
                batches.append(work)
            else:
                dropped.add(work)
        batch = batches.popleft()
        service.sendall(_answer(models, batch, dropped))
        dropped = {drop for drop in dropped if drop.number > batch.number}


def _has_more(service: socket.socket) -> bool:
    return bool(select.select([service], [], [], 0)[0])


def _answer(models: list[Model], batch: Batch, dropped: set[Drop]) -> bytes:
    now = time.monotonic()
    wanted = [
        Drop(batch.number, index) not in dropped and (deadline is None or now < deadline)
        for index, deadline in enumerate(batch.deadlines)
    ]
    images = list(compress(batch.images, wanted))
    try:
        report = models[batch.model].answer(images, alone=batch.alone)
    except Exception as error:  # whatever it is: this batch has failed, and the next may not
        log.exception("a batch failed")
        return Failure(f"{type(error).__name__}: {one_line(error)}").write()
    answers = iter(report.answers)
    return report._replace(answers=[next(answers) if one else _UNWANTED for one in wanted]).write()


_UNWANTED = DeadlineExceeded("nobody waits for this image any more")

"""Trial process of a new model file: it loads, warms up and validates the model as runners do.

The process also answers recent images with the new and the current version. Another process of the same kind
writes the weights that the runners share, and reads no images. Both run at low priority, and the kernel's
out-of-memory killer selects them first.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import time
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from fovea.service.errors import ModelError
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.preprocess import configure_pillow
from fovea.service.inference.session import read_model, runs_on_cpu
from fovea.service.inference.shared_weights import share_weights
from fovea.service.rollout.trial import (
    ShadowTestReply,
    ShadowTestRequest,
    ShadowTestResult,
    WriteWeightsReply,
    WriteWeightsRequest,
)
from fovea.service.runners.batch_messages import Answer
from fovea.service.runners.child_process import prepare_child
from fovea.service.runners.frames import receive_frame, split_content
from fovea.service.runners.messages import Failure
from fovea.service.runners.predictor import Predictor

_NICE: Final = 12
"""Nice value of this process. Runners have 5, the service has 0."""


def main(descriptor: int, memory: int, seconds: int) -> None:
    """Run the trial that the parent describes through the socket `descriptor`.

    `ShadowTests.run` in the parent starts this process, sends one message with the loads and the images, and
    waits for one reply. The limits are `memory` in bytes and `seconds` of processor time.
    """
    prepare_child(_NICE, is_expendable=True, memory_bytes=memory, cpu_seconds=seconds)
    configure_pillow()
    with (
        socket.socket(fileno=descriptor) as parent,
        contextlib.suppress(BrokenPipeError, ConnectionResetError),
    ):
        frame = receive_frame(parent)
        if frame is None:
            return
        is_test = frame.kind == ShadowTestRequest.__name__
        request = (ShadowTestRequest if is_test else WriteWeightsRequest).from_frame(frame)
        reply: ShadowTestReply | WriteWeightsReply | Failure
        try:
            if isinstance(request, WriteWeightsRequest):
                reply = _write_weights(request)
            else:
                images = list(split_content(frame.content, request.image_sizes))
                reply = ShadowTestReply(request.number, _run_test(request, images, seconds))
        except MemoryError:
            reason = f"it needs more than {memory} bytes of memory (FOVEA_TRIAL_BYTES)"
            reply = Failure(request.number, reason)
        except Exception as error:  # any exception means that the file cannot be served
            reply = Failure.from_model_error(request.number, error)
        parent.sendall(reply.to_bytes())


def _run_test(request: ShadowTestRequest, images: Sequence[memoryview], limit: float) -> ShadowTestResult:
    """Load the candidate and compare it with the current version.

    `limit` is the processor time in seconds, of which half is available for images.
    """
    memory = DecodeMemory(request.candidate.plan.decode_bytes)
    candidate = Predictor.from_load(request.candidate, memory)
    if request.current is None or not (images or request.is_golden):
        return ShadowTestResult(0, 0, 1.0)
    try:
        current = Predictor.from_load(request.current, memory)
    except ModelError:  # the current version's file was overwritten: there is nothing to compare with
        return ShadowTestResult(0, 0, 1.0)
    if request.is_golden:
        sets = (*current.contract.golden.images, *candidate.contract.golden.images)
        images = [memoryview(b64decode(content)) for content in dict.fromkeys(one.image for one in sets)]
    answers = []
    for image in images:
        answers.append((_time_answer(candidate, image), _time_answer(current, image)))
        if time.process_time() > limit / 2:
            break
    pairs = [(new, old) for new, old in answers if old.label is not None]  # no answer counts as a flip
    if not pairs:
        return ShadowTestResult(0, 0, 1.0)
    flips = sum(new.label != old.label for new, old in pairs)
    new, old = (statistics.median(one.seconds for one in ones) for ones in zip(*pairs, strict=True))
    return ShadowTestResult(len(pairs), flips, new / old)


def _write_weights(request: WriteWeightsRequest) -> WriteWeightsReply:
    """Write and seal the weights that runners share. Raises `ModelError`."""
    load = request.load
    if load.weights_file and runs_on_cpu(load.plan.provider):
        try:
            share_weights(read_model(Path(load.file), load.fingerprint), load.weights_file)
        except OSError as error:  # the model has been unloaded
            raise ModelError(f"cannot share the weights of {load.path}: {error.strerror}") from None
    return WriteWeightsReply(request.number)


class _TimedLabel(NamedTuple):
    """Answer to one image."""

    label: str | None
    """Most probable label; None for an image that is refused."""
    seconds: float


def _time_answer(model: Predictor, image: memoryview) -> _TimedLabel:
    """Answer one image and measure the time."""
    started_at = time.monotonic()
    answer = model.predict_batch([image]).answers[0]
    seconds = time.monotonic() - started_at
    label = model.contract.labels[answer.ranking[0]] if isinstance(answer, Answer) else None
    return _TimedLabel(label, seconds)

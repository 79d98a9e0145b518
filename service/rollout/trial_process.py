"""Trial process of a new model file: it loads, warms up and validates the model as runners do.

The process also answers recent images with the new and the current version. It runs at low priority, and the
kernel's out-of-memory killer selects it first.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import statistics
import time
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

from fovea.service.errors import GoldenError, ModelError, RequestError, to_one_line
from fovea.service.inference.decode_memory import DecodeMemory
from fovea.service.inference.preprocess import configure_pillow
from fovea.service.rollout.trial import ShadowTestResult
from fovea.service.runners.frames import receive_message, send_message, split_content
from fovea.service.runners.load_messages import Failure, LoadCommand
from fovea.service.runners.predictor import Predictor

_NICE: Final = 12
"""Nice value of this process. Runners have 5, the service has 0."""


def main(descriptor: int, memory: int, seconds: int) -> None:
    """Run the trial that the parent describes through the socket `descriptor`.

    `ShadowTests.run` in the parent starts this process, sends one message with the loads and the images, and
    waits for one reply. The limits are `memory` in bytes and `seconds` of processor time.
    """
    os.nice(_NICE)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    # Set the limits before anything is read: the kernel must enforce them for the whole trial.
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    configure_pillow()
    with socket.socket(fileno=descriptor) as parent:
        frame = receive_message(parent)
        if frame is None:
            return
        values, content = frame
        images = list(split_content(content, values["images"]))
        try:
            loads = [LoadCommand.from_dict(load) for load in values["loads"]]
            result: Any = asdict(_run_test(loads, images, seconds, golden=values["golden"]))
        except MemoryError:
            result = Failure(f"it needs more than {memory} bytes of memory (FOVEA_TRIAL_BYTES)").to_dict()
        except Exception as error:  # any exception means that the file cannot be served
            result = Failure(to_one_line(error), isinstance(error, GoldenError)).to_dict()
        send_message(parent, result)


def _run_test(
    loads: Sequence[LoadCommand], images: Sequence[memoryview], limit: float, *, golden: bool
) -> ShadowTestResult:
    """Load the candidate and compare it with the current version.

    `limit` is the processor time in seconds, of which half is available for images. With `golden`, the images
    are the golden images of both models.
    """
    memory = DecodeMemory(loads[0].plan.decode_bytes)
    candidate = Predictor.from_load(loads[0], memory)
    if len(loads) == 1 or not (images or golden):
        return ShadowTestResult(0, 0, 1.0)
    try:
        current = Predictor.from_load(loads[1], memory)
    except ModelError:  # the current version's file was overwritten: there is nothing to compare with
        return ShadowTestResult(0, 0, 1.0)
    if golden:
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
    label = None if isinstance(answer, RequestError) else model.contract.labels[answer.ranking[0]]
    return _TimedLabel(label, seconds)

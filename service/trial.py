"""A new model file is tried in a process of its own before it comes near those that serve.

There it is loaded, warmed up and proven, and answers the last images beside the version that it is to
replace. What kills that process, never ends or takes too much memory has harmed nobody. It stands back
behind everything else, and where memory ends the system takes it first.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from service.errors import GoldenError, ModelError, RequestError, one_line
from service.images import settle_pillow
from service.inference import Model
from service.memory import DecodeMemory
from service.messages import Failure, Load, receive, send

_NICE: Final = 10
"""Runners have 5, the service 0."""

_PATIENCE: Final = 10
"""How many times as long as the processor time that it may use a trial may last: others are at work too."""

_CODE: Final = "import sys; sys.path[:] = {path!r}; from service import trial; trial.main{arguments}"


@dataclass(frozen=True)
class Verdict:
    """How a new version did on the last images, beside the one that it is to replace."""

    seconds: float
    """To load, warm up and prove it."""
    images: int
    """That both could answer."""
    flips: int
    """Images whose most probable label is another, by name."""
    slowdown: float
    """The median image's time, by that of the old version; 1 where there was nothing to compare."""

    @property
    def flip_rate(self) -> float:
        """Flips by images; 0 where there were none."""
        return self.flips / self.images if self.images else 0.0


class Trial:
    """Tries one file after the other; every method may be called from any thread."""

    def __init__(self, *, seconds: float, memory: int) -> None:
        """How much processor time one may take, and how many bytes."""
        self._seconds = seconds
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def run(self, candidate: Load, current: Load | None, images: Sequence[bytes]) -> Verdict:
        """Try `candidate` beside `current` on `images`, and wait for the end.

        Raises `ModelError`: it cannot be served, and why.
        """
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                limits = (theirs.fileno(), self._memory, math.ceil(self._seconds))
                process = self._process = _popen(*limits)
            if self._closed:
                process.kill()
            try:
                ours.settimeout(_PATIENCE * self._seconds)
                loads = [asdict(load) for load in (candidate, current) if load]
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died: see below
                    send(ours, {"loads": loads, "images": list(map(len, images))}, images)
                frame = receive(ours)
            except TimeoutError:
                raise self._late(f"{_PATIENCE} times ") from None
            except ConnectionResetError:
                frame = None
            finally:
                process.kill()
                status = process.wait()
        if frame is None and status == -signal.SIGXCPU:
            raise self._late("")
        if frame is None:
            raise ModelError(f"the process that tried it {_end(status)}")
        if failure := Failure.read(frame[0]):
            raise failure.error()
        return Verdict(**frame[0])

    def _late(self, times: str) -> ModelError:
        return ModelError(f"it could not be tried within {times}{self._seconds:g} s (FOVEA_TRIAL_SECONDS)")

    def close(self) -> None:
        """End what is being tried; it fails."""
        self._closed = True
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def _end(status: int) -> str:
    if status == -signal.SIGKILL:
        return "was killed: it takes too much memory, or the service was ending"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"


def _popen(descriptor: int, memory: int, seconds: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-c", _CODE.format(path=sys.path, arguments=(descriptor, memory, seconds))],
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # a native library's last words; ours come through the socket
        process_group=0,
        env={"OPENBLAS_NUM_THREADS": "1", **os.environ},
    )


# --- in that process -------------------------------------------------------------------------------


def main(descriptor: int, memory: int, seconds: int) -> None:
    """Try what the socket with this file descriptor brings, in so many bytes and seconds of its processor."""
    os.nice(_NICE)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    settle_pillow()
    with socket.socket(fileno=descriptor) as parent:
        frame = receive(parent)
        if frame is None:
            return
        values, content = frame
        images, start = [], 0
        for size in values["images"]:
            images.append(content[start : start + size])
            start += size
        try:
            verdict: Any = asdict(_try([Load.from_plain(load) for load in values["loads"]], images))
        except MemoryError:
            verdict = Failure("it takes too much memory (FOVEA_TRIAL_BYTES)").to_plain()
        except Exception as error:  # whatever it is, it is not to be served
            verdict = Failure(one_line(error), isinstance(error, GoldenError)).to_plain()
        send(parent, verdict)


def _try(loads: Sequence[Load], images: Sequence[memoryview]) -> Verdict:
    memory = DecodeMemory(loads[0].plan.decode_bytes)
    candidate = _load(loads[0], memory)
    seconds = candidate.loaded.seconds
    if len(loads) == 1 or not images:
        return Verdict(seconds, 0, 0, 1.0)
    try:
        current = _load(loads[1], memory)
    except ModelError:  # its file is gone, or was replaced: there is nothing to compare with
        return Verdict(seconds, 0, 0, 1.0)
    answers = [(_answer(candidate, image), _answer(current, image)) for image in images]
    pairs = [(new, old) for new, old in answers if new.label is not None and old.label is not None]
    if not pairs:
        return Verdict(seconds, 0, 0, 1.0)
    flips = sum(new.label != old.label for new, old in pairs)
    new, old = (statistics.median(one.seconds for one in ones) for ones in zip(*pairs, strict=True))
    return Verdict(seconds, len(pairs), flips, new / old)


def _load(load: Load, memory: DecodeMemory) -> Model:
    return Model(Path(load.path), load.plan, memory)


class _Answer(NamedTuple):
    label: str | None
    """None for an image that is refused."""
    seconds: float


def _answer(model: Model, image: memoryview) -> _Answer:
    started = time.monotonic()
    answer = model.answer([image]).answers[0]
    seconds = time.monotonic() - started
    label = None if isinstance(answer, RequestError) else model.contract.labels[answer.ranking[0]]
    return _Answer(label, seconds)

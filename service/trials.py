"""A new model file is tried in a process of its own before it comes near those that serve.

What kills that process (`service.trial`), never ends or takes too much memory has harmed nobody.
"""

from __future__ import annotations

import contextlib
import math
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from service import child
from service.errors import Interrupted, ModelError
from service.messages import Failure, Load, receive, send

PATIENCE: Final = 10
"""How many times as long as the processor time that it may use a trial may last: others are at work too."""


@dataclass(frozen=True)
class Verdict:
    """How a new version did on the last images, beside the one that it is to replace."""

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


class Trials:
    """One after the other; every method may be called from any thread."""

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
                limits = (self._memory, math.ceil(self._seconds))
                # A native library's last words are not shown; ours come through the socket.
                process = self._process = child.start("trial", [theirs.fileno()], *limits, quiet=True)
            if self._closed:
                process.kill()
            try:
                ours.settimeout(PATIENCE * self._seconds)
                loads = [asdict(load) for load in (candidate, current) if load]
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died: see below
                    send(ours, {"loads": loads, "images": list(map(len, images))}, images)
                frame = receive(ours)
            except TimeoutError:
                raise self._late(f"{PATIENCE} times ") from None
            except ConnectionResetError:
                frame = None
            finally:
                process.kill()
                status = process.wait()
        if frame is None and status == -signal.SIGXCPU:
            raise self._late("")
        if frame is None and self._closed:
            raise Interrupted("the service was ending")
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
        return "was killed: there was not enough memory"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"

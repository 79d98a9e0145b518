"""A new model file is tried in a process of its own before it comes near those that serve.

A file that kills the process (`trial_process`), never ends or takes too much memory harms nobody else.
"""

from __future__ import annotations

import contextlib
import math
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fovea.service.errors import GoldenError, Interrupted, ModelError, Unproven
from fovea.service.runners import spawn
from fovea.service.runners.messages import Failure, Load, receive, send


@dataclass(frozen=True)
class Verdict:
    """How a new version did on the last images, beside the one that it is to replace."""

    images: int
    """That the old version answers."""
    flips: int
    """Images whose most probable label is another, by name, or that the new version does not answer."""
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

    def run(
        self, candidate: Load, current: Load | None, images: Sequence[bytes], *, golden: bool = False
    ) -> Verdict:
        """Try `candidate` beside `current` on `images`, and wait for the end. With `golden` the images are
        those of both models' golden sets.

        Raises `ModelError`: it cannot be served, and why.
        """
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise Interrupted(f"a trial cannot be started: {error.strerror}") from None
        with ours:
            with theirs:
                limits = (self._memory, math.ceil(self._seconds))
                # A native library's last words are not shown; ours come through the socket.
                try:
                    process = spawn.start("rollout.trial_process", [theirs.fileno()], *limits, quiet=True)
                except OSError as error:
                    raise Interrupted(f"a trial cannot be started: {error.strerror}") from None
                self._process = process
            if self._closed:
                process.kill()
            try:
                ours.settimeout(spawn.PATIENCE * self._seconds)
                loads = [asdict(load) for load in (candidate, current) if load]
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died: see below
                    sizes = list(map(len, images))
                    send(ours, {"loads": loads, "images": sizes, "golden": golden}, images)
                frame = receive(ours)
            except TimeoutError:
                raise Unproven(self._late(f"{spawn.PATIENCE} times ")) from None
            except ConnectionResetError:
                frame = None
            finally:
                process.kill()
                status = process.wait()
        if frame is None and status == -signal.SIGXCPU:
            raise ModelError(self._late(""))
        if frame is None and self._closed:
            raise Interrupted("the service was ending")
        if frame is None:
            kind = Unproven if status == -signal.SIGKILL else ModelError
            raise kind(f"the process that tried it {_end(status)}")
        if failure := Failure.read(frame[0]):
            raise failure.error()
        return Verdict(**frame[0])

    def _late(self, times: str) -> str:
        return f"it could not be tried within {times}{self._seconds:g} s (FOVEA_TRIAL_SECONDS)"

    def close(self) -> None:
        """End what is being tried; it fails."""
        self._closed = True
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def is_lasting(error: Exception) -> bool:
    """Whether an error says something about the file: it would come again, at any time and on any machine."""
    of_machine = isinstance(error, Interrupted | GoldenError | Unproven)
    return isinstance(error, ModelError) and not of_machine and not is_of_provider(error)


def is_of_provider(error: Exception) -> bool:
    """Whether the machine or ONNX Runtime has no such execution provider (`engine`)."""
    return "FOVEA_PROVIDER" in str(error)


def change_limit(seconds: float) -> float:
    """Seconds within which one process has a change ready or has failed: a trial, and as much again for the
    load in its runners. `seconds` is the processor time that a trial may take."""
    return 2 * spawn.PATIENCE * seconds


def check(verdict: Verdict, flips: float, slowdown: float) -> None:
    """Raise `ModelError` where a new version changes more labels, or takes longer, than it may."""
    if verdict.flip_rate > flips:
        raise ModelError(
            f"{verdict.flips} of the last {verdict.images} images would get another label: "
            f"{verdict.flip_rate:.1%}, at most {flips:.1%} (FOVEA_SWAP_FLIPS)"
        )
    if slowdown and verdict.slowdown > slowdown:
        raise ModelError(
            f"an image would take {verdict.slowdown:.2f} times as long; at most {slowdown:g} "
            "(FOVEA_SWAP_SLOWDOWN)"
        )


def _end(status: int) -> str:
    if status == -signal.SIGKILL:
        return "was killed: there was not enough memory"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"

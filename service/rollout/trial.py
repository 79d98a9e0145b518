"""Trial of a new model file in a separate process, before the file reaches the serving processes.

A file that crashes the process (`trial_process`), never finishes or uses too much memory harms no other
process.
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
from fovea.service.runners.messages import Failure, LoadCommand, receive_message, send_message


@dataclass(frozen=True)
class Verdict:
    """Result of a trial: the new version compared with the current version on recent images."""

    images: int
    """Number of images that the current version answers."""
    flips: int
    """Number of images for which the most probable label differs by name, or that the new version does not
    answer."""
    slowdown: float
    """Ratio of the median times per image, new to current; 1 if there was nothing to compare."""

    @property
    def flip_rate(self) -> float:
        """Return flips divided by images, or 0 if there were no images."""
        return self.flips / self.images if self.images else 0.0


class Trials:
    """Runner of trials, one at a time. Every method may be called from any thread."""

    def __init__(self, *, seconds: float, memory: int) -> None:
        """Set the limits of a trial: processor time in seconds, and memory in bytes."""
        self._seconds = seconds
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def run(
        self,
        candidate: LoadCommand,
        current: LoadCommand | None,
        images: Sequence[bytes],
        *,
        golden: bool = False,
    ) -> Verdict:
        """Try `candidate`, compared with `current` on `images`, and wait for the verdict.

        With `golden`, the images are the golden images of both models. Raises `ModelError` with the reason
        when the candidate cannot be served.
        """
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise Interrupted(f"a trial cannot be started: {error.strerror}") from None
        with ours:
            with theirs:
                # `with theirs` closes our copy of the child's end after the start: otherwise
                # `receive_message` would not see the end of the stream when the child dies.
                limits = (self._memory, math.ceil(self._seconds))
                # Output of a crashing native library is hidden; the verdict comes through the socket.
                try:
                    process = spawn.start_process(
                        "rollout.trial_process", [theirs.fileno()], *limits, quiet=True
                    )
                except OSError as error:
                    raise Interrupted(f"a trial cannot be started: {error.strerror}") from None
                self._process = process
            # `close` may have run before `_process` was set.
            if self._closed:
                process.kill()
            try:
                ours.settimeout(spawn.LOAD_TIMEOUT_FACTOR * self._seconds)
                loads = [asdict(load) for load in (candidate, current) if load]
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died: see below
                    sizes = list(map(len, images))
                    send_message(ours, {"loads": loads, "images": sizes, "golden": golden}, images)
                frame = receive_message(ours)
            except TimeoutError:
                raise Unproven(self._late(f"{spawn.LOAD_TIMEOUT_FACTOR} times ")) from None
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
        if failure := Failure.from_dict(frame[0]):
            raise failure.to_exception()
        return Verdict(**frame[0])

    def _late(self, times: str) -> str:
        """Return the message for a trial that took too long."""
        return f"it could not be tried within {times}{self._seconds:g} s (FOVEA_TRIAL_SECONDS)"

    def close(self) -> None:
        """Kill the running trial, which then fails."""
        self._closed = True
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def is_lasting(error: Exception) -> bool:
    """Return whether an error is a property of the file.

    Such an error would recur at any time on any machine.
    """
    of_machine = isinstance(error, Interrupted | GoldenError | Unproven)
    return isinstance(error, ModelError) and not of_machine and not is_of_provider(error)


def is_of_provider(error: Exception) -> bool:
    """Return whether an error means that the execution provider is not available (`engine`)."""
    return "FOVEA_PROVIDER" in str(error)


def change_limit(seconds: float) -> float:
    """Return the time limit in seconds for one process to prepare a change.

    The limit covers a trial, and the same time again for the load in the runners. `seconds` is the processor
    time of a trial.
    """
    return 2 * spawn.LOAD_TIMEOUT_FACTOR * seconds


def check(verdict: Verdict, flips: float, slowdown: float) -> None:
    """Raise `ModelError` if a new version changes too many labels or is too slow."""
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
    """Describe how a process ended."""
    if status == -signal.SIGKILL:
        return "was killed: there was not enough memory"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"

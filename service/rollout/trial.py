"""Trial of a new model file in a separate process, before the file reaches the serving processes.

A file that crashes the process (`trial_process`), never finishes or uses too much memory harms no other
process.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fovea.service.errors import GoldenError, Interrupted, ModelError, Unproven
from fovea.service.runners.child_process import LOAD_TIMEOUT_FACTOR, ChildProcess, Reply
from fovea.service.runners.frames import FrameError
from fovea.service.runners.load_messages import LoadCommand
from fovea.service.runners.messages import Failure, NumberedMessage


@dataclass(frozen=True)
class ShadowTestRequest(NumberedMessage):
    """The only request to a trial process. The content is the images, one after another."""

    candidate: LoadCommand
    current: LoadCommand | None
    image_sizes: Sequence[int]
    is_golden: bool
    """True to compare on the golden images of both models instead."""


@dataclass(frozen=True)
class ShadowTestResult:
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


@dataclass(frozen=True)
class ShadowTestReply(NumberedMessage):
    """Reply to a `ShadowTestRequest` for a model that can be served; otherwise the reply is a `Failure`."""

    result: ShadowTestResult


@dataclass(frozen=True)
class WriteWeightsRequest(NumberedMessage):
    """The only request to a trial process that writes the weights of a version for the runners."""

    load: LoadCommand


@dataclass(frozen=True)
class WriteWeightsReply(NumberedMessage):
    """Reply to a `WriteWeightsRequest`: the file is complete, or empty if the weights cannot be shared."""


class ShadowTests:
    """Runner of trial processes. Every method may be called from any thread."""

    def __init__(self, *, seconds: float, memory: int) -> None:
        """Set the limits of a trial: processor time in seconds, and memory in bytes."""
        self._seconds = seconds
        self._memory = memory
        self._processes: set[ChildProcess] = set()
        self._is_closed = False

    def run(
        self,
        candidate: LoadCommand,
        current: LoadCommand | None,
        images: Sequence[bytes],
        *,
        golden: bool = False,
    ) -> ShadowTestResult:
        """Try `candidate`, compared with `current` on `images`, and wait for the result.

        With `golden`, the images are the golden images of both models. Raises `ModelError` with the reason
        when the candidate cannot be served.

        This blocks for as long as the trial takes. Call it in a worker thread if an event loop is running.
        """
        request = ShadowTestRequest(0, candidate, current, list(map(len, images)), golden)
        return self._ask(request, images, ShadowTestReply).result

    def write_weights(self, load: LoadCommand) -> None:
        """Write the weights of a version that has passed its trial into the file `load.weights_file`.

        The file stays empty if the weights cannot be shared. Raises `ModelError` when the file may be
        incomplete. This blocks as `run` does.
        """
        self._ask(WriteWeightsRequest(0, load), [], WriteWeightsReply)

    def _ask(self, request: NumberedMessage, images: Sequence[bytes], kind: type[Reply]) -> Reply:
        """Start a process, send it the request with the images, and return its reply.

        Raises `ModelError`.
        """
        process = self._start_process()
        deadline = time.monotonic() + LOAD_TIMEOUT_FACTOR * self._seconds
        try:
            process.send(request.to_pieces(images), deadline)
            reply = process.receive_reply(request.number, kind, deadline)
        except TimeoutError:
            raise Unproven(self._format_timeout(f"{LOAD_TIMEOUT_FACTOR} times ")) from None
        except FrameError as error:
            raise Unproven(f"its trial process {error}") from None
        finally:
            status = process.kill_and_wait()
            self._processes.discard(process)
        if reply is None:
            raise self._explain_death(status)
        if isinstance(reply, Failure):
            raise reply.to_exception()
        return reply

    def _start_process(self) -> ChildProcess:
        try:
            # The output of a crashing native library is hidden; the result comes through the socket.
            process = ChildProcess(
                "rollout.trial_process", self._memory, math.ceil(self._seconds), quiet=True
            )
        except OSError as error:
            raise Interrupted(f"a trial cannot be started: {error.strerror}") from None
        self._processes.add(process)
        # `close` runs on the event loop's thread, perhaps before the process was added here. It sets
        # `_is_closed` first, so that one of the two threads kills the process.
        if self._is_closed:
            process.kill()
        return process

    def _explain_death(self, status: int | None) -> ModelError:
        """Return the error for a trial process that ended with `status` and without a result."""
        if status == -signal.SIGXCPU:
            return ModelError(self._format_timeout(""))
        if self._is_closed:
            return Interrupted("the service was ending")
        kind = Unproven if status in (None, -signal.SIGKILL) else ModelError
        return kind(f"its trial process {_describe_exit(status)}")

    def _format_timeout(self, times: str) -> str:
        """Return the message for a trial that took too long."""
        return f"it could not be tried within {times}{self._seconds:g} s (FOVEA_TRIAL_SECONDS)"

    def close(self) -> None:
        """Kill the running trials, which then fail, as do all later trials."""
        self._is_closed = True
        for process in self._processes.copy():
            process.kill()


def is_lasting(error: Exception) -> bool:
    """Return whether an error is a property of the file.

    Such an error would recur at any time on any machine.
    """
    is_machine_failure = isinstance(error, Interrupted | GoldenError | Unproven)
    return isinstance(error, ModelError) and not is_machine_failure and not is_provider_error(error)


def is_provider_error(error: Exception) -> bool:
    """Return whether an error means that the execution provider is not available.

    Only the messages of such errors name the setting FOVEA_PROVIDER.
    """
    return "FOVEA_PROVIDER" in str(error)


def compute_change_timeout(seconds: float) -> float:
    """Return the time limit in seconds for one process to prepare a change.

    The limit covers a trial, the same time again for the process that writes the weights, and once more for
    the load in the runners. `seconds` is the processor time of a trial.
    """
    return 3 * LOAD_TIMEOUT_FACTOR * seconds


def check_result(result: ShadowTestResult, max_flip_rate: float, max_slowdown: float) -> None:
    """Raise `ModelError` if a new version changes too many labels or is too slow."""
    if result.flip_rate > max_flip_rate:
        raise ModelError(
            f"{result.flips} of the last {result.images} images would get another label: "
            f"{result.flip_rate:.1%}, at most {max_flip_rate:.1%} (FOVEA_SWAP_FLIPS)"
        )
    if max_slowdown and result.slowdown > max_slowdown:
        raise ModelError(
            f"an image would take {result.slowdown:.2f} times as long; at most {max_slowdown:g} "
            "(FOVEA_SWAP_SLOWDOWN)"
        )


def _describe_exit(status: int | None) -> str:
    """Describe how a process ended; None stands for a process that cannot be killed."""
    if status is None:
        return "closed its socket and cannot be killed"
    if status == -signal.SIGKILL:
        return "was killed: there was not enough memory"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"

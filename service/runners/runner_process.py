"""A runner process as the service starts it."""

from __future__ import annotations

import contextlib
import time

from fovea.service.errors import Interrupted, ModelError
from fovea.service.runners.child_process import ChildProcess
from fovea.service.runners.frames import FrameError
from fovea.service.runners.load_messages import Setup, SetupReply
from fovea.service.runners.messages import Failure


class RunnerProcess(ChildProcess):
    """A runner process. It loads the models in `setup` at once.

    `wait_ready` reads the socket first; then the socket belongs to a `RunnerConnection` on the event loop.
    """

    def __init__(self, setup: Setup, lock_descriptor: int, bodies_descriptor: int, *, timeout: float) -> None:
        """Start the process, which must be ready within `timeout` seconds.

        `lock_descriptor` and `bodies_descriptor` are the descriptors of files that all runners share.

        Raises `ModelError` when the system has no files, memory or processes left.
        """
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        try:
            super().__init__("runners.process", descriptors=(lock_descriptor, bodies_descriptor))
        except OSError as error:
            raise ModelError(f"a runner cannot be started: {error.strerror}") from None
        self.is_multi_threaded = any(load.plan.wide_threads > load.plan.threads for load in setup.models)
        self._setup_number, self._model_count = setup.number, len(setup.models)
        # Before the process can read: the socket buffer holds the message, so this rarely waits.
        with contextlib.suppress(TimeoutError):  # `wait_ready` reports it
            self.send(setup.to_pieces(), self._deadline)

    def wait_ready(self) -> SetupReply:
        """Block until the process has loaded its models. Call this once, in a thread that may wait.

        Raises `ModelError` when a model cannot be loaded. Raises `Interrupted` when the process dies, breaks
        the protocol or exceeds the time limit; the process is killed then.
        """
        try:
            reply = self.receive_reply(self._setup_number, SetupReply, self._deadline)
            if isinstance(reply, SetupReply) and len(reply.models) != self._model_count:
                raise FrameError(f"loaded {len(reply.models)} models instead of {self._model_count}")
        except TimeoutError:
            self.kill()
            raise Interrupted(
                f"runner {self.pid} has not loaded its models within {self._timeout:g} s (10 times "
                "FOVEA_TRIAL_SECONDS, once more for each further model, and the time to start); it is killed"
            ) from None
        except FrameError as error:
            self.kill()
            raise Interrupted(f"runner {self.pid} {error}; it is killed") from None
        if reply is None:
            raise Interrupted(f"a runner died while it loaded the models, exit status {self.wait_exit()}")
        if isinstance(reply, Failure):
            raise reply.to_exception()
        return reply

"""Two-phase commit of changes to the served models: all workers prepare a change, or none commits it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, Protocol

from fovea.service.artifact.repository import ModelVersion, ServingState
from fovea.service.errors import GoldenError, Interrupted, ModelError, Unproven

log = logging.getLogger(__name__)

_LOST_WORKER: Final = "lost"
"""Kind of a reply in place of the reply of a worker that has died."""

_ERROR_TYPES: Final = {kind.__name__: kind for kind in (Interrupted, Unproven, GoldenError)}


class Worker(Protocol):
    """Interface of a worker process for changes."""

    def send_message(self, **message: Any) -> None:
        """Send a message to the worker. Raises `OSError` when the worker does not read."""

    def kill(self) -> None:
        """Kill the worker. Another worker takes its place."""


class Coordinator:
    """Coordinator of changes in a supervisor, as a `RolloutTarget`.

    Every method must be called on the event loop.
    """

    def __init__(
        self,
        workers: Callable[[], Collection[Worker]],
        on_end: Callable[[], None],
        *,
        state: ServingState,
        timeout: float,
    ) -> None:
        """Set the workers, the callback for the end of a change, the first state, and the time limit.

        The time limit is in seconds.

        `workers` returns the active workers. No worker may join between the beginning of a change and its
        end, which `on_end` reports. A worker that is not ready within `timeout` hangs and is killed, because
        all its own limits have passed by then.
        """
        self._workers = workers
        self._timeout = timeout
        self._on_end = on_end
        self.is_changing = False
        self._change_id = 0
        self._pending_replies: dict[Worker, asyncio.Future[dict[str, Any]]] = {}
        self._prepared_workers: Sequence[Worker] = ()
        self.state = state
        """State that the workers serve. A worker that has loaded other versions must start again."""

    async def prepare(
        self, name: str | None, versions: Sequence[ModelVersion], *, force: bool = False
    ) -> None:
        """Let all workers prepare a change, as `RolloutTarget` describes.

        The first worker prepares before the others: if it refuses, the others need not try. If all prepared
        at once, requests would also lose more processor time. If there is no worker, later workers start with
        the new versions.
        """
        self._change_id += 1
        self.is_changing = True
        self._prepared_workers = list(self._workers())
        try:
            replies: list[dict[str, Any]] = []
            for group in (self._prepared_workers[:1], self._prepared_workers[1:]):
                replies += await self._prepare_workers(group, name, versions, force=force)
                _check_replies(replies)
            if replies and all(reply["error"] for reply in replies):
                raise Interrupted(replies[0]["error"])  # all workers died; none has prepared it
        except BaseException:
            for worker in self._prepared_workers:
                self._send_message(worker, abandon=name)
            self._end()
            raise

    async def _prepare_workers(
        self, workers: Sequence[Worker], name: str | None, versions: Sequence[ModelVersion], *, force: bool
    ) -> list[dict[str, Any]]:
        """Ask workers to prepare a change, and return their replies.

        A worker that has died counts as lost. Its replacement starts with the versions that are served then.
        """
        loop = asyncio.get_running_loop()
        self._pending_replies = {worker: loop.create_future() for worker in workers}
        plain = [one.to_plain() for one in versions]
        for worker in workers:
            if worker in self._workers():  # it may have died while another worker prepared
                if not self._send_message(
                    worker, prepare=plain, name=name, change=self._change_id, force=force
                ):
                    worker.kill()  # it would not receive the new state either
            else:
                self.on_worker_lost(worker)
        timeout_timer = loop.call_later(self._timeout, self._give_up)
        try:
            return list(await asyncio.gather(*self._pending_replies.values()))
        finally:
            timeout_timer.cancel()

    def serve(self, state: ServingState) -> None:
        """Make all workers serve `state`, as `RolloutTarget` describes."""
        # The state changes first: `_end` admits workers that have loaded their models meanwhile, and those
        # with other versions must start again.
        self.state = state
        for worker in self._workers():
            self.send_state(worker)
        if self.is_changing:
            self._end()

    def send_state(self, worker: Worker) -> None:
        """Make a worker serve the current state, or kill it if it cannot be told."""
        if not self._send_message(worker, serve=self.state.to_json()):
            worker.kill()  # it would go on serving the old state

    def handle_message(self, worker: Worker, message: dict[str, Any]) -> None:
        """Handle a worker's reply to a `prepare` message. The supervisor calls this on the event loop."""
        # A reply to an earlier change, which has timed out, is ignored.
        if message["prepared"] == self._change_id:
            self._set_reply(worker, message)

    def on_worker_lost(self, worker: Worker) -> None:
        """Set the reply of a worker that has died or hangs, so that `prepare` does not wait for it."""
        self._set_reply(worker, {"error": "a worker died or hung during the change", "kind": _LOST_WORKER})

    def _give_up(self) -> None:
        """Kill the workers that have not replied in time."""
        for worker, reply in self._pending_replies.items():
            if not reply.done():
                log.error("a worker has not prepared a change within %g s; it is killed", self._timeout)
                worker.kill()
                self.on_worker_lost(worker)

    def _end(self) -> None:
        """End the change, so that workers may join again."""
        self.is_changing = False
        self._on_end()

    def _set_reply(self, worker: Worker, reply: dict[str, Any]) -> None:
        """Set a worker's reply, unless it is already set."""
        future = self._pending_replies.get(worker)
        if future and not future.done():
            future.set_result(reply)

    def _send_message(self, worker: Worker, **message: Any) -> bool:
        """Send a message to a worker and return whether that was possible."""
        try:
            worker.send_message(**message)
        except OSError:  # it has died, or does not read
            self.on_worker_lost(worker)
            return False
        return True


def _check_replies(replies: Sequence[dict[str, Any]]) -> None:
    """Raise `ModelError` if a worker has refused.

    A verdict on the file takes precedence over an interruption.
    """
    refusals = [reply for reply in replies if reply["error"] and reply["kind"] != _LOST_WORKER]
    if refusals:
        worst = min(refusals, key=lambda one: one["kind"] == Interrupted.__name__)
        raise _ERROR_TYPES.get(worst["kind"], ModelError)(worst["error"])

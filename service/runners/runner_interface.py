"""The interface between the batcher and a runner: how a batch begins, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from fovea.service.runners.lane import DropItem, Lane

BatchCallback: TypeAlias = Callable[[Sequence[Any] | Exception], None]
"""Callback for a batch: a runner calls it once on the event loop, as `Runner.start_batch` describes."""


class RunnerLost(Exception):
    """The death of a runner, as the outcome of a batch."""

    def __init__(self, message: str, *, is_suspect: bool) -> None:
        """Set the message. `is_suspect` is True if the runner may have been at work on the batch.

        Each item of a suspect batch runs once more, in a batch of its own.
        """
        super().__init__(message)
        self.is_suspect = is_suspect


class Runner(Protocol):
    """A worker that runs one batch after another. The batcher calls it on the event loop."""

    is_multi_threaded: bool
    """True if the runner has extra threads for an `exclusive` batch."""

    def start_batch(
        self,
        lane: Lane[Any, Any],
        items: Sequence[Any],
        deadlines: Sequence[float],
        *,
        exclusive: bool,
        separate: bool,
        memory: int,
        on_finish: BatchCallback,
    ) -> DropItem:
        """Begin a batch of items of one lane, and call `on_finish` once, later, on the event loop.

        `memory` is the number of bytes reserved for the batch beyond the runner's own share; the reservation
        ends when `on_finish` is called. `exclusive` promises that no other batch runs on any runner when this
        one begins.

        `on_finish` gets a list with one result or error for each item, in order, or one error for all items
        (`RunnerLost` when the runner has died). It must not be called before this method has returned,
        because the batcher may start another batch from within it. Batches finish in the order in which they
        began. Batches of one lane may run together, unless they must stay `separate`.

        The returned function drops the item at an index of the batch. The runner does no work for dropped
        items, or for items whose `deadlines` (monotonic, in seconds) have passed, if it has not begun with
        them. An error that this method raises means that the batch has not begun and that `on_finish` will
        not be called.
        """

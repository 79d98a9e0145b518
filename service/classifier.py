"""The core call: one encoded image to ranked labels. Every dialect and the command come through here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from service import threads
from service.contract import Contract, Task
from service.engine import Floats
from service.errors import Overloaded, RequestError
from service.images import Decoded, decode
from service.metrics import Metrics
from service.repository import LiveModel, Repository
from service.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True)
class Prediction:
    """One label. `selected` is set for multi-label models alone: did it reach the threshold?"""

    label: str
    index: int
    probability: float
    selected: bool | None


@dataclass(frozen=True)
class Classification:
    """One image's answer. `probabilities`: float32 (labels,), in the contract's order."""

    model: LiveModel
    image: Decoded
    probabilities: Floats


class Classifier:
    """The models, the decode threads and the bound on how much is taken on."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Load the models. Raises `ModelError`."""
        self.settings = settings
        self.thread_plan = threads.plan(settings, threads.available_cpus())
        self.metrics = metrics
        self.repository = Repository(settings, self.thread_plan, metrics)
        self._threads = ThreadPoolExecutor(self.thread_plan.decode_threads, thread_name_prefix="decode")
        self._in_flight = 0

    async def classify(self, image: bytes | memoryview, model: LiveModel) -> Classification:
        """Decode one encoded image and run it through `model`.

        The caller holds a place for it (`places`). Raises the errors of `service.images.decode`.
        """
        decoded = await self.in_thread(lambda: self._decode(image, model.contract))
        probabilities = await model.batcher.submit(decoded.pixels)
        self.metrics.images.labels(model.name, model.version).inc()
        return Classification(model, decoded, probabilities)

    async def outcome(self, image: bytes | memoryview, model: LiveModel) -> Classification | RequestError:
        """The same for one image among several: its own answer, or its own error."""
        try:
            return await self.classify(image, model)
        except RequestError as error:
            return error

    @contextmanager
    def places(self, count: int, model: LiveModel) -> Iterator[None]:
        """Take places for `count` images, and give them back. Raises `Overloaded` at once when full."""
        limit = self.settings.queue_images
        if self._in_flight + count > limit:
            raise Overloaded(
                f"{self._in_flight} images are in flight; at most {limit} (FOVEA_QUEUE_IMAGES)",
                retry_after=model.batcher.drain_seconds(self._in_flight),
            )
        self._in_flight += count
        self.metrics.images_in_flight.set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= count
            self.metrics.images_in_flight.set(self._in_flight)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do blocking `work` in a decode thread, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """End all threads, after the work that they are in."""
        self._threads.shutdown()
        self.repository.close()

    def _decode(self, image: bytes | memoryview, contract: Contract) -> Decoded:
        started = time.monotonic()
        try:
            return decode(image, contract.input, max_pixels=self.settings.image_pixels)
        finally:
            self.metrics.stage_seconds.labels("decode").observe(time.monotonic() - started)


def rank(classification: Classification, *, top_k: int, threshold: float | None = None) -> list[Prediction]:
    """The `top_k` most probable labels (0: all) of at least probability `threshold`, best first.

    Equal probabilities keep the contract's order.
    """
    contract = classification.model.contract
    probabilities = classification.probabilities
    best = np.argsort(-probabilities, kind="stable")[: top_k or None]
    return [
        _prediction(contract, int(index), float(probabilities[index]))
        for index in best
        if threshold is None or probabilities[index] >= threshold
    ]


def _prediction(contract: Contract, index: int, probability: float) -> Prediction:
    selected = None
    if contract.task is Task.MULTILABEL and contract.threshold is not None:
        selected = probability >= contract.threshold
    return Prediction(contract.labels[index], index, probability, selected)

"""Encoded images to probabilities, with the models that this process holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from service.engine import Engine, Floats
from service.errors import ModelError, RequestError
from service.images import Decoded, decode
from service.memory import DecodeMemory
from service.messages import Answer, Image, Loaded, Plan, Report

_BATCH_MAX: Final = {"cpu": 4, "cuda": 32}
"""Images in one model call. On a CPU larger ones gain nothing and hold the others up."""


class Model:
    """A model file, loaded, warmed up and proven against its golden set."""

    def __init__(self, path: Path, plan: Plan, memory: DecodeMemory) -> None:
        """Raises `ModelError` that names the file."""
        started = time.monotonic()
        self._engine = Engine.load(
            path, provider=plan.provider, threads=plan.threads, wide_threads=plan.wide_threads
        )
        self.contract = self._engine.contract
        batch_max = plan.batch_max or _BATCH_MAX[self._engine.provider]
        try:
            self._engine.warm_up(batch_max)
            proof = self._engine.prove()
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None
        self._image_pixels = plan.image_pixels
        self._memory = memory
        self._map: Callable[..., Iterable[Any]] = map
        if plan.decode_threads > 1:
            self._map = ThreadPoolExecutor(plan.decode_threads, thread_name_prefix="decode").map
        self.loaded = Loaded(
            contract=self.contract.to_json(),
            provider=self._engine.provider,
            batch_max=batch_max,
            seconds=time.monotonic() - started,
            golden=asdict(proof),
        )

    def answer(self, images: Sequence[Image], *, alone: bool = False) -> Report:
        """Decode and run one batch. A bad image has an error for an answer, and harms no other.

        `alone` promises that nothing else is at work: all processors are there for this call.
        Raises `ModelError` when the graph does not run.
        """
        timed = list(self._map(self._decode, images))
        decoded = [outcome.pixels for outcome, _ in timed if isinstance(outcome, Decoded)]
        started = time.monotonic()
        probabilities: Sequence[Floats] = ()
        if decoded:
            probabilities = list(self._engine.run(np.stack(decoded), alone=alone))
        inference = time.monotonic() - started if decoded else 0.0
        rows = iter(probabilities)
        answers = [
            _answer(outcome, next(rows)) if isinstance(outcome, Decoded) else outcome for outcome, _ in timed
        ]
        return Report(answers, [seconds for _, seconds in timed], inference)

    def _decode(self, image: Image) -> tuple[Decoded | RequestError, float]:
        started = time.monotonic()
        outcome: Decoded | RequestError
        try:
            outcome = decode(image, self.contract.input, max_pixels=self._image_pixels, memory=self._memory)
        except RequestError as error:
            outcome = error
        return outcome, time.monotonic() - started


def _answer(image: Decoded, probabilities: Floats) -> Answer:
    ranking = np.argsort(-probabilities, kind="stable").astype(np.int32)
    values: memoryview[float] = np.ascontiguousarray(probabilities).data  # type: ignore[assignment]
    return Answer(image.format, image.width, image.height, values, ranking.data)

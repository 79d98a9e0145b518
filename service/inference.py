"""Encoded images to probabilities, with the models that this process holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from service.engine import Engine, Floats
from service.errors import ModelError, RequestError
from service.images import Decoded, decode
from service.memory import DecodeMemory
from service.messages import Answer, Loaded, Plan, Report, Sent

_BATCH_MAX: Final = {"cpu": 4, "cuda": 32}
"""Images in one model call. On a CPU larger ones gain nothing and hold the others up."""

_BATCH_BYTES: Final = {"cpu": 256 << 10, "cuda": 1 << 40}
"""Encoded bytes in one model call. A batch of thumbnails saves time; large photographs take long to decode
one after the other, and save nothing."""


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
            batch_bytes=_BATCH_BYTES[self._engine.provider],
            seconds=time.monotonic() - started,
            golden=asdict(proof),
        )

    def answer(self, images: Sequence[Sent], *, alone: bool = False) -> Report:
        """Decode and run one batch. A bad image has an error for an answer, and harms no other.

        `alone` promises that nothing else is at work: all processors are there for this call.
        Raises `ModelError` when the graph does not run.
        """
        timed = list(self._map(self._decode, images))
        decoded = [outcome.pixels for outcome, _ in timed if isinstance(outcome, Decoded)]
        started = time.monotonic()
        rows: Iterator[_Row] = iter(())
        if decoded:
            rows = _rows(self._engine.run(np.stack(decoded), alone=alone))
        inference = time.monotonic() - started if decoded else 0.0
        answers = [
            Answer(outcome.format, outcome.width, outcome.height, *next(rows))
            if isinstance(outcome, Decoded)
            else outcome
            for outcome, _ in timed
        ]
        return Report(answers, [seconds for _, seconds in timed], inference, len(decoded))

    def _decode(self, image: Sent) -> tuple[Decoded | RequestError, float]:
        started = time.monotonic()
        outcome: Decoded | RequestError
        try:
            outcome = decode(image, self.contract.input, max_pixels=self._image_pixels, memory=self._memory)
        except RequestError as error:
            outcome = error
        return outcome, time.monotonic() - started


_Row: TypeAlias = tuple[Any, Any]


def _rows(probabilities: Floats) -> Iterator[_Row]:
    """Each image's probabilities and their ranking, as memory views."""
    rankings = np.argsort(-probabilities, kind="stable").astype(np.int32)
    return zip(
        (row.data for row in np.ascontiguousarray(probabilities)), (row.data for row in rankings), strict=True
    )

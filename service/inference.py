"""Encoded images to probabilities, with the models that this process holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from service.contract import Task
from service.drift import brightness_of
from service.engine import Engine, Floats
from service.errors import ModelError, RequestError
from service.images import Decoded, Pixels, decode
from service.memory import DecodeMemory
from service.messages import Answer, Load, Loaded, Plan, Report, Sent, Work

_BATCH_MAX: Final = {"cpu": 4, "cuda": 32}
"""Images in one model call. On a CPU larger ones gain nothing and hold the others up."""

_BATCH_BYTES: Final = {"cpu": 256 << 10, "cuda": 1 << 40}
"""Encoded bytes in one model call. A batch of thumbnails saves time; large photographs take long to decode
one after the other, and save nothing."""


class Model:
    """A model file, loaded, warmed up and proven against its golden set."""

    def __init__(
        self,
        path: Path,
        plan: Plan,
        memory: DecodeMemory,
        *,
        file: Path | None = None,
        stamp: Sequence[int] = (),
    ) -> None:
        """For `file` and `stamp` see `Engine.load`. Raises `ModelError` that names the file."""
        started = time.monotonic()
        self._engine = Engine.load(
            path,
            provider=plan.provider,
            threads=plan.threads,
            wide_threads=plan.wide_threads,
            file=file,
            stamp=stamp,
        )
        self.contract = self._engine.contract
        batch_max = plan.batch_max or _BATCH_MAX[self._engine.provider]
        batch_max = min(batch_max, self._engine.batch_limit or batch_max)
        try:
            self._engine.warm_up(batch_max)
            proof = self._engine.prove()
        except ModelError as error:
            raise type(error)(f"{path}: {error}") from None
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

    @classmethod
    def of(cls, load: Load, memory: DecodeMemory) -> Model:
        """What a runner is told to load. Raises `ModelError` that names the file."""
        return cls(Path(load.path), load.plan, memory, file=Path(load.file), stamp=load.stamp)

    def answer(self, images: Sequence[Sent], *, alone: bool = False) -> Report:
        """Decode and run one batch. A bad image has an error for an answer, and harms no other.

        `alone` promises that nothing else is at work: all processors are there for this call.
        Raises `ModelError` when the graph does not run.
        """
        timed = list(self._map(self._decode, images))
        decoded = [outcome.pixels for outcome, *_ in timed if isinstance(outcome, Decoded)]
        started = time.monotonic()
        said: Iterator[_Said] = iter(())
        if decoded:
            batch = np.stack(decoded)
            said = _said(self._engine.run(batch, alone=alone), batch, self.contract.task)
        inference = time.monotonic() - started if decoded else 0.0
        answers = [
            Answer(
                outcome.format,
                outcome.width,
                outcome.height,
                *next(said),
                Work(began, seconds, started, inference, len(decoded)),
            )
            if isinstance(outcome, Decoded)
            else outcome
            for outcome, began, seconds in timed
        ]
        return Report(answers, [seconds for _, _, seconds in timed], inference, len(decoded))

    def _decode(self, image: Sent) -> tuple[Decoded | RequestError, float, float]:
        started = time.monotonic()
        outcome: Decoded | RequestError
        try:
            outcome = decode(image, self.contract.input, max_pixels=self._image_pixels, memory=self._memory)
        except RequestError as error:
            outcome = error
        return outcome, started, time.monotonic() - started


_Said: TypeAlias = tuple[float, float, Any, Any]


def _said(probabilities: Floats, batch: Pixels, task: Task) -> Iterator[_Said]:
    """Of each image brightness and entropy, and as memory views its probabilities and their ranking."""
    rankings = np.argsort(-probabilities, kind="stable").astype(np.int32)
    return zip(
        brightness_of(batch).tolist(),
        entropy_of(probabilities, task).tolist(),
        (row.data for row in np.ascontiguousarray(probabilities)),
        (row.data for row in rankings),
        strict=True,
    )


def entropy_of(probabilities: Floats, task: Task) -> Floats:
    """How undecided each row is, float32 (n,): 0 sure … 1 all labels alike, Shannon's entropy by the largest
    that there can be. Of `multilabel` the mean over labels."""
    if task is Task.MULTILABEL:
        undecided: Floats = (_bits(probabilities) + _bits(1 - probabilities)).mean(axis=1)
    else:
        undecided = _bits(probabilities).sum(axis=1) / np.float32(np.log2(probabilities.shape[1]))
    return undecided


def _bits(probabilities: Floats) -> Floats:
    bits: Floats = -probabilities * np.log2(np.maximum(probabilities, np.finfo(np.float32).tiny))
    return bits

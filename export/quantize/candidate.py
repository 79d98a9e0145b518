"""Candidates: converted graphs, their outputs on images, and their speed beside the float model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto

from fovea.export.quantize.images import PixelSelection
from fovea.model.evaluation import metrics
from fovea.service.artifact.contract import Contract
from fovea.service.inference.engine import Floats
from fovea.service.inference.pixels import Pixels
from fovea.service.inference.session import get_batch_limit, open_session, run_outputs
from fovea.service.providers import ProviderSetting

_BATCH_SIZE: Final = 16
"""Number of images in one call where only the answers count."""

_ROUND_COUNT: Final = 24
"""Number of rounds of a measurement. In each round both models run, and the ratio is taken."""

_ROUND_SECONDS: Final = 0.03
"""Time of one model in one round, at least one call."""


@dataclass(frozen=True)
class Outputs:
    """The outputs of a model for some images."""

    logits: Floats
    """float32 (n, logits)."""
    probabilities: Floats
    """float32 (n, labels)."""

    def choose_answers(self, contract: Contract) -> npt.NDArray[Any]:
        """Return the chosen label indices, int64 (n,), or flags, bool (n, labels), for `multilabel`."""
        choice = metrics.choose_labels(
            torch.from_numpy(self.probabilities), contract.task, contract.thresholds
        )
        answers: npt.NDArray[Any] = choice.numpy()
        return answers


class GraphRunner:
    """A session of a graph, with the names of its outputs."""

    def __init__(
        self,
        graph: ModelProto,
        contract: Contract,
        *,
        threads: int,
        provider: ProviderSetting = "cpu",
        unoptimized: bool = False,
    ) -> None:
        """Open the graph. Raises `ModelError`."""
        self._session = open_session(graph.SerializeToString(), provider, threads, unoptimized=unoptimized)
        self._names = [contract.logits_name, contract.probabilities_name]

    def run(self, batch: Pixels) -> Outputs:
        """Return the outputs for uint8 (n, height, width, 3). Raises `ModelError`."""
        logits, probabilities = run_outputs(self._session, self._names, batch)
        return Outputs(logits, probabilities)

    def run_images(self, images: PixelSelection) -> Outputs:
        """Return the outputs for all images. Raises `ModelError`."""
        size = get_batch_limit(self._session) or _BATCH_SIZE
        parts = [self.run(batch) for batch in images.iterate_batches(size)]
        return Outputs(
            np.concatenate([part.logits for part in parts]),
            np.concatenate([part.probabilities for part in parts]),
        )


def compute_sqnr(expected: Floats, values: Floats) -> float:
    """Return the signal-to-quantization-noise ratio of logits in decibels; infinite without noise."""
    noise = float(np.square(expected.astype(np.float64) - values).sum())
    signal = float(np.square(expected.astype(np.float64)).sum())
    return 10 * float(np.log10(signal / noise)) if noise > 0 and signal > 0 else float("inf")


@dataclass(frozen=True)
class Speed:
    """The speed of a candidate beside the float model: one image in one thread."""

    source_ms: float
    """Median time of one call of the float model, in ms."""
    candidate_ms: float
    ratios: tuple[float, ...]
    """Time of the float model divided by that of the candidate, for each round, in rising order."""

    @property
    def ratio(self) -> float:
        """Median ratio."""
        return statistics.median(self.ratios)


def measure_speed(source: GraphRunner, candidate: GraphRunner, images: PixelSelection) -> Speed:
    """Measure both models in turn, so that whatever else the machine does affects both alike."""
    batches = [pixels[None] for _, pixels in zip(range(8), images.iterate_images(), strict=False)]
    runners = (source, candidate)
    counts = []
    for runner in runners:
        runner.run(batches[0])
        counts.append(max(1, round(_ROUND_SECONDS / _time_calls(runner, batches, len(batches)))))
    times = []
    for number in range(_ROUND_COUNT):
        pair = [0.0, 0.0]
        for index in (0, 1) if number % 2 else (1, 0):
            pair[index] = _time_calls(runners[index], batches, counts[index])
        times.append(pair)
    source_times, candidate_times = zip(*times, strict=True)
    ratios = sorted(first / second for first, second in times)
    return Speed(
        1000 * statistics.median(source_times), 1000 * statistics.median(candidate_times), tuple(ratios)
    )


def _time_calls(runner: GraphRunner, batches: Sequence[Pixels], count: int) -> float:
    """Return the mean time of a call in seconds."""
    start = time.perf_counter()
    for number in range(count):
        runner.run(batches[number % len(batches)])
    return (time.perf_counter() - start) / count

"""Drift: how far what a model sees and says now is from what it saw and said of held-out images.

Of the last images in a window each signal is counted in the bins of the contract's reference, and both are
compared by the population stability index (Siddiqi, 2006, "Credit Risk Scorecards"):

    PSI = sum over K bins of (p - q) ln(p / q)

It is 0 where both are alike; 0.1 is called a moderate and 0.25 a large shift. Two samples of one source, N
and M images, differ by chance: by (K - 1)(1/N + 1/M) on average (Yurdakul, 2018, "Statistical Properties of
Population Stability Index"). Half an image is added to each bin, so that an empty one does not make it
infinite.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from fovea.service.artifact.contract import Reference
from fovea.service.inference.preprocess import Pixels

SIGNALS: Final = ("label", "confidence", "brightness")
"""The most probable label, its probability, and the mean of the model's input."""

_SMOOTHING: Final = 0.5
"""Images that each bin has more than were counted."""


class Index(NamedTuple):
    """A signal's population stability index, and how large it would be on average by chance alone."""

    psi: float
    chance: float


class Drift:
    """One model's last images against its reference."""

    def __init__(self, reference: Reference, labels: Sequence[str], window: int) -> None:
        """`labels` are the contract's; `window` is how many images are compared."""
        self._bins = {labels.index(label): number for number, label in enumerate(reference.labels)}
        self._confidence, self._brightness = reference.confidence.edges, reference.brightness.edges
        named = list(reference.labels.values())
        self._expected = (
            [*named, reference.images - sum(named)], reference.confidence.counts, reference.brightness.counts
        )  # fmt: skip
        self._counts = [[0] * len(counts) for counts in self._expected]
        self._last: deque[tuple[int, int, int]] = deque(maxlen=window)
        self.images = 0
        """Added so far."""

    @property
    def is_full(self) -> bool:
        """There are as many images as the window holds."""
        return len(self._last) == self._last.maxlen

    def add(self, label: int, confidence: float, brightness: float) -> None:
        """An image: its most probable label's place and probability, and its brightness."""
        if self.is_full:
            self._count(self._last[0], -1)
        bins = (
            self._bins.get(label, len(self._bins)),
            bisect_right(self._confidence, confidence),
            bisect_right(self._brightness, brightness),
        )
        self._last.append(bins)
        self.images += 1
        self._count(bins, 1)

    def _count(self, bins: tuple[int, int, int], images: int) -> None:
        for counts, number in zip(self._counts, bins, strict=True):
            counts[number] += images

    def indices(self) -> dict[str, Index]:
        """Each signal's, of the images that there are."""
        return {
            signal: Index(index(expected, counts), chance(expected, counts))
            for signal, expected, counts in zip(SIGNALS, self._expected, self._counts, strict=True)
        }


def index(expected: Sequence[int], counts: Sequence[int]) -> float:
    """The population stability index of two counts of the same bins."""
    return sum((p - q) * math.log(p / q) for p, q in zip(_shares(expected), _shares(counts), strict=True))


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) + _SMOOTHING * len(counts)
    return [(count + _SMOOTHING) / total for count in counts]


def chance(expected: Sequence[int], counts: Sequence[int]) -> float:
    """How large the index of two samples of one source is on average."""
    return (len(counts) - 1) * (1 / sum(expected) + 1 / max(1, sum(counts)))


def brightness_of(batch: Pixels) -> npt.NDArray[np.float32]:
    """The mean of all values, 0 … 1, float32 (n,), for uint8 (n, height, width, 3)."""
    values = batch.reshape(len(batch), -1)
    means: npt.NDArray[np.float32] = (values.sum(axis=1, dtype=np.uint64) / (255 * values.shape[1])).astype(
        np.float32
    )
    return means

"""Drift: the difference between a model's recent inputs and outputs and those of held-out images.

Each signal of the last images in a window is counted in the bins of the contract's reference. Both histograms
are compared by the population stability index (Siddiqi, 2006, "Credit Risk Scorecards"):

    PSI = sum over K bins of (p - q) ln(p / q)

The index is 0 for equal histograms; 0.1 is called a moderate and 0.25 a large shift. Two samples of one
source with N and M images differ by chance: by (K - 1)(1/N + 1/M) on average (Yurdakul, 2018, "Statistical
Properties of Population Stability Index"). Half an image is added to each bin, so that an empty bin does not
make the index infinite.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from fovea.service.artifact.contract import DriftReference

SIGNALS: Final = ("label", "confidence", "brightness")
"""Signals: the most probable label, its probability, and the mean of the model's input."""

_SMOOTHING: Final = 0.5
"""Number of images added to each bin."""


class StabilityIndex(NamedTuple):
    """The population stability index of a signal, and its average if only chance acts."""

    psi: float
    chance: float


class DriftMonitor:
    """The last images of one model in comparison with its reference.

    Not safe for threads: the event loop adds the images of all runners.
    """

    def __init__(self, reference: DriftReference, labels: Sequence[str], window: int) -> None:
        """Compare a window of `window` images. `labels` are those of the contract, in order."""
        self._label_bins = {labels.index(label): number for number, label in enumerate(reference.labels)}
        self._confidence_edges, self._brightness_edges = (
            reference.confidence.edges,
            reference.brightness.edges,
        )
        label_counts = list(reference.labels.values())
        self._reference_counts = (
            [*label_counts, reference.images - sum(label_counts)],
            reference.confidence.counts,
            reference.brightness.counts,
        )
        self._counts = [[0] * len(counts) for counts in self._reference_counts]
        self._window: deque[tuple[int, int, int]] = deque(maxlen=window)
        self.images = 0
        """Number of images added so far."""

    @property
    def is_full(self) -> bool:
        """True if there are as many images as the window holds."""
        return len(self._window) == self._window.maxlen

    def add(self, label: int, confidence: float, brightness: float) -> None:
        """Add an image: the index of its most probable label, the label's probability, and the brightness.

        `confidence` and `brightness` are from 0 to 1.
        """
        if self.is_full:
            # Before the append below, which drops the oldest image from the full window.
            self._update_counts(self._window[0], -1)
        bins = (
            self._label_bins.get(label, len(self._label_bins)),
            bisect_right(self._confidence_edges, confidence),
            bisect_right(self._brightness_edges, brightness),
        )
        self._window.append(bins)
        self.images += 1
        self._update_counts(bins, 1)

    def _update_counts(self, bins: tuple[int, int, int], images: int) -> None:
        for counts, number in zip(self._counts, bins, strict=True):
            counts[number] += images

    def compute_indices(self) -> dict[str, StabilityIndex]:
        """Return the index of each signal for the images in the window."""
        return {
            signal: StabilityIndex(
                stability_index(reference_counts, counts), chance_index(reference_counts, counts)
            )
            for signal, reference_counts, counts in zip(
                SIGNALS, self._reference_counts, self._counts, strict=True
            )
        }


def stability_index(reference_counts: Sequence[int], counts: Sequence[int]) -> float:
    """Return the population stability index of two counts over the same bins."""
    return sum(
        (p - q) * math.log(p / q)
        for p, q in zip(_smooth_shares(reference_counts), _smooth_shares(counts), strict=True)
    )


def _smooth_shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) + _SMOOTHING * len(counts)
    return [(count + _SMOOTHING) / total for count in counts]


def chance_index(reference_counts: Sequence[int], counts: Sequence[int]) -> float:
    """Return the average index of two samples of one source."""
    return (len(counts) - 1) * (1 / sum(reference_counts) + 1 / max(1, sum(counts)))

"""Comparison of two models on the same images: the loss of the second, its confidence interval, its proof.

The loss is the share of images that only the first model gets right, minus the share that only the second
gets right. Its interval is Newcombe's method 10 for paired proportions (Newcombe, 1998, Statistics in
Medicine 17, 2635), which combines two Wilson intervals and stays sensible when no image differs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
import numpy.typing as npt

CONFIDENCE: Final = 0.95
"""Confidence of an interval for all candidates together."""

_MAX_PROOF_IMAGES: Final = 10_000_000
"""Number of images above which a proof counts as impossible."""

Hits = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PairedCounts:
    """Numbers of images by whether each of two models is right. They may be fractions, for forecasts."""

    both: float
    only_first: float
    only_second: float
    neither: float

    @classmethod
    def from_hits(cls, first: Hits, second: Hits) -> PairedCounts:
        """Count images from flags, bool (n,), that say whether a model is right."""
        return cls(
            both=int((first & second).sum()),
            only_first=int((first & ~second).sum()),
            only_second=int((~first & second).sum()),
            neither=int((~first & ~second).sum()),
        )

    @property
    def images(self) -> float:
        """Number of images."""
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def loss(self) -> float:
        """Accuracy of the first model minus that of the second, -1 to 1."""
        return (self.only_first - self.only_second) / self.images

    def scale(self, factor: float) -> PairedCounts:
        """Return the counts of more images with the same shares."""
        return PairedCounts(*(factor * count for count in vars(self).values()))

    def find_interval(self, confidence: float) -> tuple[float, float]:
        """Return the lower and upper limit of the loss at a two-sided confidence, 0 to 1."""
        return self._find_limits(NormalDist().inv_cdf((1 + confidence) / 2))

    def _find_limits(self, z: float) -> tuple[float, float]:
        count = self.images
        first, second = (self.both + self.only_first) / count, (self.both + self.only_second) / count
        first_low, first_high = _wilson_limits(first, count, z)
        second_low, second_high = _wilson_limits(second, count, z)
        correlation = self._estimate_correlation()
        lower = _combine(first - first_low, second_high - second, correlation)
        upper = _combine(second - second_low, first_high - first, correlation)
        return self.loss - lower, self.loss + upper

    def _estimate_correlation(self) -> float:
        """Return phi with the continuity correction of method 10; 0 if a margin is empty."""
        margins = (
            (self.both + self.only_first)
            * (self.only_second + self.neither)
            * (self.both + self.only_second)
            * (self.only_first + self.neither)
        )
        if not margins:
            return 0.0
        product = self.both * self.neither - self.only_first * self.only_second
        corrected_product = max(product - self.images / 2, 0.0) if product > 0 else product
        return corrected_product / math.sqrt(margins)

    def find_certainty(self, limit: float, candidates: int = 1) -> float:
        """Return how sure it is that the loss is at most `limit`, 0 to 1.

        The upper limit of the interval is `limit` at a certain z; the one-sided confidence of this z is the
        answer. With several candidates, the error adds up (Bonferroni).
        """
        if self.loss > limit:
            return 0.0
        low, high = 0.0, 10.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._find_limits(middle)[1] <= limit else (low, middle)
        return max(0.0, 1 - candidates * (1 - NormalDist().cdf(low)))

    def count_images_for_proof(self, limit: float, confidence: float) -> int | None:
        """Return how many images with the same shares have an upper limit of at most `limit`.

        None if no number of images is enough, because the loss is not below the limit.
        """

        def is_proven(count: float) -> bool:
            return self.scale(count / self.images).find_interval(confidence)[1] <= limit

        if self.loss >= limit or not is_proven(_MAX_PROOF_IMAGES):
            return None
        low, high = 1, _MAX_PROOF_IMAGES
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if is_proven(middle) else (middle + 1, high)
        return low


def share_confidence(candidates: int) -> float:
    """Return the confidence of each interval, so that all candidates together have `CONFIDENCE`."""
    return 1 - (1 - CONFIDENCE) / candidates


def _wilson_limits(share: float, count: float, z: float) -> tuple[float, float]:
    """Return the limits of a share (Wilson, 1927, J. Am. Statist. Assoc. 22, 209)."""
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    divisor = 1 + z * z / count
    return (centre - spread) / divisor, (centre + spread) / divisor


def _combine(first: float, second: float, correlation: float) -> float:
    square = first * first - 2 * correlation * first * second + second * second
    return math.sqrt(max(square, 0.0))

"""Scores from counts: precision, recall and calibration error. Needs no PyTorch.

`metrics` counts the answers of tensors, and bulk classification counts the rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

BINS: Final = 15
"""Number of bins of equal mass for the calibration error."""


@dataclass(frozen=True)
class LabelScore:
    """Precision and recall of one label; None if undefined."""

    precision: float | None
    """Fraction of the images with this label chosen for which the label is true."""
    recall: float | None
    """Fraction of the images with this label true for which the label was chosen."""
    images: int
    """Number of images for which the label is true."""

    @classmethod
    def from_counts(cls, hits: int, predicted_count: int, images: int) -> LabelScore:
        """Return the score of a label that was chosen `predicted_count` times, `hits` of them correctly."""
        return cls(
            hits / predicted_count if predicted_count else None, hits / images if images else None, images
        )

    @property
    def f1(self) -> float | None:
        """The harmonic mean of precision and recall."""
        if self.precision is None or self.recall is None or not self.precision + self.recall:
            return None
        return 2 * self.precision * self.recall / (self.precision + self.recall)


@dataclass(frozen=True)
class CalibrationBin:
    """A bin of answers of similar confidence, with their mean confidence and accuracy."""

    count: int
    confidence: float
    accuracy: float


def split_into_bins(
    counts: npt.NDArray[np.int64],
    confidence_sums: npt.NDArray[np.float64],
    correct_sums: npt.NDArray[np.float64],
    bin_count: int = BINS,
) -> tuple[CalibrationBin, ...]:
    """Return bins of equal mass from groups of answers by ascending confidence; no bin is empty.

    Each group, (G,), has the number of its answers and the sums of their confidence and their correctness.
    The answers of a group count as equal, so that their order does not matter where two bins divide them.
    """
    total = int(counts.sum())
    size, larger_count = divmod(total, bin_count)  # the sizes of `numpy.array_split`
    sizes = [size + (number < larger_count) for number in range(bin_count)]
    edges = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.concatenate([[0], np.cumsum(counts)])
    confidences, corrects = (
        np.diff(np.interp(edges, ends, np.concatenate([[0.0], np.cumsum(sums)])))
        for sums in (confidence_sums, correct_sums)
    )
    return tuple(
        CalibrationBin(count, float(confidence) / count, float(correct) / count)
        for count, confidence, correct in zip(sizes, confidences, corrects, strict=True)
        if count
    )


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Return the expected calibration error (Guo et al., 2017).

    The error is the mean distance between confidence and accuracy, weighted by bin size.
    """
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.confidence - one.accuracy) for one in bins) / total if total else 0.0


def compute_auroc(higher: npt.NDArray[np.float32], lower: npt.NDArray[np.float32]) -> float:
    """Return the area under the ROC curve of two sets of scores, (n,) and (m,).

    This is the share of pairs in which the value of `higher` is the larger one; ties count half.
    """
    ordered = np.sort(lower)
    left, right = (np.searchsorted(ordered, higher, side=side) for side in ("left", "right"))
    return float((left + right).mean() / (2 * len(lower)))

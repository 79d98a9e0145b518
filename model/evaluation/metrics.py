"""Metrics of probabilities: accuracy, confusion, calibration error and conformal coverage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fovea.service.artifact.contract import Task

BINS: Final = 15
"""Number of bins of equal mass for the calibration error."""


def choose_labels(probabilities: Tensor, task: Task, thresholds: Sequence[float]) -> Tensor:
    """Return the chosen label indices, int64 (N,), or flags, bool (N, labels), for `multilabel`.

    For `binary`, the second label is chosen if its probability reaches the only threshold.
    """
    if task is Task.MULTICLASS:
        return probabilities.argmax(dim=1)
    if task is Task.BINARY:
        return (probabilities[:, 1] >= thresholds[0]).long()
    return probabilities >= torch.tensor(thresholds)


def compute_accuracy(predictions: Tensor, targets: Tensor) -> float:
    """Return the fraction of images with the correct label; for `multilabel`, of (image, label) pairs."""
    return float((predictions == targets.to(predictions.dtype)).double().mean()) if len(targets) else 0.0


def confusion_matrix(predictions: Tensor, targets: Tensor, label_count: int) -> Tensor:
    """Return the confusion matrix, int64 (labels, labels): rows are true labels, columns chosen labels."""
    # (labels, labels)
    return torch.bincount(targets * label_count + predictions, minlength=label_count**2).view(
        label_count, label_count
    )


@dataclass(frozen=True)
class LabelScore:
    """Precision and recall of one label; None if undefined."""

    precision: float | None
    """Fraction of the images with this label chosen for which the label is true."""
    recall: float | None
    """Fraction of the images with this label true for which the label was chosen."""
    images: int
    """Number of images for which the label is true."""

    @property
    def f1(self) -> float | None:
        """The harmonic mean of precision and recall."""
        if self.precision is None or self.recall is None or not self.precision + self.recall:
            return None
        return 2 * self.precision * self.recall / (self.precision + self.recall)


def label_scores(predictions: Tensor, targets: Tensor, label_count: int) -> tuple[LabelScore, ...]:
    """Return one score for each label; `predictions` and `targets` are indices (N,) or flags (N, labels)."""
    predicted_flags, true_flags = (_to_flags(one, label_count) for one in (predictions, targets))
    correct_flags, predicted_counts, true_counts = (
        (predicted_flags & true_flags).sum(dim=0),
        predicted_flags.sum(dim=0),
        true_flags.sum(dim=0),
    )
    return tuple(
        LabelScore(
            hits / predicted_count if predicted_count else None, hits / images if images else None, images
        )
        for hits, predicted_count, images in zip(
            correct_flags.tolist(), predicted_counts.tolist(), true_counts.tolist(), strict=True
        )
    )


def _to_flags(indices: Tensor, label_count: int) -> Tensor:
    if indices.ndim == 2:
        return indices > 0.5
    return torch.nn.functional.one_hot(indices, label_count).bool()


# --- calibration ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationBin:
    """A bin of answers of similar confidence, with their mean confidence and accuracy."""

    count: int
    confidence: float
    accuracy: float


def reliability_bins(
    probabilities: Tensor, targets: Tensor, task: Task, bin_count: int = BINS
) -> tuple[CalibrationBin, ...]:
    """Return bins of equal mass by ascending confidence (Nixon et al., 2019); no bin is empty.

    An answer is the most probable label of an image; for `multilabel`, each probability of each label.
    Answers of equal confidence share their mean correctness, so that their order does not matter.
    """
    if task is Task.MULTILABEL:
        # (N labels,) each
        confidence, correctness = probabilities.flatten().double(), (targets > 0.5).flatten().double()
    else:
        best = probabilities.max(dim=1)
        confidence, correctness = best.values.double(), (best.indices == targets).double()
    _, tie_groups = torch.unique(confidence, return_inverse=True)
    correctness = (torch.bincount(tie_groups, weights=correctness) / torch.bincount(tie_groups))[tie_groups]
    order = confidence.argsort(stable=True)
    parts = torch.tensor_split(order, bin_count)
    return tuple(
        CalibrationBin(len(part), float(confidence[part].mean()), float(correctness[part].mean()))
        for part in parts
        if len(part)
    )


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Return the expected calibration error (Guo et al., 2017).

    The error is the mean distance between confidence and accuracy, weighted by bin size.
    """
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.confidence - one.accuracy) for one in bins) / total if total else 0.0


def measure_coverage(probabilities: Tensor, targets: Tensor, quantile: float) -> tuple[float, float]:
    """Return the coverage of conformal sets and their mean size; zeros without images."""
    if not len(targets):
        return 0.0, 0.0
    in_set = 1 - probabilities.double() <= quantile
    is_covered = in_set.gather(1, targets[:, None])  # (N, 1)
    return float(is_covered.double().mean()), float(in_set.sum(dim=1).double().mean())

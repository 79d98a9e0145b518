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


def choose(probabilities: Tensor, task: Task, thresholds: Sequence[float]) -> Tensor:
    """Return the chosen label indices, int64 (N,), or flags, bool (N, labels), for `multilabel`.

    For `binary`, the second label is chosen if its probability reaches the only threshold.
    """
    if task is Task.MULTICLASS:
        return probabilities.argmax(dim=1)
    if task is Task.BINARY:
        return (probabilities[:, 1] >= thresholds[0]).long()
    return probabilities >= torch.tensor(thresholds)


def accuracy(chosen: Tensor, targets: Tensor) -> float:
    """Return the fraction of images with the correct label; for `multilabel`, of (image, label) pairs."""
    return float((chosen == targets.to(chosen.dtype)).double().mean()) if len(targets) else 0.0


def confusion(chosen: Tensor, targets: Tensor, labels: int) -> Tensor:
    """Return the confusion matrix, int64 (labels, labels): rows are true labels, columns chosen labels."""
    # (labels, labels)
    return torch.bincount(targets * labels + chosen, minlength=labels**2).view(labels, labels)


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


def label_scores(chosen: Tensor, targets: Tensor, labels: int) -> tuple[LabelScore, ...]:
    """Return one score for each label; `chosen` and `targets` are indices (N,) or flags (N, labels)."""
    said, true = (_flags(one, labels) for one in (chosen, targets))
    both, said_count, true_count = (said & true).sum(dim=0), said.sum(dim=0), true.sum(dim=0)
    return tuple(
        LabelScore(hits / chosen_ if chosen_ else None, hits / images if images else None, images)
        for hits, chosen_, images in zip(both.tolist(), said_count.tolist(), true_count.tolist(), strict=True)
    )


def _flags(labelled: Tensor, labels: int) -> Tensor:
    if labelled.ndim == 2:
        return labelled > 0.5
    return torch.nn.functional.one_hot(labelled, labels).bool()


# --- calibration ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bin:
    """A bin of answers of similar confidence, with their mean confidence and accuracy."""

    count: int
    confidence: float
    accuracy: float


def reliability(probabilities: Tensor, targets: Tensor, task: Task, bins: int = BINS) -> tuple[Bin, ...]:
    """Return bins of equal mass by ascending confidence (Nixon et al., 2019); no bin is empty.

    An answer is the most probable label of an image; for `multilabel`, each probability of each label.
    Answers of equal confidence share their mean correctness, so that their order does not matter.
    """
    if task is Task.MULTILABEL:
        # (N labels,) each
        confidence, right = probabilities.flatten().double(), (targets > 0.5).flatten().double()
    else:
        best = probabilities.max(dim=1)
        confidence, right = best.values.double(), (best.indices == targets).double()
    _, tied = torch.unique(confidence, return_inverse=True)
    right = (torch.bincount(tied, weights=right) / torch.bincount(tied))[tied]
    order = confidence.argsort(stable=True)
    parts = torch.tensor_split(order, bins)
    return tuple(
        Bin(len(part), float(confidence[part].mean()), float(right[part].mean()))
        for part in parts
        if len(part)
    )


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error (Guo et al., 2017).

    The error is the mean distance between confidence and accuracy, weighted by bin size.
    """
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.confidence - one.accuracy) for one in bins) / total if total else 0.0


def covered(probabilities: Tensor, targets: Tensor, quantile: float) -> tuple[float, float]:
    """Return the coverage of conformal sets and their mean size; zeros without images."""
    if not len(targets):
        return 0.0, 0.0
    inside = 1 - probabilities.double() <= quantile
    true = inside.gather(1, targets[:, None])  # (N, 1)
    return float(true.double().mean()), float(inside.sum(dim=1).double().mean())

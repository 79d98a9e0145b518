"""How good probabilities are: what they choose, how often that is right, and how honest they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fovea.service.artifact.contract import Task

BINS: Final = 15
"""Of equal mass, for the calibration error."""


def choose(probabilities: Tensor, task: Task, thresholds: Sequence[float]) -> Tensor:
    """What is chosen: label indices, int64 (N,); for `multilabel` bool (N, labels).

    `binary` chooses the second label where its probability reaches the only threshold.
    """
    if task is Task.MULTICLASS:
        return probabilities.argmax(dim=1)
    if task is Task.BINARY:
        return (probabilities[:, 1] >= thresholds[0]).long()
    return probabilities >= torch.tensor(thresholds)


def accuracy(chosen: Tensor, targets: Tensor) -> float:
    """The fraction of images whose label is the chosen one; for `multilabel`, of (image, label) pairs."""
    return float((chosen == targets.to(chosen.dtype)).double().mean()) if len(targets) else 0.0


def confusion(chosen: Tensor, targets: Tensor, labels: int) -> Tensor:
    """Counts, int64 (labels, labels): rows are true labels, columns chosen ones."""
    return torch.bincount(targets * labels + chosen, minlength=labels**2).view(labels, labels)


@dataclass(frozen=True)
class LabelScore:
    """How well one label is found. None where nothing can be said."""

    precision: float | None
    """Of the images for which it was chosen, those where it is true."""
    recall: float | None
    """Of the images where it is true, those for which it was chosen."""
    images: int
    """Where it is true."""

    @property
    def f1(self) -> float | None:
        """The harmonic mean of both."""
        if self.precision is None or self.recall is None or not self.precision + self.recall:
            return None
        return 2 * self.precision * self.recall / (self.precision + self.recall)


def label_scores(chosen: Tensor, targets: Tensor, labels: int) -> tuple[LabelScore, ...]:
    """One for each label; `chosen` and `targets` are indices (N,), or flags (N, labels)."""
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


# --- honesty -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bin:
    """Answers of about the same confidence: what they claim, and how often they are right."""

    count: int
    confidence: float
    accuracy: float


def reliability(probabilities: Tensor, targets: Tensor, task: Task, bins: int = BINS) -> tuple[Bin, ...]:
    """Bins of equal mass, by rising confidence (Nixon et al., 2019); fewer where there are fewer answers.

    An answer is the most probable label of an image; for `multilabel`, each probability of each label.
    Answers of equal confidence share the mean of their truth, so that their order does not matter.
    """
    if task is Task.MULTILABEL:
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
    """Expected calibration error: the mean distance of claim and truth, by mass (Guo et al., 2017)."""
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.confidence - one.accuracy) for one in bins) / total if total else 0.0


def covered(probabilities: Tensor, targets: Tensor, quantile: float) -> tuple[float, float]:
    """Of conformal sets: the fraction that hold the true label, and their mean size; zeros of no images."""
    if not len(targets):
        return 0.0, 0.0
    inside = 1 - probabilities.double() <= quantile
    true = inside.gather(1, targets[:, None])
    return float(true.double().mean()), float(inside.sum(dim=1).double().mean())

"""Metrics of probabilities: accuracy, confusion, calibration error and conformal coverage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fovea.model.evaluation.scores import BINS, CalibrationBin, LabelScore, split_into_bins
from fovea.service.artifact.contract import Task


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


def label_scores(predictions: Tensor, targets: Tensor, label_count: int) -> tuple[LabelScore, ...]:
    """Return one score for each label; `predictions` and `targets` are indices (N,) or flags (N, labels)."""
    predicted_flags, true_flags = (_to_flags(one, label_count) for one in (predictions, targets))
    correct_flags, predicted_counts, true_counts = (
        (predicted_flags & true_flags).sum(dim=0),
        predicted_flags.sum(dim=0),
        true_flags.sum(dim=0),
    )
    return tuple(
        LabelScore.from_counts(hits, predicted_count, images)
        for hits, predicted_count, images in zip(
            correct_flags.tolist(), predicted_counts.tolist(), true_counts.tolist(), strict=True
        )
    )


def _to_flags(indices: Tensor, label_count: int) -> Tensor:
    if indices.ndim == 2:
        return indices > 0.5
    return torch.nn.functional.one_hot(indices, label_count).bool()


# --- calibration ---------------------------------------------------------------------------------


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
    values, tie_groups = torch.unique(confidence, return_inverse=True)  # ascending
    counts = torch.bincount(tie_groups, minlength=len(values))
    correct_sums = torch.bincount(tie_groups, weights=correctness, minlength=len(values))
    return split_into_bins(counts.numpy(), (values * counts).numpy(), correct_sums.numpy(), bin_count)


def measure_coverage(probabilities: Tensor, targets: Tensor, quantile: float) -> tuple[float, float]:
    """Return the coverage of conformal sets and their mean size; zeros without images."""
    if not len(targets):
        return 0.0, 0.0
    in_set = 1 - probabilities.double() <= quantile
    is_covered = in_set.gather(1, targets[:, None])  # (N, 1)
    return float(is_covered.double().mean()), float(in_set.sum(dim=1).double().mean())

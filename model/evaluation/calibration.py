"""Calibration from held-out images: temperature, thresholds and conformal quantiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fovea.model.networks.network import compute_loss, to_probabilities
from fovea.service.artifact.contract import Task

COVERAGE_LEVELS: Final = tuple(round(0.80 + step / 100, 2) for step in range(20))
"""Coverage levels with precomputed quantiles: 0.80, 0.81, … 0.99."""


@dataclass(frozen=True)
class Calibration:
    """Parameters that turn logits into calibrated answers."""

    temperature: float
    """Divisor of the logits."""
    thresholds: tuple[float, ...]
    """Probabilities from which a label is selected.

    None for `multiclass`, one for `binary` (of the second label), one for each label for `multilabel`.
    """
    coverage: tuple[tuple[float, float], ...]
    """(level, quantile) pairs: sets of labels with 1 - p <= quantile cover `level` of the true labels."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that survive a round trip through JSON unchanged."""
        return {
            "temperature": self.temperature,
            "thresholds": list(self.thresholds),
            "coverage": [list(pair) for pair in self.coverage],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """Build the calibration from the output of `to_dict`."""
        pairs = tuple((level, quantile) for level, quantile in values["coverage"])
        return cls(values["temperature"], tuple(values["thresholds"]), pairs)


def fit_calibration(
    validation_logits: Tensor,
    validation_targets: Tensor,
    conformal_logits: Tensor,
    conformal_targets: Tensor,
    task: Task,
    *,
    has_temperature: bool = True,
) -> Calibration:
    """Fit temperature and thresholds on one half of the held-out images and the quantiles on the other.

    Logits are float32 (N, n), targets as in `model.data.dataset.Examples`. Without `has_temperature`, the
    temperature stays 1, so that the probabilities are the softmax of the logits and nothing else.
    """
    temperature = fit_temperature(validation_logits, validation_targets, task) if has_temperature else 1.0
    return Calibration(
        temperature,
        fit_thresholds(to_probabilities(validation_logits, task, temperature), validation_targets, task),
        fit_quantiles(to_probabilities(conformal_logits, task, temperature), conformal_targets, task),
    )


_TEMPERATURE_BOUNDS: Final = (0.05, 20.0)
"""Bounds of the search for the temperature."""

_PRIOR_STRENGTH: Final = 20.0
"""Strength of the prior at temperature 1, as a number of images.

Without the prior, few held-out images, or only correct ones, would lead to an extreme temperature.
"""


def fit_temperature(logits: Tensor, targets: Tensor, task: Task) -> float:
    """Return the maximum-likelihood temperature (Guo et al., 2017), with a weak prior towards 1.

    The loss is convex in 1 / T. The prior in log T is negligible above a few hundred images. A golden-section
    search in log T finds the minimum to 1e-4.
    """
    if not len(targets):
        return 1.0
    logits = logits.double()

    def compute_cost(log_temperature: float) -> float:
        likelihood = compute_loss(logits / math.exp(log_temperature), targets, task, label_smoothing=0.0)
        return float(likelihood) * len(targets) + _PRIOR_STRENGTH * log_temperature**2 / 2

    low, high = (math.log(one) for one in _TEMPERATURE_BOUNDS)
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if compute_cost(left) <= compute_cost(right) else (left, high)
    return math.exp((low + high) / 2)


_MIN_IMAGES: Final = 10
"""Number of held-out images with, or without, a label below which its threshold is 0.5.

With fewer images, chance would determine the threshold.
"""


def fit_thresholds(probabilities: Tensor, targets: Tensor, task: Task) -> tuple[float, ...]:
    """Return the best thresholds, or 0.5 if fewer than ten images have, or lack, the label.

    `binary` maximises balanced accuracy, which does not depend on label frequency. `multilabel` maximises F1
    for each label, because a label's positive images are few.
    """
    if task is Task.MULTICLASS:
        return ()
    if task is Task.BINARY:
        return (_find_threshold(probabilities[:, 1], targets > 0, _balanced_accuracy),)
    columns = range(probabilities.shape[1])
    return tuple(_find_threshold(probabilities[:, i], targets[:, i] > 0.5, _f1_score) for i in columns)


def _find_threshold(positive: Tensor, truth: Tensor, rate_thresholds: Any) -> float:
    """Return the best midpoint between neighbouring probabilities; among equals, the one nearest to 0.5."""
    if min(truth.sum(), (~truth).sum()) < _MIN_IMAGES:
        return 0.5
    steps = torch.unique(positive.double())  # ascending
    midpoints = torch.cat([(steps[:-1] + steps[1:]) / 2, torch.tensor([0.5], dtype=torch.float64)])
    order = positive.double().sort().values
    hits = positive[truth].double().sort().values
    selected_count = len(order) - torch.searchsorted(order, midpoints)  # selected at each threshold
    correct_count = len(hits) - torch.searchsorted(hits, midpoints)  # correctly selected at each threshold
    scores = rate_thresholds(
        correct_count.double(), selected_count.double(), float(truth.sum()), float(len(truth))
    )
    best = midpoints[scores >= scores.max() - 1e-12]
    return float(best[(best - 0.5).abs().argmin()])


def _balanced_accuracy(
    correct_count: Tensor, selected_count: Tensor, positives: float, images: float
) -> Tensor:
    negatives = images - positives
    return correct_count / positives + (negatives - (selected_count - correct_count)) / negatives


def _f1_score(correct_count: Tensor, selected_count: Tensor, positives: float, images: float) -> Tensor:
    return 2 * correct_count / (selected_count + positives)


def fit_quantiles(probabilities: Tensor, targets: Tensor, task: Task) -> tuple[tuple[float, float], ...]:
    """Return the conformal quantiles of 1 - p(true label) for all levels.

    The method is split conformal prediction (Vovk et al., 2005; Angelopoulos and Bates, 2021). The quantile
    of a level is the ceil((n + 1) level)-th smallest of n scores. The true label of a new image is within the
    quantile with at least that probability. The quantile is 1 if n is too small. Scores are float64, as in
    the service, so that a score equal to the quantile is inside there too.
    """
    if task is Task.MULTILABEL or not len(targets):
        return ()
    scores = (1 - probabilities.double().gather(1, targets[:, None])[:, 0]).sort().values  # (N,)
    ranks = [math.ceil((len(scores) + 1) * level - 1e-9) for level in COVERAGE_LEVELS]
    return tuple(
        (level, float(scores[rank - 1]) if rank <= len(scores) else 1.0)
        for level, rank in zip(COVERAGE_LEVELS, ranks, strict=True)
    )

"""Honest probabilities: temperature, thresholds and conformal quantiles, from held-out images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fovea.model.networks.network import loss, probabilities
from fovea.service.artifact.contract import Task

LEVELS: Final = tuple(round(0.80 + step / 100, 2) for step in range(20))
"""Coverages that are prepared: 0.80, 0.81, … 0.99."""


@dataclass(frozen=True)
class Calibration:
    """What turns logits into answers that keep their word."""

    temperature: float
    """What logits are divided by."""
    thresholds: tuple[float, ...]
    """From which probability on a label is selected: none for `multiclass`, one for `binary` (of the second
    label), one for each label for `multilabel`."""
    coverage: tuple[tuple[float, float], ...]
    """(level, quantile): labels with 1 - p <= quantile hold the true one in `level` of all cases."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, equal to what JSON gives back of them."""
        return {
            "temperature": self.temperature,
            "thresholds": list(self.thresholds),
            "coverage": [list(pair) for pair in self.coverage],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """The inverse of `to_dict`."""
        pairs = tuple((level, quantile) for level, quantile in values["coverage"])
        return cls(values["temperature"], tuple(values["thresholds"]), pairs)


def calibrate(
    chosen_logits: Tensor, chosen_targets: Tensor, other_logits: Tensor, other_targets: Tensor, task: Task
) -> Calibration:
    """Temperature and thresholds from one half of the held-out images, quantiles from the other.

    Logits are float32 (N, n), targets as in `model.data.dataset.Examples`.
    """
    heat = temperature(chosen_logits, chosen_targets, task)
    return Calibration(
        heat,
        thresholds(probabilities(chosen_logits, task, heat), chosen_targets, task),
        coverage(probabilities(other_logits, task, heat), other_targets, task),
    )


_HEATS: Final = (0.05, 20.0)
"""Between these a temperature is looked for."""

_PRIOR: Final = 20.0
"""Images' worth of belief that the temperature is 1: few held-out images, or only right ones, would
otherwise ask for an extreme one."""


def temperature(logits: Tensor, targets: Tensor, task: Task) -> float:
    """The temperature of the most likely held-out labels (Guo et al., 2017), drawn to 1 by a weak prior.

    The loss is convex in 1 / T, and the prior in log T is all but flat for more than some hundred images:
    a golden-section search in log T finds the minimum to 1e-4.
    """
    if not len(targets):
        return 1.0
    logits = logits.double()

    def cost(log_heat: float) -> float:
        likelihood = loss(logits / math.exp(log_heat), targets, task, label_smoothing=0.0)
        return float(likelihood) * len(targets) + _PRIOR * log_heat**2 / 2

    low, high = (math.log(one) for one in _HEATS)
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if cost(left) <= cost(right) else (left, high)
    return math.exp((low + high) / 2)


_FEW: Final = 10
"""Held-out images, with a label or without it, below which its threshold is 0.5: chance would set it."""


def thresholds(probabilities: Tensor, targets: Tensor, task: Task) -> tuple[float, ...]:
    """`binary`: where balanced accuracy is best, which no label's frequency sways. `multilabel`: for each
    label, where F1 is best, since its true images are few. 0.5 where there are less than
    ten images of either kind."""
    if task is Task.MULTICLASS:
        return ()
    if task is Task.BINARY:
        return (_best_threshold(probabilities[:, 1], targets > 0, _balanced),)
    columns = range(probabilities.shape[1])
    return tuple(_best_threshold(probabilities[:, i], targets[:, i] > 0.5, _f1) for i in columns)


def _best_threshold(positive: Tensor, true: Tensor, score: Any) -> float:
    """Halfway between two neighbours among the probabilities; of equally good ones that nearest to 0.5."""
    if min(true.sum(), (~true).sum()) < _FEW:
        return 0.5
    steps = torch.unique(positive.double())  # rising
    middles = torch.cat([(steps[:-1] + steps[1:]) / 2, torch.tensor([0.5], dtype=torch.float64)])
    order = positive.double().sort().values
    hits = positive[true].double().sort().values
    said = len(order) - torch.searchsorted(order, middles)  # chosen at each threshold
    right = len(hits) - torch.searchsorted(hits, middles)  # of them truly so
    scores = score(right.double(), said.double(), float(true.sum()), float(len(true)))
    best = middles[scores >= scores.max() - 1e-12]
    return float(best[(best - 0.5).abs().argmin()])


def _balanced(right: Tensor, said: Tensor, positives: float, images: float) -> Tensor:
    negatives = images - positives
    return right / positives + (negatives - (said - right)) / negatives


def _f1(right: Tensor, said: Tensor, positives: float, images: float) -> Tensor:
    return 2 * right / (said + positives)


def coverage(probabilities: Tensor, targets: Tensor, task: Task) -> tuple[tuple[float, float], ...]:
    """Split conformal quantiles (Vovk et al., 2005; Angelopoulos and Bates, 2021) of 1 - p(true label).

    The quantile of a level is the ceil((n + 1) level)-th smallest of n scores: the true label of a new image
    is within it with at least that probability. 1 where n is too small to say. Scores are float64, as the
    service computes them, so that one that lies on the quantile is inside there too.
    """
    if task is Task.MULTILABEL or not len(targets):
        return ()
    scores = (1 - probabilities.double().gather(1, targets[:, None])[:, 0]).sort().values
    ranks = [math.ceil((len(scores) + 1) * level - 1e-9) for level in LEVELS]
    return tuple(
        (level, float(scores[rank - 1]) if rank <= len(scores) else 1.0)
        for level, rank in zip(LEVELS, ranks, strict=True)
    )

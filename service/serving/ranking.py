"""Ranked labels and label sets of a classified image."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Final, NamedTuple

from fovea.service.artifact.contract import Contract, Coverage, Task
from fovea.service.errors import BadRequest
from fovea.service.serving.classifier import Classification


@dataclass(slots=True)
class Prediction:
    """One label of an answer.

    `selected` tells whether the label passes the model's threshold. It is None for multi-class models.
    """

    label: str
    index: int
    probability: float
    selected: bool | None


def rank_labels(
    classification: Classification, *, top_k: int, threshold: float | None = None
) -> list[Prediction]:
    """Return the `top_k` most probable labels (0: all) of at least probability `threshold`, best first.

    Equal probabilities keep the contract's order.
    """
    contract = classification.model.contract
    probabilities = classification.answer.probabilities
    best: Sequence[int] = classification.answer.ranking[: top_k or None]
    if threshold is not None:
        best = [index for index in best if probabilities[index] >= threshold]
    labels = contract.labels
    if contract.task is Task.MULTICLASS:
        return [Prediction(labels[index], index, probabilities[index], None) for index in best]
    return [
        Prediction(labels[index], index, probabilities[index], _is_selected(contract, index, probabilities))
        for index in best
    ]


def _is_selected(contract: Contract, index: int, probabilities: Sequence[float]) -> bool:
    """Return whether the label at `index` passes its threshold."""
    if contract.task is Task.MULTILABEL:
        return probabilities[index] >= contract.thresholds[index]
    return (probabilities[1] >= contract.thresholds[0]) == bool(index)


def find_label_index(contract: Contract, label: str) -> int:
    """Return the index of a label in the contract. Raises `BadRequest`."""
    try:
        return contract.labels.index(label)
    except ValueError:
        nearest_label = difflib.get_close_matches(label, contract.labels, n=1, cutoff=0.0)[0]
        raise BadRequest(f"there is no label {label!r}; the nearest is {nearest_label!r}") from None


class LabelSet(NamedTuple):
    """Conformal set: it contains the true label in a share `level` of all cases.

    The most probable label is first.
    """

    level: float
    labels: list[str]
    abstain: bool
    """True if the set is not informative: empty, more than half of all labels, or more than `MAX_SET_LABELS`
    labels."""


def is_known(classification: Classification) -> bool | None:
    """Return whether an image is like the training images; None if the model does not tell."""
    known, score = classification.model.contract.known, classification.answer.known_score
    return None if known is None or score is None else known.accepts(score)


MAX_SET_LABELS: Final = 5
"""Maximum number of labels in an informative set. With ten labels, a set of six is also too large."""


def find_coverage(contract: Contract, level: float) -> Coverage:
    """Return the stored coverage of the model for a level. Raises `BadRequest` if there is none."""
    for coverage in contract.coverage:
        if abs(coverage.level - level) < 1e-9:  # the level was parsed from text
            return coverage
    if contract.task is Task.MULTILABEL:
        raise BadRequest("coverage: a multi-label model has no label sets; each label is `selected` or not")
    if not contract.coverage:
        raise BadRequest(
            "coverage: no label sets were measured for this model; `fovea train` measures them, and "
            "`fovea import` does not"
        )
    levels = ", ".join(str(one.level) for one in contract.coverage)
    raise BadRequest(f"coverage {level} is not one of {levels}")


def compute_label_set(classification: Classification, coverage: Coverage) -> LabelSet:
    """Return the conformal set of an answer."""
    contract, answer = classification.model.contract, classification.answer
    indices = takewhile(lambda index: 1 - answer.probabilities[index] <= coverage.quantile, answer.ranking)
    labels = [contract.labels[index] for index in indices]
    return LabelSet(
        coverage.level, labels, not 1 <= len(labels) <= min(MAX_SET_LABELS, len(contract.labels) // 2)
    )

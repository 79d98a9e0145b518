"""A score of how much an image resembles those that a model was trained on.

The score is the negative free energy of the logits z (Liu, Wang, Owens and Li, 2020, "Energy-based
Out-of-distribution Detection", NeurIPS):

    multiclass    ln sum exp(z)
    multilabel    sum ln (1 + exp(z)) over the labels (Wang, Liu, Bocchieri and Li, 2021, "Can multi-label
                  classification networks know what they don't know?", NeurIPS)

A network has large logits for what it was trained on. Unlike the largest probability, the score does not
become high where one small logit is merely larger than the others. A binary model has one logit and no such
score: what its logit says is how sure it is.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from fovea.service.artifact.contract import Task
from fovea.service.inference.engine import Floats

ACCEPTED_SHARE: Final = 0.95
"""Share of held-out images that the threshold of a model accepts."""

_LARGEST: Final = np.finfo(np.float32).max


def compute_known_scores(logits: Floats, task: Task) -> Floats:
    """Return the score of each row, float32 (n,), for logits, float32 (n, `contract.logit_count`).

    A higher score is more alike. The scores are finite wherever the probabilities are.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scores: Floats = np.minimum(_sum_up(logits, task), _LARGEST)
    return scores


def _sum_up(logits: Floats, task: Task) -> Floats:
    if task is Task.MULTILABEL:
        scores: Floats = np.add.reduce(np.logaddexp(logits, np.float32(0)), axis=1)
    else:
        largest = np.maximum.reduce(logits, axis=1)
        scores = np.log(np.add.reduce(np.exp(logits - largest[:, None]), axis=1)) + largest
    return scores

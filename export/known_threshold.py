"""The threshold of the score that tells known from unknown images, from held-out images."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from fovea.model.data.examples import Examples
from fovea.model.evaluation.evaluate import BATCH_SIZE
from fovea.service.artifact.contract import KnownScore, Task
from fovea.service.inference.engine import Engine, Floats
from fovea.service.inference.known import ACCEPTED_SHARE, compute_known_scores

_MIN_IMAGES: Final = 100
"""Minimum number of held-out images. The lowest 5 % of fewer images are too few to tell a threshold."""

_MIN_SPREAD: Final = 1e-2
"""Smallest difference between the highest and the lowest score that tells images apart, not roundings."""


def measure_known_score(engine: Engine, *example_sets: Examples) -> KnownScore | None:
    """Return the threshold from the logits of `engine` on the held-out images.

    Return None for too few images, and for a binary model, which has no score.
    """
    if engine.contract.task is Task.BINARY:
        return None
    scores = [
        compute_known_scores(engine.compute_logits(part.pixels[rows].numpy()), engine.contract.task)
        for part in example_sets
        for rows in torch.split(torch.arange(len(part)), BATCH_SIZE)
        if len(rows)
    ]
    return choose_threshold(np.concatenate(scores))


def choose_threshold(scores: Floats) -> KnownScore | None:
    """Return the threshold that accepts 95 % of held-out images with these scores, (n,).

    Return None for too few images, and for scores that tell nothing because all are equal.

    At least 95 % of new images like these are accepted, too (split conformal prediction: Vovk et al., 2005).
    """
    count = len(scores)
    if count < _MIN_IMAGES or np.ptp(scores) < _MIN_SPREAD:
        return None
    rejected_count = int(
        (count + 1) * (1 - ACCEPTED_SHARE)
    )  # of new images, including the one at the threshold
    threshold = float(np.sort(scores)[rejected_count - 1])
    return KnownScore(threshold, float((scores >= np.float32(threshold)).mean()), count)

"""The threshold that accepts 95 % of the held-out images."""

from __future__ import annotations

import numpy as np

from fovea.export.known_threshold import choose_threshold


def test_threshold_accepts_95_percent_of_held_out_and_of_new_images() -> None:
    random = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        scores = random.normal(5, 2, 400).astype(np.float32)
        known = choose_threshold(scores)
        assert known
        assert known.images == 400
        assert known.accepted == np.mean(scores >= known.threshold) >= 0.95
        shares.append(np.mean(random.normal(5, 2, 400) >= known.threshold))
    # The mean share of new images is 1 - 20 / 401 by theory.
    assert 0.945 < np.mean(shares) < 0.955


def test_equal_scores_are_accepted_together() -> None:
    known = choose_threshold(np.repeat(np.array([1.0, 2.0], np.float32), 100))
    assert known
    assert (known.threshold, known.accepted) == (1.0, 1.0)


def test_too_few_images_and_scores_that_tell_nothing_have_no_threshold() -> None:
    random = np.random.default_rng(0)
    assert choose_threshold(random.normal(5, 2, 99).astype(np.float32)) is None
    assert choose_threshold(random.normal(0, 1e-6, 1000).astype(np.float32)) is None
    assert choose_threshold(random.normal(5, 2, 100).astype(np.float32)) is not None

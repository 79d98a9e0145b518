"""The interval of a paired difference, and what it proves."""

from __future__ import annotations

import numpy as np
import pytest

from fovea.export.quantize.comparison import PairedCounts, share_confidence


@pytest.mark.parametrize(
    ("shares", "images"), [((0.8, 0.02, 0.02, 0.16), 500), ((0.9, 0.03, 0.01, 0.06), 200)]
)
def test_interval_contains_the_true_loss_in_95_of_100_samples(shares: tuple[float, ...], images: int) -> None:
    samples = np.random.default_rng(0).multinomial(images, shares, 2000)
    true_loss = shares[1] - shares[2]
    limits = [PairedCounts(*map(int, sample)).find_interval(0.95) for sample in samples]
    covered = np.mean([low <= true_loss <= high for low, high in limits])
    assert 0.935 <= covered <= 0.985


def test_limits_stay_apart_when_no_answer_differs() -> None:
    """If all n images are right twice, the upper limit is Wilson's for 0 of n: z² / (n + z²)."""
    low, high = PairedCounts(300, 0, 0, 0).find_interval(0.95)
    assert high == pytest.approx(3.8415 / 303.8415, rel=1e-3)
    assert low == pytest.approx(-high)


def test_counts_follow_the_flags_of_each_image() -> None:
    first, second = np.array([True, True, False, False, True]), np.array([True, False, True, False, False])
    counts = PairedCounts.from_hits(first, second)
    assert counts == PairedCounts(1, 2, 1, 1)
    assert counts.loss == pytest.approx(0.2)


def test_certainty_grows_with_images_and_falls_with_candidates() -> None:
    few, many = PairedCounts(90, 0, 0, 10), PairedCounts(9000, 20, 15, 965)
    assert few.find_certainty(0.005) < 0.9 < many.find_certainty(0.005)
    assert many.find_certainty(0.001, 3) < many.find_certainty(0.001, 1)
    assert PairedCounts(80, 10, 0, 10).find_certainty(0.005) == 0.0


def test_images_for_proof_are_the_fewest_whose_upper_limit_is_the_allowed_loss() -> None:
    counts = PairedCounts(880, 3, 2, 115)
    images = counts.count_images_for_proof(0.005, 0.95)
    assert images is not None
    upper_limits = [counts.scale(count / 1000).find_interval(0.95)[1] for count in (images, images - 1)]
    assert upper_limits[0] <= 0.005 < upper_limits[1]
    assert PairedCounts(90, 2, 0, 8).count_images_for_proof(0.005, 0.95) is None


def test_candidates_share_the_error() -> None:
    assert share_confidence(1) == pytest.approx(0.95)
    assert share_confidence(5) == pytest.approx(0.99)

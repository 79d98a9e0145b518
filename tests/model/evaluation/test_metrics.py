"""What is said of probabilities, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fovea.model.evaluation.metrics import (
    LabelScore,
    calibration_error,
    choose_labels,
    compute_accuracy,
    confusion_matrix,
    label_scores,
    measure_coverage,
    reliability_bins,
)
from fovea.service.artifact.contract import Task

THREE = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.4, 0.35, 0.25], [0.2, 0.3, 0.5]])
TARGETS = torch.tensor([0, 1, 1, 2])


def test_the_most_probable_label_is_chosen() -> None:
    assert choose_labels(THREE, Task.MULTICLASS, ()).tolist() == [0, 1, 0, 2]
    assert compute_accuracy(choose_labels(THREE, Task.MULTICLASS, ()), TARGETS) == 0.75


@pytest.mark.parametrize(("threshold", "chosen"), [(0.5, [0, 1, 1]), (0.3, [1, 1, 1]), (0.9, [0, 0, 1])])
def test_binary_chooses_the_second_label_from_its_threshold_on(threshold: float, chosen: list[int]) -> None:
    positive = torch.tensor([0.3, 0.8, 0.9])
    both = torch.stack([1 - positive, positive], dim=1)
    threshold = float(torch.tensor(threshold))  # as exact as a float32 is
    assert choose_labels(both, Task.BINARY, (threshold,)).tolist() == chosen


def test_each_label_of_several_has_its_own_threshold() -> None:
    said = choose_labels(torch.tensor([[0.4, 0.4], [0.6, 0.6]]), Task.MULTILABEL, (0.3, 0.5))
    assert said.tolist() == [[True, False], [True, True]]
    assert compute_accuracy(said, torch.tensor([[1.0, 1.0], [1.0, 1.0]])) == 0.75


def test_confusion_has_true_labels_in_rows() -> None:
    assert confusion_matrix(torch.tensor([0, 1, 0, 2]), TARGETS, 3).tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [0, 0, 1],
    ]


def test_precision_and_recall_by_label() -> None:
    scores = label_scores(torch.tensor([0, 1, 0, 2]), TARGETS, 4)
    assert scores == (
        LabelScore(0.5, 1.0, 1),
        LabelScore(1.0, 0.5, 2),
        LabelScore(1.0, 1.0, 1),
        LabelScore(None, None, 0),
    )
    assert [score.f1 for score in scores] == [pytest.approx(2 / 3), pytest.approx(2 / 3), 1.0, None]
    flags = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert label_scores(flags > 2, flags, 2) == (LabelScore(None, 0.0, 2), LabelScore(None, 0.0, 1))
    assert LabelScore(0.0, 0.0, 3).f1 is None


# --- honesty -------------------------------------------------------------------------------------


def simulate_answers(count: int, honest: bool) -> tuple[Tensor, Tensor]:
    """Two labels, and truths drawn by the stated probability, or always the less probable one."""
    random = torch.Generator().manual_seed(0)
    positive = 0.5 + torch.rand(count, generator=random) / 2
    right = torch.rand(count, generator=random) < positive if honest else torch.zeros(count, dtype=torch.bool)
    return torch.stack([1 - positive, positive], dim=1), right.long()


def test_who_keeps_his_word_has_no_error_and_who_never_does_has_all_of_it() -> None:
    honest, boasting = simulate_answers(20_000, True), simulate_answers(20_000, False)
    assert calibration_error(reliability_bins(*honest, Task.BINARY)) < 0.02
    assert calibration_error(reliability_bins(*boasting, Task.BINARY)) == pytest.approx(0.75, abs=0.01)


def test_bins_have_equal_mass_and_rise() -> None:
    bins = reliability_bins(*simulate_answers(1_000, True), Task.BINARY)
    assert len(bins) == 15
    assert {one.count for one in bins} == {66, 67}
    claims = [one.confidence for one in bins]
    assert claims == sorted(claims)


def test_an_error_by_hand() -> None:
    """Four answers, each a bin: right with 0.7, 0.6 and 0.5, wrong with 0.4."""
    bins = reliability_bins(THREE, TARGETS, Task.MULTICLASS)
    assert [(one.count, one.accuracy) for one in bins] == [(1, 0.0), (1, 1.0), (1, 1.0), (1, 1.0)]
    assert calibration_error(bins) == pytest.approx((0.4 + 0.5 + 0.4 + 0.3) / 4)


def test_the_order_of_answers_that_tie_does_not_matter() -> None:
    """All say 0.6, six of ten are right: honest, however the images are sorted."""
    said = torch.tensor([[0.4, 0.6]]).repeat(3_000, 1)
    truth = (torch.arange(3_000) < 1_800).long()
    assert calibration_error(reliability_bins(said, truth, Task.BINARY)) == pytest.approx(0, abs=1e-6)
    mixed = truth[torch.randperm(3_000, generator=torch.Generator().manual_seed(0))]
    assert reliability_bins(said, truth, Task.BINARY) == reliability_bins(said, mixed, Task.BINARY)


def test_of_several_labels_every_probability_is_an_answer() -> None:
    flags = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    bins = reliability_bins(flags, flags, Task.MULTILABEL)
    assert sum(one.count for one in bins) == 6
    assert calibration_error(bins) == 0
    assert calibration_error(reliability_bins(1 - flags, flags, Task.MULTILABEL)) == 1


def test_no_images_have_no_error() -> None:
    assert calibration_error(reliability_bins(THREE[:0], TARGETS[:0], Task.MULTICLASS)) == 0
    assert compute_accuracy(TARGETS[:0], TARGETS[:0]) == 0
    assert measure_coverage(THREE[:0], TARGETS[:0], 0.5) == (0, 0)


def test_covered_counts_true_labels_and_the_size_of_sets() -> None:
    assert measure_coverage(THREE, TARGETS, 0.5) == (0.75, 0.75)
    assert measure_coverage(THREE, TARGETS, 0.71) == (1.0, 7 / 4)
    assert measure_coverage(THREE, TARGETS, 1.0) == (1.0, 3.0)

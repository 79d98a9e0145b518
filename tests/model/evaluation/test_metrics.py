"""Metrics of probabilities, compared with counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fovea.model.evaluation.metrics import (
    choose_labels,
    compute_accuracy,
    confusion_matrix,
    label_scores,
    measure_coverage,
    reliability_bins,
)
from fovea.model.evaluation.scores import LabelScore, calibration_error
from fovea.service.artifact.contract import Task

PROBABILITIES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.4, 0.35, 0.25], [0.2, 0.3, 0.5]])
TARGETS = torch.tensor([0, 1, 1, 2])


def test_most_probable_label_is_chosen() -> None:
    assert choose_labels(PROBABILITIES, Task.MULTICLASS, ()).tolist() == [0, 1, 0, 2]
    assert compute_accuracy(choose_labels(PROBABILITIES, Task.MULTICLASS, ()), TARGETS) == 0.75


@pytest.mark.parametrize(("threshold", "expected"), [(0.5, [0, 1, 1]), (0.3, [1, 1, 1]), (0.9, [0, 0, 1])])
def test_binary_task_chooses_second_label_from_threshold(threshold: float, expected: list[int]) -> None:
    positive = torch.tensor([0.3, 0.8, 0.9])
    probabilities = torch.stack([1 - positive, positive], dim=1)
    threshold = float(torch.tensor(threshold))  # rounded to float32
    assert choose_labels(probabilities, Task.BINARY, (threshold,)).tolist() == expected


def test_multilabel_task_has_a_threshold_per_label() -> None:
    labels = choose_labels(torch.tensor([[0.4, 0.4], [0.6, 0.6]]), Task.MULTILABEL, (0.3, 0.5))
    assert labels.tolist() == [[True, False], [True, True]]
    assert compute_accuracy(labels, torch.tensor([[1.0, 1.0], [1.0, 1.0]])) == 0.75


def test_confusion_matrix_has_true_labels_in_rows() -> None:
    assert confusion_matrix(torch.tensor([0, 1, 0, 2]), TARGETS, 3).tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [0, 0, 1],
    ]


def test_precision_and_recall_match_counts_by_hand() -> None:
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


# --- calibration and coverage --------------------------------------------------------------------


def simulate_answers(count: int, is_honest: bool) -> tuple[Tensor, Tensor]:
    """Return probabilities of two labels, and targets drawn by them, or always the less probable label."""
    random = torch.Generator().manual_seed(0)
    positive = 0.5 + torch.rand(count, generator=random) / 2
    is_positive = (
        torch.rand(count, generator=random) < positive if is_honest else torch.zeros(count, dtype=torch.bool)
    )
    return torch.stack([1 - positive, positive], dim=1), is_positive.long()


def test_calibration_error_measures_overconfidence() -> None:
    honest_answers, wrong_answers = simulate_answers(20_000, True), simulate_answers(20_000, False)
    assert calibration_error(reliability_bins(*honest_answers, Task.BINARY)) < 0.02
    assert calibration_error(reliability_bins(*wrong_answers, Task.BINARY)) == pytest.approx(0.75, abs=0.01)


def test_reliability_bins_have_equal_mass_and_rise() -> None:
    bins = reliability_bins(*simulate_answers(1_000, True), Task.BINARY)
    assert len(bins) == 15
    assert {entry.count for entry in bins} == {66, 67}
    confidences = [entry.confidence for entry in bins]
    assert confidences == sorted(confidences)


def test_calibration_error_matches_hand_computation() -> None:
    """Four answers, each a bin: right with 0.7, 0.6 and 0.5, wrong with 0.4."""
    bins = reliability_bins(PROBABILITIES, TARGETS, Task.MULTICLASS)
    assert [(entry.count, entry.accuracy) for entry in bins] == [(1, 0.0), (1, 1.0), (1, 1.0), (1, 1.0)]
    assert calibration_error(bins) == pytest.approx((0.4 + 0.5 + 0.4 + 0.3) / 4)


def test_order_of_tied_answers_does_not_matter() -> None:
    """All answers have 0.6 and six of ten are correct, so there is no error in any order."""
    probabilities = torch.tensor([[0.4, 0.6]]).repeat(3_000, 1)
    targets = (torch.arange(3_000) < 1_800).long()
    assert calibration_error(reliability_bins(probabilities, targets, Task.BINARY)) == pytest.approx(
        0, abs=1e-6
    )
    shuffled_targets = targets[torch.randperm(3_000, generator=torch.Generator().manual_seed(0))]
    assert reliability_bins(probabilities, targets, Task.BINARY) == reliability_bins(
        probabilities, shuffled_targets, Task.BINARY
    )


def test_multilabel_bins_count_every_probability() -> None:
    flags = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    bins = reliability_bins(flags, flags, Task.MULTILABEL)
    assert sum(entry.count for entry in bins) == 6
    assert calibration_error(bins) == 0
    assert calibration_error(reliability_bins(1 - flags, flags, Task.MULTILABEL)) == 1


def test_metrics_of_no_images_are_zero() -> None:
    assert calibration_error(reliability_bins(PROBABILITIES[:0], TARGETS[:0], Task.MULTICLASS)) == 0
    assert compute_accuracy(TARGETS[:0], TARGETS[:0]) == 0
    assert measure_coverage(PROBABILITIES[:0], TARGETS[:0], 0.5) == (0, 0)


def test_coverage_gives_hit_rate_and_mean_set_size() -> None:
    assert measure_coverage(PROBABILITIES, TARGETS, 0.5) == (0.75, 0.75)
    assert measure_coverage(PROBABILITIES, TARGETS, 0.71) == (1.0, 7 / 4)
    assert measure_coverage(PROBABILITIES, TARGETS, 1.0) == (1.0, 3.0)

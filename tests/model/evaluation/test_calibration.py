"""Temperature, thresholds and conformal quantiles, against brute force and simulation."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from fovea.model.evaluation.calibration import (
    COVERAGE_LEVELS,
    Calibration,
    fit_calibration,
    fit_quantiles,
    fit_temperature,
    fit_thresholds,
)
from fovea.model.evaluation.metrics import choose_labels, measure_coverage
from fovea.model.networks.network import compute_loss, to_probabilities
from fovea.service.artifact.contract import Task


def simulate_logits(count: int, labels: int = 5, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits `scale` times too large, and targets drawn by the logits before scaling."""
    random = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, labels, generator=random)
    targets = torch.multinomial(logits.softmax(dim=1), 1, generator=random)[:, 0]
    return logits * scale, targets


# --- temperature ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5, 8.0])
def test_temperature_recovers_the_scale_of_the_logits(scale: float) -> None:
    assert fit_temperature(*simulate_logits(20_000, scale=scale), Task.MULTICLASS) == pytest.approx(
        scale, rel=0.03
    )


@pytest.mark.parametrize("task", list(Task))
def test_fitted_temperature_is_the_most_likely(task: Task) -> None:
    logits, targets = simulate_logits(4_000, labels=1 if task is Task.BINARY else 4, scale=1.7)
    random = torch.Generator().manual_seed(1)
    if task is not Task.MULTICLASS:
        targets = (torch.rand(logits.shape, generator=random) < (logits / 1.7).sigmoid()).long()
        targets = targets[:, 0] if task is Task.BINARY else targets.float()
    fitted_temperature = fit_temperature(logits, targets, task)

    def measure_loss(temperature: float) -> float:
        return float(compute_loss(logits.double() / temperature, targets, task, label_smoothing=0))

    grid = [math.exp(step / 100) for step in range(-150, 250)]
    assert measure_loss(fitted_temperature) <= min(map(measure_loss, grid)) + 1e-4
    assert fitted_temperature == pytest.approx(1.7, rel=0.1)


def test_temperature_of_few_images_is_moderate() -> None:
    assert fit_temperature(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), Task.MULTICLASS) == 1
    logits = 3 * torch.eye(3)[torch.arange(30) % 3]
    targets = torch.arange(30) % 3
    assert 0.3 < fit_temperature(logits, targets, Task.MULTICLASS) < 1
    assert 0.85 < fit_temperature(logits[:3], targets[:3], Task.MULTICLASS) < 1
    assert 1 < fit_temperature(logits[:3], 2 - targets[:3], Task.MULTICLASS) < 1.5


# --- thresholds ----------------------------------------------------------------------------------


def test_multiclass_has_no_threshold() -> None:
    assert fit_thresholds(torch.rand(10, 3), torch.zeros(10, dtype=torch.int64), Task.MULTICLASS) == ()


def make_probabilities(second_label: list[float]) -> Tensor:
    second_column = torch.tensor(second_label)
    return torch.stack([1 - second_column, second_column], dim=1)


def test_binary_threshold_lies_halfway_between_the_labels() -> None:
    positive, targets = [0.1, 0.15, 0.25, 0.9] * 5, torch.tensor([0, 0, 1, 1] * 5)
    (threshold,) = fit_thresholds(make_probabilities(positive), targets, Task.BINARY)
    assert threshold == pytest.approx(0.2)
    # sixteen images are too few
    assert fit_thresholds(make_probabilities(positive[:-4]), targets[:-4], Task.BINARY) == (0.5,)


def test_rare_label_lowers_the_binary_threshold() -> None:
    random = torch.Generator().manual_seed(0)
    is_true = torch.rand(5_000, generator=random) < 0.03
    positive = (torch.randn(5_000, generator=random) + 2.0 * is_true - 3).sigmoid()
    (threshold,) = fit_thresholds(torch.stack([1 - positive, positive], dim=1), is_true.long(), Task.BINARY)
    assert threshold < 0.25
    is_chosen = choose_labels(torch.stack([1 - positive, positive], dim=1), Task.BINARY, (threshold,)).bool()
    balanced_accuracy = (is_chosen[is_true].float().mean() + (~is_chosen)[~is_true].float().mean()) / 2
    accuracy_at_half = (
        (positive >= 0.5)[is_true].float().mean() + (positive < 0.5)[~is_true].float().mean()
    ) / 2
    assert balanced_accuracy > accuracy_at_half + 0.1


def test_tied_thresholds_give_the_one_nearest_to_a_half() -> None:
    assert fit_thresholds(make_probabilities([0.05, 0.98] * 10), torch.tensor([0, 1] * 10), Task.BINARY) == (
        0.5,
    )


def test_multilabel_thresholds_maximise_f1() -> None:
    random = torch.Generator().manual_seed(2)
    targets = (torch.rand(800, 3, generator=random) < torch.tensor([0.5, 0.1, 0.0])).float()
    probabilities = (
        1.5 * torch.randn(800, 3, generator=random) + 2 * targets - torch.tensor([1.0, 3.0, 0.0])
    ).sigmoid()
    thresholds = fit_thresholds(probabilities, targets, Task.MULTILABEL)
    assert thresholds[2] == 0.5  # never true, so nothing can be fitted

    def compute_f1(label: int, threshold: float) -> float:
        chosen, expected = probabilities[:, label] >= threshold, targets[:, label] > 0.5
        return float(2 * (chosen & expected).sum() / (chosen.sum() + expected.sum()))

    for label in (0, 1):
        assert (
            compute_f1(label, thresholds[label])
            >= max(compute_f1(label, step / 500) for step in range(501)) - 1e-9
        )


# --- coverage ------------------------------------------------------------------------------------


def test_coverage_levels_are_80_to_99_percent() -> None:
    assert COVERAGE_LEVELS[0] == 0.8
    assert COVERAGE_LEVELS[-1] == 0.99
    assert len(COVERAGE_LEVELS) == 20


def test_conformal_sets_reach_the_requested_coverage() -> None:
    """The mean of 40 calibrations of 500 images is measured on images that none of them used."""
    logits, targets = simulate_logits(60_000)
    probabilities = logits.softmax(dim=1)
    shares = {level: [] for level in COVERAGE_LEVELS}  # type: dict[float, list[float]]
    for number in range(40):
        part = slice(500 * number, 500 * number + 500)
        for level, quantile in fit_quantiles(probabilities[part], targets[part], Task.MULTICLASS):
            shares[level].append(measure_coverage(probabilities[20_000:], targets[20_000:], quantile)[0])
    for level, level_shares in shares.items():
        mean = sum(level_shares) / len(level_shares)
        assert level - 0.005 <= mean <= level + 1 / 500 + 0.005, level


def test_quantile_follows_the_paper() -> None:
    """The quantile is the ceil(100 * 0.9) = 90th of 99 scores 0.01 … 0.99."""
    true_probabilities = 1 - torch.arange(1, 100) / 100
    quantiles = dict(
        fit_quantiles(
            torch.stack([true_probabilities, 1 - true_probabilities], dim=1),
            torch.zeros(99, dtype=torch.int64),
            Task.BINARY,
        )
    )
    assert quantiles[0.9] == pytest.approx(0.90)
    assert quantiles[0.99] == pytest.approx(0.99)


def test_too_few_images_give_full_conformal_sets() -> None:
    probabilities, targets = torch.tensor([[0.9, 0.1]] * 10), torch.zeros(10, dtype=torch.int64)
    quantiles = dict(fit_quantiles(probabilities, targets, Task.BINARY))
    assert quantiles[0.9] == pytest.approx(0.1)  # ceil(11 * 0.9) = 10 of 10
    assert quantiles[0.95] == 1
    assert fit_quantiles(probabilities[:0], targets[:0], Task.BINARY) == ()
    assert fit_quantiles(probabilities, probabilities, Task.MULTILABEL) == ()


def test_quantile_is_exactly_a_score_of_the_service() -> None:
    probabilities, targets = simulate_logits(999)
    probabilities = probabilities.softmax(dim=1)
    for _, quantile in fit_quantiles(probabilities, targets, Task.MULTICLASS):
        scores = [1 - float(row[target]) for row, target in zip(probabilities, targets.tolist(), strict=True)]
        assert quantile in scores


# --- together ------------------------------------------------------------------------------------


def test_temperature_and_quantiles_use_different_halves() -> None:
    first_half, second_half = simulate_logits(2_000, scale=3.0), simulate_logits(2_000, scale=3.0, seed=1)
    calibration = fit_calibration(*first_half, *second_half, Task.MULTICLASS)
    assert calibration.temperature == fit_temperature(*first_half, Task.MULTICLASS)
    probabilities = to_probabilities(second_half[0], Task.MULTICLASS, calibration.temperature)
    assert calibration.coverage == fit_quantiles(probabilities, second_half[1], Task.MULTICLASS)
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


def test_network_without_temperature_has_thresholds_and_quantiles_of_its_plain_probabilities() -> None:
    first_half, second_half = simulate_logits(2_000, scale=3.0), simulate_logits(2_000, scale=3.0, seed=1)
    calibration = fit_calibration(*first_half, *second_half, Task.MULTICLASS, has_temperature=False)
    assert calibration.temperature == 1
    probabilities = to_probabilities(second_half[0], Task.MULTICLASS)
    assert calibration.coverage == fit_quantiles(probabilities, second_half[1], Task.MULTICLASS)

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
    """Logits `scale` times too large, and truths drawn by what they would say without that."""
    random = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, labels, generator=random)
    targets = torch.multinomial(logits.softmax(dim=1), 1, generator=random)[:, 0]
    return logits * scale, targets


# --- temperature ---------------------------------------------------------------------------------


@pytest.mark.parametrize("heat", [0.4, 1.0, 2.5, 8.0])
def test_the_temperature_undoes_what_the_logits_exaggerate(heat: float) -> None:
    assert fit_temperature(*simulate_logits(20_000, scale=heat), Task.MULTICLASS) == pytest.approx(
        heat, rel=0.03
    )


@pytest.mark.parametrize("task", list(Task))
def test_no_other_temperature_is_likelier(task: Task) -> None:
    logits, targets = simulate_logits(4_000, labels=1 if task is Task.BINARY else 4, scale=1.7)
    random = torch.Generator().manual_seed(1)
    if task is not Task.MULTICLASS:
        targets = (torch.rand(logits.shape, generator=random) < (logits / 1.7).sigmoid()).long()
        targets = targets[:, 0] if task is Task.BINARY else targets.float()
    found = fit_temperature(logits, targets, task)

    def likelihood(heat: float) -> float:
        return float(compute_loss(logits.double() / heat, targets, task, label_smoothing=0))

    grid = [math.exp(step / 100) for step in range(-150, 250)]
    assert likelihood(found) <= min(map(likelihood, grid)) + 1e-4
    assert found == pytest.approx(1.7, rel=0.1)


def test_few_images_or_only_right_ones_do_not_make_it_extreme() -> None:
    assert fit_temperature(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), Task.MULTICLASS) == 1
    certain = 3 * torch.eye(3)[torch.arange(30) % 3]
    targets = torch.arange(30) % 3
    assert 0.3 < fit_temperature(certain, targets, Task.MULTICLASS) < 1
    assert 0.85 < fit_temperature(certain[:3], targets[:3], Task.MULTICLASS) < 1
    assert 1 < fit_temperature(certain[:3], 2 - targets[:3], Task.MULTICLASS) < 1.5


# --- thresholds ----------------------------------------------------------------------------------


def test_multiclass_has_no_threshold() -> None:
    assert fit_thresholds(torch.rand(10, 3), torch.zeros(10, dtype=torch.int64), Task.MULTICLASS) == ()


def make_pair(positive: list[float]) -> Tensor:
    second = torch.tensor(positive)
    return torch.stack([1 - second, second], dim=1)


def test_a_binary_threshold_parts_both_labels_halfway() -> None:
    positive, true = [0.1, 0.15, 0.25, 0.9] * 5, torch.tensor([0, 0, 1, 1] * 5)
    (found,) = fit_thresholds(make_pair(positive), true, Task.BINARY)
    assert found == pytest.approx(0.2)
    assert fit_thresholds(make_pair(positive[:-4]), true[:-4], Task.BINARY) == (0.5,)  # too few to say


def test_a_rare_label_moves_the_threshold_and_frequency_does_not() -> None:
    random = torch.Generator().manual_seed(0)
    true = torch.rand(5_000, generator=random) < 0.03
    said = (torch.randn(5_000, generator=random) + 2.0 * true - 3).sigmoid()
    (found,) = fit_thresholds(torch.stack([1 - said, said], dim=1), true.long(), Task.BINARY)
    assert found < 0.25
    chosen = choose_labels(torch.stack([1 - said, said], dim=1), Task.BINARY, (found,)).bool()
    balanced = (chosen[true].float().mean() + (~chosen)[~true].float().mean()) / 2
    at_half = ((said >= 0.5)[true].float().mean() + (said < 0.5)[~true].float().mean()) / 2
    assert balanced > at_half + 0.1


def test_equally_good_thresholds_give_the_one_nearest_to_a_half() -> None:
    assert fit_thresholds(make_pair([0.05, 0.98] * 10), torch.tensor([0, 1] * 10), Task.BINARY) == (0.5,)


def test_each_of_several_labels_has_the_threshold_of_its_best_f1() -> None:
    random = torch.Generator().manual_seed(2)
    true = (torch.rand(800, 3, generator=random) < torch.tensor([0.5, 0.1, 0.0])).float()
    said = (1.5 * torch.randn(800, 3, generator=random) + 2 * true - torch.tensor([1.0, 3.0, 0.0])).sigmoid()
    found = fit_thresholds(said, true, Task.MULTILABEL)
    assert found[2] == 0.5  # never true: nothing to go by

    def f1(label: int, threshold: float) -> float:
        chosen, wanted = said[:, label] >= threshold, true[:, label] > 0.5
        return float(2 * (chosen & wanted).sum() / (chosen.sum() + wanted.sum()))

    for label in (0, 1):
        assert f1(label, found[label]) >= max(f1(label, step / 500) for step in range(501)) - 1e-9


# --- coverage ------------------------------------------------------------------------------------


def test_levels_are_80_to_99_percent() -> None:
    assert COVERAGE_LEVELS[0] == 0.8
    assert COVERAGE_LEVELS[-1] == 0.99
    assert len(COVERAGE_LEVELS) == 20


def test_sets_hold_the_true_label_of_other_images_as_often_as_asked_for() -> None:
    """Over 40 calibrations of 500 images, on images that none of them has seen."""
    said, targets = simulate_logits(60_000)
    likely = said.softmax(dim=1)
    shares = {level: [] for level in COVERAGE_LEVELS}  # type: dict[float, list[float]]
    for number in range(40):
        part = slice(500 * number, 500 * number + 500)
        for level, quantile in fit_quantiles(likely[part], targets[part], Task.MULTICLASS):
            shares[level].append(measure_coverage(likely[20_000:], targets[20_000:], quantile)[0])
    for level, found in shares.items():
        mean = sum(found) / len(found)
        assert level - 0.005 <= mean <= level + 1 / 500 + 0.005, level


def test_the_quantile_is_the_paper_s() -> None:
    """The quantile is the ceil(100 * 0.9) = 90th of 99 scores 0.01 … 0.99."""
    true = 1 - torch.arange(1, 100) / 100
    found = dict(
        fit_quantiles(torch.stack([true, 1 - true], dim=1), torch.zeros(99, dtype=torch.int64), Task.BINARY)
    )
    assert found[0.9] == pytest.approx(0.90)
    assert found[0.99] == pytest.approx(0.99)


def test_too_few_images_give_whole_sets_and_none_give_none() -> None:
    likely, targets = torch.tensor([[0.9, 0.1]] * 10), torch.zeros(10, dtype=torch.int64)
    found = dict(fit_quantiles(likely, targets, Task.BINARY))
    assert found[0.9] == pytest.approx(0.1)  # ceil(11 * 0.9) = 10 of 10
    assert found[0.95] == 1
    assert fit_quantiles(likely[:0], targets[:0], Task.BINARY) == ()
    assert fit_quantiles(likely, likely, Task.MULTILABEL) == ()


def test_an_image_on_the_quantile_is_inside_as_the_service_computes_it() -> None:
    likely, targets = simulate_logits(999)
    likely = likely.softmax(dim=1)
    for _, quantile in fit_quantiles(likely, targets, Task.MULTICLASS):
        scores = [1 - float(row[target]) for row, target in zip(likely, targets.tolist(), strict=True)]
        assert quantile in scores


# --- together ------------------------------------------------------------------------------------


def test_each_half_has_its_own_purpose() -> None:
    chosen, other = simulate_logits(2_000, scale=3.0), simulate_logits(2_000, scale=3.0, seed=1)
    found = fit_calibration(*chosen, *other, Task.MULTICLASS)
    assert found.temperature == fit_temperature(*chosen, Task.MULTICLASS)
    likely = to_probabilities(other[0], Task.MULTICLASS, found.temperature)
    assert found.coverage == fit_quantiles(likely, other[1], Task.MULTICLASS)
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found

"""The training recipe and its learning rate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fovea.model.recipe import Recipe, build_recipe, compute_learning_rate


@pytest.mark.parametrize("images", [2, 15, 162, 1_000, 4_500, 45_000, 1_000_000])
def test_small_data_set_gets_enough_steps(images: int) -> None:
    recipe = build_recipe(images, validation=0.2, seed=3)
    steps = max(1, images // recipe.batch)
    assert recipe.epochs == 100 or recipe.epochs * steps >= 1000
    assert 8 <= recipe.batch <= Recipe().batch
    assert recipe.peak_lr / recipe.batch == pytest.approx(Recipe().peak_lr / Recipe().batch)
    assert (recipe.validation, recipe.seed) == (0.2, 3)
    assert build_recipe(images, epochs=5, validation=0.2, seed=3) == replace(recipe, epochs=5)


def test_large_data_set_gets_the_default_recipe() -> None:
    assert build_recipe(45_000) == Recipe()


def test_image_passes_stay_within_the_limit() -> None:
    for images in (500, 4_500, 9_000, 45_000):
        assert build_recipe(images).epochs * images <= max(360_000, images * Recipe().epochs)


def test_fine_tuning_lowers_peak_rate_and_halves_epochs() -> None:
    scratch_recipe, tuned_recipe = build_recipe(4_500), build_recipe(4_500, fine_tuning=True)
    assert tuned_recipe.peak_lr == pytest.approx(scratch_recipe.peak_lr / 10)
    assert tuned_recipe.epochs == scratch_recipe.epochs // 2
    assert build_recipe(4_500, epochs=3, fine_tuning=True).epochs == 3


@pytest.mark.parametrize("steps", [10, 100, 350])
def test_learning_rate_rises_then_falls_linearly(steps: int) -> None:
    recipe = Recipe(peak_lr=0.2, warm_up=0.2)
    rates = np.array([compute_learning_rate(step, steps, recipe) for step in range(steps)])
    peak_step = int(rates.argmax())
    assert rates.max() == pytest.approx(0.2)
    assert peak_step + 1 == pytest.approx(0.2 * steps, abs=1)
    assert (rates > 0).all()
    assert rates[0] == pytest.approx(0.2 / (0.2 * steps))
    assert rates[-1] == pytest.approx(0.2 / (0.8 * steps))
    for segment in (rates[: peak_step + 1], rates[peak_step + 1 :]):  # each is a straight line
        assert np.ptp(np.diff(segment)) < 1e-9
    assert (np.diff(rates[: peak_step + 1]) > 0).all()
    assert (np.diff(rates[peak_step + 1 :]) < 0).all()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_shortest_runs_have_a_positive_learning_rate(steps: int) -> None:
    rates = [compute_learning_rate(step, steps, Recipe(peak_lr=0.2)) for step in range(steps)]
    assert all(0 < rate <= 0.2 for rate in rates)
    assert rates[0] == 0.2

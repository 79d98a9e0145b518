"""The recipe: how long, how fast, in what steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fovea.model.recipe import Recipe, build_recipe, compute_learning_rate


@pytest.mark.parametrize("images", [2, 15, 162, 1_000, 4_500, 45_000, 1_000_000])
def test_a_small_set_still_makes_enough_steps(images: int) -> None:
    recipe = build_recipe(images, validation=0.2, seed=3)
    steps = max(1, images // recipe.batch)
    assert recipe.epochs == 100 or recipe.epochs * steps >= 1000
    assert 8 <= recipe.batch <= Recipe().batch
    assert recipe.peak_lr / recipe.batch == pytest.approx(Recipe().peak_lr / Recipe().batch)
    assert (recipe.validation, recipe.seed) == (0.2, 3)
    assert build_recipe(images, epochs=5, validation=0.2, seed=3) == replace(recipe, epochs=5)


def test_a_large_set_gets_the_recipe_as_it_stands() -> None:
    assert build_recipe(45_000) == Recipe()


def test_no_set_costs_more_than_its_own_epochs_or_the_passes_of_a_small_one() -> None:
    for images in (500, 4_500, 9_000, 45_000):
        assert build_recipe(images).epochs * images <= max(360_000, images * Recipe().epochs)


def test_weights_that_know_images_are_changed_gently() -> None:
    scratch, tuned = build_recipe(4_500), build_recipe(4_500, fine_tuning=True)
    assert tuned.peak_lr == pytest.approx(scratch.peak_lr / 10)
    assert tuned.epochs == scratch.epochs // 2
    assert build_recipe(4_500, epochs=3, fine_tuning=True).epochs == 3


@pytest.mark.parametrize("steps", [10, 100, 350])
def test_the_rate_rises_to_its_peak_and_falls_to_nothing(steps: int) -> None:
    recipe = Recipe(peak_lr=0.2, warm_up=0.2)
    rates = np.array([compute_learning_rate(step, steps, recipe) for step in range(steps)])
    top = int(rates.argmax())
    assert rates.max() == pytest.approx(0.2)
    assert top + 1 == pytest.approx(0.2 * steps, abs=1)
    assert (rates > 0).all()
    assert rates[0] == pytest.approx(0.2 / (0.2 * steps))
    assert rates[-1] == pytest.approx(0.2 / (0.8 * steps))
    for leg in (rates[: top + 1], rates[top + 1 :]):  # each is a straight line
        assert np.ptp(np.diff(leg)) < 1e-9
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top + 1 :]) < 0).all()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_a_rate_too(steps: int) -> None:
    rates = [compute_learning_rate(step, steps, Recipe(peak_lr=0.2)) for step in range(steps)]
    assert all(0 < rate <= 0.2 for rate in rates)
    assert rates[0] == 0.2

"""The time of a training run: measured, predicted and limited."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fovea.model.data.dataset import Dataset
from fovea.model.networks.network import Net, NetConfig
from fovea.model.recipe import Precision, Recipe, build_recipe
from fovea.model.training.batches import Batches
from fovea.model.training.pace import (
    Pace,
    count_flops,
    estimate_cost,
    estimate_step,
    fit_epochs,
    format_duration,
    measure_pace,
)
from fovea.model.training.trainer import train_net as run_training
from fovea.model.training.training_run import InitialState
from fovea.service.artifact.contract import Task
from tests.training import SHORT_RECIPE, draw_dataset, make_net


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Sixty squares to train on, fifteen held out."""
    return draw_dataset(tmp_path_factory.mktemp("drawn") / "squares", count=25, validation=0.2)


def predict_seconds(recipe: Recipe, data: Dataset, pace: Pace) -> float:
    """Predict the duration of a run by its pace, with the evaluation at its end."""
    full_steps = len(data.train) // recipe.batch
    steps = min(full_steps, recipe.epoch_steps or full_steps)
    measured_images = len(data.validation) + len(data.conformal) + len(data.test)
    evaluated_images = recipe.epochs * len(data.validation) + measured_images
    teaching_seconds = min(recipe.epochs, recipe.views) * len(data.train) * pace.teaching_seconds
    return (
        recipe.epochs * steps * pace.step_seconds
        + evaluated_images * pace.evaluation_seconds
        + teaching_seconds
    )


@pytest.mark.parametrize("seconds", [30.0, 60.0, 300.0, 3600.0])
@pytest.mark.parametrize("step_seconds", [0.001, 0.02, 0.3, 2.0])
@pytest.mark.parametrize("evaluation_seconds", [0.0, 0.002, 0.05])
@pytest.mark.parametrize("teaching_seconds", [0.0, 0.002])
def test_epochs_are_fitted_to_the_available_time(
    data: Dataset, seconds: float, step_seconds: float, evaluation_seconds: float, teaching_seconds: float
) -> None:
    recipe = replace(Recipe(batch=5), teaching=0.8 if teaching_seconds else 0.0)
    pace = Pace(step_seconds, evaluation_seconds, teaching_seconds)
    fitted_recipe = fit_epochs(recipe, data, pace, seconds)
    assert fitted_recipe == replace(
        recipe, epochs=fitted_recipe.epochs, epoch_steps=fitted_recipe.epoch_steps
    )
    assert fitted_recipe.epochs >= 1
    assert predict_seconds(fitted_recipe, data, pace) == pytest.approx(
        seconds - 2, rel=0.1, abs=step_seconds * max(1, fitted_recipe.epochs / 2)
    )


def test_epoch_is_cut_to_at_least_one_step(data: Dataset) -> None:
    cut_recipe = fit_epochs(Recipe(batch=5), data, Pace(3.0, 0.0), 20.0)
    assert (cut_recipe.epochs, cut_recipe.epoch_steps) == (1, 6)
    minimum_recipe = fit_epochs(Recipe(batch=5), data, Pace(3.0, 0.0), -100.0, min_seconds=18.0)
    assert (minimum_recipe.epochs, minimum_recipe.epoch_steps) == (1, 6)
    one_step_recipe = fit_epochs(Recipe(batch=5), data, Pace(3.0, 0.0), -100.0)
    assert (one_step_recipe.epochs, one_step_recipe.epoch_steps) == (1, 1)


def test_cut_epochs_use_different_images(data: Dataset) -> None:
    batches = Batches(data, Recipe(batch=5, epochs=2, epoch_steps=4, flip=False), (0.5, 0.5, 0.5), None)
    try:
        assert batches.steps == 4
        first, second = (torch.cat([batches._get_order(epoch)[:20]]) for epoch in (0, 1))
        assert set(first.tolist()) != set(second.tolist())
    finally:
        batches.close()


def test_resumed_run_with_cut_epochs_gives_the_same_weights(tmp_path: Path, data: Dataset) -> None:
    from tests.model.training.test_trainer import interrupt_training, read_weights, train_to_end
    from tests.training import train_quietly

    recipe = replace(SHORT_RECIPE, epoch_steps=2)
    train_to_end(data, recipe, tmp_path / "unbroken")
    with interrupt_training(3):
        assert train_quietly(data, recipe, tmp_path / "broken") is None
    result = train_to_end(data, recipe, tmp_path / "broken", resume=True)
    assert result.metadata["progress"]["step"] == 6
    assert read_weights(tmp_path / "broken") == read_weights(tmp_path / "unbroken")


def test_measuring_pace_keeps_weights_and_random_state(data: Dataset) -> None:
    net, teacher = make_net(data, SHORT_RECIPE), make_net(data, SHORT_RECIPE)
    before = [tensor.clone() for tensor in net.state_dict().values()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pace = measure_pace(data, SHORT_RECIPE, InitialState(net, [teacher]), 0.05)
    assert torch.equal(torch.rand(3), expected)
    assert all(map(torch.equal, before, net.state_dict().values()))
    assert min(pace.step_seconds, pace.evaluation_seconds, pace.teaching_seconds) > 0


def capture_output(data: Dataset, recipe: Recipe, out: Path) -> str:
    """Run a training and return its output."""
    console = Console(file=io.StringIO(), width=200)
    run_training(data, recipe, out, InitialState(make_net(data, recipe)), resume=False, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "images"), [(SHORT_RECIPE, 60), (replace(SHORT_RECIPE, epochs=30), 60)])
def test_expected_time_is_printed_once_before_epoch_two(
    tmp_path: Path, data: Dataset, recipe: Recipe, images: int
) -> None:
    output = capture_output(data, recipe, tmp_path / "run")
    (line,) = re.findall(r"expected: .*", output)
    assert re.fullmatch(
        rf"expected: \d+ (seconds|minutes) for [\d.]+ epochs of {images} images, at \d+ images/s *", line
    )
    assert output.index("expected: ") < output.index("epoch   2/")


@pytest.mark.long
def test_step_time_is_estimated_only_for_long_steps(data: Dataset) -> None:
    small_net = make_net(data, SHORT_RECIPE)
    assert estimate_step(small_net, data, SHORT_RECIPE, torch.device("cpu")) is None
    large_net = Net(NetConfig(Task.MULTICLASS, 3, "resnet18", 16))
    recipe = replace(SHORT_RECIPE, batch=20_000)
    step = estimate_step(large_net, data, recipe, torch.device("cpu"))
    assert step is not None
    assert math.isfinite(step)
    assert step > 0


def compute_network_cost(
    name: str = "cnn", size: int = 32, precision: Precision = Precision.BFLOAT16
) -> float:
    return estimate_cost(Net(NetConfig(Task.MULTICLASS, 10, name, size)), precision)


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU costs nothing more")
def test_cost_depends_on_network_size_and_precision() -> None:
    threads = torch.get_num_threads()
    cost_of_two_threads = compute_network_cost() * threads / 2
    assert cost_of_two_threads == pytest.approx(1, abs=0.01)
    assert compute_network_cost(size=48) > 2 * compute_network_cost()
    assert compute_network_cost("resnet18") > 4 * compute_network_cost()
    assert compute_network_cost(precision=Precision.FLOAT32) == pytest.approx(1.7 * compute_network_cost())
    assert count_flops(Net(NetConfig(Task.MULTICLASS, 10))) == pytest.approx(236e6, rel=0.01)


@pytest.mark.parametrize("images", [500, 4_500, 45_000])
@pytest.mark.parametrize("cost", [1.7, 4.0, 40.0])
def test_expensive_images_are_seen_in_fewer_epochs(images: int, cost: float) -> None:
    usual_recipe, recipe = build_recipe(images), build_recipe(images, cost=cost)
    assert recipe == replace(usual_recipe, epochs=recipe.epochs)
    assert 10 <= recipe.epochs <= usual_recipe.epochs
    steps = images // recipe.batch
    assert recipe.epochs * images * cost <= max(360_000, 10 * images * cost, 20 * images) + images * cost or (
        recipe.epochs == math.ceil(1000 / steps)
    )
    assert build_recipe(images, cost=0.1) == usual_recipe


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 seconds"), (42, "42 seconds"), (100, "2 minutes"), (3600, "60 minutes"), (9000, "2 h 30 min")],
)
def test_durations_are_formatted_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text

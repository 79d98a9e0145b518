"""Training runs: repeatable, interruptible, and good at what is easy."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import checkpoint
from model.checkpoint import RESUME, WEIGHTS, Checkpoint, CheckpointError
from model.data import Data, Examples
from model.evaluate import accuracy
from model.net import NetConfig
from model.train import Recipe, augment, learning_rate, recipe_for
from service.contract import Task
from tests.training import BRIEF, drawn_data, train

STEPS = 6
"""Of `BRIEF` on three labels of five images."""


@dataclass(frozen=True)
class Interrupting(Examples):
    """Examples of which the batch number `at` comes with Ctrl-C, pressed `times` times."""

    at: int
    times: int = 1
    taken: list[int] = field(default_factory=list)

    def take(self, indices: Tensor) -> Examples:
        self.taken.append(len(indices))
        if len(self.taken) == self.at:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
        return super().take(indices)


def interrupting(data: Data, at: int, times: int = 1) -> Data:
    return replace(data, train=Interrupting(data.train.pixels, data.train.targets, at, times))


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Twelve squares to train on, three held out."""
    return drawn_data(tmp_path / "squares")


def finished(data: Data, recipe: Recipe, out: Path, *, resume: bool = False) -> Checkpoint:
    done = train(data, recipe, out, resume=resume)
    assert done is not None
    return done


def weights(folder: Path) -> bytes:
    """The tensors of a checkpoint, bit for bit."""
    tensors = checkpoint.load(folder).tensors
    return b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors))


# --- repeatable ----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights(tmp_path: Path, data: Data) -> None:
    first = finished(data, BRIEF, tmp_path / "first")
    torch.manual_seed(99)  # nothing outside may matter
    finished(data, BRIEF, tmp_path / "again")
    assert weights(tmp_path / "first") == weights(tmp_path / "again")
    assert all(tensor.isfinite().all() for tensor in first.tensors.values())


def test_another_seed_gives_other_weights(tmp_path: Path, data: Data) -> None:
    one = replace(BRIEF, epochs=1)
    finished(data, one, tmp_path / "first")
    finished(data, replace(one, seed=1), tmp_path / "other")
    assert weights(tmp_path / "first") != weights(tmp_path / "other")


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_stopped_at_any_step_and_resumed_is_the_run_that_was_not(
    tmp_path: Path, data: Data, step: int
) -> None:
    unbroken = finished(data, BRIEF, tmp_path / "unbroken")
    assert train(interrupting(data, step), BRIEF, tmp_path / "broken") is None
    assert checkpoint.load(tmp_path / "broken").about["progress"]["step"] == step
    resumed = finished(data, BRIEF, tmp_path / "broken", resume=True)
    assert weights(tmp_path / "broken") == weights(tmp_path / "unbroken")
    figures = ("epoch", "loss", "train_accuracy", "validation_accuracy")
    histories = [
        [[epoch[figure] for figure in figures] for epoch in run.about["progress"]["history"]]
        for run in (resumed, unbroken)
    ]
    assert histories[0] == histories[1]
    assert len(histories[0]) == BRIEF.epochs


def test_a_run_may_be_stopped_twice(tmp_path: Path, data: Data) -> None:
    finished(data, BRIEF, tmp_path / "unbroken")
    assert train(interrupting(data, 1), BRIEF, tmp_path / "broken") is None
    assert train(interrupting(data, 3), BRIEF, tmp_path / "broken", resume=True) is None
    assert checkpoint.load(tmp_path / "broken").about["progress"]["step"] == 4
    finished(data, BRIEF, tmp_path / "broken", resume=True)
    assert weights(tmp_path / "broken") == weights(tmp_path / "unbroken")


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path: Path, data: Data) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(interrupting(data, 2, times=2), BRIEF, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run").exists()


def test_a_finished_run_resumed_stays_as_it_is(tmp_path: Path, data: Data) -> None:
    one = replace(BRIEF, epochs=1)
    done = finished(data, one, tmp_path)
    before = weights(tmp_path)
    assert finished(data, one, tmp_path, resume=True).about == done.about
    assert weights(tmp_path) == before


# --- another run ---------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path, data: Data) -> None:
    one = replace(BRIEF, epochs=1)
    finished(data, one, tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(CheckpointError, match="holds a run already; pass --resume"):
        train(data, one, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before


def other_recipe(data: Data, recipe: Recipe) -> tuple[Data, Recipe]:
    return data, replace(recipe, peak_lr=0.05)


def other_labels(data: Data, recipe: Recipe) -> tuple[Data, Recipe]:
    return replace(data, labels=("a", "b", "c")), recipe


def other_pixels(data: Data, recipe: Recipe) -> tuple[Data, Recipe]:
    return replace(data, train=replace(data.train, pixels=255 - data.train.pixels)), recipe


def fewer_images(data: Data, recipe: Recipe) -> tuple[Data, Recipe]:
    return replace(data, validation=data.validation.take(torch.tensor([0, 1]))), recipe


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_recipe, "recipe"),
        (other_labels, "labels"),
        (other_pixels, "net"),
        (fewer_images, "data"),
    ],
)
def test_only_the_same_run_is_resumed(tmp_path: Path, data: Data, change: Any, what: str) -> None:
    assert train(interrupting(data, 1), BRIEF, tmp_path) is None
    before = (tmp_path / RESUME).read_bytes()
    changed, recipe = change(data, BRIEF)
    with pytest.raises(CheckpointError, match=f"holds a run with another {what}"):
        train(changed, recipe, tmp_path, resume=True)
    assert (tmp_path / RESUME).read_bytes() == before


def test_resume_without_an_earlier_run_starts_one(tmp_path: Path, data: Data) -> None:
    one = replace(BRIEF, epochs=1)
    finished(data, one, tmp_path / "new", resume=True)
    finished(data, one, tmp_path / "plain")
    assert weights(tmp_path / "new") == weights(tmp_path / "plain")


@pytest.mark.parametrize("images", [2, 15, 162, 1_000, 4_500, 45_000, 1_000_000])
def test_a_small_set_still_makes_enough_steps(images: int) -> None:
    recipe = recipe_for(images, epochs=None, validation=0.2, seed=3)
    steps = max(1, images // recipe.batch)
    assert recipe.epochs == 100 or recipe.epochs * steps >= 1000
    assert 8 <= recipe.batch <= 128
    assert recipe.peak_lr / recipe.batch == pytest.approx(Recipe().peak_lr / Recipe().batch)
    assert (recipe.validation, recipe.seed) == (0.2, 3)
    assert recipe_for(images, epochs=5, validation=0.2, seed=3) == replace(recipe, epochs=5)


def test_a_large_set_gets_the_recipe_as_it_stands() -> None:
    assert recipe_for(45_000, epochs=None, validation=0.1, seed=0) == Recipe()


# --- what it learns and tells --------------------------------------------------------------------


@pytest.mark.parametrize("labels", [("blue", "red"), ("blue", "green", "red")])
def test_it_learns_what_is_easy(tmp_path: Path, labels: tuple[str, ...]) -> None:
    data = drawn_data(tmp_path / "squares", *labels, count=20, validation=0.3)
    done = finished(data, Recipe(epochs=8, batch=8, peak_lr=0.05), tmp_path / "run")
    assert accuracy(done.net(), data.validation) >= 0.95
    assert done.about["progress"]["history"][-1]["validation_accuracy"] >= 0.95
    task = Task.BINARY if len(labels) == 2 else Task.MULTICLASS
    assert NetConfig.from_dict(done.about["net"]).task is task


def test_the_weights_tell_what_they_are(tmp_path: Path, data: Data) -> None:
    data = replace(data, test=data.validation)
    done = finished(data, replace(BRIEF, epochs=2), tmp_path)
    about = checkpoint.load(tmp_path).about
    assert about == checkpoint.load(tmp_path, RESUME).about
    assert about["labels"] == ["blue", "green", "red"]
    assert about["recipe"] == {**about["recipe"], "epochs": 2, "batch": 5, "seed": 0}
    assert about["data"] == {"name": "squares", "train": 12, "validation": 3, "test": 3}
    assert (about["source"], about["command"]) == ("squares", "fovea train")
    assert about["test_accuracy"] == accuracy(done.net(), data.test)
    history = about["progress"]["history"]
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    assert history[-1]["validation_accuracy"] == accuracy(done.net(), data.validation)


def test_the_code_s_commit_is_known_where_there_is_git(
    tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = finished(data, replace(BRIEF, epochs=1), tmp_path / "git").about["commit"]
    assert commit == "unknown" or len(commit.removesuffix("-dirty")) == 40
    monkeypatch.setenv("PATH", "")
    assert finished(data, replace(BRIEF, epochs=1), tmp_path / "none").about["commit"] == "unknown"


def test_the_training_images_have_zero_mean_and_unit_deviation(tmp_path: Path, data: Data) -> None:
    planes = finished(data, replace(BRIEF, epochs=1), tmp_path).net().normalize(data.train.pixels)
    torch.testing.assert_close(planes.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(planes.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_a_channel_that_never_changes_does_no_harm(tmp_path: Path, data: Data) -> None:
    data.train.pixels[..., 1] = 0
    done = finished(data, replace(BRIEF, epochs=1), tmp_path)
    assert all(tensor.isfinite().all() for tensor in done.tensors.values())


# --- the schedule --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 100, 350])
def test_the_rate_rises_to_its_peak_and_falls_to_nothing(steps: int) -> None:
    recipe = Recipe(peak_lr=0.2, warm_up=0.2)
    rates = np.array([learning_rate(step, steps, recipe) for step in range(steps)])
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
    rates = [learning_rate(step, steps, Recipe(peak_lr=0.2)) for step in range(steps)]
    assert all(0 < rate <= 0.2 for rate in rates)
    assert rates[0] == 0.2


# --- augmentation --------------------------------------------------------------------------------


def images(count: int = 40, height: int = 12, width: int = 10) -> Tensor:
    """Images of which no two pixels are alike."""
    numbers = torch.arange(count * height * width).view(count, height, width, 1)
    return torch.cat([numbers // 65536, numbers // 256 % 256, numbers % 256], dim=-1).to(torch.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flips(count: int, value: bool) -> Tensor:
    return torch.full((count,), value)


def moved(image: Tensor, down: int, across: int) -> Tensor:
    """What a shift must give, by NumPy's own padding."""
    height, width, _ = image.shape
    padded = np.pad(image.numpy(), ((3, 3), (3, 3), (0, 0)), mode="reflect")
    return torch.from_numpy(padded[3 + down : 3 + down + height, 3 + across : 3 + across + width].copy())


def shifts(image: Tensor, result: Tensor) -> list[tuple[int, int]]:
    """By how much `image` must have been moved to give `result`."""
    span = range(-3, 4)
    return [(d, a) for d in span for a in span if torch.equal(result, moved(image, d, a))]


def test_without_shift_or_mirror_nothing_changes() -> None:
    pixels = images()
    assert torch.equal(augment(pixels, flips(40, False), 0, generator()), pixels)


def test_a_mirrored_image_is_exactly_mirrored() -> None:
    pixels = images()
    flip = torch.arange(40) % 3 == 0
    result = augment(pixels, flip, 0, generator())
    assert torch.equal(result[flip], pixels[flip].flip(2))
    assert torch.equal(result[~flip], pixels[~flip])


def test_each_image_moves_by_its_own_shift_with_its_edge_mirrored() -> None:
    pixels = images(200)
    result = augment(pixels, flips(200, False), 3, generator())
    found = [shifts(image, moved_image) for image, moved_image in zip(pixels, result, strict=True)]
    assert all(len(one) == 1 for one in found)
    assert len({one[0] for one in found}) > 40  # of 49
    assert {down for ((down, _),) in found} == {across for ((_, across),) in found} == set(range(-3, 4))


def test_a_mirrored_image_moves_too_and_keeps_its_own_pixels() -> None:
    pixels = images()
    result = augment(pixels, flips(40, True), 3, generator())
    assert all(shifts(image.flip(1), other) for image, other in zip(pixels, result, strict=True))
    for image, other in zip(pixels, result, strict=True):
        own = set(map(tuple, image.view(-1, 3).tolist()))
        assert set(map(tuple, other.view(-1, 3).tolist())) <= own


def test_augmentation_is_decided_by_its_generator() -> None:
    pixels, flip = images(), flips(40, False)
    first, again, other = (augment(pixels, flip, 3, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

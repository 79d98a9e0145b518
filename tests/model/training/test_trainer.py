"""Training runs: repeatable, interruptible, and good at what is easy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fovea.model.data.dataset import Dataset, load_dataset
from fovea.model.evaluation.evaluate import measure_accuracy
from fovea.model.networks import checkpoint
from fovea.model.networks.checkpoint import RESUME_FILE, WEIGHTS_FILE, Checkpoint, CheckpointError
from fovea.model.networks.network import Net, NetConfig
from fovea.model.recipe import Precision, Recipe
from fovea.model.training.training_run import compute_class_weights
from fovea.service.artifact.contract import Task
from tests.conftest import ROOT
from tests.training import SHORT_RECIPE, draw_dataset, draw_images, stack_pixels, train_quietly

STEPS = 6
"""Result of `SHORT_RECIPE` on three labels of five images."""


@contextmanager
def interrupt_training(step_number: int, times: int = 1) -> Iterator[None]:
    """Ctrl-C, pressed `times` times, comes during the training step number `step_number` from here on."""
    steps = []

    def press_ctrl_c(module: nn.Module, _inputs: object) -> None:
        if isinstance(module, Net) and module.training:
            steps.append(1)
            if len(steps) == step_number:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)

    handle = register_module_forward_pre_hook(press_ctrl_c)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Twelve squares to train on, three held out."""
    drawn = draw_dataset(tmp_path / "squares")
    return replace(drawn, train=replace(drawn.train, pixels=stack_pixels(drawn.train.pixels)))


def train_to_end(data: Dataset, recipe: Recipe, out: Path, *, resume: bool = False) -> Checkpoint:
    trained_checkpoint = train_quietly(data, recipe, out, resume=resume)
    assert trained_checkpoint is not None
    return trained_checkpoint


def read_weights(folder: Path) -> bytes:
    """The tensors of a checkpoint, bit for bit."""
    tensors = checkpoint.load_checkpoint(folder).tensors
    return b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors))


# --- repeatable ----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights(tmp_path: Path, data: Dataset) -> None:
    first = train_to_end(data, SHORT_RECIPE, tmp_path / "first")
    torch.manual_seed(99)  # nothing outside may matter
    train_to_end(data, SHORT_RECIPE, tmp_path / "again")
    assert read_weights(tmp_path / "first") == read_weights(tmp_path / "again")
    assert all(tensor.isfinite().all() for tensor in first.tensors.values())


def test_another_seed_gives_other_weights(tmp_path: Path, data: Dataset) -> None:
    one = replace(SHORT_RECIPE, epochs=1)
    train_to_end(data, one, tmp_path / "first")
    train_to_end(data, replace(one, seed=1), tmp_path / "other")
    assert read_weights(tmp_path / "first") != read_weights(tmp_path / "other")


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_stopped_at_any_step_and_resumed_is_the_run_that_was_not(
    tmp_path: Path, data: Dataset, step: int
) -> None:
    unbroken = train_to_end(data, SHORT_RECIPE, tmp_path / "unbroken")
    with interrupt_training(step):
        assert train_quietly(data, SHORT_RECIPE, tmp_path / "broken") is None
    assert checkpoint.load_checkpoint(tmp_path / "broken").metadata["progress"]["step"] == step
    resumed = train_to_end(data, SHORT_RECIPE, tmp_path / "broken", resume=True)
    assert read_weights(tmp_path / "broken") == read_weights(tmp_path / "unbroken")
    figures = ("epoch", "loss", "train_accuracy", "validation_accuracy")
    histories = [
        [[epoch[figure] for figure in figures] for epoch in run.metadata["progress"]["history"]]
        for run in (resumed, unbroken)
    ]
    assert histories[0] == histories[1]
    assert len(histories[0]) == SHORT_RECIPE.epochs


def test_a_run_may_be_stopped_twice(tmp_path: Path, data: Dataset) -> None:
    train_to_end(data, SHORT_RECIPE, tmp_path / "unbroken")
    with interrupt_training(1):
        assert train_quietly(data, SHORT_RECIPE, tmp_path / "broken") is None
    with interrupt_training(3):
        assert train_quietly(data, SHORT_RECIPE, tmp_path / "broken", resume=True) is None
    assert checkpoint.load_checkpoint(tmp_path / "broken").metadata["progress"]["step"] == 4
    train_to_end(data, SHORT_RECIPE, tmp_path / "broken", resume=True)
    assert read_weights(tmp_path / "broken") == read_weights(tmp_path / "unbroken")


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path: Path, data: Dataset) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupt_training(2, times=2):
        train_quietly(data, SHORT_RECIPE, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run").exists()


def test_a_finished_run_resumed_stays_as_it_is(tmp_path: Path, data: Dataset) -> None:
    one = replace(SHORT_RECIPE, epochs=1)
    done = train_to_end(data, one, tmp_path)
    before = read_weights(tmp_path)
    assert train_to_end(data, one, tmp_path, resume=True).metadata == done.metadata
    assert read_weights(tmp_path) == before


# --- another run ---------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path, data: Dataset) -> None:
    one = replace(SHORT_RECIPE, epochs=1)
    train_to_end(data, one, tmp_path)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()
    with pytest.raises(CheckpointError, match="holds a run already; pass --resume to continue it"):
        train_quietly(data, one, tmp_path)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == before


def change_recipe(data: Dataset, recipe: Recipe) -> tuple[Dataset, Recipe]:
    return data, replace(recipe, peak_lr=0.05)


def change_labels(data: Dataset, recipe: Recipe) -> tuple[Dataset, Recipe]:
    return replace(data, labels=("a", "b", "c")), recipe


def change_pixels(data: Dataset, recipe: Recipe) -> tuple[Dataset, Recipe]:
    return replace(data, train=replace(data.train, pixels=255 - stack_pixels(data.train.pixels))), recipe


def remove_images(data: Dataset, recipe: Recipe) -> tuple[Dataset, Recipe]:
    return replace(data, validation=data.validation.select(torch.tensor([0, 1]))), recipe


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (change_recipe, "recipe"),
        (change_labels, "labels"),
        (change_pixels, "net"),
        (remove_images, "data"),
    ],
)
def test_only_the_same_run_is_resumed(tmp_path: Path, data: Dataset, change: Any, what: str) -> None:
    with interrupt_training(1):
        assert train_quietly(data, SHORT_RECIPE, tmp_path) is None
    before = (tmp_path / RESUME_FILE).read_bytes()
    changed, recipe = change(data, SHORT_RECIPE)
    with pytest.raises(CheckpointError, match=f"holds a run with another {what}"):
        train_quietly(changed, recipe, tmp_path, resume=True)
    assert (tmp_path / RESUME_FILE).read_bytes() == before


def test_a_run_of_an_earlier_version_is_resumed(tmp_path: Path, data: Dataset) -> None:
    """Its recipe knows nothing of epochs that are cut short."""
    with interrupt_training(1):
        assert train_quietly(data, SHORT_RECIPE, tmp_path) is None
    for name in (RESUME_FILE, WEIGHTS_FILE):
        earlier = checkpoint.load_checkpoint(tmp_path, name)
        del earlier.metadata["recipe"]["epoch_steps"]
        checkpoint.save_checkpoint(tmp_path, name, earlier)
    assert train_to_end(data, SHORT_RECIPE, tmp_path, resume=True).metadata["progress"]["step"] == STEPS


def test_resume_without_an_earlier_run_starts_one(tmp_path: Path, data: Dataset) -> None:
    one = replace(SHORT_RECIPE, epochs=1)
    train_to_end(data, one, tmp_path / "new", resume=True)
    train_to_end(data, one, tmp_path / "plain")
    assert read_weights(tmp_path / "new") == read_weights(tmp_path / "plain")


# --- what it learns and tells --------------------------------------------------------------------


@pytest.mark.parametrize("labels", [("blue", "red"), ("blue", "green", "red")])
def test_it_learns_what_is_easy(tmp_path: Path, labels: tuple[str, ...]) -> None:
    data = draw_dataset(tmp_path / "squares", *labels, count=20, validation=0.3)
    done = train_to_end(data, Recipe(epochs=8, batch=8, peak_lr=0.05), tmp_path / "run")
    assert measure_accuracy(done.build_net(), data.validation) >= 0.95
    assert done.metadata["progress"]["history"][-1]["validation_accuracy"] >= 0.95
    task = Task.BINARY if len(labels) == 2 else Task.MULTICLASS
    assert NetConfig.from_dict(done.metadata["net"]).task is task


def test_the_weights_tell_what_they_are(tmp_path: Path, data: Dataset) -> None:
    data = replace(data, test=data.validation)
    done = train_to_end(data, replace(SHORT_RECIPE, epochs=2), tmp_path)
    about = checkpoint.load_checkpoint(tmp_path).metadata
    assert about == checkpoint.load_checkpoint(tmp_path, RESUME_FILE).metadata
    assert about["labels"] == ["blue", "green", "red"]
    assert about["recipe"] == {**about["recipe"], "epochs": 2, "batch": 5, "seed": 0}
    assert about["data"] == {"name": "squares", "train": 12, "validation": 3, "conformal": 0, "test": 3}
    assert (about["source"], about["command"]) == ("squares", "fovea train")
    history = about["progress"]["history"]
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    assert history[-1]["validation_accuracy"] == measure_accuracy(done.build_net(), data.validation)


def test_the_code_s_commit_is_known_where_there_is_git(
    tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = train_to_end(data, replace(SHORT_RECIPE, epochs=1), tmp_path / "git").metadata["commit"]
    assert commit == "unknown" or len(commit.removesuffix("-dirty")) == 40
    monkeypatch.setenv("PATH", "")
    assert (
        train_to_end(data, replace(SHORT_RECIPE, epochs=1), tmp_path / "none").metadata["commit"] == "unknown"
    )


def test_the_training_images_have_zero_mean_and_unit_deviation(tmp_path: Path, data: Dataset) -> None:
    planes = (
        train_to_end(data, replace(SHORT_RECIPE, epochs=1), tmp_path)
        .build_net()
        .normalize(stack_pixels(data.train.pixels))
    )
    torch.testing.assert_close(planes.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(planes.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_a_channel_that_never_changes_does_no_harm(tmp_path: Path, data: Dataset) -> None:
    pixels = stack_pixels(data.train.pixels)
    pixels[..., 1] = 0
    data = replace(data, train=replace(data.train, pixels=pixels))
    done = train_to_end(data, replace(SHORT_RECIPE, epochs=1), tmp_path)
    assert all(tensor.isfinite().all() for tensor in done.tensors.values())


# --- killed ----------------------------------------------------------------------------------------

ENDLESS = 400
"""Epochs: some seconds."""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """SIGKILL at five moments, wherever they fall: also while a file is written."""
    source = draw_images(tmp_path / "squares", "blue", "red", count=6)
    arguments = ["train", "--data", str(source), "--size", "16", "--epochs", str(ENDLESS)]
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    kills = 0
    for seconds in (0.5, 0.9, 0.3, 0.7, 0.4):
        with start_command([*arguments, "--out", str(broken), "--resume"]) as process:
            if wait_for_epoch(process, f"/{ENDLESS}") and not wait_for_end(process, seconds):
                process.kill()
                kills += 1
    assert kills >= 3
    step = checkpoint.load_checkpoint(broken, RESUME_FILE).metadata["progress"]["step"]
    assert 0 < step < ENDLESS
    for out in (broken, unbroken):
        with start_command([*arguments, "--out", str(out), "--resume"]) as process:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said
    assert read_weights(broken) == read_weights(unbroken)
    assert not list(broken.glob("*.tmp"))


def start_command(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fovea", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_epoch(process: subprocess.Popen[str], text: str) -> bool:
    """Wait until an epoch is told; false when the run ends before."""
    assert process.stdout is not None
    return any(line.startswith("epoch") and text in line for line in process.stdout)


def wait_for_end(process: subprocess.Popen[str], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


# --- a teacher -----------------------------------------------------------------------------------


def test_a_pupil_learns_what_its_teacher_says_and_not_the_labels(tmp_path: Path) -> None:
    """The labels are wrong, and count nothing: what is right can only come from the teacher."""
    data = draw_dataset(tmp_path / "squares", count=20, validation=0.3)
    recipe = Recipe(epochs=8, batch=8, peak_lr=0.05, cutout=0)
    teacher = train_to_end(data, recipe, tmp_path / "teacher").build_net()
    wrong = replace(data, train=replace(data.train, targets=(data.train.targets + 1) % 3))
    taught = replace(recipe, teaching=1.0)
    done = train_quietly(wrong, taught, tmp_path / "pupil", teacher=teacher)
    assert done is not None
    assert measure_accuracy(done.build_net(), data.validation) >= 0.95
    untaught = train_to_end(wrong, recipe, tmp_path / "untaught")
    assert measure_accuracy(untaught.build_net(), data.validation) <= 0.2


# --- precision and weights of labels -------------------------------------------------------------


def test_bfloat16_is_as_good_and_as_repeatable(tmp_path: Path) -> None:
    data = draw_dataset(tmp_path / "squares", count=20, validation=0.3)
    recipe = Recipe(epochs=8, batch=8, peak_lr=0.05, precision=Precision.BFLOAT16)
    done = train_to_end(data, recipe, tmp_path / "run")
    train_to_end(data, recipe, tmp_path / "again")
    assert read_weights(tmp_path / "run") == read_weights(tmp_path / "again")
    assert {tensor.dtype for tensor in done.tensors.values()} == {torch.float32, torch.int64}
    assert measure_accuracy(done.build_net(), data.validation) >= 0.95
    train_to_end(data, replace(recipe, precision=Precision.FLOAT32), tmp_path / "full")
    assert read_weights(tmp_path / "run") != read_weights(tmp_path / "full")


def test_rare_labels_weigh_more_where_labels_are_unequal(tmp_path: Path) -> None:
    draw_images(tmp_path / "set", "red", count=64)
    draw_images(tmp_path / "set", "blue", count=4)
    unequal = load_dataset(tmp_path / "set", size=16, validation=0.1, seed=0)
    found = compute_class_weights(unequal)
    assert found is not None
    blue, red = found.tolist()
    assert blue / red == pytest.approx((unequal.label_counts[1] / unequal.label_counts[0]) ** 0.5)
    assert compute_class_weights(draw_dataset(tmp_path / "squares")) is None


def test_labels_are_unequal_from_the_same_ratio_on_for_the_warning_and_the_weights(tmp_path: Path) -> None:
    """Three to one is not yet; one image more is."""
    for red, unequal in ((27, False), (28, True)):
        folder = tmp_path / str(red)
        for seed, (label, count) in enumerate((("red", red), ("blue", 9))):
            draw_images(folder, label, count=count + round(count * 0.1), seed=seed)
        data = load_dataset(folder, size=16, validation=0.1, seed=0)
        assert data.label_counts == (9, red)
        assert (compute_class_weights(data) is not None) is unequal
        assert any("labels are imbalanced" in line for line in data.warnings) is unequal


def test_each_epoch_is_told_to_who_watches(tmp_path: Path, data: Dataset) -> None:
    told: list[dict[str, float]] = []
    done = train_quietly(data, SHORT_RECIPE, tmp_path, on_epoch=told.append)
    assert done is not None
    assert told == done.metadata["progress"]["history"]
    assert len(told) == SHORT_RECIPE.epochs

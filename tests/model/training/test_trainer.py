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
from fovea.model.training.trainer import compute_class_weights
from fovea.service.artifact.contract import Task
from tests.conftest import ROOT
from tests.training import BRIEF, draw, drawn_data, train, whole

STEPS = 6
"""Of `BRIEF` on three labels of five images."""


@contextmanager
def interrupting(at: int, times: int = 1) -> Iterator[None]:
    """Ctrl-C, pressed `times` times, comes during the training step number `at` from here on."""
    seen = []

    def press(module: nn.Module, _inputs: object) -> None:
        if isinstance(module, Net) and module.training:
            seen.append(1)
            if len(seen) == at:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)

    handle = register_module_forward_pre_hook(press)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Twelve squares to train on, three held out."""
    drawn = drawn_data(tmp_path / "squares")
    return replace(drawn, train=replace(drawn.train, pixels=whole(drawn.train.pixels)))


def finished(data: Dataset, recipe: Recipe, out: Path, *, resume: bool = False) -> Checkpoint:
    done = train(data, recipe, out, resume=resume)
    assert done is not None
    return done


def weights(folder: Path) -> bytes:
    """The tensors of a checkpoint, bit for bit."""
    tensors = checkpoint.load_checkpoint(folder).tensors
    return b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors))


# --- repeatable ----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights(tmp_path: Path, data: Dataset) -> None:
    first = finished(data, BRIEF, tmp_path / "first")
    torch.manual_seed(99)  # nothing outside may matter
    finished(data, BRIEF, tmp_path / "again")
    assert weights(tmp_path / "first") == weights(tmp_path / "again")
    assert all(tensor.isfinite().all() for tensor in first.tensors.values())


def test_another_seed_gives_other_weights(tmp_path: Path, data: Dataset) -> None:
    one = replace(BRIEF, epochs=1)
    finished(data, one, tmp_path / "first")
    finished(data, replace(one, seed=1), tmp_path / "other")
    assert weights(tmp_path / "first") != weights(tmp_path / "other")


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_stopped_at_any_step_and_resumed_is_the_run_that_was_not(
    tmp_path: Path, data: Dataset, step: int
) -> None:
    unbroken = finished(data, BRIEF, tmp_path / "unbroken")
    with interrupting(step):
        assert train(data, BRIEF, tmp_path / "broken") is None
    assert checkpoint.load_checkpoint(tmp_path / "broken").metadata["progress"]["step"] == step
    resumed = finished(data, BRIEF, tmp_path / "broken", resume=True)
    assert weights(tmp_path / "broken") == weights(tmp_path / "unbroken")
    figures = ("epoch", "loss", "train_accuracy", "validation_accuracy")
    histories = [
        [[epoch[figure] for figure in figures] for epoch in run.metadata["progress"]["history"]]
        for run in (resumed, unbroken)
    ]
    assert histories[0] == histories[1]
    assert len(histories[0]) == BRIEF.epochs


def test_a_run_may_be_stopped_twice(tmp_path: Path, data: Dataset) -> None:
    finished(data, BRIEF, tmp_path / "unbroken")
    with interrupting(1):
        assert train(data, BRIEF, tmp_path / "broken") is None
    with interrupting(3):
        assert train(data, BRIEF, tmp_path / "broken", resume=True) is None
    assert checkpoint.load_checkpoint(tmp_path / "broken").metadata["progress"]["step"] == 4
    finished(data, BRIEF, tmp_path / "broken", resume=True)
    assert weights(tmp_path / "broken") == weights(tmp_path / "unbroken")


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path: Path, data: Dataset) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupting(2, times=2):
        train(data, BRIEF, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run").exists()


def test_a_finished_run_resumed_stays_as_it_is(tmp_path: Path, data: Dataset) -> None:
    one = replace(BRIEF, epochs=1)
    done = finished(data, one, tmp_path)
    before = weights(tmp_path)
    assert finished(data, one, tmp_path, resume=True).metadata == done.metadata
    assert weights(tmp_path) == before


# --- another run ---------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path, data: Dataset) -> None:
    one = replace(BRIEF, epochs=1)
    finished(data, one, tmp_path)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()
    with pytest.raises(CheckpointError, match="holds a run already; pass --resume"):
        train(data, one, tmp_path)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == before


def other_recipe(data: Dataset, recipe: Recipe) -> tuple[Dataset, Recipe]:
    return data, replace(recipe, peak_lr=0.05)


def other_labels(data: Dataset, recipe: Recipe) -> tuple[Dataset, Recipe]:
    return replace(data, labels=("a", "b", "c")), recipe


def other_pixels(data: Dataset, recipe: Recipe) -> tuple[Dataset, Recipe]:
    return replace(data, train=replace(data.train, pixels=255 - whole(data.train.pixels))), recipe


def fewer_images(data: Dataset, recipe: Recipe) -> tuple[Dataset, Recipe]:
    return replace(data, validation=data.validation.select(torch.tensor([0, 1]))), recipe


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_recipe, "recipe"),
        (other_labels, "labels"),
        (other_pixels, "net"),
        (fewer_images, "data"),
    ],
)
def test_only_the_same_run_is_resumed(tmp_path: Path, data: Dataset, change: Any, what: str) -> None:
    with interrupting(1):
        assert train(data, BRIEF, tmp_path) is None
    before = (tmp_path / RESUME_FILE).read_bytes()
    changed, recipe = change(data, BRIEF)
    with pytest.raises(CheckpointError, match=f"holds a run with another {what}"):
        train(changed, recipe, tmp_path, resume=True)
    assert (tmp_path / RESUME_FILE).read_bytes() == before


def test_a_run_of_an_earlier_version_is_resumed(tmp_path: Path, data: Dataset) -> None:
    """Its recipe knows nothing of epochs that are cut short."""
    with interrupting(1):
        assert train(data, BRIEF, tmp_path) is None
    for name in (RESUME_FILE, WEIGHTS_FILE):
        earlier = checkpoint.load_checkpoint(tmp_path, name)
        del earlier.metadata["recipe"]["epoch_steps"]
        checkpoint.save_checkpoint(tmp_path, name, earlier)
    assert finished(data, BRIEF, tmp_path, resume=True).metadata["progress"]["step"] == STEPS


def test_resume_without_an_earlier_run_starts_one(tmp_path: Path, data: Dataset) -> None:
    one = replace(BRIEF, epochs=1)
    finished(data, one, tmp_path / "new", resume=True)
    finished(data, one, tmp_path / "plain")
    assert weights(tmp_path / "new") == weights(tmp_path / "plain")


# --- what it learns and tells --------------------------------------------------------------------


@pytest.mark.parametrize("labels", [("blue", "red"), ("blue", "green", "red")])
def test_it_learns_what_is_easy(tmp_path: Path, labels: tuple[str, ...]) -> None:
    data = drawn_data(tmp_path / "squares", *labels, count=20, validation=0.3)
    done = finished(data, Recipe(epochs=8, batch=8, peak_lr=0.05), tmp_path / "run")
    assert measure_accuracy(done.build_net(), data.validation) >= 0.95
    assert done.metadata["progress"]["history"][-1]["validation_accuracy"] >= 0.95
    task = Task.BINARY if len(labels) == 2 else Task.MULTICLASS
    assert NetConfig.from_dict(done.metadata["net"]).task is task


def test_the_weights_tell_what_they_are(tmp_path: Path, data: Dataset) -> None:
    data = replace(data, test=data.validation)
    done = finished(data, replace(BRIEF, epochs=2), tmp_path)
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
    commit = finished(data, replace(BRIEF, epochs=1), tmp_path / "git").metadata["commit"]
    assert commit == "unknown" or len(commit.removesuffix("-dirty")) == 40
    monkeypatch.setenv("PATH", "")
    assert finished(data, replace(BRIEF, epochs=1), tmp_path / "none").metadata["commit"] == "unknown"


def test_the_training_images_have_zero_mean_and_unit_deviation(tmp_path: Path, data: Dataset) -> None:
    planes = (
        finished(data, replace(BRIEF, epochs=1), tmp_path).build_net().normalize(whole(data.train.pixels))
    )
    torch.testing.assert_close(planes.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(planes.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_a_channel_that_never_changes_does_no_harm(tmp_path: Path, data: Dataset) -> None:
    pixels = whole(data.train.pixels)
    pixels[..., 1] = 0
    data = replace(data, train=replace(data.train, pixels=pixels))
    done = finished(data, replace(BRIEF, epochs=1), tmp_path)
    assert all(tensor.isfinite().all() for tensor in done.tensors.values())


# --- killed ----------------------------------------------------------------------------------------

ENDLESS = 400
"""Epochs: some seconds."""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """SIGKILL at five moments, wherever they fall: also while a file is written."""
    source = draw(tmp_path / "squares", "blue", "red", count=6)
    arguments = ["train", "--data", str(source), "--size", "16", "--epochs", str(ENDLESS)]
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    kills = 0
    for seconds in (0.5, 0.9, 0.3, 0.7, 0.4):
        with started([*arguments, "--out", str(broken), "--resume"]) as process:
            if seen_after(process, f"/{ENDLESS}") and not ended_within(process, seconds):
                process.kill()
                kills += 1
    assert kills >= 3
    step = checkpoint.load_checkpoint(broken, RESUME_FILE).metadata["progress"]["step"]
    assert 0 < step < ENDLESS
    for out in (broken, unbroken):
        with started([*arguments, "--out", str(out), "--resume"]) as process:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said
    assert weights(broken) == weights(unbroken)
    assert not list(broken.glob("*.tmp"))


def started(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fovea", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def seen_after(process: subprocess.Popen[str], text: str) -> bool:
    """Wait until an epoch is told; false when the run ends before."""
    assert process.stdout is not None
    return any(line.startswith("epoch") and text in line for line in process.stdout)


def ended_within(process: subprocess.Popen[str], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


# --- a teacher -----------------------------------------------------------------------------------


def test_a_pupil_learns_what_its_teacher_says_and_not_the_labels(tmp_path: Path) -> None:
    """The labels are wrong, and count nothing: what is right can only come from the teacher."""
    data = drawn_data(tmp_path / "squares", count=20, validation=0.3)
    recipe = Recipe(epochs=8, batch=8, peak_lr=0.05, cutout=0)
    teacher = finished(data, recipe, tmp_path / "teacher").build_net()
    wrong = replace(data, train=replace(data.train, targets=(data.train.targets + 1) % 3))
    taught = replace(recipe, teaching=1.0)
    done = train(wrong, taught, tmp_path / "pupil", teacher=teacher)
    assert done is not None
    assert measure_accuracy(done.build_net(), data.validation) >= 0.95
    untaught = finished(wrong, recipe, tmp_path / "untaught")
    assert measure_accuracy(untaught.build_net(), data.validation) <= 0.2


# --- precision and weights of labels -------------------------------------------------------------


def test_bfloat16_is_as_good_and_as_repeatable(tmp_path: Path) -> None:
    data = drawn_data(tmp_path / "squares", count=20, validation=0.3)
    recipe = Recipe(epochs=8, batch=8, peak_lr=0.05, precision=Precision.BFLOAT16)
    done = finished(data, recipe, tmp_path / "run")
    finished(data, recipe, tmp_path / "again")
    assert weights(tmp_path / "run") == weights(tmp_path / "again")
    assert {tensor.dtype for tensor in done.tensors.values()} == {torch.float32, torch.int64}
    assert measure_accuracy(done.build_net(), data.validation) >= 0.95
    finished(data, replace(recipe, precision=Precision.FLOAT32), tmp_path / "full")
    assert weights(tmp_path / "run") != weights(tmp_path / "full")


def test_rare_labels_weigh_more_where_labels_are_unequal(tmp_path: Path) -> None:
    draw(tmp_path / "set", "red", count=64)
    draw(tmp_path / "set", "blue", count=4)
    unequal = load_dataset(tmp_path / "set", size=16, validation=0.1, seed=0)
    found = compute_class_weights(unequal)
    assert found is not None
    blue, red = found.tolist()
    assert blue / red == pytest.approx((unequal.label_counts[1] / unequal.label_counts[0]) ** 0.5)
    assert compute_class_weights(drawn_data(tmp_path / "squares")) is None


def test_labels_are_unequal_from_the_same_ratio_on_for_the_warning_and_the_weights(tmp_path: Path) -> None:
    """Three to one is not yet; one image more is."""
    for red, unequal in ((27, False), (28, True)):
        folder = tmp_path / str(red)
        for seed, (label, count) in enumerate((("red", red), ("blue", 9))):
            draw(folder, label, count=count + round(count * 0.1), seed=seed)
        data = load_dataset(folder, size=16, validation=0.1, seed=0)
        assert data.label_counts == (9, red)
        assert (compute_class_weights(data) is not None) is unequal
        assert any("labels are unequal" in line for line in data.warnings) is unequal


def test_each_epoch_is_told_to_who_watches(tmp_path: Path, data: Dataset) -> None:
    told: list[dict[str, float]] = []
    done = train(data, BRIEF, tmp_path, watch=told.append)
    assert done is not None
    assert told == done.metadata["progress"]["history"]
    assert len(told) == BRIEF.epochs

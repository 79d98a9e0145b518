"""Training runs: repeatable, interruptible, and accurate on easy images."""

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
"""Number of steps that `SHORT_RECIPE` makes with three labels of five images."""


@contextmanager
def interrupt_training(step_number: int, times: int = 1) -> Iterator[None]:
    """Press Ctrl-C `times` times during training step number `step_number`, counted from now on."""
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
    dataset = draw_dataset(tmp_path / "squares")
    return replace(dataset, train=replace(dataset.train, pixels=stack_pixels(dataset.train.pixels)))


def train_to_end(data: Dataset, recipe: Recipe, out: Path, *, resume: bool = False) -> Checkpoint:
    result = train_quietly(data, recipe, out, resume=resume)
    assert result is not None
    return result


def read_weights(folder: Path) -> bytes:
    """Return the bytes of all tensors of a checkpoint."""
    tensors = checkpoint.load_checkpoint(folder).tensors
    return b"".join(tensors[key].numpy().tobytes() for key in sorted(tensors))


# --- repeatable ----------------------------------------------------------------------------------


def test_same_seed_gives_the_same_weights(tmp_path: Path, data: Dataset) -> None:
    first = train_to_end(data, SHORT_RECIPE, tmp_path / "first")
    torch.manual_seed(99)  # the state outside must not matter
    train_to_end(data, SHORT_RECIPE, tmp_path / "again")
    assert read_weights(tmp_path / "first") == read_weights(tmp_path / "again")
    assert all(tensor.isfinite().all() for tensor in first.tensors.values())


def test_another_seed_gives_other_weights(tmp_path: Path, data: Dataset) -> None:
    recipe = replace(SHORT_RECIPE, epochs=1)
    train_to_end(data, recipe, tmp_path / "first")
    train_to_end(data, replace(recipe, seed=1), tmp_path / "other")
    assert read_weights(tmp_path / "first") != read_weights(tmp_path / "other")


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_resumed_run_equals_an_uninterrupted_run(tmp_path: Path, data: Dataset, step: int) -> None:
    uninterrupted = train_to_end(data, SHORT_RECIPE, tmp_path / "unbroken")
    with interrupt_training(step):
        assert train_quietly(data, SHORT_RECIPE, tmp_path / "broken") is None
    assert checkpoint.load_checkpoint(tmp_path / "broken").metadata["progress"]["step"] == step
    resumed = train_to_end(data, SHORT_RECIPE, tmp_path / "broken", resume=True)
    assert read_weights(tmp_path / "broken") == read_weights(tmp_path / "unbroken")
    fields = ("epoch", "loss", "train_accuracy", "validation_accuracy")
    histories = [
        [[epoch[field] for field in fields] for epoch in run.metadata["progress"]["history"]]
        for run in (resumed, uninterrupted)
    ]
    assert histories[0] == histories[1]
    assert len(histories[0]) == SHORT_RECIPE.epochs


def test_run_can_be_interrupted_twice(tmp_path: Path, data: Dataset) -> None:
    train_to_end(data, SHORT_RECIPE, tmp_path / "unbroken")
    with interrupt_training(1):
        assert train_quietly(data, SHORT_RECIPE, tmp_path / "broken") is None
    with interrupt_training(3):
        assert train_quietly(data, SHORT_RECIPE, tmp_path / "broken", resume=True) is None
    assert checkpoint.load_checkpoint(tmp_path / "broken").metadata["progress"]["step"] == 4
    train_to_end(data, SHORT_RECIPE, tmp_path / "broken", resume=True)
    assert read_weights(tmp_path / "broken") == read_weights(tmp_path / "unbroken")


def test_second_ctrl_c_ends_the_run_at_once(tmp_path: Path, data: Dataset) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupt_training(2, times=2):
        train_quietly(data, SHORT_RECIPE, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run").exists()


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, data: Dataset) -> None:
    recipe = replace(SHORT_RECIPE, epochs=1)
    result = train_to_end(data, recipe, tmp_path)
    before = read_weights(tmp_path)
    assert train_to_end(data, recipe, tmp_path, resume=True).metadata == result.metadata
    assert read_weights(tmp_path) == before


# --- existing runs -------------------------------------------------------------------------------


def test_existing_run_is_not_overwritten(tmp_path: Path, data: Dataset) -> None:
    recipe = replace(SHORT_RECIPE, epochs=1)
    train_to_end(data, recipe, tmp_path)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()
    with pytest.raises(CheckpointError, match="holds a run already; pass --resume to continue it"):
        train_quietly(data, recipe, tmp_path)
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
    ("change", "changed_part"),
    [
        (change_recipe, "recipe"),
        (change_labels, "labels"),
        (change_pixels, "net"),
        (remove_images, "data"),
    ],
)
def test_resuming_a_different_run_is_refused(
    tmp_path: Path, data: Dataset, change: Any, changed_part: str
) -> None:
    with interrupt_training(1):
        assert train_quietly(data, SHORT_RECIPE, tmp_path) is None
    before = (tmp_path / RESUME_FILE).read_bytes()
    changed_data, recipe = change(data, SHORT_RECIPE)
    with pytest.raises(CheckpointError, match=f"holds a run with another {changed_part}"):
        train_quietly(changed_data, recipe, tmp_path, resume=True)
    assert (tmp_path / RESUME_FILE).read_bytes() == before


def test_run_of_an_earlier_version_is_resumed(tmp_path: Path, data: Dataset) -> None:
    """The recipe of an earlier version has no `epoch_steps`, and its geometry has no steps."""
    with interrupt_training(1):
        assert train_quietly(data, SHORT_RECIPE, tmp_path) is None
    for name in (RESUME_FILE, WEIGHTS_FILE):
        earlier = checkpoint.load_checkpoint(tmp_path, name)
        del earlier.metadata["recipe"]["epoch_steps"]
        size = data.geometry.height
        earlier.metadata["geometry"] = {
            "height": size, "width": size, "resize": "shorter", "resize_to": size,
            "interpolation": "bilinear", "pixel_path": "fast",
        }  # fmt: skip
        checkpoint.save_checkpoint(tmp_path, name, earlier)
    assert train_to_end(data, SHORT_RECIPE, tmp_path, resume=True).metadata["progress"]["step"] == STEPS


def test_resume_without_an_earlier_run_starts_a_new_run(tmp_path: Path, data: Dataset) -> None:
    recipe = replace(SHORT_RECIPE, epochs=1)
    train_to_end(data, recipe, tmp_path / "new", resume=True)
    train_to_end(data, recipe, tmp_path / "plain")
    assert read_weights(tmp_path / "new") == read_weights(tmp_path / "plain")


# --- accuracy and metadata -----------------------------------------------------------------------


@pytest.mark.parametrize("labels", [("blue", "red"), ("blue", "green", "red")])
def test_training_learns_easy_images(tmp_path: Path, labels: tuple[str, ...]) -> None:
    data = draw_dataset(tmp_path / "squares", *labels, count=20, validation=0.3)
    result = train_to_end(data, Recipe(epochs=8, batch=8, peak_lr=0.05), tmp_path / "run")
    assert measure_accuracy(result.build_net(), data.validation) >= 0.95
    assert result.metadata["progress"]["history"][-1]["validation_accuracy"] >= 0.95
    task = Task.BINARY if len(labels) == 2 else Task.MULTICLASS
    assert NetConfig.from_dict(result.metadata["net"]).task is task


def test_weights_file_contains_the_run_metadata(tmp_path: Path, data: Dataset) -> None:
    data = replace(data, test=data.validation)
    result = train_to_end(data, replace(SHORT_RECIPE, epochs=2), tmp_path)
    metadata = checkpoint.load_checkpoint(tmp_path).metadata
    assert metadata == checkpoint.load_checkpoint(tmp_path, RESUME_FILE).metadata
    assert metadata["labels"] == ["blue", "green", "red"]
    assert metadata["recipe"] == {**metadata["recipe"], "epochs": 2, "batch": 5, "seed": 0}
    assert metadata["data"] == {"name": "squares", "train": 12, "validation": 3, "conformal": 0, "test": 3}
    assert (metadata["source"], metadata["command"]) == ("squares", "fovea train")
    history = metadata["progress"]["history"]
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    assert history[-1]["validation_accuracy"] == measure_accuracy(result.build_net(), data.validation)


def test_commit_is_recorded_if_git_is_available(
    tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = train_to_end(data, replace(SHORT_RECIPE, epochs=1), tmp_path / "git").metadata["commit"]
    assert commit == "unknown" or len(commit.removesuffix("-dirty")) == 40
    monkeypatch.setenv("PATH", "")
    assert (
        train_to_end(data, replace(SHORT_RECIPE, epochs=1), tmp_path / "none").metadata["commit"] == "unknown"
    )


def test_training_images_are_normalised_by_the_network(tmp_path: Path, data: Dataset) -> None:
    planes = (
        train_to_end(data, replace(SHORT_RECIPE, epochs=1), tmp_path)
        .build_net()
        .normalize(stack_pixels(data.train.pixels))
    )
    torch.testing.assert_close(planes.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(planes.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_constant_channel_gives_finite_weights(tmp_path: Path, data: Dataset) -> None:
    pixels = stack_pixels(data.train.pixels)
    pixels[..., 1] = 0
    data = replace(data, train=replace(data.train, pixels=pixels))
    result = train_to_end(data, replace(SHORT_RECIPE, epochs=1), tmp_path)
    assert all(tensor.isfinite().all() for tensor in result.tensors.values())


# --- killed runs -----------------------------------------------------------------------------------

KILLED_RUN_EPOCHS = 80
"""Number of epochs that take some seconds."""


@pytest.mark.long
def test_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL comes at three moments, which may be while a file is written."""
    source = draw_images(tmp_path / "squares", "blue", "red", count=6)
    arguments = ["train", "--data", str(source), "--size", "16", "--epochs", str(KILLED_RUN_EPOCHS)]
    killed_folder, uninterrupted_folder = tmp_path / "broken", tmp_path / "unbroken"
    kills = 0
    for seconds in (0.5, 0.3, 0.4):
        with start_command([*arguments, "--out", str(killed_folder), "--resume"]) as process:
            if wait_for_epoch(process, f"/{KILLED_RUN_EPOCHS}") and not wait_for_end(process, seconds):
                process.kill()
                kills += 1
    assert kills >= 2
    step = checkpoint.load_checkpoint(killed_folder, RESUME_FILE).metadata["progress"]["step"]
    assert 0 < step < KILLED_RUN_EPOCHS
    for out in (killed_folder, uninterrupted_folder):
        with start_command([*arguments, "--out", str(out), "--resume"]) as process:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    assert read_weights(killed_folder) == read_weights(uninterrupted_folder)
    assert not list(killed_folder.glob("*.tmp"))


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
    """Wait until an epoch is printed; return false if the run ends before."""
    assert process.stdout is not None
    return any(line.startswith("epoch") and text in line for line in process.stdout)


def wait_for_end(process: subprocess.Popen[str], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


# --- teachers ------------------------------------------------------------------------------------


def test_student_learns_from_the_teacher_not_the_labels(tmp_path: Path) -> None:
    """The labels are wrong and have no weight, so accuracy can only come from the teacher."""
    data = draw_dataset(tmp_path / "squares", count=20, validation=0.3)
    recipe = Recipe(epochs=8, batch=8, peak_lr=0.05, cutout=0)
    teacher = train_to_end(data, recipe, tmp_path / "teacher").build_net()
    mislabelled_data = replace(data, train=replace(data.train, targets=(data.train.targets + 1) % 3))
    teaching_recipe = replace(recipe, teaching=1.0)
    result = train_quietly(mislabelled_data, teaching_recipe, tmp_path / "pupil", teacher=teacher)
    assert result is not None
    assert measure_accuracy(result.build_net(), data.validation) >= 0.95
    result_without_teacher = train_to_end(mislabelled_data, recipe, tmp_path / "untaught")
    assert measure_accuracy(result_without_teacher.build_net(), data.validation) <= 0.2


# --- precision and weights of labels -------------------------------------------------------------


def test_bfloat16_training_is_accurate_and_repeatable(tmp_path: Path) -> None:
    data = draw_dataset(tmp_path / "squares", count=20, validation=0.3)
    recipe = Recipe(epochs=8, batch=8, peak_lr=0.05, precision=Precision.BFLOAT16)
    result = train_to_end(data, recipe, tmp_path / "run")
    train_to_end(data, recipe, tmp_path / "again")
    assert read_weights(tmp_path / "run") == read_weights(tmp_path / "again")
    assert {tensor.dtype for tensor in result.tensors.values()} == {torch.float32, torch.int64}
    assert measure_accuracy(result.build_net(), data.validation) >= 0.95
    train_to_end(data, replace(recipe, precision=Precision.FLOAT32), tmp_path / "full")
    assert read_weights(tmp_path / "run") != read_weights(tmp_path / "full")


def test_rare_labels_get_larger_weights(tmp_path: Path) -> None:
    draw_images(tmp_path / "set", "red", count=64)
    draw_images(tmp_path / "set", "blue", count=4)
    data = load_dataset(tmp_path / "set", size=16, validation=0.1, seed=0)
    weights = compute_class_weights(data)
    assert weights is not None
    blue, red = weights.tolist()
    assert blue / red == pytest.approx((data.label_counts[1] / data.label_counts[0]) ** 0.5)
    assert compute_class_weights(draw_dataset(tmp_path / "squares")) is None


def test_warning_and_weights_share_the_imbalance_ratio(tmp_path: Path) -> None:
    """Three to one is balanced; with one image more, the labels are imbalanced."""
    for red_count, is_imbalanced in ((27, False), (28, True)):
        folder = tmp_path / str(red_count)
        for seed, (label, count) in enumerate((("red", red_count), ("blue", 9))):
            draw_images(folder, label, count=count + round(count * 0.1), seed=seed)
        data = load_dataset(folder, size=16, validation=0.1, seed=0)
        assert data.label_counts == (9, red_count)
        assert (compute_class_weights(data) is not None) is is_imbalanced
        assert any("labels are imbalanced" in line for line in data.warnings) is is_imbalanced


def test_callback_receives_every_epoch(tmp_path: Path, data: Dataset) -> None:
    entries: list[dict[str, float]] = []
    result = train_quietly(data, SHORT_RECIPE, tmp_path, on_epoch=entries.append)
    assert result is not None
    assert entries == result.metadata["progress"]["history"]
    assert len(entries) == SHORT_RECIPE.epochs

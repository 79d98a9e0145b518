"""Logits of a teacher for the training images: computed once, stored, and computed again if needed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fovea.model.data.dataset import Dataset
from fovea.model.evaluation import evaluate
from fovea.model.networks.network import Net
from fovea.model.recipe import Recipe
from fovea.model.training.batches import Batches, Views
from fovea.model.training.distillation import LOGITS_PATTERN, average_logits, compute_teacher_logits
from fovea.service.atomic_files import WriteError
from tests.training import draw_dataset, limit_file_size, make_net, stack_pixels

RECIPE = Recipe(epochs=10, batch=5, views=4, teaching=0.5)
TRAINING_IMAGES = 12
"""Number of images to train on."""


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return draw_dataset(tmp_path / "squares")


@pytest.fixture
def teacher(data: Dataset) -> Net:
    return make_net(data, replace(RECIPE, seed=7)).eval()


def run_teacher(
    teacher: Net, data: Dataset, folder: Path, recipe: Recipe = RECIPE
) -> npt.NDArray[np.float16]:
    student_config = make_net(data, recipe).config
    return compute_teacher_logits(
        [teacher], student_config, data, recipe, folder, Console(file=io.StringIO())
    )


@contextmanager
def count_images(interrupt_at: int = 0) -> Iterator[list[int]]:
    """Record the batch size of each forward pass; pass number `interrupt_at` raises `KeyboardInterrupt`."""
    batch_sizes: list[int] = []

    def record_batch(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, Net):
            batch_sizes.append(len(inputs[0]))
            if len(batch_sizes) == interrupt_at:
                raise KeyboardInterrupt

    handle = register_module_forward_pre_hook(record_batch)
    try:
        yield batch_sizes
    finally:
        handle.remove()


def test_teacher_sees_every_view_of_every_image_once(tmp_path: Path, data: Dataset, teacher: Net) -> None:
    with count_images() as batch_sizes:
        logits = run_teacher(teacher, data, tmp_path)
    # a batch for each of four views, and one for its mirror image
    assert (batch_sizes, logits.shape) == ([TRAINING_IMAGES] * 8, (4, TRAINING_IMAGES, 3))
    views = Views(data.train, RECIPE)
    for view in range(4):
        expected = average_logits([teacher], views.get_pixels(view, torch.arange(TRAINING_IMAGES)), RECIPE)
        torch.testing.assert_close(torch.tensor(logits[view]).float(), expected, atol=2e-3, rtol=2e-3)
    assert len({logits[view].tobytes() for view in range(4)}) == 4


def test_logits_average_all_teachers_and_mirror_images(data: Dataset, teacher: Net) -> None:
    other, pixels = (
        make_net(data, replace(RECIPE, seed=8)).eval(),
        data.train.pixels[torch.arange(TRAINING_IMAGES)],
    )
    first, second, mirrored, other_mirrored = (
        evaluate.compute_logits(net, images)
        for images in (pixels, pixels.flip(2))
        for net in (teacher, other)
    )
    assert not torch.allclose(first, mirrored, atol=1e-3)
    two_way_mean = average_logits([teacher, other], pixels, RECIPE)
    torch.testing.assert_close(two_way_mean, (first + second + mirrored + other_mirrored) / 4)
    one_way_mean = average_logits([teacher, other], pixels, replace(RECIPE, flip=False))
    torch.testing.assert_close(one_way_mean, (first + second) / 2)


def test_batches_carry_the_logits_of_their_own_images(tmp_path: Path, data: Dataset, teacher: Net) -> None:
    """Without cutout, the teacher gives the same logits for the pixels of the batch."""
    recipe = replace(RECIPE, cutout=0.0)
    batches = Batches(data, recipe, (0.5, 0.5, 0.5), run_teacher(teacher, data, tmp_path, recipe))
    for number in (0, 1, 7, 13, 2 * recipe.epochs - 1):
        batch = batches.get(number)
        assert batch.teacher_logits is not None
        expected = average_logits([teacher], batch.pixels, recipe)
        torch.testing.assert_close(batch.teacher_logits.float(), expected, atol=2e-3, rtol=2e-3)
    batches.close()


def test_views_repeat_only_with_a_teacher(data: Dataset) -> None:
    rows = torch.arange(TRAINING_IMAGES)
    teaching_views, plain_views = Views(data.train, RECIPE), Views(data.train, replace(RECIPE, teaching=0.0))
    assert (teaching_views.count, plain_views.count) == (4, 10)
    assert Views(data.train, replace(RECIPE, epochs=2)).count == 2
    assert len({plain_views.get_pixels(view, rows).numpy().tobytes() for view in range(10)}) == 10
    for view in (3, 0, 2):  # in any order, for any of them
        assert torch.equal(
            teaching_views.get_pixels(view, rows.flip(0)).flip(0), plain_views.get_pixels(view, rows)
        )
    unshifted_views = Views(data.train, replace(RECIPE, translate=0.0))
    pixels = stack_pixels(data.train.pixels)
    for view in range(4):
        is_mirrored = (rows + view) % 2 == 0
        expected = torch.where(is_mirrored[:, None, None, None], pixels.flip(2), pixels)
        assert torch.equal(unshifted_views.get_pixels(view, rows), expected)


def test_stored_logits_are_reused_except_partial_views(tmp_path: Path, data: Dataset, teacher: Net) -> None:
    with pytest.raises(KeyboardInterrupt), count_images(interrupt_at=5):
        run_teacher(teacher, data, tmp_path / "run")
    (file,) = (tmp_path / "run").glob(LOGITS_PATTERN)
    with file.open("ab") as stream:
        stream.write(b"half a view")
    with count_images() as batch_sizes:
        logits = run_teacher(teacher, data, tmp_path / "run")
    assert batch_sizes == [TRAINING_IMAGES] * 4
    assert np.array_equal(logits, run_teacher(teacher, data, tmp_path / "other"))
    with count_images() as batch_sizes:
        assert np.array_equal(logits, run_teacher(teacher, data, tmp_path / "run"))
    assert batch_sizes == []


@pytest.mark.parametrize("changed_part", ["teacher", "seed", "translate", "images"])
def test_logits_of_another_setup_are_not_reused(
    tmp_path: Path, data: Dataset, teacher: Net, changed_part: str
) -> None:
    first = run_teacher(teacher, data, tmp_path / "run").copy()
    recipe = RECIPE
    if changed_part == "teacher":
        teacher = make_net(data, replace(RECIPE, seed=8)).eval()
    elif changed_part == "images":
        data = replace(data, train=replace(data.train, pixels=255 - stack_pixels(data.train.pixels)))
    else:
        recipe = replace(RECIPE, seed=3) if changed_part == "seed" else replace(RECIPE, translate=0.3)
    other = run_teacher(teacher, data, tmp_path / "run", recipe)
    assert not np.array_equal(other, first)
    assert len(list((tmp_path / "run").glob(LOGITS_PATTERN))) == 1  # the earlier logits are removed


def test_full_disk_is_reported_for_teacher_logits(tmp_path: Path, data: Dataset, teacher: Net) -> None:
    expect_error = pytest.raises(WriteError, match=r"cannot store the teacher's logits in .*: File too large")
    with limit_file_size(2 * TRAINING_IMAGES * 3 + 10), expect_error:
        run_teacher(teacher, data, tmp_path / "run")

"""What a teacher says of the training images: asked once, kept, and asked again where it must be."""

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

from fovea.model.atomic_files import WriteError
from fovea.model.data.dataset import Dataset
from fovea.model.evaluation import evaluate
from fovea.model.networks.network import Net
from fovea.model.recipe import Recipe
from fovea.model.training.batches import Batches, Views
from fovea.model.training.distillation import LOGITS_PATTERN, average_logits, compute_teacher_logits
from tests.training import draw_dataset, limit_file_size, make_net, stack_pixels

RECIPE = Recipe(epochs=10, batch=5, views=4, teaching=0.5)
LEFT = 12
"""Images of the set to train on."""


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return draw_dataset(tmp_path / "squares")


@pytest.fixture
def teacher(data: Dataset) -> Net:
    return make_net(data, replace(RECIPE, seed=7)).eval()


def ask_teacher(
    teacher: Net, data: Dataset, folder: Path, recipe: Recipe = RECIPE
) -> npt.NDArray[np.float16]:
    student_config = make_net(data, recipe).config
    return compute_teacher_logits(
        [teacher], student_config, data, recipe, folder, Console(file=io.StringIO())
    )


@contextmanager
def count_images(interrupt_at: int = 0) -> Iterator[list[int]]:
    """How many images each forward pass of a network sees; one of them can be the last."""
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


def test_the_teacher_is_asked_of_every_view_of_every_image_once(
    tmp_path: Path, data: Dataset, teacher: Net
) -> None:
    with count_images() as seen:
        answers = ask_teacher(teacher, data, tmp_path)
    assert (seen, answers.shape) == ([LEFT] * 8, (4, LEFT, 3))  # each view and its mirror image
    views = Views(data.train, RECIPE)
    for view in range(4):
        said = average_logits([teacher], views.get_pixels(view, torch.arange(LEFT)), RECIPE)
        torch.testing.assert_close(torch.tensor(answers[view]).float(), said, atol=2e-3, rtol=2e-3)
    assert len({answers[view].tobytes() for view in range(4)}) == 4


def test_the_answer_is_the_mean_of_all_teachers_and_both_ways_round(data: Dataset, teacher: Net) -> None:
    other, pixels = make_net(data, replace(RECIPE, seed=8)).eval(), data.train.pixels[torch.arange(LEFT)]
    first, second, mirrored, other_mirrored = (
        evaluate.compute_logits(net, seen) for seen in (pixels, pixels.flip(2)) for net in (teacher, other)
    )
    assert not torch.allclose(first, mirrored, atol=1e-3)
    both = average_logits([teacher, other], pixels, RECIPE)
    torch.testing.assert_close(both, (first + second + mirrored + other_mirrored) / 4)
    one_way = average_logits([teacher, other], pixels, replace(RECIPE, flip=False))
    torch.testing.assert_close(one_way, (first + second) / 2)


def test_each_batch_brings_the_answers_to_its_own_images(tmp_path: Path, data: Dataset, teacher: Net) -> None:
    """Without a blank square the teacher, asked of the batch itself, says the same."""
    recipe = replace(RECIPE, cutout=0.0)
    batches = Batches(data, recipe, (0.5, 0.5, 0.5), ask_teacher(teacher, data, tmp_path, recipe))
    for number in (0, 1, 7, 13, 2 * recipe.epochs - 1):
        batch = batches.get(number)
        assert batch.teacher_logits is not None
        said = average_logits([teacher], batch.pixels, recipe)
        torch.testing.assert_close(batch.teacher_logits.float(), said, atol=2e-3, rtol=2e-3)
    batches.close()


def test_views_come_again_with_a_teacher_and_never_without(data: Dataset) -> None:
    every = torch.arange(LEFT)
    taught, alone = Views(data.train, RECIPE), Views(data.train, replace(RECIPE, teaching=0.0))
    assert (taught.count, alone.count) == (4, 10)
    assert Views(data.train, replace(RECIPE, epochs=2)).count == 2
    assert len({alone.get_pixels(view, every).numpy().tobytes() for view in range(10)}) == 10
    for view in (3, 0, 2):  # in any order, for any of them
        assert torch.equal(taught.get_pixels(view, every.flip(0)).flip(0), alone.get_pixels(view, every))
    still = Views(data.train, replace(RECIPE, translate=0.0))
    pixels = stack_pixels(data.train.pixels)
    for view in range(4):
        mirrored = (every + view) % 2 == 0
        expected = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
        assert torch.equal(still.get_pixels(view, every), expected)


def test_answers_are_kept_and_half_a_view_is_asked_again(tmp_path: Path, data: Dataset, teacher: Net) -> None:
    with pytest.raises(KeyboardInterrupt), count_images(interrupt_at=5):
        ask_teacher(teacher, data, tmp_path / "run")
    (file,) = (tmp_path / "run").glob(LOGITS_PATTERN)
    with file.open("ab") as opened:
        opened.write(b"half a view")
    with count_images() as seen:
        again = ask_teacher(teacher, data, tmp_path / "run")
    assert seen == [LEFT] * 4
    assert np.array_equal(again, ask_teacher(teacher, data, tmp_path / "other"))
    with count_images() as seen:
        assert np.array_equal(again, ask_teacher(teacher, data, tmp_path / "run"))
    assert seen == []


@pytest.mark.parametrize("changed", ["teacher", "seed", "translate", "images"])
def test_answers_to_something_else_are_not_taken(
    tmp_path: Path, data: Dataset, teacher: Net, changed: str
) -> None:
    first = ask_teacher(teacher, data, tmp_path / "run").copy()
    recipe = RECIPE
    if changed == "teacher":
        teacher = make_net(data, replace(RECIPE, seed=8)).eval()
    elif changed == "images":
        data = replace(data, train=replace(data.train, pixels=255 - stack_pixels(data.train.pixels)))
    else:
        recipe = replace(RECIPE, seed=3) if changed == "seed" else replace(RECIPE, translate=0.3)
    other = ask_teacher(teacher, data, tmp_path / "run", recipe)
    assert not np.array_equal(other, first)
    assert len(list((tmp_path / "run").glob(LOGITS_PATTERN))) == 1  # the earlier ones are of no more use


def test_answers_that_find_no_room_say_so(tmp_path: Path, data: Dataset, teacher: Net) -> None:
    refused = pytest.raises(WriteError, match=r"cannot store the teacher's logits in .*: File too large")
    with limit_file_size(2 * LEFT * 3 + 10), refused:
        ask_teacher(teacher, data, tmp_path / "run")

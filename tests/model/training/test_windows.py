"""Augmentation by windows: crops, wide views, colours, blur and JPEG."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fovea.model.data.dataset import load_dataset
from fovea.model.data.examples import Examples
from fovea.model.recipe import Augmentation, Recipe
from fovea.model.training import windows
from fovea.model.training.batches import Batches, Views
from tests.training import draw_images

DRAWS = torch.rand(2000, 5, generator=torch.Generator().manual_seed(0))


def make_ramp(side: int = 32) -> Tensor:
    """Return an image whose red is the column and whose green is the row, uint8 (1, side, side, 3)."""
    steps = torch.arange(side) * (256 // side)
    red, green = steps.expand(side, side), steps[:, None].expand(side, side)
    return torch.stack([red, green, torch.full_like(red, 77)], dim=-1).to(torch.uint8)[None]


def make_noise(count: int) -> Tensor:
    """Return random images, uint8 (count, 16, 16, 3)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 16, 16, 3), generator=generator).to(torch.uint8)


def split_windows(*, wide: bool) -> tuple[Tensor, Tensor]:
    """Return centres and sides of random windows, float32 (N, 2) each."""
    result = windows.make_windows(DRAWS, wide=wide)
    return result[:, :2], result[:, 2:]


def test_crops_lie_inside_the_image() -> None:
    centres, sides = split_windows(wide=False)
    assert (centres - sides / 2 > -1e-5).all()
    assert (centres + sides / 2 < 1 + 1e-5).all()
    area, ratio = sides.prod(dim=1), sides[:, 0] / sides[:, 1]
    assert 0.3 < area.min() < 0.4 and area.max() <= 1
    assert 0.74 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.35
    assert centres.min() < 0.35 and centres.max() > 0.65


def test_half_of_the_wide_windows_contain_the_image() -> None:
    centres, sides = split_windows(wide=True)
    contains = ((centres - sides / 2 < 1e-5) & (centres + sides / 2 > 1 - 1e-5)).all(dim=1)
    assert 0.45 < contains.float().mean() < 0.55
    assert 3.8 < sides.max() < 4.7
    assert 1.8 < sides[contains].prod(dim=1).sqrt().median() < 2.2  # uniform in the logarithm


def test_whole_window_is_the_image() -> None:
    planes, inside = windows.cut_windows(make_ramp(), torch.tensor([[0.5, 0.5, 1.0, 1.0]]), 32)
    assert torch.equal(windows.to_pixels(planes), make_ramp())
    assert inside.all()


def test_window_is_the_part_at_its_place() -> None:
    planes, _ = windows.cut_windows(make_ramp(), torch.tensor([[0.75, 0.25, 0.5, 0.5]]), 16)
    assert torch.equal(windows.to_pixels(planes), make_ramp()[:, :16, 16:])


def test_wide_window_shows_the_image_small_and_says_where() -> None:
    planes, inside = windows.cut_windows(make_ramp(), torch.tensor([[0.5, 0.5, 2.0, 2.0]]), 32)
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[8:24, 8:24] = True
    assert torch.equal(inside[0], expected)
    # halved before it is sampled: every pixel is the mean of four
    mean = make_ramp().float().unfold(1, 2, 2).unfold(2, 2, 2).mean(dim=(-1, -2))
    assert torch.allclose(planes[0, :, 8:24, 8:24], mean[0].permute(2, 0, 1), atol=1e-4)


def test_image_in_a_wide_window_is_the_mean_of_all_its_pixels() -> None:
    noise = make_noise(1)
    planes, inside = windows.cut_windows(noise, torch.tensor([[0.5, 0.5, 4.0, 4.0]]), 16)
    mean = noise.float().unfold(1, 4, 4).unfold(2, 4, 4).mean(dim=(-1, -2))  # 16 pixels each
    assert torch.allclose(planes[0][:, inside[0]], mean[0].permute(2, 0, 1).flatten(1), atol=1e-3)


def test_colours_vary_around_the_image() -> None:
    planes = make_ramp().permute(0, 3, 1, 2).float().expand(3, -1, -1, -1)
    middle = torch.full((3, 3), 0.5)
    assert torch.allclose(windows.vary_colours(planes, middle), planes)
    draws = middle.clone()
    draws[0, 0], draws[1, 1], draws[2, 2] = 0.0, 1.0, 1.0
    pale, contrasting, bright = windows.vary_colours(planes, draws)
    assert (pale.amax(dim=0) - pale.amin(dim=0)).mean() < 0.7 * (
        planes[0].amax(dim=0) - planes[0].amin(dim=0)
    ).mean()
    assert math.isclose(float(contrasting.std() / planes[0].std()), 1.3, rel_tol=1e-3)
    assert torch.allclose(bright, planes[0] + 40)


def test_a_quarter_is_blurred_and_a_quarter_is_compressed() -> None:
    random = make_noise(8)
    draws = (torch.arange(8) + 0.5) / 8  # the first two are below a quarter
    planes = random.permute(0, 3, 1, 2).float()
    blurred = windows.blur_some(planes.clone(), draws)
    compressed = windows.compress_some(random.clone(), draws)
    assert [not torch.equal(*pair) for pair in zip(blurred, planes, strict=True)] == [True] * 2 + [False] * 6
    assert [not torch.equal(*pair) for pair in zip(compressed, random, strict=True)] == [True] * 2 + [
        False
    ] * 6
    assert blurred[0].std() < 0.5 * planes[0].std()


@pytest.mark.parametrize("augmentation", [Augmentation.CROP, Augmentation.PHOTO])
def test_views_depend_on_seed_view_and_image_alone(augmentation: Augmentation) -> None:
    random = torch.randint(0, 256, (12, 16, 16, 3), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )
    examples = Examples(random, torch.zeros(12, dtype=torch.int64))
    recipe = Recipe(augmentation=augmentation)
    rows = torch.arange(12)
    first = Views(examples, recipe).get_pixels(3, rows)
    assert first.shape == (12, 16, 16, 3) and first.dtype == torch.uint8
    assert torch.equal(Views(examples, recipe).get_pixels(3, rows.flip(0)).flip(0), first)
    assert not torch.equal(Views(examples, recipe).get_pixels(5, rows), first)
    assert not torch.equal(Views(examples, replace(recipe, seed=1)).get_pixels(3, rows), first)
    assert Views(examples, recipe).get_pixels(3, rows, 8).shape == (12, 8, 8, 3)


def test_wide_views_are_filled_with_other_images() -> None:
    colours = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250]], dtype=torch.uint8)
    examples = Examples(colours[:, None, None].repeat(100, 32, 32, 1), torch.zeros(300, dtype=torch.int64))
    result = Views(examples, Recipe(augmentation=Augmentation.PHOTO)).get_pixels(0, torch.arange(300))
    strongest = result.float().argmax(dim=3).flatten(1)  # (300, pixels)
    own = (strongest == (torch.arange(300) % 3)[:, None]).float().mean(dim=1)
    assert 0.2 < (own < 0.9).float().mean() < 0.5  # two thirds of the half that is wide have another colour
    assert own.min() < 0.25


def test_images_grow_during_the_first_epochs(tmp_path: Path) -> None:
    recipe = Recipe(epochs=10, batch=5, augmentation=Augmentation.CROP, growth=0.6)
    assert [recipe.get_side(epoch, 64) for epoch in range(10)] == [32, 40, 40, 48, 56, 56, 64, 64, 64, 64]
    assert replace(recipe, growth=0.0).get_side(0, 64) == 64
    assert [recipe.get_side(epoch, 24) for epoch in (0, 9)] == [16, 24]
    assert recipe.get_side(0, 16) == 16  # no network takes smaller ones
    data = load_dataset(draw_images(tmp_path, count=10), size=32, validation=0.2, seed=0)
    batches = Batches(data, recipe, (0.5, 0.5, 0.5), None)
    try:
        sides = [batches.get(epoch * batches.steps).pixels.shape[1] for epoch in range(10)]
    finally:
        batches.close()
    assert sides == [16, 16, 24, 24, 24, 32, 32, 32, 32, 32]

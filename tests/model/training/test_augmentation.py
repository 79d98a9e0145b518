"""Augmentation of whole batches: what may change, and what not."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fovea.model.training import augmentation

BLACK = torch.zeros(3, dtype=torch.uint8)


def images(count: int = 40, height: int = 12, width: int = 10) -> Tensor:
    """Images of which no two pixels are alike."""
    numbers = torch.arange(count * height * width).view(count, height, width, 1)
    return torch.cat([numbers // 65536, numbers // 256 % 256, numbers % 256], dim=-1).to(torch.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flips(count: int, value: bool) -> Tensor:
    return torch.full((count,), value)


def change(pixels: Tensor, flip: Tensor | None = None, *, shift: int = 0) -> Tensor:
    """`augment.moved`, by as much as a generator says."""
    flip = flips(len(pixels), False) if flip is None else flip
    by = torch.randint(-shift, shift + 1, (len(pixels), 2), generator=generator())
    return augmentation.flip_and_shift(pixels, flip, by)


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
    assert torch.equal(change(pixels), pixels)


def test_a_mirrored_image_is_exactly_mirrored() -> None:
    pixels = images()
    flip = torch.arange(40) % 3 == 0
    result = change(pixels, flip)
    assert torch.equal(result[flip], pixels[flip].flip(2))
    assert torch.equal(result[~flip], pixels[~flip])


def test_each_image_moves_by_its_own_shift_with_its_edge_mirrored() -> None:
    by = torch.cartesian_prod(torch.arange(-3, 4), torch.arange(-3, 4))
    pixels = images(len(by))
    result = augmentation.flip_and_shift(pixels, flips(len(by), False), by)
    found = [shifts(image, moved_image) for image, moved_image in zip(pixels, result, strict=True)]
    assert found == [[tuple(shift)] for shift in by.tolist()]


def test_a_mirrored_image_moves_too_and_keeps_its_own_pixels() -> None:
    pixels = images()
    result = change(pixels, flips(40, True), shift=3)
    assert all(shifts(image.flip(1), other) for image, other in zip(pixels, result, strict=True))
    for image, other in zip(pixels, result, strict=True):
        own = set(map(tuple, image.view(-1, 3).tolist()))
        assert set(map(tuple, other.view(-1, 3).tolist())) <= own


def test_holes_are_decided_by_their_generator() -> None:
    first, again, other = (
        augmentation.apply_cutout(images(), 4, BLACK, generator(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_hole_is_a_square_of_the_given_colour_and_nothing_else_changes() -> None:
    pixels = images(400, 24, 20) // 2 + 100
    result = augmentation.apply_cutout(pixels, 6, BLACK, generator())
    blank = (result == BLACK).all(dim=3)  # (B, H, W)
    assert torch.equal(result[~blank], pixels[~blank])
    heights, widths = blank.any(dim=2).sum(dim=1), blank.any(dim=1).sum(dim=1)
    assert torch.equal(blank.sum(dim=(1, 2)), heights * widths)  # a rectangle
    assert int(heights.max()) == int(widths.max()) == 6
    assert int(heights.min()) >= 3 and int(widths.min()) >= 3  # its centre is in the image
    assert len({tuple(map(tuple, one.nonzero().tolist())) for one in blank}) > 200
    assert (blank.float().mean(dim=0) > 0.01).all()  # no pixel is spared

"""Augmentation of whole batches: what may change, and what not."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fovea.model.training import augmentation

BLACK = torch.zeros(3, dtype=torch.uint8)


def make_images(count: int = 40, height: int = 12, width: int = 10) -> Tensor:
    """Images of which no two pixels are alike."""
    numbers = torch.arange(count * height * width).view(count, height, width, 1)
    return torch.cat([numbers // 65536, numbers // 256 % 256, numbers % 256], dim=-1).to(torch.uint8)


def make_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_flips(count: int, value: bool) -> Tensor:
    return torch.full((count,), value)


def move_images(pixels: Tensor, flip: Tensor | None = None, *, shift: int = 0) -> Tensor:
    """`augment.moved`, by as much as a generator says."""
    flip = make_flips(len(pixels), False) if flip is None else flip
    offsets = torch.randint(-shift, shift + 1, (len(pixels), 2), generator=make_generator())
    return augmentation.flip_and_shift(pixels, flip, offsets)


def shift_by_hand(image: Tensor, down: int, across: int) -> Tensor:
    """What a shift must give, by NumPy's own padding."""
    height, width, _ = image.shape
    padded_image = np.pad(image.numpy(), ((3, 3), (3, 3), (0, 0)), mode="reflect")
    return torch.from_numpy(
        padded_image[3 + down : 3 + down + height, 3 + across : 3 + across + width].copy()
    )


def find_shifts(image: Tensor, result: Tensor) -> list[tuple[int, int]]:
    """By how much `image` must have been moved to give `result`."""
    span = range(-3, 4)
    return [(d, a) for d in span for a in span if torch.equal(result, shift_by_hand(image, d, a))]


def test_without_shift_or_mirror_nothing_changes() -> None:
    pixels = make_images()
    assert torch.equal(move_images(pixels), pixels)


def test_a_mirrored_image_is_exactly_mirrored() -> None:
    pixels = make_images()
    flip = torch.arange(40) % 3 == 0
    result = move_images(pixels, flip)
    assert torch.equal(result[flip], pixels[flip].flip(2))
    assert torch.equal(result[~flip], pixels[~flip])


def test_each_image_moves_by_its_own_shift_with_its_edge_mirrored() -> None:
    by = torch.cartesian_prod(torch.arange(-3, 4), torch.arange(-3, 4))
    pixels = make_images(len(by))
    result = augmentation.flip_and_shift(pixels, make_flips(len(by), False), by)
    found = [find_shifts(image, moved_image) for image, moved_image in zip(pixels, result, strict=True)]
    assert found == [[tuple(shift)] for shift in by.tolist()]


def test_a_mirrored_image_moves_too_and_keeps_its_own_pixels() -> None:
    pixels = make_images()
    result = move_images(pixels, make_flips(40, True), shift=3)
    assert all(find_shifts(image.flip(1), other) for image, other in zip(pixels, result, strict=True))
    for image, other in zip(pixels, result, strict=True):
        own = set(map(tuple, image.view(-1, 3).tolist()))
        assert set(map(tuple, other.view(-1, 3).tolist())) <= own


def test_holes_are_decided_by_their_generator() -> None:
    first, again, other = (
        augmentation.apply_cutout(make_images(), 4, BLACK, make_generator(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_hole_is_a_square_of_the_given_colour_and_nothing_else_changes() -> None:
    pixels = make_images(400, 24, 20) // 2 + 100
    result = augmentation.apply_cutout(pixels, 6, BLACK, make_generator())
    blank = (result == BLACK).all(dim=3)  # (B, H, W)
    assert torch.equal(result[~blank], pixels[~blank])
    heights, widths = blank.any(dim=2).sum(dim=1), blank.any(dim=1).sum(dim=1)
    assert torch.equal(blank.sum(dim=(1, 2)), heights * widths)  # a rectangle
    assert int(heights.max()) == int(widths.max()) == 6
    assert int(heights.min()) >= 3 and int(widths.min()) >= 3  # its centre is in the image
    assert len({tuple(map(tuple, one.nonzero().tolist())) for one in blank}) > 200
    assert (blank.float().mean(dim=0) > 0.01).all()  # no pixel is spared

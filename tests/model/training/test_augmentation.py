"""Augmentation of whole batches: flips, shifts and cutout."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fovea.model.training import augmentation

BLACK = torch.zeros(3, dtype=torch.uint8)


def make_images(count: int = 40, height: int = 12, width: int = 10) -> Tensor:
    """Return images in which no two pixels are equal."""
    numbers = torch.arange(count * height * width).view(count, height, width, 1)
    return torch.cat([numbers // 65536, numbers // 256 % 256, numbers % 256], dim=-1).to(torch.uint8)


def make_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_flips(count: int, value: bool) -> Tensor:
    return torch.full((count,), value)


def move_images(pixels: Tensor, flip: Tensor | None = None, *, shift: int = 0) -> Tensor:
    """Apply `flip_and_shift` with random offsets of at most `shift`."""
    flip = make_flips(len(pixels), False) if flip is None else flip
    offsets = torch.randint(-shift, shift + 1, (len(pixels), 2), generator=make_generator())
    return augmentation.flip_and_shift(pixels, flip, offsets)


def shift_by_hand(image: Tensor, down: int, across: int) -> Tensor:
    """Return the image after a shift, by means of the padding of NumPy."""
    height, width, _ = image.shape
    padded_image = np.pad(image.numpy(), ((3, 3), (3, 3), (0, 0)), mode="reflect")
    return torch.from_numpy(
        padded_image[3 + down : 3 + down + height, 3 + across : 3 + across + width].copy()
    )


def find_shifts(image: Tensor, result: Tensor) -> list[tuple[int, int]]:
    """Return all shifts of `image` that give `result`."""
    span = range(-3, 4)
    return [
        (down, across)
        for down in span
        for across in span
        if torch.equal(result, shift_by_hand(image, down, across))
    ]


def test_images_without_shift_and_flip_are_unchanged() -> None:
    pixels = make_images()
    assert torch.equal(move_images(pixels), pixels)


def test_flipped_images_are_exactly_mirrored() -> None:
    pixels = make_images()
    flip = torch.arange(40) % 3 == 0
    result = move_images(pixels, flip)
    assert torch.equal(result[flip], pixels[flip].flip(2))
    assert torch.equal(result[~flip], pixels[~flip])


def test_each_image_is_shifted_with_reflected_edges() -> None:
    offsets = torch.cartesian_prod(torch.arange(-3, 4), torch.arange(-3, 4))
    pixels = make_images(len(offsets))
    result = augmentation.flip_and_shift(pixels, make_flips(len(offsets), False), offsets)
    shifts = [find_shifts(image, moved_image) for image, moved_image in zip(pixels, result, strict=True)]
    assert shifts == [[tuple(shift)] for shift in offsets.tolist()]


def test_flipped_images_are_shifted_and_keep_their_pixels() -> None:
    pixels = make_images()
    result = move_images(pixels, make_flips(40, True), shift=3)
    assert all(
        find_shifts(image.flip(1), moved_image) for image, moved_image in zip(pixels, result, strict=True)
    )
    for image, moved_image in zip(pixels, result, strict=True):
        own_pixels = set(map(tuple, image.view(-1, 3).tolist()))
        assert set(map(tuple, moved_image.view(-1, 3).tolist())) <= own_pixels


def test_cutout_is_decided_by_its_generator() -> None:
    first, repeated, other = (
        augmentation.apply_cutout(make_images(), 4, BLACK, make_generator(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first, repeated)
    assert not torch.equal(first, other)


def test_cutout_blanks_one_square_of_each_image() -> None:
    pixels = make_images(400, 24, 20) // 2 + 100
    result = augmentation.apply_cutout(pixels, 6, BLACK, make_generator())
    is_blank = (result == BLACK).all(dim=3)  # (B, H, W)
    assert torch.equal(result[~is_blank], pixels[~is_blank])
    heights, widths = is_blank.any(dim=2).sum(dim=1), is_blank.any(dim=1).sum(dim=1)
    assert torch.equal(is_blank.sum(dim=(1, 2)), heights * widths)  # a rectangle
    assert int(heights.max()) == int(widths.max()) == 6
    assert int(heights.min()) >= 3 and int(widths.min()) >= 3  # its centre is in the image
    assert len({tuple(map(tuple, mask.nonzero().tolist())) for mask in is_blank}) > 200
    assert (is_blank.float().mean(dim=0) > 0.01).all()  # no pixel is spared

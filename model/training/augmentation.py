"""Augmentation of whole batches as tensors: flip, shift and cutout."""

from __future__ import annotations

import torch
from torch import Tensor


def flip_and_shift(pixels: Tensor, flip: Tensor, shift: Tensor) -> Tensor:
    """Flip and shift a batch with one gather.

    `pixels`: uint8 (B, H, W, 3). `flip`: bool (B,). `shift`: int64 (B, 2), the number of pixels by which each
    image's window moves down and across. The border is filled by mirroring the image.
    """
    count, height, width, _ = pixels.shape
    down, across = shift.unsqueeze(2).unbind(1)  # (B, 1) each
    rows = _mirror_index(torch.arange(height) + down, height)  # (B, H)
    columns = _mirror_index(torch.arange(width) + across, width)  # (B, W)
    columns = torch.where(flip[:, None], width - 1 - columns, columns)  # (B, W)
    image_indices = torch.arange(count)
    return pixels[image_indices[:, None, None], rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)


def _mirror_index(index: Tensor, length: int) -> Tensor:
    index = index.abs()
    return (length - 1) - ((length - 1) - index).abs()


def apply_cutout(pixels: Tensor, side: int, colour: Tensor, generator: torch.Generator) -> Tensor:
    """Apply cutout (DeVries and Taylor, 2017) to `pixels`, uint8 (B, H, W, 3).

    A square of `side` pixels, with its centre anywhere in the image, becomes `colour`, uint8 (3,).
    """
    count, height, width, _ = pixels.shape
    down, across = (_sample_hole(length, count, side, generator) for length in (height, width))
    in_hole = (down[:, :, None] & across[:, None, :])[..., None]  # (B, H, W, 1)
    return torch.where(in_hole, colour, pixels)


def _sample_hole(length: int, count: int, side: int, generator: torch.Generator) -> Tensor:
    """Return the position of the square along one axis, bool (count, length)."""
    start = torch.randint(0, length, (count, 1), generator=generator) - side // 2
    position = torch.arange(length)
    return (position >= start) & (position < start + side)

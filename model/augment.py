"""Augmentation of whole batches, as tensors: mirror, shift, and a blank square."""

from __future__ import annotations

import torch
from torch import Tensor


def augment(
    pixels: Tensor, flip: Tensor, *, shift: int, hole: int, blank: Tensor, generator: torch.Generator
) -> Tensor:
    """Mirror, translate and blank a batch: one gather and one fill.

    `pixels`: uint8 (B, H, W, 3). `flip`: bool (B,). Each image moves by its own whole number of pixels
    in -shift … shift, down and across; what enters at the edge is the image mirrored. A square of `hole`
    pixels a side, anywhere with its centre in the image, becomes the colour `blank`, uint8 (3,).
    Random choices are drawn on the CPU; the result is on the device of `pixels`.
    """
    count, height, width, _ = pixels.shape
    down, across = torch.randint(-shift, shift + 1, (2, count, 1), generator=generator)
    rows = _mirror(torch.arange(height) + down, height)  # (B, H)
    columns = _mirror(torch.arange(width) + across, width)  # (B, W)
    columns = torch.where(flip[:, None], width - 1 - columns, columns)
    rows, columns = rows.to(pixels.device), columns.to(pixels.device)
    each = torch.arange(count, device=pixels.device)
    moved = pixels[each[:, None, None], rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    if hole:
        down, across = _hole(height, count, hole, generator), _hole(width, count, hole, generator)
        inside = (down[:, :, None] & across[:, None, :])[..., None].to(pixels.device)  # (B, H, W, 1)
        moved = torch.where(inside, blank.to(pixels.device), moved)
    return moved


def _mirror(index: Tensor, length: int) -> Tensor:
    index = index.abs()
    return (length - 1) - ((length - 1) - index).abs()


def _hole(length: int, count: int, side: int, generator: torch.Generator) -> Tensor:
    """Along one axis, where the hole is: bool (count, length)."""
    start = torch.randint(0, length, (count, 1), generator=generator) - side // 2
    position = torch.arange(length)
    return (position >= start) & (position < start + side)

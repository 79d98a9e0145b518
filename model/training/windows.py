"""Augmentation by windows: each training image is seen through a window of random size, place and shape.

A window smaller than the image is a random resized crop (Szegedy et al., 2015). A window larger than the
image shows it small and off centre, as objects are in photographs, and a piece of another image fills the
rest. Colours, blur and JPEG compression vary as cameras do.
"""

from __future__ import annotations

import io
import math
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

_CROP_AREA: Final = (0.35, 1.0)
"""Area of a crop, as a fraction of the image."""

_ASPECT: Final = math.log(4 / 3)
"""Largest logarithm of a window's width divided by its height, as in the training of Inception."""

_WIDE_SHARE: Final = 0.5
"""Fraction of the images of `wide` windows that is larger than the image."""

_WIDEST: Final = 4.0
"""Side of the widest window in sides of the image, so that the image fills a quarter of the side."""

_COARSEST_LEVEL: Final = 3
"""Number of halvings of an image before a wide window samples it."""


def make_windows(draws: Tensor, *, wide: bool) -> Tensor:
    """Return windows, float32 (B, 4), from uniform random numbers in 0 to 1, float32 (B, 5).

    A window is the centre across, the centre down, the width and the height, in sides of the image. Crops lie
    inside the image. With `wide`, half of the windows are larger, and the image lies inside those.
    """
    area, aspect, across, down, width = draws.unbind(1)  # (B,) each
    smallest, largest = _CROP_AREA
    side = (smallest + (largest - smallest) * area).sqrt()
    if wide:
        is_wide = width < _WIDE_SHARE
        side = torch.where(is_wide, _WIDEST ** (width / _WIDE_SHARE), side)  # uniform in the logarithm
    ratio = (_ASPECT * (2 * aspect - 1) / 2).exp()
    sides = torch.stack([side * ratio, side / ratio], dim=1)  # (B, 2)
    # a side that would cross the border of the image ends there: crops from within, wide windows from outside
    sides = torch.where(side[:, None] < 1, sides.clamp(max=1), sides.clamp(min=1))
    room = (1 - sides) / 2
    centres = 0.5 + room * (2 * torch.stack([across, down], dim=1) - 1)
    return torch.cat([centres, sides], dim=1)


def cut_windows(pixels: Tensor, windows: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return what the windows show, float32 (B, 3, side, side), 0 to 255, and where the images are.

    `pixels` are uint8 (B, H, W, 3) and `windows` float32 (B, 4). The places are a mask, bool (B, side, side);
    elsewhere the values repeat the image's border. Sampling is bilinear, from an image that was halved until
    a pixel of the result covers fewer than two of its pixels.
    """
    planes = pixels.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
    centres, sides = windows[:, :2], windows[:, 2:]
    scale = sides.amax(dim=1) * pixels.shape[1] / side  # pixels of the image in one of the result
    levels = scale.log2().floor().clamp(0, _COARSEST_LEVEL).long()  # (B,)
    transform = torch.zeros(len(pixels), 2, 3)
    transform[:, 0, 0], transform[:, 1, 1] = sides.unbind(1)
    transform[:, :, 2] = 2 * centres - 1
    grid = affine_grid(transform, [len(pixels), 3, side, side], align_corners=False)  # (B, side, side, 2)
    result = torch.empty(len(pixels), 3, side, side)
    for level in set(levels.tolist()):
        rows = torch.where(levels == level)[0]
        source = avg_pool2d(planes[rows], 1 << level) if level else planes[rows]
        result[rows] = grid_sample(source, grid[rows], padding_mode="border", align_corners=False)
    return result, (grid.abs() <= 1).all(dim=3)


def vary_colours(planes: Tensor, draws: Tensor) -> Tensor:
    """Return planes, float32 (B, 3, H, W), with other saturation, contrast and brightness.

    `draws` are uniform random numbers in 0 to 1, float32 (B, 3).
    """
    saturation, contrast, brightness = (2 * draws - 1)[:, :, None, None, None].unbind(1)  # (B, 1, 1, 1) each
    grey = planes.mean(dim=1, keepdim=True)
    planes = grey + (planes - grey) * (1 + 0.4 * saturation)
    mean = planes.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (planes - mean) * (1 + 0.3 * contrast) + 40 * brightness


def blur_some(planes: Tensor, draws: Tensor) -> Tensor:
    """Return planes, float32 (B, 3, H, W), a quarter of which is blurred over 3 x 3 pixels.

    `draws` are uniform random numbers in 0 to 1, float32 (B,).
    """
    rows = torch.where(draws < 0.25)[0]
    if len(rows):
        planes[rows] = avg_pool2d(planes[rows], 3, stride=1, padding=1, count_include_pad=False)
    return planes


def compress_some(pixels: Tensor, draws: Tensor) -> Tensor:
    """Return pixels, uint8 (B, H, W, 3), a quarter of which went through JPEG of quality 30 to 90.

    `draws` are uniform random numbers in 0 to 1, float32 (B,).
    """
    for row in torch.where(draws < 0.25)[0].tolist():
        buffer = io.BytesIO()
        quality = 30 + round(60 * float(draws[row]) / 0.25)
        Image.fromarray(pixels[row].numpy()).save(buffer, "JPEG", quality=quality)
        with Image.open(buffer) as image:
            pixels[row] = torch.from_numpy(np.array(image))
    return pixels


def to_pixels(planes: Tensor) -> Tensor:
    """Return planes, float32 (B, 3, H, W), rounded to uint8 (B, H, W, 3)."""
    return planes.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

"""The default backbone: a small residual CNN, the best of those that were measured for its milliseconds.

It descends from ResNet-9 of the DAWNBench entries (David Page, 2018, "How to train your ResNet"), with a
narrow stem as in airbench (Keller Jordan, 2024), where the map is largest, and a residual pair at each size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor, nn

WIDTHS: Final = (24, 64, 128, 256)
"""Channels of the stem and of the three stages."""


class ConvBlock(nn.Sequential):
    """3 x 3 convolution, batch normalisation, ReLU; `pool` halves height and width between the first two."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int = 1, pool: bool = False) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
            *([nn.MaxPool2d(2)] if pool else []),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
        )


class Residual(nn.Module):
    """Two blocks whose result is added to what came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvBlock(channels, channels)
        self.second = ConvBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.second(self.first(x))
        return result


class Cnn(nn.Sequential):
    """(B, 3, H, W) to maps (B, widths[-1], h, w).

    For inputs of 32 pixels the stages see 16, 8 and 4. From 64 pixels on the stem halves its input, from 128
    on twice, so that all behind it costs about the same.
    """

    def __init__(self, size: int, widths: Sequence[int] = ()) -> None:
        stem, *stages = widths or WIDTHS
        layers: list[nn.Module] = [ConvBlock(3, stem, stride=2 if size >= 64 else 1)]
        if size >= 128:
            layers.append(ConvBlock(stem, stem, stride=2))
        channels = stem
        for width in stages:
            layers += [ConvBlock(channels, width, pool=True), Residual(width)]
            channels = width
        super().__init__(*layers)
        self.channels = channels
        """Of the maps."""

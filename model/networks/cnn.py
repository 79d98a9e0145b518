"""The default backbone: the network of airbench94 (Keller Jordan, 2024, "94% on CIFAR-10 in 3.29 seconds"),
for inputs of any size, and with an average before the head, which makes its answers explainable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

WIDTHS: Final = (24, 64, 256, 256)
"""Channels of the stem and of the three stages."""

LARGE: Final = (24, 128, 384, 384)
"""Those of airbench95: two and a half times the work."""


class Whitening(nn.Conv2d):
    """Planes (B, 3, H, W) to their patches' principal components, each with its negative.

    `observe` makes the kernels, such that what comes out is white: uncorrelated, and of unit variance. They
    stay as they are; only the biases learn. Patches overlap by half.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__(3, channels, 2 * stride, stride=stride)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def observe(self, planes: Tensor) -> None:
        """Make the kernels from normalised training images, float32 (N, 3, H, W)."""
        patches = nn.functional.unfold(planes, self.kernel_size, stride=self.stride)  # (N, 3 k k, patches)
        patches = patches.transpose(1, 2).flatten(0, 1).double()
        variance, components = torch.linalg.eigh(patches.T @ patches / len(patches))  # the largest comes last
        kernels = (components / (variance + _LEAST_VARIANCE).sqrt()).T.flip(0)[: self.out_channels // 2]
        self.weight.copy_(torch.cat([kernels, -kernels]).view_as(self.weight))


_LEAST_VARIANCE: Final = 5e-4
"""Airbench's: what hardly varies is noise, and stays small."""


class Offset(nn.BatchNorm2d):
    """Batch normalisation that learns an offset and no scale: the next layer's weights can do that.

    The recipe gives the offsets a learning rate of their own.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight.requires_grad_(False)


class ConvBlock(nn.Sequential):
    """3 x 3 convolution, batch normalisation, GELU; `pool` halves height and width between the first two.

    At first the convolution hands on its input, in the first of its channels, as it is.
    """

    def __init__(self, channels_in: int, channels_out: int, *, stride: int = 1, pool: bool = False) -> None:
        convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        nn.init.dirac_(convolution.weight.data[:channels_in])
        super().__init__(convolution, *([nn.MaxPool2d(2)] if pool else []), Offset(channels_out), nn.GELU())


class Square(nn.Module):
    """Each value squared, so that the average of a map is led by where it is strong."""

    def forward(self, maps: Tensor) -> Tensor:
        """Of the same shape."""
        return maps.square()


class Cnn(nn.Sequential):
    """(B, 3, H, W) to maps (B, widths[-1], h, w).

    For inputs of 32 pixels the stages see 15, 7 and 3. From 64 pixels on the stem halves its input, from 128
    on twice, so that all behind it costs about the same.
    """

    def __init__(self, size: int, widths: Sequence[int]) -> None:
        stem, *stages = widths
        layers: list[nn.Module] = [Whitening(stem, stride=2 if size >= 64 else 1), nn.GELU()]
        if size >= 128:
            layers.append(ConvBlock(stem, stem, stride=2))
        channels = stem
        for width in stages:
            layers += [ConvBlock(channels, width, pool=True), ConvBlock(width, width)]
            channels = width
        super().__init__(*layers, Square())
        self.channels = channels
        """Of the maps."""

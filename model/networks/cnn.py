"""The default backbone, based on airbench94.

Source: Keller Jordan, 2024, "94% on CIFAR-10 in 3.29 seconds". Fovea's version takes inputs of any size.
Global average pooling before the head makes class activation maps exact, so predictions can be explained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

DEFAULT_WIDTHS: Final = (24, 64, 256, 256)
"""Channels of the stem and of the three stages."""

LARGE_WIDTHS: Final = (24, 128, 384, 384)
"""Channels of airbench95, which needs 2.5 times the computation."""


class Whitening(nn.Conv2d):
    """Patch whitening: (B, 3, H, W) to the principal components of the patches and their negatives.

    `fit_kernels` computes the kernels so that the outputs are white: uncorrelated, with unit variance. The
    kernels stay fixed; only the biases are trained. Patches overlap by half.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__(3, channels, 2 * stride, stride=stride)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def fit_kernels(self, planes: Tensor) -> None:
        """Compute the kernels from normalised training images, float32 (N, 3, H, W)."""
        patches = nn.functional.unfold(planes, self.kernel_size, stride=self.stride)  # (N, 3 k k, patches)
        patches = patches.transpose(1, 2).flatten(0, 1).double()  # (N patches, 3 k k)
        variance, components = torch.linalg.eigh(patches.T @ patches / len(patches))  # eigenvalues ascend
        kernels = (components / (variance + _VARIANCE_EPSILON).sqrt()).T.flip(0)[: self.out_channels // 2]
        self.weight.copy_(torch.cat([kernels, -kernels]).view_as(self.weight))


_VARIANCE_EPSILON: Final = 5e-4
"""Regularisation of the variance, from airbench.

Components with less variance are mostly noise and stay small.
"""


class OffsetBatchNorm(nn.BatchNorm2d):
    """Batch normalisation with a learned offset and no scale.

    The weights of the next layer can express the scale. The recipe gives the offsets their own learning rate.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight.requires_grad_(False)


class ConvBlock(nn.Sequential):
    """A 3 x 3 convolution, batch normalisation and GELU.

    `pool` halves height and width after the convolution. The convolution is initialised to the identity: its
    first output channels equal its input.
    """

    def __init__(self, channels_in: int, channels_out: int, *, stride: int = 1, pool: bool = False) -> None:
        convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        nn.init.dirac_(convolution.weight.data[:channels_in])
        super().__init__(
            convolution, *([nn.MaxPool2d(2)] if pool else []), OffsetBatchNorm(channels_out), nn.GELU()
        )


class Square(nn.Module):
    """An elementwise square; the average of a map is then dominated by its strong activations."""

    def forward(self, maps: Tensor) -> Tensor:
        """Return the squared maps, with unchanged shape."""
        return maps.square()


class Cnn(nn.Sequential):
    """A backbone from (B, 3, H, W) to feature maps (B, widths[-1], h, w).

    At 32 px input, the stages see sides of 15, 7 and 3. From 64 px the stem halves its input, from 128 px
    twice, so that the cost of the later layers stays about the same.
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
        """Number of channels of the feature maps."""

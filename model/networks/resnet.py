"""ResNet-18, -34 and -50 (He et al., 2016), with the stride on the 3 x 3 convolution ("v1.5").

The parameter names are torchvision's and timm's (`conv1.weight`, `layer1.0.bn2.bias`, …), so their published
weights load.
"""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor, nn

SMALL_SIDE: Final = 96
"""Input side, in pixels, below which the stem does not downsample.

Two halvings would leave feature maps of a few pixels. The kernel shapes are unchanged, so published weights
still fit.
"""

DEPTHS: Final = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
"""Number of blocks in each of the four stages."""


def initialize_weights(net: nn.Module) -> None:
    """Initialise all convolutions so that gradients keep their variance behind a ReLU (He et al., 2015)."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels // layer.groups * math.prod(layer.kernel_size)
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    expansion: Final = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _build_shortcut(channels_in, width, stride)
        nn.init.zeros_(self.bn2.weight)  # each block starts as its shortcut (Goyal et al., 2017)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        result: Tensor = self.relu(self.bn2(self.conv2(x)) + shortcut)
        return result


class Bottleneck(nn.Module):
    """A 1 x 1, a 3 x 3 and a 1 x 1 convolution, and a shortcut."""

    expansion: Final = 4

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _build_shortcut(channels_in, 4 * width, stride)
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        result: Tensor = self.relu(self.bn3(self.conv3(x)) + shortcut)
        return result


def _build_shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Module | None:
    if channels_in == channels_out and stride == 1:
        return None
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
    )


class ResNet(nn.Module):
    """A backbone from (B, 3, H, W) to feature maps (B, 512 or 2048, h, w).

    The maps have 1/32 of the input's side, or 1/8 for inputs below `SMALL_SIDE` px.
    """

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        block = Bottleneck if name == "resnet50" else BasicBlock
        stride = 1 if size < SMALL_SIDE else 2
        self.conv1 = nn.Conv2d(3, 64, 7, stride, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if size < SMALL_SIDE else nn.MaxPool2d(3, 2, padding=1)
        self.channels = 64
        """Number of channels of the feature maps."""
        stages = enumerate(DEPTHS[name])
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            self._build_stage(block, 64 << number, blocks, 2 if number else 1) for number, blocks in stages
        )
        initialize_weights(self)

    def _build_stage(
        self, block: type[BasicBlock] | type[Bottleneck], width: int, blocks: int, stride: int
    ) -> nn.Sequential:
        layers = []
        for number in range(blocks):
            layers.append(block(self.channels, width, 1 if number else stride))
            self.channels = width * block.expansion
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        result: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return result

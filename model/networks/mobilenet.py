"""MobileNetV2 (Sandler et al., 2018), with the parameter names of timm's `mobilenetv2_100`."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn

from fovea.model.networks.resnet import SMALL_SIDE, initialize_weights

STAGES: Final = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, blocks and stride of each stage, as in table 2 of the paper."""


class SeparableConv(nn.Module):
    """A depthwise and a pointwise convolution; the block of the first stage, which has no expansion."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv_dw = _build_depthwise(channels_in, 1)
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv_pw = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.bn2(self.conv_pw(self.act(self.bn1(self.conv_dw(x)))))
        return result


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection, with a shortcut if the shape is unchanged."""

    def __init__(self, channels_in: int, channels_out: int, expansion: int, stride: int) -> None:
        super().__init__()
        expanded_channels = channels_in * expansion
        self.conv_pw = nn.Conv2d(channels_in, expanded_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(expanded_channels)
        self.conv_dw = _build_depthwise(expanded_channels, stride)
        self.bn2 = nn.BatchNorm2d(expanded_channels)
        self.conv_pwl = nn.Conv2d(expanded_channels, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.act = nn.ReLU6(inplace=True)
        self.has_shortcut = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.bn1(self.conv_pw(x)))
        result = self.act(self.bn2(self.conv_dw(result)))
        result = self.bn3(self.conv_pwl(result))
        return x + result if self.has_shortcut else result


def _build_depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


class MobileNetV2(nn.Module):
    """A backbone from (B, 3, H, W) to feature maps (B, 1280, h, w).

    The maps have 1/32 of the input's side, or 1/8 for inputs below `SMALL_SIDE` px.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        stem_stride = 1 if size < SMALL_SIDE else 2
        self.conv_stem = nn.Conv2d(3, 32, 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.act = nn.ReLU6(inplace=True)
        channels, stages = 32, []
        for number, (expansion, width, blocks, stride) in enumerate(STAGES):
            layers: list[nn.Module] = []
            for index in range(blocks):
                step = 1 if index else stem_stride if number == 1 else stride
                layers.append(
                    SeparableConv(channels, width)
                    if expansion == 1
                    else InvertedResidual(channels, width, expansion, step)
                )
                channels = width
            stages.append(nn.Sequential(*layers))
        self.blocks = nn.Sequential(*stages)
        self.channels = 1280
        """Number of channels of the feature maps."""
        self.conv_head = nn.Conv2d(channels, self.channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(self.channels)
        initialize_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act(self.bn1(self.conv_stem(x))))
        result: Tensor = self.act(self.bn2(self.conv_head(x)))
        return result

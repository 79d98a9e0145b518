"""The network: a small residual CNN, from uint8 pixels to logits.

It is ResNet-9 of the DAWNBench entries (David Page, 2018, "How to train your ResNet") at half the
width, with one change: global average pooling before the linear head instead of max pooling, so that
the class activation map of a label is exactly its row of the head times the last feature maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from service.contract import Task


@dataclass(frozen=True)
class NetConfig:
    """What it takes to build the same network again."""

    task: Task
    labels: int
    widths: tuple[int, int, int, int] = (32, 64, 128, 256)
    """Channels of the stem and of the three stages."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Of the training pixels, per channel, of 1."""
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, equal to what JSON gives back of them."""
        values = asdict(self)
        return {**values, **{key: list(values[key]) for key in ("widths", "mean", "std")}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NetConfig:
        """The inverse of `to_dict`."""
        sequences = {key: tuple(values[key]) for key in ("widths", "mean", "std")}
        return cls(task=Task(values["task"]), labels=values["labels"], **sequences)


class Normalize(nn.Module):
    """uint8 (B, H, W, 3) in 0 … 255 to float32 (B, 3, H, W) of zero mean and unit deviation."""

    scale: Tensor
    offset: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        scale = 1 / (255 * torch.tensor(std))
        self.register_buffer("scale", scale.view(1, 3, 1, 1))
        self.register_buffer("offset", -255 * torch.tensor(mean).view(1, 3, 1, 1) * self.scale)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.permute(0, 3, 1, 2).float() * self.scale + self.offset


class ConvBlock(nn.Sequential):
    """3 x 3 convolution, batch normalisation, ReLU; height and width stay."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
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


class Net(nn.Module):
    """uint8 (B, H, W, 3) to float32 logits (B, labels); one logit for `binary`.

    Height and width are free, from 8 pixels up; for 32 x 32 the stages see 32, 16, 8 and 4.
    """

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        stem, first, second, third = config.widths
        self.normalize = Normalize(config.mean, config.std)
        self.features = nn.Sequential(
            ConvBlock(3, stem),
            ConvBlock(stem, first),
            nn.MaxPool2d(2),
            Residual(first),
            ConvBlock(first, second),
            nn.MaxPool2d(2),
            ConvBlock(second, third),
            nn.MaxPool2d(2),
            Residual(third),
        )
        self.head = nn.Linear(third, 1 if config.task is Task.BINARY else config.labels)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.features(self.normalize(pixels))  # (B, third, H / 8, W / 8)
        logits: Tensor = self.head(maps.mean(dim=(2, 3)))
        return logits


def probabilities(logits: Tensor, task: Task) -> Tensor:
    """Logits (B, n) to probabilities: (B, labels); for `binary` (B, 2) = [1 - p, p]."""
    if task is Task.MULTICLASS:
        return logits.softmax(dim=1)
    positive = logits.sigmoid()
    return torch.cat([1 - positive, positive], dim=1) if task is Task.BINARY else positive


def loss(logits: Tensor, targets: Tensor, task: Task, *, label_smoothing: float) -> Tensor:
    """Mean loss. `targets`: int64 (B,) of label indices; float32 (B, labels) for `multilabel`."""
    if task is Task.MULTICLASS:
        return nn.functional.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    wanted = targets.float().view_as(logits)
    smoothed = wanted * (1 - label_smoothing) + label_smoothing / 2
    return nn.functional.binary_cross_entropy_with_logits(logits, smoothed)

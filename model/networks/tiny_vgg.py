"""A small network for teaching, after VGG (Simonyan and Zisserman, 2015).

It has the layers that a first lesson is about, and no others: convolution, ReLU, max pooling, flatten, and
the linear layer of the head. No layer normalises, pads or is skipped, so each number on the web page follows
from the column before it.
"""

from __future__ import annotations

from typing import Final

from torch import nn

from fovea.model.networks.resnet import initialize_weights

CHANNELS: Final = 8
"""Number of maps of every layer: as many as the web page shows in one column."""


class TinyVgg(nn.Sequential):
    """A backbone from (B, 3, H, W) to the values of its last maps, (B, `channels`).

    Two blocks of two 3 x 3 convolutions end in a pool that halves the side. At 32 px input, the sides of the
    maps are 30, 28, 14, 12, 10 and 5.
    """

    def __init__(self, size: int) -> None:
        layers: list[nn.Module] = []
        channels, side = 3, size
        for _ in range(2):
            for _ in range(2):
                layers += [nn.Conv2d(channels, CHANNELS, 3), nn.ReLU()]
                channels = CHANNELS
            layers.append(nn.MaxPool2d(2))
            side = (side - 4) // 2  # each convolution without padding takes two pixels
        super().__init__(*layers, nn.Flatten())
        self.channels = CHANNELS * side * side
        """Number of values that the head reads."""
        initialize_weights(self)

"""What a network says of pixels, and how often it is right."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from model.data import Examples
from model.net import Net
from service.contract import Task

BATCH: Final = 500
"""Images at once; more does not go faster on a CPU and takes more memory."""


@torch.inference_mode()
def logits(net: Net, pixels: Tensor) -> Tensor:
    """Logits, float32 (N, n), for uint8 pixels (N, H, W, 3), in evaluation mode."""
    net.eval()
    return torch.cat([net(batch) for batch in torch.split(pixels, BATCH)])


def accuracy(net: Net, examples: Examples) -> float:
    """The fraction of `examples` whose most probable label is the true one."""
    said = logits(net, examples.pixels)
    if net.config.task is Task.BINARY:
        chosen = (said[:, 0] > 0).long()
    else:
        chosen = said.argmax(dim=1)
    return int((chosen == examples.targets).sum()) / len(examples)

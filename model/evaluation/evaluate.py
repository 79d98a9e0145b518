"""What a network says of pixels, and how often it is right."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fovea.model.data.dataset import Examples
from fovea.model.data.pixels import Pixels
from fovea.model.networks.network import Net
from fovea.model.recipe import Precision
from fovea.service.artifact.contract import Task

BATCH: Final = 500
"""Images at once; more does not go faster on a CPU and takes more memory."""


def device() -> torch.device:
    """Where networks run: on the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def placed(net: Net, where: torch.device) -> Net:
    """The network there, its weights laid out as convolutions read them the fastest."""
    return net.to(where).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]  # torch's stub


def autocast(where: torch.device, precision: Precision) -> torch.autocast:
    """Convolutions and products in `precision`."""
    return torch.autocast(where.type, torch.bfloat16, enabled=precision is Precision.BFLOAT16)


@torch.inference_mode()
def logits(net: Net, pixels: Pixels, precision: Precision = Precision.FLOAT32) -> Tensor:
    """Logits, float32 (N, n) on the CPU, for uint8 pixels (N, H, W, 3), in evaluation mode.

    `pixels` may be anything that gives such batches for indices, such as a memory map.
    """
    net.eval()
    where = net.head.weight.device
    parts = torch.split(torch.arange(len(pixels)), BATCH)
    with autocast(where, precision):
        return torch.cat([net(pixels[indices].to(where)).float().cpu() for indices in parts])


def accuracy(net: Net, examples: Examples, precision: Precision = Precision.FLOAT32) -> float:
    """The fraction of `examples` whose label is the true one; for `multilabel`, the share of right labels."""
    said = logits(net, examples.pixels, precision)
    return float(right(said, examples.targets, net.config.task)) / len(examples)


def right(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """How many images are right, float64 (); for `multilabel`, the sum of each one's share of labels."""
    if task is Task.MULTICLASS:
        return (logits.argmax(dim=1) == targets).sum().double()
    wanted = targets.view_as(logits) > 0.5
    return ((logits > 0) == wanted).double().mean(dim=1).sum()

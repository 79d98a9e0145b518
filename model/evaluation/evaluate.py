"""Inference and accuracy of a network."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fovea.model.data.dataset import Examples
from fovea.model.data.pixels import Pixels
from fovea.model.networks.network import Net
from fovea.model.recipe import Precision
from fovea.service.artifact.contract import Task

BATCH_SIZE: Final = 500
"""Images per batch; larger batches are not faster on a CPU and take more memory."""


def choose_device() -> torch.device:
    """Return the device for networks: the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_device(net: Net, device: torch.device) -> Net:
    """Move the network to the device, in channels-last layout, in which convolutions are fastest."""
    return net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]  # torch's stub


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return a context in which convolutions and matrix products use `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision is Precision.BFLOAT16)


@torch.inference_mode()
def compute_logits(net: Net, pixels: Pixels, precision: Precision = Precision.FLOAT32) -> Tensor:
    """Return logits, float32 (N, n) on the CPU, for uint8 pixels (N, H, W, 3), in evaluation mode.

    `pixels` may be any object that returns such batches for indices, such as a memory map.
    """
    net.eval()
    device = net.head.weight.device
    parts = torch.split(torch.arange(len(pixels)), BATCH_SIZE)
    with autocast(device, precision):
        return torch.cat([net(pixels[indices].to(device)).float().cpu() for indices in parts])


def measure_accuracy(net: Net, examples: Examples, precision: Precision = Precision.FLOAT32) -> float:
    """Return the fraction of correctly labelled examples; for `multilabel`, of correct labels."""
    logits = compute_logits(net, examples.pixels, precision)
    return float(count_correct(logits, examples.targets, net.config.task)) / len(examples)


def count_correct(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Return the number of correct images, float64 (); for `multilabel`, the sum of correct shares."""
    if task is Task.MULTICLASS:
        return (logits.argmax(dim=1) == targets).sum().double()  # (B, n) -> ()
    truth = targets.view_as(logits) > 0.5
    return ((logits > 0) == truth).double().mean(dim=1).sum()  # (B, labels) -> ()

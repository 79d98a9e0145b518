"""Training time: estimated from FLOPs, measured on the first steps and fitted to a time limit."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch.utils.flop_counter import FlopCounterMode

from fovea.model.data.dataset import Data
from fovea.model.evaluation import evaluate
from fovea.model.evaluation.evaluate import autocast
from fovea.model.networks.network import Net, loss
from fovea.model.recipe import Precision, Recipe
from fovea.model.training.batches import Views
from fovea.model.training.distillation import mean_logits

_USUAL_FLOPS: Final = 236e6
"""Floating-point operations of the network `cnn` for one image of 32 x 32 px."""

_USUAL_THREADS: Final = 2

_FLOAT32: Final = 1.7
"""Slowdown of float32 against bfloat16 on a processor with bfloat16 support."""

_BACKWARD: Final = 2.0
"""Time of a backward pass relative to a forward pass: each product has two in the backward pass."""

_LONG_STEP_FLOPS: Final = 2e12
"""Number of operations from which a step may take over ten seconds.

The time is then measured on a few images instead.
"""

_FEW: Final = 8
"""Number of images in such a measurement."""

_MEASURED: Final = 256
"""Maximum number of images for measuring the time of an evaluation."""

_FINISH_SECONDS: Final = 2.0
"""Time for calibration, checkpoints and the report, in seconds."""

_WHOLE_EPOCHS: Final = 10
"""Number of epochs from which whole epochs meet the time limit well enough."""


@dataclass(frozen=True)
class Pace:
    """The duration of the parts of a run, in seconds."""

    step: float
    evaluation: float
    """Time to evaluate one image, in seconds."""
    teaching: float = 0.0
    """Time of a teacher for one view of an image and its mirror image, in seconds."""


def flops_of(net: Net) -> int:
    """Return the floating-point operations of a forward pass for one image."""
    size = net.config.size
    probe = copy.deepcopy(net).cpu().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        probe(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    return int(counter.get_total_flops())


def cost_of(net: Net, precision: Precision) -> float:
    """Return the time for one image relative to the reference, `cnn` at 32 px on two cores with bfloat16.

    The cost depends only on the network, the number of threads and the precision. The same command therefore
    makes the same run on the same machine under any load. On a GPU the cost is always 1.
    """
    if torch.cuda.is_available():
        return 1.0
    slow = 1.0 if precision is Precision.BFLOAT16 else _FLOAT32
    return flops_of(net) / _USUAL_FLOPS * slow * _USUAL_THREADS / torch.get_num_threads()


def measured_evaluation(net: Net, data: Data, precision: Precision) -> float:
    """Measure the time to evaluate one image, in seconds."""
    sample = data.validation.take(torch.arange(min(len(data.validation), _MEASURED)))
    evaluate.logits(net, sample.take(torch.arange(1)).pixels, precision)  # warm-up: the first call is slower
    started = time.monotonic()
    evaluate.logits(net, sample.pixels, precision)
    return (time.monotonic() - started) / len(sample)


def measured_teaching(teachers: Sequence[Net], data: Data, recipe: Recipe) -> float:
    """Measure the teachers' time for one view of an image, in seconds."""
    if not teachers:
        return 0.0
    pixels = data.train.pixels[torch.arange(min(len(data.train), _FEW * 4))]
    mean_logits(teachers, pixels[:1], recipe)
    started = time.monotonic()
    mean_logits(teachers, pixels, recipe)
    return (time.monotonic() - started) / len(pixels)


def estimated_step(net: Net, data: Data, recipe: Recipe, device: torch.device) -> float | None:
    """Estimate the time of a slow step, in seconds, from a few images; None for a fast step or a GPU."""
    if recipe.batch * flops_of(net) * (1 + _BACKWARD) < _LONG_STEP_FLOPS or device.type != "cpu":
        return None
    probe = copy.deepcopy(net).train()
    few = min(_FEW, len(data.train))
    pixels, targets = data.train.pixels[torch.arange(few)], data.train.targets[:few]
    seconds = math.inf
    for _ in range(2):  # the first pass is a warm-up
        started = time.monotonic()
        with autocast(device, recipe.precision):
            logits = probe(pixels).float()
        loss(logits, targets, net.config.task, label_smoothing=0.0).backward()  # type: ignore[no-untyped-call]
        seconds = min(seconds, time.monotonic() - started)
    return seconds * recipe.batch / few


def fitted(recipe: Recipe, data: Data, pace: Pace, seconds: float, least: float = 0.0) -> Recipe:
    """Return the recipe with the epochs, or steps per epoch, that fill `seconds`.

    `seconds` include the rest of the run, but at least `least` seconds are left for the epochs. At least one
    step remains.
    """
    steps = max(1, len(data.train) // recipe.batch)
    evaluation = pace.evaluation * len(data.validation)
    images = len(data.validation) + len(data.conformal) + len(data.test)
    left = seconds - _FINISH_SECONDS - pace.evaluation * images
    if pace.teaching:
        epochs = max(1, round(left / (steps * pace.step + evaluation)))
        views = Views(data.train, replace(recipe, epochs=epochs)).count
        left -= pace.teaching * views * len(data.train)
    left = max(left, least)
    epochs_exact = left / (steps * pace.step + evaluation)
    if epochs_exact >= _WHOLE_EPOCHS:
        return replace(recipe, epochs=round(epochs_exact), epoch_steps=None)
    epochs = max(1, math.ceil(epochs_exact - 1e-9))
    epoch_steps = max(1, round((left / epochs - evaluation) / pace.step))
    return replace(recipe, epochs=epochs, epoch_steps=epoch_steps if epoch_steps < steps else None)


def duration(seconds: float) -> str:
    """Format a duration for people: `40 seconds`, `12 minutes`, `1 h 20 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"

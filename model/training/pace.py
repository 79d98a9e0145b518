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

from fovea.model.data.dataset import Dataset
from fovea.model.evaluation import evaluate
from fovea.model.evaluation.evaluate import autocast
from fovea.model.networks.network import Net, compute_loss
from fovea.model.recipe import Precision, Recipe
from fovea.model.training.batches import Views
from fovea.model.training.distillation import average_logits
from fovea.model.training.training_run import InitialState, TrainingRun

_REFERENCE_FLOPS: Final = 236e6
"""Floating-point operations of the network `cnn` for one image of 32 x 32 px."""

_REFERENCE_THREADS: Final = 2

_FLOAT32_SLOWDOWN: Final = 1.7
"""Slowdown of float32 against bfloat16 on a processor with bfloat16 support."""

_BACKWARD_COST: Final = 2.0
"""Time of a backward pass relative to a forward pass: each product has two in the backward pass."""

_LONG_STEP_FLOPS: Final = 2e12
"""Number of operations from which a step may take over ten seconds.

The time is then measured on a few images instead.
"""

_PROBE_IMAGES: Final = 8
"""Number of images in such a measurement."""

_MAX_EVALUATION_IMAGES: Final = 256
"""Maximum number of images for measuring the time of an evaluation."""

_FINISH_SECONDS: Final = 2.0
"""Time for calibration, checkpoints and the report, in seconds."""

_MIN_WHOLE_EPOCHS: Final = 10
"""Number of epochs from which whole epochs meet the time limit well enough."""


@dataclass(frozen=True)
class Pace:
    """The duration of the parts of a run, in seconds."""

    step_seconds: float
    evaluation_seconds: float
    """Time to evaluate one image, in seconds."""
    teaching_seconds: float = 0.0
    """Time of a teacher for one view of an image and its mirror image, in seconds."""


def count_flops(net: Net) -> int:
    """Return the floating-point operations of a forward pass for one image."""
    size = net.config.size
    probe = copy.deepcopy(net).cpu().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        probe(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    return int(counter.get_total_flops())


def estimate_cost(net: Net, precision: Precision) -> float:
    """Return the time for one image relative to the reference, `cnn` at 32 px on two cores with bfloat16.

    The cost depends only on the network, the number of threads and the precision. The same command therefore
    makes the same run on the same machine under any load. On a GPU the cost is always 1.
    """
    if torch.cuda.is_available():
        return 1.0
    slowdown = 1.0 if precision is Precision.BFLOAT16 else _FLOAT32_SLOWDOWN
    return count_flops(net) / _REFERENCE_FLOPS * slowdown * _REFERENCE_THREADS / torch.get_num_threads()


def measure_evaluation(net: Net, data: Dataset, precision: Precision) -> float:
    """Measure the time to evaluate one image, in seconds."""
    sample = data.validation.select(torch.arange(min(len(data.validation), _MAX_EVALUATION_IMAGES)))
    evaluate.compute_logits(
        net, sample.select(torch.arange(1)).pixels, precision
    )  # warm-up: the first call is slower
    started_at = time.monotonic()
    evaluate.compute_logits(net, sample.pixels, precision)
    return (time.monotonic() - started_at) / len(sample)


def measure_teaching(teachers: Sequence[Net], data: Dataset, recipe: Recipe) -> float:
    """Measure the teachers' time for one view of an image, in seconds."""
    if not teachers:
        return 0.0
    pixels = data.train.pixels[torch.arange(min(len(data.train), _PROBE_IMAGES * 4))]
    average_logits(teachers, pixels[:1], recipe)
    started_at = time.monotonic()
    average_logits(teachers, pixels, recipe)
    return (time.monotonic() - started_at) / len(pixels)


def estimate_step(net: Net, data: Dataset, recipe: Recipe, device: torch.device) -> float | None:
    """Estimate the time of a slow step, in seconds, from a few images; None for a fast step or a GPU."""
    if recipe.batch * count_flops(net) * (1 + _BACKWARD_COST) < _LONG_STEP_FLOPS or device.type != "cpu":
        return None
    probe = copy.deepcopy(net).train()
    image_count = min(_PROBE_IMAGES, len(data.train))
    pixels, targets = data.train.pixels[torch.arange(image_count)], data.train.targets[:image_count]
    seconds = math.inf
    for _ in range(2):  # the first pass is a warm-up
        started_at = time.monotonic()
        with autocast(device, recipe.precision):
            logits = probe(pixels).float()
        compute_loss(logits, targets, net.config.task, label_smoothing=0.0).backward()  # type: ignore[no-untyped-call]
        seconds = min(seconds, time.monotonic() - started_at)
    return seconds * recipe.batch / image_count


def measure_pace(data: Dataset, recipe: Recipe, initial_state: InitialState, seconds: float) -> Pace:
    """Measure the first steps of a run for about `seconds`.

    The steps train a copy of the network and use forked random generators, so that the run that follows has
    the same result as without the measurement.
    """
    with torch.random.fork_rng(), TrainingRun(data, recipe, _copy_state(initial_state)) as run:
        if (
            step_seconds := estimate_step(run.net, data, recipe, run.device)
        ) is None or step_seconds < seconds:
            run.step()  # warm-up
            started_at = _synchronized_time(run.device)
            steps = 0
            while steps < _MIN_PROBE_STEPS or _synchronized_time(run.device) - started_at < seconds:
                run.step()
                steps += 1
                if _synchronized_time(run.device) - started_at > _MAX_PROBE_SECONDS:
                    break
            step_seconds = (_synchronized_time(run.device) - started_at) / steps
        teachers = [evaluate.to_device(teacher, run.device) for teacher in initial_state.teachers]
        return Pace(
            step_seconds,
            measure_evaluation(run.net, data, recipe.precision),
            measure_teaching(teachers, data, recipe),
        )


def _synchronized_time(device: torch.device) -> float:
    """Return the monotonic time after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def _copy_state(initial_state: InitialState) -> InitialState:
    return replace(initial_state, net=copy.deepcopy(initial_state.net))


_MIN_PROBE_STEPS: Final = 3
"""Minimum number of measured steps, unless steps take very long."""
_MAX_PROBE_SECONDS: Final = 20.0
"""Time after which no further step is measured, in seconds."""


def fit_epochs(recipe: Recipe, data: Dataset, pace: Pace, seconds: float, min_seconds: float = 0.0) -> Recipe:
    """Return the recipe with the epochs, or steps per epoch, that fill `seconds`.

    `seconds` include the rest of the run, but at least `min_seconds` seconds are left for the epochs. At
    least one step remains.
    """
    steps = max(1, len(data.train) // recipe.batch)
    evaluation = pace.evaluation_seconds * len(data.validation)
    images = len(data.validation) + len(data.conformal) + len(data.test)
    remaining_seconds = seconds - _FINISH_SECONDS - pace.evaluation_seconds * images
    if pace.teaching_seconds:
        epochs = max(1, round(remaining_seconds / (steps * pace.step_seconds + evaluation)))
        views = Views(data.train, replace(recipe, epochs=epochs)).count
        remaining_seconds -= pace.teaching_seconds * views * len(data.train)
    remaining_seconds = max(remaining_seconds, min_seconds)
    epochs_exact = remaining_seconds / (steps * pace.step_seconds + evaluation)
    if epochs_exact >= _MIN_WHOLE_EPOCHS:
        return replace(recipe, epochs=round(epochs_exact), epoch_steps=None)
    epochs = max(1, math.ceil(epochs_exact - 1e-9))
    epoch_steps = max(1, round((remaining_seconds / epochs - evaluation) / pace.step_seconds))
    return replace(recipe, epochs=epochs, epoch_steps=epoch_steps if epoch_steps < steps else None)


def format_duration(seconds: float) -> str:
    """Format a duration for people: `40 seconds`, `12 minutes`, `1 h 20 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
